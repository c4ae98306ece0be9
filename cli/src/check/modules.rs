//! How is KVM set up: nested paging, nested virtualization, and what it lets guests do.

use std::path::Path;

use super::Finding;
use super::host::text;

/// Looks at the parameters of KVM's modules of the system in `root`.
pub fn check(root: &Path) -> Vec<Finding> {
    let (module, paging) = if root.join("sys/module/kvm_amd").exists() {
        ("kvm_amd", "npt")
    } else if root.join("sys/module/kvm_intel").exists() {
        ("kvm_intel", "ept")
    } else {
        // The check of the device says what that means.
        return Vec::new();
    };
    let value = |module: &str, name: &str| text(root, &format!("sys/module/{module}/parameters/{name}"));
    let again = |setting: &str| {
        format!(
            "echo 'options {module} {setting}' >/etc/modprobe.d/bulkhead.conf; modprobe -r {module} && modprobe {module}"
        )
    };
    vec![
        nested_paging(&value(module, paging), paging, again(&format!("{paging}=1"))),
        nested_machines(&value(module, "nested"), again("nested=0")),
        ignored_registers(&value("kvm", "ignore_msrs")),
    ]
}

fn is_on(value: &str) -> bool {
    matches!(value, "Y" | "1")
}

fn nested_paging(value: &str, name: &str, mend: String) -> Finding {
    const WHAT: &str = "nested paging";
    if is_on(value) {
        return Finding::ok(WHAT, format!("{name} is on"));
    }
    Finding::warn(WHAT, format!("{name} is off"))
        .because("the host's kernel has to follow each change of a guest's page tables: slow, and much code for a guest to attack")
        .mended_by(mend)
}

fn nested_machines(value: &str, mend: String) -> Finding {
    const WHAT: &str = "nested virtualization";
    if !is_on(value) {
        return Finding::ok(WHAT, "off");
    }
    Finding::warn(WHAT, "on")
        .because("pods don't need it, and it is the part of KVM with the most holes found; pods don't see it, other machines of the host do")
        .mended_by(mend)
}

fn ignored_registers(value: &str) -> Finding {
    const WHAT: &str = "unknown model-specific registers";
    if !is_on(value) {
        return Finding::ok(WHAT, "refused");
    }
    Finding::warn(WHAT, "ignored")
        .because("guests that try registers at random are not stopped, and each try may be logged")
        .mended_by("echo 0 >/sys/module/kvm/parameters/ignore_msrs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use crate::testing::Directory;

    #[test]
    fn settings_of_either_vendor_are_judged() {
        for (module, paging) in [("kvm_amd", "npt"), ("kvm_intel", "ept")] {
            let root = Directory::new(&format!("modules-{module}"));
            assert_eq!(check(root.path()), []);
            let parameters = format!("sys/module/{module}/parameters");
            root.write(&format!("{parameters}/{paging}"), "Y\n");
            root.write(&format!("{parameters}/nested"), "0\n");
            let verdicts = || check(root.path()).iter().map(|finding| finding.verdict).collect::<Vec<_>>();
            assert_eq!(verdicts(), [Verdict::Ok; 3]);
            root.write(&format!("{parameters}/{paging}"), "N\n");
            root.write(&format!("{parameters}/nested"), "1\n");
            root.write("sys/module/kvm/parameters/ignore_msrs", "Y\n");
            assert_eq!(verdicts(), [Verdict::Warn; 3]);
            assert!(check(root.path())[0].mend.as_ref().unwrap().contains(&format!("{module} {paging}=1")));
        }
    }
}
