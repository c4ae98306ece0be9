//! Is there a KVM that a guest kernel can run on?

use std::ffi::CString;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_vmm::calibrate::{self, Speed};
use bulkhead_vmm::vm::NEEDED_CAPABILITIES;
use kvm_ioctls::Kvm;

use super::Finding;
use super::processor::{Extension, Processor};

/// The only version there has been since Linux 2.6.22; KVM's documentation asks to refuse any other.
const API_VERSION: i32 = 12;

/// How long the calibration guest may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Machines that are created to see how long it takes.
const CREATIONS: u32 = 3;

/// A machine that takes longer to be created than this has waited for something; a few tenths of a millisecond are usual.
const SLOW_CREATION: Duration = Duration::from_millis(3);

/// The part of the host's speed below which guest kernel code is taken for interpreted: a CPU that executes it is about as fast as the host.
const SLOW: f64 = 1.0 / 20.0;

/// The kind of KVM a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The processor executes guests.
    Hardware,
    /// The same, by leave of another hypervisor.
    Nested,
    /// A program does what a guest's kernel says.
    Software,
    /// None that can be used.
    None,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Hardware => "hardware",
            Kind::Nested => "nested",
            Kind::Software => "software",
            Kind::None => "none",
        })
    }
}

/// What the kind of KVM is told by.
#[derive(Debug)]
pub(crate) struct Evidence {
    /// Or why there is no KVM.
    speed: Result<Speed, String>,
    processor: Processor,
}

impl Evidence {
    /// The kind of KVM.
    pub(crate) fn kind(&self) -> Kind {
        match (&self.speed, self.processor.extension, &self.processor.hypervisor) {
            (Err(_), ..) => Kind::None,
            (Ok(speed), ..) if speed.ratio() < SLOW => Kind::Software,
            (_, Extension::Absent, _) => Kind::Software,
            (_, _, Some(_)) => Kind::Nested,
            (_, _, None) => Kind::Hardware,
        }
    }

    /// Why there is no KVM.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.speed.as_ref().err().map(String::as_str)
    }

    fn finding(&self) -> Finding {
        const WHAT: &str = "kind of KVM";
        let kind = self.kind();
        let speed = match &self.speed {
            Ok(speed) => speed,
            Err(reason) => return Finding::fail(WHAT, reason),
        };
        let evidence = format!("{kind}: {}, {}", spoken(speed), self.processor_says());
        if kind == Kind::Software {
            return Finding::fail(WHAT, evidence).because("a guest kernel cannot boot on it").mended_by(
                "use a machine with VT-x or AMD-V; in a virtual machine, have nested virtualization switched on",
            );
        }
        Finding::ok(WHAT, evidence)
    }

    fn processor_says(&self) -> String {
        let extension = match self.processor.extension {
            Extension::Present(name, flag) => format!("{name} ({flag} in /proc/cpuinfo)"),
            Extension::Absent => "neither vmx nor svm in /proc/cpuinfo".to_owned(),
            Extension::Unknown => "/proc/cpuinfo has no flags".to_owned(),
        };
        let module = match self.processor.modules.as_slice() {
            [] => "no module that is known".to_owned(),
            modules => modules.join(" and "),
        };
        match &self.processor.hypervisor {
            Some(hypervisor) => format!("{extension}, {module}, in a virtual machine of {hypervisor}"),
            None => format!("{extension}, {module}, no hypervisor below"),
        }
    }
}

fn spoken(speed: &Speed) -> String {
    let part = speed.ratio() * 100.0;
    let digits = if part < 1.0 { 2 } else { 0 };
    format!(
        "guest kernel code is {part:.digits$} % as fast as the host's, {} instructions a second",
        human(speed.guest)
    )
}

/// Finds out what kind of KVM is behind `device`; takes a tenth of a second on a software KVM, [`TIME_LIMIT`] at most.
pub(crate) fn look(device: &Path) -> Evidence {
    let (sender, receiver) = mpsc::channel();
    let device = device.to_owned();
    // On a thread of its own, since a KVM that is broken enough never comes back from the guest; it ends with the process.
    let spawned = thread::Builder::new().spawn(move || {
        // Nobody listens any more when the time was over.
        let _ = sender.send(calibrate::measure(&device).map_err(|error| bulkhead_base::chain(&error)));
    });
    let speed = match spawned {
        Ok(_) => receiver.recv_timeout(TIME_LIMIT).unwrap_or_else(|_| {
            Err(format!("the calibration guest did not halt within {} s", TIME_LIMIT.as_secs()))
        }),
        Err(error) => Err(format!("cannot start a thread for the calibration guest: {error}")),
    };
    Evidence { speed, processor: Processor::here(Path::new("/")) }
}

/// The findings about the KVM device; those after a failure that explains them are left out.
pub(crate) fn check(device: &Path) -> Vec<Finding> {
    const WHAT: &str = "KVM device";
    let kvm = match open(device) {
        Ok(kvm) => kvm,
        Err(error) => return vec![Finding::fail(WHAT, explain(device, &error))],
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return vec![Finding::fail(
            WHAT,
            format!(
                "{} answers API version {version} where KVM answers {API_VERSION}: not KVM",
                device.display()
            ),
        )];
    }
    let findings =
        vec![Finding::ok(WHAT, format!("{}, API version {version}", device.display())), capabilities(&kvm)];
    let creation = creation(&kvm);
    drop(kvm);
    findings.into_iter().chain([creation]).chain([look(device).finding()]).collect()
}

fn open(device: &Path) -> io::Result<Kvm> {
    let path = CString::new(device.as_os_str().as_encoded_bytes())?;
    Ok(Kvm::new_with_path(path)?)
}

