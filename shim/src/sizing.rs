//! How large a pod's virtual machine is: its limits, rounded up to one of few sizes.
//!
//! Each size that pods have needs a template of its own, so there are few: twice the memory each, and twice the vCPUs. A
//! machine has more memory than its containers may use ([`own_use`]), so that a container that is limited to some amount
//! can really use it. What is not used costs the host nothing.

use std::collections::HashMap;

use bulkhead_vmm_protocol::MAX_VCPUS;
use oci_spec::runtime::{LinuxResources, Spec};

use crate::config::{Maxima, Size};
use crate::error::{Classify, Code};
use crate::spec::sandbox::Role;

/// Annotations of containerd's CRI plugin on a sandbox: what the kubelet says of the pod's containers together.
const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CRI_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CRI_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CRI_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// The smallest class: what its containers may use, MiB.
const SMALLEST_MIB: u64 = 256;

/// CPU time is divided in periods of so many microseconds unless something else is said.
pub(crate) const USUAL_PERIOD: u64 = 100_000;

/// CPU shares that the kubelet gives for one requested CPU.
const SHARES_PER_CPU: u64 = 1024;

/// Limits from here on mean none: cgroup version 1's "unlimited" and what others write for it.
const NO_LIMIT: u64 = 1 << 62;

/// What the limits of a pod ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Bytes that its containers may use together; `None` without a limit.
    pub memory: Option<u64>,
    /// CPUs that it may use, rounded up; `None` without a limit.
    pub cpus: Option<u64>,
    /// CPUs that were promised to it, rounded up: what it gets at least if it has no limit.
    pub requested_cpus: Option<u64>,
}

/// Limits that no machine can be made for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// More memory than the operator allows.
    #[error(
        "the pod's memory limit is {} MiB: with max_memory at {most_mib} MiB no pod can have more than {} MiB",
        .asked.div_ceil(1 << 20), room(*most_mib) >> 20
    )]
    Memory {
        /// Bytes.
        asked: u64,
        /// The maximum, MiB.
        most_mib: u32,
    },
    /// More CPUs than the operator allows.
    #[error("the pod's CPU limit is {asked} CPUs: max_vcpus allows {most}")]
    Vcpus {
        /// How many.
        asked: u64,
        /// The maximum.
        most: u8,
    },
    /// An annotation that containerd would not write.
    #[error("the annotation {key} is {value:?}, which is not a number")]
    Annotation {
        /// Which.
        key: &'static str,
        /// What it says.
        value: String,
    },
}

impl Classify for SizeError {
    fn code(&self) -> Code {
        match self {
            SizeError::Annotation { .. } => Code::INVALID_ARGUMENT,
            _ => Code::FAILED_PRECONDITION,
        }
    }
}

impl Demand {
    /// Of the pod that is made for a container.
    pub fn of(spec: &Spec, role: &Role) -> Result<Demand, SizeError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        match role {
            // A sandbox's own limits are those of a process that does nothing.
            Role::Sandbox => spec.annotations().as_ref().map_or(Ok(Demand::default()), Demand::of_sandbox),
            Role::Single | Role::Member(_) => Ok(resources.map(Demand::of_resources).unwrap_or_default()),
        }
    }

    /// Of a Kubernetes pod, by the annotations of its sandbox.
    pub fn of_sandbox(annotations: &HashMap<String, String>) -> Result<Demand, SizeError> {
        let number = |key| match annotations.get(key) {
            None => Ok(0),
            Some(text) => text
                .parse::<i64>()
                .map_err(|_| SizeError::Annotation { key, value: text.chars().take(64).collect() }),
        };
        Ok(Demand::of_numbers(
            number(CRI_MEMORY)?,
            number(CRI_QUOTA)?,
            number(CRI_PERIOD)?,
            number(CRI_SHARES)?,
        ))
    }

    /// Of the CRI's numbers for a pod's containers together (`LinuxContainerResources`), in which nothing is 0.
    pub(crate) fn of_numbers(memory_limit: i64, cpu_quota: i64, cpu_period: i64, cpu_shares: i64) -> Demand {
        let shares = u64::try_from(cpu_shares).unwrap_or(0);
        Demand {
            memory: limit(memory_limit),
            cpus: cpus(cpu_quota, u64::try_from(cpu_period).unwrap_or(0)),
            requested_cpus: Some(shares.div_ceil(SHARES_PER_CPU)).filter(|cpus| *cpus > 0),
        }
    }

    /// Of a container that is a pod by itself.
    pub fn of_resources(resources: &LinuxResources) -> Demand {
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
        let cpu = resources.cpu().as_ref();
        let quota = cpu.and_then(|cpu| cpu.quota()).unwrap_or(0);
        let period = cpu.and_then(|cpu| cpu.period()).unwrap_or(0);
        Demand { memory: memory.and_then(limit), cpus: cpus(quota, period), requested_cpus: None }
    }

    /// What it asks for beyond a machine of this size, in words that name both numbers.
    pub(crate) fn beyond(&self, size: Size) -> Option<String> {
        let mut words = Vec::new();
        if let Some(memory) = self.memory.filter(|memory| *memory > room(size.memory_mib)) {
            words.push(format!(
                "a memory limit of {} MiB, and the pod's virtual machine has {} MiB for its containers",
                memory.div_ceil(1 << 20),
                room(size.memory_mib) >> 20
            ));
        }
        if let Some(cpus) = self.cpus.filter(|cpus| *cpus > u64::from(size.vcpus)) {
            words.push(format!(
                "a CPU limit of {cpus} CPUs, and the pod's virtual machine has {}",
                size.vcpus
            ));
        }
        (!words.is_empty()).then(|| words.join("; "))
    }
}

