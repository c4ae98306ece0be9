//! What a pod may use on the host: its machine, what serving it costs, and what its containers ask of the host itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bulkhead_agent_protocol::weight_of_shares;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::{LinuxBlockIo, LinuxResources};

use crate::config::Size;
use crate::host::cgroup::Limits;
use crate::sizing::{Demand, USUAL_PERIOD};
use crate::spec::sandbox::Role;

/// What a pod's processes may use beside guest memory, in bytes: VMM, file server, and page cache of shared files.
const MEMORY_OVERHEAD: u64 = 128 << 20;

/// Processes and threads of a pod on the host.
const PIDS_MAX: u32 = 128;

/// What one container asks of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Volumes whose files are in the host's memory and that it may write to: the file system's number, and its size. They
    /// are written by the pod's file server, and so count as the pod's.
    tmpfs: BTreeMap<u64, u64>,
    /// CPUs and memory nodes of the host that it is to run on.
    cpus: Option<String>,
    mems: Option<String>,
    /// What else counts for all of the pod, because the container is a pod of its own.
    settings: Vec<(&'static str, String)>,
    /// Whether nothing of it ever runs: a sandbox.
    is_idle: bool,
}

/// The limits of a pod as they follow from its containers.
#[derive(Debug)]
pub(crate) struct PodLimits {
    size: Size,
    /// Whether the pod is a container of its own, whose limits are the pod's.
    is_lone: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The limit of the pod's containers together, bytes.
    memory: Option<u64>,
    claims: BTreeMap<String, Claim>,
    /// Files of the `cpuset` controller that have been written to.
    placed: BTreeSet<&'static str>,
}

impl Claim {
    /// Of a container that writes to files below these directories.
    pub(crate) fn new<'a>(
        written: impl IntoIterator<Item = &'a Path>,
        resources: Option<&LinuxResources>,
        role: &Role,
    ) -> Claim {
        let tmpfs = written.into_iter().filter_map(tmpfs).collect();
        let mut claim = Claim { tmpfs, is_idle: *role == Role::Sandbox, ..Claim::default() };
        if let Some(resources) = resources {
            claim.update(resources, *role == Role::Single);
        }
        claim
    }

    /// Takes over what an update names.
    fn update(&mut self, resources: &LinuxResources, is_lone: bool) {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(cpu) = resources.cpu() {
            self.cpus = filled(cpu.cpus()).or(self.cpus.take());
            self.mems = filled(cpu.mems()).or(self.mems.take());
        }
        if is_lone {
            for (file, value) in settings(resources) {
                // Limits of devices stand side by side.
                if file != "io.max" {
                    self.settings.retain(|(other, _)| *other != file);
                }
                self.settings.push((file, value));
            }
        } else if resources.block_io().as_ref().is_some_and(names_devices) {
            log::warn!(
                "limits of a container's block I/O name devices of the host: in a pod of several containers they have no effect"
            );
        }
    }
}

/// What a lone container's limits are for the pod's cgroup.
fn settings(resources: &LinuxResources) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if let Some(cpu) = resources.cpu() {
        let period = cpu.period().filter(|period| *period > 0).unwrap_or(USUAL_PERIOD);
        match cpu.quota() {
            Some(quota @ 1..) => settings.push(("cpu.max", format!("{quota} {period}"))),
            Some(..0) => settings.push(("cpu.max", format!("max {period}"))),
            Some(0) | None => {}
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            settings.push(("cpu.weight", weight_of_shares(shares).to_string()));
        }
    }
    if let Some(io) = resources.block_io() {
        // 10 to 1000 become 1 to 10000.
        if let Some(weight @ 10..=1000) = io.weight() {
            settings.push(("io.weight", (1 + (u32::from(weight) - 10) * 9999 / 990).to_string()));
        }
        let throttles = [
            ("rbps", io.throttle_read_bps_device()),
            ("wbps", io.throttle_write_bps_device()),
            ("riops", io.throttle_read_iops_device()),
            ("wiops", io.throttle_write_iops_device()),
        ];
        for (key, devices) in throttles {
            for device in devices.iter().flatten() {
                let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
                settings.push(("io.max", format!("{}:{} {key}={rate}", device.major(), device.minor())));
            }
        }
    }
    settings
}

