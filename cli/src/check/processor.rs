//! What the processor and the loaded modules say about virtual machines.

use std::arch::x86_64::__cpuid;
use std::path::Path;

use super::host::text;

/// The leaf of CPUID in which a hypervisor tells its name, and the flag that announces it in `/proc/cpuinfo`.
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const HYPERVISOR_FLAG: &str = "hypervisor";

/// The names of some hypervisors, and who they are.
const HYPERVISORS: [(&str, &str); 6] = [
    ("KVMKVMKVM", "KVM"),
    ("Microsoft Hv", "Hyper-V"),
    ("VMwareVMware", "VMware"),
    ("XenVMMXenVMM", "Xen"),
    ("TCGTCGTCGTCG", "QEMU's software CPU"),
    ("bhyve bhyve ", "bhyve"),
];

/// What is known of the processor without running a guest on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Processor {
    /// Its extension for virtual machines.
    pub extension: Extension,
    /// The hypervisor that this machine itself is a guest of.
    pub hypervisor: Option<String>,
    /// The modules of KVM besides `kvm`.
    pub modules: Vec<String>,
}

/// Whether a processor has an extension for virtual machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extension {
    /// VT-x or AMD-V, and its flag in `/proc/cpuinfo`.
    Present(&'static str, &'static str),
    /// Its flags have none.
    Absent,
    /// Its flags can't be read.
    Unknown,
}

impl Processor {
    /// Looks at the system in `root` and at the processor.
    pub(crate) fn here(root: &Path) -> Self {
        let cpuinfo = text(root, "proc/cpuinfo");
        let flags =
            cpuinfo.lines().find(|line| line.starts_with("flags")).and_then(|line| line.split_once(':'));
        let has =
            |name: &str| flags.is_some_and(|(_, flags)| flags.split_whitespace().any(|flag| flag == name));
        let extension = match (flags.is_some(), has("vmx"), has("svm")) {
            (false, ..) => Extension::Unknown,
            (_, true, _) => Extension::Present("VT-x", "vmx"),
            (_, _, true) => Extension::Present("AMD-V", "svm"),
            _ => Extension::Absent,
        };
        let hypervisor = has(HYPERVISOR_FLAG).then(|| name_of(&signature()));
        let mut modules: Vec<String> = std::fs::read_dir(root.join("sys/module"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with("kvm_"))
            .collect();
        modules.sort();
        Processor { extension, hypervisor, modules }
    }
}

/// What the hypervisor calls itself.
fn signature() -> [u8; 12] {
    // Not every compiler takes this for safe. SAFETY: each x86-64 processor has the instruction; it reads no memory.
    #[allow(unused_unsafe)]
    let leaf = unsafe { __cpuid(HYPERVISOR_LEAF) };
    let mut name = [0; 12];
    for (part, register) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
        part.copy_from_slice(&register.to_le_bytes());
    }
    name
}

fn name_of(signature: &[u8]) -> String {
    let text: String =
        signature.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
    match HYPERVISORS.iter().find(|(name, _)| *name == text) {
        Some((_, who)) => (*who).to_owned(),
        None if text.chars().any(|c| c.is_ascii_graphic()) => {
            format!("a hypervisor that says \"{}\"", text.escape_default())
        }
        None => "a hypervisor without a name".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn flags_and_modules_are_read() {
        let root = Directory::new();
        assert_eq!(Processor::here(root.path()).extension, Extension::Unknown);
        root.write("sys/module/kvm/parameters/ignore_msrs", "N\n");
        root.write("sys/module/kvm_intel/parameters/ept", "Y\n");
        root.write("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme vmx\nvmx flags\t: ept\nbugs\t\t:\n");
        let processor = Processor::here(root.path());
        assert_eq!(
            processor,
            Processor {
                extension: Extension::Present("VT-x", "vmx"),
                hypervisor: None,
                modules: vec!["kvm_intel".to_owned()],
            }
        );
        root.write("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme svm hypervisor\n");
        let processor = Processor::here(root.path());
        assert_eq!(processor.extension, Extension::Present("AMD-V", "svm"));
        assert!(processor.hypervisor.is_some());
        root.write("proc/cpuinfo", "flags\t\t: fpu vme\n");
        assert_eq!(Processor::here(root.path()).extension, Extension::Absent);
    }

    #[test]
    fn hypervisors_have_names() {
        assert_eq!(name_of(b"KVMKVMKVM\0\0\0"), "KVM");
        assert_eq!(name_of(b"TCGTCGTCGTCG"), "QEMU's software CPU");
        assert_eq!(name_of(b"Some\xff\x1bThing."), "a hypervisor that says \"Some\\u{ff}\\u{1b}Thing.\"");
        assert_eq!(name_of(&[0; 12]), "a hypervisor without a name");
    }
}