fn limit(bytes: i64) -> Option<u64> {
    u64::try_from(bytes).ok().filter(|bytes| (1..NO_LIMIT).contains(bytes))
}

fn cpus(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    let period = if period == 0 { USUAL_PERIOD } else { period };
    Some(quota.div_ceil(period))
}

/// MiB of a machine's memory that its containers can't use, for so much that they can: the kernel and its account of each
/// page, and the agent.
fn own_use(room_mib: u64) -> u64 {
    64 + room_mib / 32
}

/// Bytes of a machine's memory that its containers can use.
pub(crate) fn room(memory_mib: u32) -> u64 {
    // The largest room that the machine holds together with what is not for containers.
    let rest = u64::from(memory_mib).saturating_sub(64);
    (rest - rest / 33) << 20
}

/// The size for a pod that asks for `demand`: `default` or larger, and within `maxima`. Where the operator names no maximum it
/// is what the host has, and a pod that asks for more gets that, as it would without a machine of its own.
pub(crate) fn choose(demand: &Demand, default: Size, maxima: Maxima) -> Result<Size, SizeError> {
    choose_on(demand, default, maxima, host())
}

fn choose_on(demand: &Demand, default: Size, maxima: Maxima, host: Size) -> Result<Size, SizeError> {
    let mut size = default;
    if let Some(memory) = demand.memory.filter(|memory| *memory > room(default.memory_mib)) {
        let most = maxima.memory_mib.unwrap_or(host.memory_mib);
        size.memory_mib = if memory <= room(most) {
            memory_class(memory).min(most)
        } else if maxima.memory_mib.is_some() {
            return Err(SizeError::Memory { asked: memory, most_mib: most });
        } else {
            log::warn!(
                "the pod's memory limit is {} MiB, and this host has {most} MiB: the pod's virtual machine gets no more",
                memory.div_ceil(1 << 20)
            );
            most.max(default.memory_mib)
        };
    }
    let wanted = match (demand.cpus, demand.requested_cpus) {
        (Some(limit), _) => limit,
        (None, Some(requested)) => requested.max(u64::from(default.vcpus)),
        (None, None) => return Ok(size),
    };
    let most = maxima.vcpus.unwrap_or(host.vcpus.clamp(1, MAX_VCPUS));
    size.vcpus = match u8::try_from(wanted).ok().filter(|wanted| *wanted <= most) {
        Some(wanted) => wanted.max(1).next_power_of_two().min(most),
        None if maxima.vcpus.is_some() && demand.cpus.is_some() => {
            return Err(SizeError::Vcpus { asked: wanted, most });
        }
        None => {
            log::warn!("the pod asks for {wanted} CPUs: it gets {most}");
            most
        }
    };
    Ok(size)
}

/// The memory of the smallest class with room for so many bytes, MiB.
fn memory_class(bytes: u64) -> u32 {
    let room = bytes.div_ceil(1 << 20).max(SMALLEST_MIB).checked_next_power_of_two().unwrap_or(u64::MAX / 2);
    u32::try_from(room.saturating_add(own_use(room))).unwrap_or(u32::MAX)
}