fn names_devices(io: &LinuxBlockIo) -> bool {
    let lists = [
        io.throttle_read_bps_device(),
        io.throttle_write_bps_device(),
        io.throttle_read_iops_device(),
        io.throttle_write_iops_device(),
    ];
    lists.iter().any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
}

/// The file system of a directory, if it is in memory: its number and size.
fn tmpfs(directory: &Path) -> Option<(u64, u64)> {
    let stat = statfs(directory).ok().filter(|stat| stat.filesystem_type() == TMPFS_MAGIC)?;
    let block = u64::try_from(stat.block_size()).unwrap_or(0);
    Some((fs::metadata(directory).ok()?.dev(), stat.blocks().saturating_mul(block)))
}

impl PodLimits {
    /// Of a pod without containers, of this size, whose own limits are `demand`; `is_lone` if it is a container of its own.
    pub(crate) fn new(size: Size, demand: &Demand, is_lone: bool) -> PodLimits {
        PodLimits { size, is_lone, state: Mutex::new(State { memory: demand.memory, ..State::default() }) }
    }

    /// The size of the pod's machine.
    pub(crate) fn size(&self) -> Size {
        self.size
    }

    /// Counts a container in.
    pub(crate) fn add(&self, id: &str, claim: Claim) {
        self.lock().claims.insert(id.to_owned(), claim);
    }

    /// Counts a container out.
    pub(crate) fn remove(&self, id: &str) {
        self.lock().claims.remove(id);
    }

    /// Changes what a container asks for.
    pub(crate) fn update(&self, id: &str, resources: &LinuxResources) {
        let mut state = self.lock();
        state.claims.entry(id.to_owned()).or_default().update(resources, self.is_lone);
        let limit = resources.memory().as_ref().and_then(|memory| memory.limit());
        if self.is_lone && limit.is_some_and(|limit| limit != 0) {
            state.memory = Demand::of_resources(resources).memory;
        }
    }

