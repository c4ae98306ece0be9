//! Is there a KVM that a guest kernel can run on?

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_vmm::calibrate;
use bulkhead_vmm::vm::NEEDED_CAPABILITIES;
use kvm_ioctls::Kvm;

use super::Finding;

/// The only version there has been since Linux 2.6.22; KVM's documentation asks to refuse any other.
const API_VERSION: i32 = 12;

/// How long the calibration guest may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Machines that are created to see how long it takes.
const CREATIONS: u32 = 3;

/// A machine that takes longer to be created than this has waited for something; a few tenths of a millisecond are usual.
const SLOW_CREATION: Duration = Duration::from_millis(3);

/// The kind of KVM a node has.
#[derive(Debug)]
pub struct Kind {
    /// Guest kernel instructions per second, if there is a KVM.
    rate: Option<f64>,
    /// Why there is none.
    pub reason: Option<String>,
}

impl Kind {
    /// `hardware`, `software` or `none`.
    pub fn name(&self) -> &'static str {
        match self.rate {
            Some(rate) if is_hardware(rate) => "hardware",
            Some(_) => "software",
            None => "none",
        }
    }

    fn finding(&self) -> Finding {
        const WHAT: &str = "KVM speed";
        match (self.rate, &self.reason) {
            (Some(rate), _) if is_hardware(rate) => {
                Finding::ok(WHAT, format!("hardware KVM: {} guest kernel instructions a second", human(rate)))
            }
            (Some(rate), _) => Finding::fail(
                WHAT,
                format!(
                    "software KVM: {} guest kernel instructions a second, where hardware does at least {}; a guest \
                     kernel cannot boot on it. Use a machine with VT-x or AMD-V; in a virtual machine, have nested \
                     virtualization switched on",
                    human(rate),
                    human(calibrate::HARDWARE_THRESHOLD)
                ),
            ),
            (None, reason) => Finding::fail(WHAT, reason.clone().unwrap_or_default()),
        }
    }
}

/// Measures what kind of KVM is behind `device`; takes a tenth of a second on a software KVM, [`TIME_LIMIT`] at most.
pub fn kind(device: &Path) -> Kind {
    let (sender, receiver) = mpsc::channel();
    let device = device.to_owned();
    // On a thread of its own, since a KVM that is broken enough never comes back from the guest; it ends with the process.
    let spawned = thread::Builder::new().spawn(move || {
        // Nobody listens any more when the time was over.
        let _ =
            sender.send(calibrate::instruction_rate(&device).map_err(|error| bulkhead_base::chain(&error)));
    });
    let result = match spawned {
        Ok(_) => receiver.recv_timeout(TIME_LIMIT).unwrap_or_else(|_| {
            Err(format!("the calibration guest did not halt within {} s", TIME_LIMIT.as_secs()))
        }),
        Err(error) => Err(format!("cannot start a thread for the calibration guest: {error}")),
    };
    match result {
        Ok(rate) => Kind { rate: Some(rate), reason: None },
        Err(reason) => Kind { rate: None, reason: Some(reason) },
    }
}

/// The findings about the KVM device; those after a failure that explains them are left out.
pub fn check(device: &Path) -> Vec<Finding> {
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
    findings.into_iter().chain([creation]).chain([kind(device).finding()]).collect()
}

fn is_hardware(rate: f64) -> bool {
    rate >= calibrate::HARDWARE_THRESHOLD
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
        assert_eq!(kind(Path::new("/dev/null")).name(), "none");
    }

    #[test]
    fn slow_creation_comes_with_advice() {
        assert_eq!(judge_creation(Duration::from_micros(400)).verdict, Verdict::Ok);
        let finding = judge_creation(Duration::from_millis(10));
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(finding.evidence.starts_with("10.0 ms") && finding.evidence.contains("favordynmods"));
    }

    #[test]
    fn speed_decides_the_kind() {
        let kind = |rate| Kind { rate, reason: rate.is_none().then(|| "why".to_owned()) };
        assert_eq!(kind(Some(2e9)).name(), "hardware");
        assert_eq!(kind(Some(2e9)).finding().verdict, Verdict::Ok);
        assert_eq!(kind(Some(1e6)).name(), "software");
        assert_eq!(kind(Some(1e6)).finding().verdict, Verdict::Fail);
        assert_eq!(kind(None).name(), "none");
        assert_eq!(kind(None).finding().evidence, "why");
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