fn explain(device: &Path, error: &io::Error) -> String {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => {
            "; load the module kvm_intel or kvm_amd (modprobe), and check that virtualization is on in the firmware"
        }
        io::ErrorKind::PermissionDenied => "; run this as root, as whom containerd runs the shim",
        _ => "",
    };
    format!("cannot open {}: {error}{advice}", device.display())
}

fn capabilities(kvm: &Kvm) -> Finding {
    const WHAT: &str = "KVM capabilities";
    let missing: Vec<&str> = NEEDED_CAPABILITIES
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Finding::ok(WHAT, format!("all {} that the VMM needs", NEEDED_CAPABILITIES.len()))
    } else {
        Finding::fail(WHAT, format!("missing: {}; a newer kernel is needed", missing.join(", ")))
    }
}

/// How long the kernel takes to create a machine: a part of every pod's start that the node's administrator can change.
fn creation(kvm: &Kvm) -> Finding {
    const WHAT: &str = "VM creation";
    let mut least = Duration::MAX;
    for _ in 0..CREATIONS {
        let start = Instant::now();
        match kvm.create_vm() {
            Ok(vm) => {
                least = least.min(start.elapsed());
                drop(vm);
            }
            Err(error) => {
                return Finding::fail(WHAT, format!("KVM refuses to create a virtual machine: {error}"));
            }
        }
    }
    judge_creation(least)
}

fn judge_creation(least: Duration) -> Finding {
    const WHAT: &str = "VM creation";
    let ms = least.as_secs_f64() * 1e3;
    if least <= SLOW_CREATION {
        return Finding::ok(WHAT, format!("{ms:.1} ms"));
    }
    Finding::warn(
        WHAT,
        format!(
            "{ms:.1} ms, a large part of a pod's start from a template: older kernels wait for all CPUs while they move a \
             thread between control groups; mount -o remount,favordynmods /sys/fs/cgroup avoids it (Linux 6.0 and newer)"
        ),
    )
}

/// A rate in millions or billions.
fn human(rate: f64) -> String {
    if rate >= 1e9 { format!("{:.1} billion", rate / 1e9) } else { format!("{:.1} million", rate / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn a_missing_device_fails_with_advice() {
        let findings = check(Path::new("/nonexistent/kvm"));
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].verdict, Verdict::Fail);
        assert!(findings[0].evidence.contains("cannot open /nonexistent/kvm"), "{}", findings[0].evidence);
        assert!(findings[0].evidence.contains("modprobe"), "{}", findings[0].evidence);
    }

    #[test]
    fn another_device_is_not_taken_for_kvm() {
        let findings = check(Path::new("/dev/null"));
        assert_eq!(findings[0].verdict, Verdict::Fail);
        assert!(findings[0].evidence.contains("not KVM"), "{}", findings[0].evidence);
        assert_eq!(look(Path::new("/dev/null")).kind(), Kind::None);
    }

    #[test]
    fn slow_creation_comes_with_advice() {
        assert_eq!(judge_creation(Duration::from_micros(400)).verdict, Verdict::Ok);
        let finding = judge_creation(Duration::from_millis(10));
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(finding.evidence.starts_with("10.0 ms") && finding.evidence.contains("favordynmods"));
    }

    #[test]
    fn the_kind_is_told_by_the_processor_and_by_the_guests_speed_beside_the_hosts() {
        let vmx = Extension::Present("VT-x", "vmx");
        let evidence = |ratio: Option<f64>, extension, hypervisor: Option<&str>| Evidence {
            speed: ratio.map(|ratio| Speed { guest: ratio * 2e9, host: 2e9 }).ok_or_else(|| "why".to_owned()),
            processor: Processor {
                extension,
                hypervisor: hypervisor.map(str::to_owned),
                modules: vec!["kvm_intel".to_owned()],
            },
        };
        for (ratio, extension, hypervisor, kind, verdict) in [
            (Some(0.98), vmx, None, Kind::Hardware, Verdict::Ok),
            (Some(0.98), Extension::Unknown, None, Kind::Hardware, Verdict::Ok),
            (Some(0.7), vmx, Some("Hyper-V"), Kind::Nested, Verdict::Ok),
            (Some(0.001), vmx, Some("KVM"), Kind::Software, Verdict::Fail),
            (Some(0.98), Extension::Absent, Some("KVM"), Kind::Software, Verdict::Fail),
            (Some(0.001), Extension::Absent, None, Kind::Software, Verdict::Fail),
            (None, vmx, None, Kind::None, Verdict::Fail),
        ] {
            let evidence = evidence(ratio, extension, hypervisor);
            assert_eq!((evidence.kind(), evidence.finding().verdict), (kind, verdict), "{evidence:?}");
        }
        assert_eq!(
            evidence(Some(0.98), vmx, Some("Hyper-V")).finding().evidence,
            "nested: guest kernel code is 98 % as fast as the host's, 2.0 billion instructions a second, VT-x (vmx in \
             /proc/cpuinfo), kvm_intel, in a virtual machine of Hyper-V"
        );
        assert_eq!(evidence(None, vmx, None).finding().evidence, "why");
    }

    #[test]
    fn this_machines_kvm_is_told_apart() {
        let device = Path::new("/dev/kvm");
        if open(device).is_err() {
            eprintln!("SKIPPED: no usable /dev/kvm on this machine");
            return;
        }
        let findings = check(device);
        assert_eq!(findings.len(), 4);
        assert_eq!(findings[0].verdict, Verdict::Ok, "{}", findings[0].evidence);
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let hardware = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
        let expected = if hardware { Verdict::Ok } else { Verdict::Fail };
        assert_eq!(findings[3].verdict, expected, "{}", findings[3].evidence);
    }
}