    /// What follows for the pod's cgroup.
    pub(crate) fn limits(&self) -> Limits {
        let mut state = self.lock();
        let mut tmpfs = BTreeMap::new();
        state.claims.values().for_each(|claim| tmpfs.extend(&claim.tmpfs));
        let shared = tmpfs.values().fold(0, |sum: u64, size| sum.saturating_add(*size));
        // What is written there counts as the container's where there is no machine around it, and so within its limit.
        let shared = state.memory.map_or(shared, |limit| shared.min(limit));
        let own = (u64::from(self.size.memory_mib) << 20) + MEMORY_OVERHEAD;
        let mut settings: Vec<_> =
            state.claims.values().flat_map(|claim| claim.settings.iter().cloned()).collect();
        let cpus = union(state.claims.values(), |claim| claim.cpus.as_deref());
        let mems = union(state.claims.values(), |claim| claim.mems.as_deref());
        for (file, list) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
            match list {
                Some(list) => {
                    state.placed.insert(file);
                    settings.push((file, list));
                }
                // An empty line undoes it.
                None if state.placed.remove(file) => settings.push((file, "\n".to_owned())),
                None => {}
            }
        }
        Limits { memory_max: own.saturating_add(shared), pids_max: PIDS_MAX, settings }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The CPUs, or memory nodes, of the containers of a pod together: all of the host's if any container may have all.
fn union<'a>(
    claims: impl Iterator<Item = &'a Claim>,
    list: impl Fn(&'a Claim) -> Option<&'a str>,
) -> Option<String> {
    let lists = claims.filter(|claim| !claim.is_idle).map(list).collect::<Option<Vec<_>>>()?;
    (!lists.is_empty()).then(|| lists.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size { vcpus: 1, memory_mib: 256 };
    const OWN: u64 = (256 + 128) << 20;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    fn limited(memory: u64) -> PodLimits {
        PodLimits::new(SIZE, &Demand { memory: Some(memory), ..Demand::default() }, true)
    }

    fn with_tmpfs(list: &[(u64, u64)]) -> Claim {
        Claim { tmpfs: list.iter().copied().collect(), ..Claim::default() }
    }

    #[test]
    fn files_in_the_hosts_memory_come_on_top_once_and_within_the_limit() {
        let limits = PodLimits::new(SIZE, &Demand::default(), true);
        assert_eq!(limits.limits().memory_max, OWN);
        limits.add("a", with_tmpfs(&[(1, 1000), (2, 500)]));
        limits.add("b", with_tmpfs(&[(1, 1000)]));
        assert_eq!(limits.limits().memory_max, OWN + 1500);
        limits.remove("a");
        assert_eq!(limits.limits().memory_max, OWN + 1000);
        let limits = limited(700);
        limits.add("a", with_tmpfs(&[(1, u64::MAX), (2, u64::MAX)]));
        assert_eq!(limits.limits().memory_max, OWN + 700);
        limits.update("a", &resources(r#"{"memory": {"limit": 900}}"#));
        assert_eq!(limits.limits().memory_max, OWN + 900);
        limits.update("a", &resources(r#"{"memory": {"limit": -1}}"#));
        assert_eq!(limits.limits().memory_max, u64::MAX);
    }

    #[test]
    fn a_directory_in_memory_is_known_by_its_file_system() {
        let claim = Claim::new([Path::new("/proc"), Path::new("/nonexistent")], None, &Role::Single);
        assert_eq!(claim, Claim::default());
        if let Some((device, size)) = tmpfs(Path::new("/dev/shm")) {
            assert_eq!(device, fs::metadata("/dev/shm").unwrap().dev());
            assert!(size > 0);
        }
    }

    #[test]
    fn a_lone_containers_limits_are_the_pods() {
        let limits = PodLimits::new(SIZE, &Demand::default(), true);
        let json = r#"{"cpu": {"quota": 50000, "shares": 1024, "cpus": "0-1"},
            "blockIO": {"weight": 1000, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 9}],
                        "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 7}]}}"#;
        limits.add("a", Claim::new([], Some(&resources(json)), &Role::Single));
        let expected = [
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "100"),
            ("io.weight", "10000"),
            ("io.max", "8:0 rbps=9"),
            ("io.max", "8:0 wiops=7"),
            ("cpuset.cpus", "0-1"),
        ];
        let settings = || limits.limits().settings;
        assert_eq!(settings(), expected.map(|(file, value)| (file, value.to_owned())));
        limits.update("a", &resources(r#"{"cpu": {"quota": -1, "period": 50000, "cpus": "2"}}"#));
        assert!(settings().contains(&("cpu.max", "max 50000".to_owned())));
        assert!(settings().contains(&("cpuset.cpus", "2".to_owned())));
        assert_eq!(settings().len(), expected.len());
    }

    #[test]
    fn a_pod_runs_where_any_of_its_containers_may() {
        let limits = PodLimits::new(SIZE, &Demand::default(), false);
        let member = Role::Member("pod".to_owned());
        let cpus = |json: &str| Claim::new([], Some(&resources(json)), &member);
        limits.add("pod", Claim::new([], None, &Role::Sandbox));
        assert_eq!(limits.limits().settings, []);
        limits.add("a", cpus(r#"{"cpu": {"cpus": "0-1", "quota": 5000, "shares": 2}}"#));
        limits.add("b", cpus(r#"{"cpu": {"cpus": "3"}}"#));
        assert_eq!(limits.limits().settings, [("cpuset.cpus", "0-1,3".to_owned())]);
        limits.add("c", cpus("{}"));
        assert_eq!(limits.limits().settings, [("cpuset.cpus", "\n".to_owned())]);
        assert_eq!(limits.limits().settings, []);
        limits.remove("c");
        assert_eq!(limits.limits().settings, [("cpuset.cpus", "0-1,3".to_owned())]);
    }
}
