//! Is the node on cgroup v2, with the controllers that pods are limited by?

use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::Finding;

const WHAT: &str = "cgroups";
/// Controllers that the shim sets limits with.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

/// Looks at the cgroup tree mounted on `root`.
pub(crate) fn check(root: &Path) -> Finding {
    match statfs(root) {
        Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => {}
        Ok(_) => {
            return Finding::warn(WHAT, format!("{} is not a cgroup v2 tree", root.display()))
                .because("pods run, but without limits on the host")
                .mended_by(
                    "add systemd.unified_cgroup_hierarchy=1 to GRUB_CMDLINE_LINUX in /etc/default/grub; update-grub; reboot",
                );
        }
        Err(errno) => return Finding::warn(WHAT, format!("cannot look at {}: {errno}", root.display())),
    }
    match std::fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(controllers) => judge(&controllers),
        Err(error) => {
            Finding::warn(WHAT, format!("cannot read {}/cgroup.controllers: {error}", root.display()))
        }
    }
}

fn judge(controllers: &str) -> Finding {
    let missing: Vec<&str> = NEEDED
        .into_iter()
        .filter(|needed| !controllers.split_whitespace().any(|name| name == *needed))
        .collect();
    if missing.is_empty() {
        Finding::ok(WHAT, format!("version 2 with {}", NEEDED.join(", ")))
    } else {
        Finding::warn(WHAT, format!("version 2, but without {}", missing.join(", ")))
            .because("pods run without these limits")
            .mended_by("take cgroup_disable= off the kernel's command line; reboot")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn missing_controllers_are_named() {
        assert_eq!(judge("cpuset cpu io memory pids\n").verdict, Verdict::Ok);
        let finding = judge("cpuset io memory");
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(finding.evidence.contains("without cpu, pids"), "{}", finding.evidence);
    }

    #[test]
    fn another_file_system_is_not_cgroup_v2() {
        assert_eq!(check(Path::new("/proc")).verdict, Verdict::Warn);
        assert_eq!(check(Path::new("/nonexistent")).verdict, Verdict::Warn);
    }
}