/// What the host has.
fn host() -> Size {
    // SAFETY: sysconf has no memory arguments.
    let value = |name| u64::try_from(unsafe { libc::sysconf(name) }).unwrap_or(0);
    let bytes = value(libc::_SC_PHYS_PAGES).saturating_mul(value(libc::_SC_PAGESIZE));
    Size {
        vcpus: u8::try_from(value(libc::_SC_NPROCESSORS_ONLN)).unwrap_or(u8::MAX),
        memory_mib: u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Size = Size { vcpus: 1, memory_mib: 256 };
    const HOST: Size = Size { vcpus: 12, memory_mib: 32_768 };
    const MIB: u64 = 1 << 20;

    fn size(demand: Demand, maxima: Maxima) -> Result<(u8, u32), SizeError> {
        choose_on(&demand, DEFAULT, maxima, HOST).map(|size| (size.vcpus, size.memory_mib))
    }

    fn memory(mib: u64) -> Demand {
        Demand { memory: Some(mib * MIB), ..Demand::default() }
    }

    fn cpus(cpus: u64) -> Demand {
        Demand { cpus: Some(cpus), ..Demand::default() }
    }

    #[test]
    fn limits_are_rounded_up_to_few_sizes_with_room_for_the_guest_itself() {
        let free = Maxima::default();
        assert_eq!(size(Demand::default(), free), Ok((1, 256)));
        for (limit, machine) in
            [(1, 256), (187, 256), (188, 328), (256, 328), (257, 592), (512, 592), (1024, 1120), (1025, 2176)]
        {
            assert_eq!(size(memory(limit), free), Ok((1, machine)), "{limit}");
        }
        for (limit, vcpus) in [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (12, 12)] {
            assert_eq!(size(cpus(limit), free), Ok((vcpus, 256)), "{limit}");
        }
    }

    #[test]
    fn every_class_has_the_room_that_it_is_named_by() {
        for power in 8..22 {
            let limit = 1 << power;
            let machine = memory_class(limit * MIB);
            assert!(room(machine) >= limit * MIB, "{limit} MiB in {machine}");
            assert!(room(machine - 2) < limit * MIB, "{limit} MiB in {machine}");
        }
        assert_eq!(room(0), 0);
        assert_eq!(memory_class(u64::MAX >> 2), u32::MAX);
    }

    #[test]
    fn what_the_operator_forbids_is_an_error_with_both_numbers() {
        let maxima = Maxima { vcpus: Some(3), memory_mib: Some(1000) };
        assert_eq!(size(memory(600), maxima), Ok((1, 1000)));
        assert_eq!(size(cpus(3), maxima), Ok((3, 256)));
        let error = size(memory(1024), maxima).unwrap_err().to_string();
        assert!(error.contains("1024 MiB") && error.contains("1000 MiB"), "{error}");
        let error = size(cpus(4), maxima).unwrap_err().to_string();
        assert!(error.contains("4 CPUs") && error.contains("allows 3"), "{error}");
        // Nobody was promised more than a share.
        let requested = Demand { requested_cpus: Some(4), ..Demand::default() };
        assert_eq!(size(requested, maxima), Ok((3, 256)));
    }

    #[test]
    fn what_the_host_does_not_have_is_cut() {
        assert_eq!(size(memory(1 << 20), Maxima::default()), Ok((1, 32_768)));
        assert_eq!(size(cpus(1000), Maxima::default()), Ok((12, 256)));
    }

    #[test]
    fn a_pods_limits_are_read_from_the_kubelets_numbers() {
        let annotations = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect::<HashMap<_, _>>()
        };
        let all = annotations(&[
            (CRI_MEMORY, "1073741824"),
            (CRI_QUOTA, "250000"),
            (CRI_PERIOD, "100000"),
            (CRI_SHARES, "1025"),
        ]);
        let demand = Demand::of_sandbox(&all).unwrap();
        assert_eq!(demand, Demand { memory: Some(1 << 30), cpus: Some(3), requested_cpus: Some(2) });
        let none =
            annotations(&[(CRI_MEMORY, "0"), (CRI_QUOTA, "0"), (CRI_PERIOD, "100000"), (CRI_SHARES, "2")]);
        assert_eq!(
            Demand::of_sandbox(&none).unwrap(),
            Demand { requested_cpus: Some(1), ..Demand::default() }
        );
        let error = Demand::of_sandbox(&annotations(&[(CRI_MEMORY, "1Gi")])).unwrap_err().to_string();
        assert!(error.contains(CRI_MEMORY) && error.contains("1Gi"), "{error}");
    }

    #[test]
    fn a_lone_containers_limits_are_its_own() {
        let demand = |json: &str| Demand::of_resources(&serde_json::from_str(json).unwrap());
        assert_eq!(
            demand(r#"{"memory": {"limit": 1000}, "cpu": {"quota": 150000, "shares": 9000}}"#),
            Demand { memory: Some(1000), cpus: Some(2), requested_cpus: None }
        );
        for unlimited in [
            "{}",
            r#"{"memory": {"limit": -1}, "cpu": {"quota": -1}}"#,
            r#"{"memory": {"limit": 9223372036854771712}}"#,
        ] {
            assert_eq!(demand(unlimited), Demand::default(), "{unlimited}");
        }
    }

    #[test]
    fn what_a_machine_cannot_give_is_said_with_both_numbers() {
        let size = Size { vcpus: 2, memory_mib: 328 };
        assert_eq!(memory(256).beyond(size), None);
        let words = Demand { cpus: Some(3), ..memory(300) }.beyond(size).unwrap();
        assert!(words.contains("300 MiB") && words.contains("256 MiB"), "{words}");
        assert!(words.contains("3 CPUs") && words.contains("has 2"), "{words}");
    }
}
