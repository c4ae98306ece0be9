//! How is KVM set up: nested paging, nested virtualization, and what it lets guests do.

use std::path::Path;

use super::Finding;
use super::host::text;

/// Looks at the parameters of KVM's modules of the system in `root`.
pub(crate) fn check(root: &Path) -> Vec<Finding> {
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
    let mut findings = vec![nested_paging(&value(module, paging), paging, again(&format!("{paging}=1")))];
    if module == "kvm_intel" {
        findings
            .push(unrestricted_guests(&value(module, "unrestricted_guest"), again("unrestricted_guest=1")));
    }
    findings.push(nested_machines(&value(module, "nested"), again("nested=0")));
    findings.push(ignored_registers(&value("kvm", "ignore_msrs")));
    findings
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

/// AMD's processors have never been without them.
fn unrestricted_guests(value: &str, mend: String) -> Finding {
    const WHAT: &str = "unrestricted guests";
    if is_on(value) {
        return Finding::ok(WHAT, "on");
    }
    Finding::warn(WHAT, "off")
        .because(
            "pods run, but what a guest does in real mode the host's kernel interprets: much code for a guest to attack. \
             Off as well where ept is off or the processor is too old",
        )
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
            let root = Directory::new();
            assert_eq!(check(root.path()), []);
            let parameters = format!("sys/module/{module}/parameters");
            root.write(&format!("{parameters}/{paging}"), "Y\n");
            root.write(&format!("{parameters}/nested"), "0\n");
            let verdicts = || check(root.path()).iter().map(|finding| finding.verdict).collect::<Vec<_>>();
            root.write(&format!("{parameters}/unrestricted_guest"), "Y\n");
            let count = if module == "kvm_intel" { 4 } else { 3 };
            assert_eq!(verdicts(), vec![Verdict::Ok; count]);
            root.write(&format!("{parameters}/{paging}"), "N\n");
            root.write(&format!("{parameters}/unrestricted_guest"), "N\n");
            root.write(&format!("{parameters}/nested"), "1\n");
            root.write("sys/module/kvm/parameters/ignore_msrs", "Y\n");
            assert_eq!(verdicts(), vec![Verdict::Warn; count]);
            assert!(check(root.path())[0].mend.as_ref().unwrap().contains(&format!("{module} {paging}=1")));
        }
    }
}
