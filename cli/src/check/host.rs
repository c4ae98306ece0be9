//! How well does the host keep virtual machines apart: its kernel, the processor's known weaknesses, memory, udev.

use std::fs;
use std::path::Path;

use super::Finding;

/// The oldest kernel with everything that pods can't do without.
const OLDEST: (u32, u32) = (5, 10);

/// The oldest kernel that was tried.
const TRIED: (u32, u32) = (6, 1);

/// What keeps pods off each other's cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CoreScheduling {
    /// The configuration has it switched on.
    pub wanted: bool,
    /// Processor and kernel can do it.
    pub possible: bool,
}

/// Looks at the system in `root`.
pub(crate) fn check(root: &Path, cores: CoreScheduling) -> Vec<Finding> {
    vec![kernel(root), vulnerabilities(root), smt(root, cores), ksm(root), swap(root), udev(root)]
}

/// The text of a small file; empty if there is none.
pub(super) fn text(root: &Path, place: &str) -> String {
    fs::read_to_string(root.join(place)).unwrap_or_default().trim().to_owned()
}

fn kernel(root: &Path) -> Finding {
    const WHAT: &str = "kernel";
    let release = text(root, "proc/sys/kernel/osrelease");
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let newer = "install a newer kernel, such as linux-image-amd64 of Debian 12";
    if version < OLDEST {
        Finding::fail(WHAT, format!("Linux {release}"))
            .because(format!("pods need Linux {}.{} or later", OLDEST.0, OLDEST.1))
            .mended_by(newer)
    } else if version < TRIED {
        Finding::warn(WHAT, format!("Linux {release}"))
            .because(format!("nothing older than Linux {}.{} was tried", TRIED.0, TRIED.1))
            .mended_by(newer)
    } else {
        Finding::ok(WHAT, format!("Linux {release}"))
    }
}

/// What the kernel says about the processor's weaknesses.
fn vulnerabilities(root: &Path) -> Finding {
    const WHAT: &str = "processor's weaknesses";
    let directory = root.join("sys/devices/system/cpu/vulnerabilities");
    let mut open: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let state = fs::read_to_string(entry.path()).ok()?;
            // Also "KVM: Vulnerable" and "Mitigation: ...; VMX: vulnerable".
            let is_open = state.starts_with("Vulnerable")
                || state.starts_with("KVM: Vulnerable")
                || state.contains("VMX: vulnerable");
            is_open.then(|| entry.file_name().to_string_lossy().into_owned())
        })
        .collect();
    open.sort();
    let off = text(root, "proc/cmdline").split(' ').any(|word| word == "mitigations=off");
    if off {
        Finding::warn(WHAT, "mitigations=off on the kernel's command line")
            .because(
                "a guest can read the memory of the host and of other guests through the processor's caches",
            )
            .mended_by(
                "take mitigations=off out of GRUB_CMDLINE_LINUX in /etc/default/grub; update-grub; reboot",
            )
    } else if open.is_empty() {
        Finding::ok(WHAT, "none without a mitigation")
    } else {
        Finding::warn(WHAT, format!("without a mitigation: {}", open.join(", ")))
            .because("a guest may be able to read memory that is not its own")
            .mended_by("apt-get install intel-microcode amd64-microcode; apt-get upgrade; reboot")
    }
}

fn smt(root: &Path, cores: CoreScheduling) -> Finding {
    const WHAT: &str = "hyper-threading";
    let why = "two guests on one core's threads share its caches and can watch each other";
    match (text(root, "sys/devices/system/cpu/smt/active").as_str(), cores) {
        ("1", CoreScheduling { wanted: true, possible: true }) => {
            Finding::ok(WHAT, "on; no two pods are on one core at a time (core_scheduling)")
        }
        ("1", CoreScheduling { wanted: false, possible: true }) => {
            Finding::warn(WHAT, "on, and core_scheduling is not")
                .because(why)
                .mended_by("core_scheduling = true in Bulkhead's configuration; or switch it off, echo off >/sys/devices/system/cpu/smt/control")
        }
        ("1", _) => Finding::warn(WHAT, "on, and the kernel has no core scheduling")
            .because(why)
            .mended_by("echo off >/sys/devices/system/cpu/smt/control (for good: nosmt on the kernel's command line)"),
        _ => Finding::ok(WHAT, "off"),
    }
}

fn ksm(root: &Path) -> Finding {
    const WHAT: &str = "merging of equal pages (KSM)";
    match text(root, "sys/kernel/mm/ksm/run").as_str() {
        "1" => Finding::warn(WHAT, "on")
            .because("a guest can tell from the time of a write whether another one has the same page")
            .mended_by("echo 2 >/sys/kernel/mm/ksm/run; systemctl disable --now ksmtuned"),
        _ => Finding::ok(WHAT, "off"),
    }
}

fn swap(root: &Path) -> Finding {
    const WHAT: &str = "swap";
    let table = text(root, "proc/swaps");
    let areas: Vec<&str> = table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    if areas.is_empty() {
        return Finding::ok(WHAT, "none");
    }
    Finding::warn(WHAT, areas.join(", "))
        .because("guest memory, with whatever secrets are in it, is written there and stays after the pod")
        .mended_by("swapoff -a, and take the areas out of /etc/fstab; or encrypt them with a random key")
}

/// udev looks into a block device whenever somebody who could write to it closes it.
fn udev(root: &Path) -> Finding {
    const WHAT: &str = "udev";
    let directories = ["usr/lib/udev/rules.d", "lib/udev/rules.d", "etc/udev/rules.d", "run/udev/rules.d"];
    let mut rules: Vec<_> = directories
        .iter()
        .flat_map(|directory| fs::read_dir(root.join(directory)).into_iter().flatten().flatten())
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "rules"))
        .collect();
    // The last word counts, in the order of the files' names.
    rules.sort_by_key(fs::DirEntry::file_name);
    let mut watching = false;
    for rule in rules {
        let text = fs::read_to_string(rule.path()).unwrap_or_default();
        let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        for line in lines {
            if line.contains("OPTIONS") && line.contains("\"nowatch\"") {
                watching = false;
            } else if line.contains("OPTIONS") && line.contains("\"watch\"") {
                watching = true;
            }
        }
    }
    if !watching || !root.join("run/udev/control").exists() {
        return Finding::ok(WHAT, "does not watch block devices");
    }
    Finding::warn(WHAT, "watches block devices")
        .because(
            "after a pod that wrote to a block device has closed it, the host's blkid reads what the pod has made of \
             it, as root",
        )
        .mended_by(
            "echo 'ACTION!=\"remove\", SUBSYSTEM==\"block\", OPTIONS:=\"nowatch\"' \
             >/etc/udev/rules.d/99-bulkhead.rules; udevadm control --reload; udevadm trigger --subsystem-match=block",
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use crate::testing::Directory;

    const NO_CORES: CoreScheduling = CoreScheduling { wanted: true, possible: false };

    fn verdicts(root: &Directory) -> Vec<Verdict> {
        check(root.path(), NO_CORES).iter().map(|finding| finding.verdict).collect()
    }

    #[test]
    fn a_sound_host() {
        let root = Directory::new();
        root.write("proc/sys/kernel/osrelease", "6.12.48+deb13-cloud-amd64\n");
        root.write("sys/devices/system/cpu/vulnerabilities/mds", "Not affected\n");
        root.write(
            "sys/devices/system/cpu/vulnerabilities/l1tf",
            "Mitigation: PTE Inversion; VMX: cache flushes\n",
        );
        root.write("sys/devices/system/cpu/smt/active", "0\n");
        root.write("sys/kernel/mm/ksm/run", "0\n");
        root.write("proc/swaps", "Filename Type Size Used Priority\n");
        assert_eq!(verdicts(&root), [Verdict::Ok; 6]);
    }

    #[test]
    fn a_host_that_is_not() {
        let root = Directory::new();
        root.write("proc/sys/kernel/osrelease", "4.18.0-553.el8.x86_64\n");
        root.write(
            "sys/devices/system/cpu/vulnerabilities/mds",
            "Vulnerable: Clear CPU buffers attempted, no microcode\n",
        );
        root.write("sys/devices/system/cpu/smt/active", "1\n");
        root.write("sys/kernel/mm/ksm/run", "1\n");
        root.write("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n");
        root.write("usr/lib/udev/rules.d/60-block.rules", "KERNEL==\"sd*\", OPTIONS+=\"watch\"\n");
        root.write("run/udev/control", "");
        let mut expected = [Verdict::Warn; 6];
        expected[0] = Verdict::Fail;
        assert_eq!(verdicts(&root), expected);
        let findings = check(root.path(), NO_CORES);
        assert!(findings.iter().all(|finding| finding.why.is_some() && finding.mend.is_some()));
        assert!(findings[1].evidence.contains("mds"));

        let smt = |wanted, possible| {
            let finding = smt(root.path(), CoreScheduling { wanted, possible });
            (finding.verdict, finding.evidence)
        };
        assert_eq!(smt(true, true).0, Verdict::Ok);
        assert_eq!(smt(false, true), (Verdict::Warn, "on, and core_scheduling is not".into()));
        assert_eq!(smt(false, false), smt(true, false));

        // A later file has the last word.
        root.write("etc/udev/rules.d/99-bulkhead.rules", "SUBSYSTEM==\"block\", OPTIONS:=\"nowatch\"\n");
        assert_eq!(verdicts(&root)[5], Verdict::Ok);
        root.write("proc/sys/kernel/osrelease", "5.15.0-1-amd64\n");
        assert_eq!(verdicts(&root)[0], Verdict::Warn);
        root.write("proc/cmdline", "quiet mitigations=off panic=1");
        assert!(check(root.path(), NO_CORES)[1].evidence.contains("mitigations=off"));
    }
}
