//! The name of a template: a digest of everything that the saved machine depends on.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Recipe;

/// Changes whenever the shim starts machines in another way, or templates look different on disk.
pub(crate) const FORMAT: u32 = 3;

/// A SHA-256 digest in hexadecimal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(String);

/// Not 64 lower-case hexadecimal digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not the key of a template: 64 hexadecimal digits are expected")]
pub struct KeyError;

impl TryFrom<String> for Key {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Key, KeyError> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == 64 && text.bytes().all(digit) { Ok(Key(text)) } else { Err(KeyError) }
    }
}

impl From<Key> for String {
    fn from(key: Key) -> String {
        key.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

impl Key {
    /// Enough of it to tell templates apart for a person.
    pub(crate) fn short(&self) -> &str {
        &self.0[..12]
    }
}

/// What a key is made from, readable, so that `meta.json` tells how two templates differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// [`FORMAT`] of whoever made it.
    pub format: u32,
    /// Version of the shim.
    pub version: String,
    /// SHA-256 of the VMM's program.
    pub vmm: String,
    /// SHA-256 of the guest kernel.
    pub kernel: String,
    /// SHA-256 of the guest image.
    pub image: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// The operator's kernel parameters.
    pub kernel_params: String,
    /// The host's CPU: what CPUID says of its model and features.
    pub cpu: String,
    /// The host's kernel, and with it KVM, and how KVM's modules are set.
    pub host: String,
}

/// SHA-256 digests of a recipe's files, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileDigests {
    /// Of the VMM's program.
    pub vmm: String,
    /// Of the guest kernel.
    pub kernel: String,
    /// Of the guest image.
    pub image: String,
}

impl Inputs {
    /// What the template of `recipe` depends on, on this host.
    pub(crate) fn new(recipe: &Recipe, digests: FileDigests) -> Inputs {
        Inputs {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: digests.vmm,
            kernel: digests.kernel,
            image: digests.image,
            vcpus: recipe.size.vcpus,
            memory_mib: recipe.size.memory_mib,
            kernel_params: recipe.kernel_params.clone(),
            cpu: cpu(),
            host: host(),
        }
    }

    /// The key.
    pub(crate) fn key(&self) -> Key {
        // Fields are in the order of their declaration, so equal inputs give equal bytes.
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        Key(hex(&Sha256::digest(bytes)))
    }
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// CPUID leaves and subleaves, and which of EAX, EBX, ECX, EDX are the same on every CPU of a machine at any time (no
/// APIC ids, no sizes that follow the registers in use).
const LEAVES: [(u32, u32, [bool; 4]); 10] = [
    (0x0000_0000, 0, [true; 4]),
    (0x0000_0001, 0, [true, false, true, true]),
    (0x0000_0007, 0, [true; 4]),
    (0x0000_0007, 1, [true; 4]),
    (0x0000_000d, 0, [true, false, true, true]),
    (0x0000_000d, 1, [true, false, true, true]),
    (0x8000_0001, 0, [true, false, true, true]),
    (0x8000_0007, 0, [false, false, false, true]),
    (0x8000_0008, 0, [true, true, false, false]),
    (0x8000_000a, 0, [true, true, false, true]),
];

/// The CPU's vendor, model and features.
#[allow(unused_unsafe, reason = "whether CPUID counts as unsafe depends on the compiler's version")]
fn cpu() -> String {
    use std::arch::x86_64::__cpuid_count;
    let mut text = String::new();
    for (leaf, subleaf, stable) in LEAVES {
        // SAFETY: every x86-64 CPU has CPUID. A leaf that it does not know has no effect.
        let (highest, registers) =
            unsafe { (__cpuid_count(leaf & 0x8000_0000, 0).eax, __cpuid_count(leaf, subleaf)) };
        if leaf > highest {
            continue;
        }
        let values = [registers.eax, registers.ebx, registers.ecx, registers.edx];
        for (value, stable) in values.into_iter().zip(stable) {
            if stable {
                text.push_str(&hex(&value.to_be_bytes()));
            }
        }
        text.push('.');
    }
    text
}

fn host() -> String {
    let settings = settings(Path::new("/sys/module"));
    match nix::sys::utsname::uname() {
        Ok(name) => format!("{} {}{settings}", name.release().display(), name.version().display()),
        // It does not fail; a key that fits nothing else would do no harm.
        Err(errno) => errno.to_string(),
    }
}

/// Parameters of KVM's modules without which guests have other features (pages of 1 GiB, PCID) or other state. Not who delivers
/// interrupts (`kvm_intel.enable_apicv`, `kvm_amd.avic`): KVM gives and takes the local APIC's registers as the guest sees them.
const SETTINGS: [(&str, &str); 3] =
    [("kvm_amd", "npt"), ("kvm_intel", "ept"), ("kvm_intel", "unrestricted_guest")];

/// Those that there are, with their values.
fn settings(modules: &Path) -> String {
    let mut text = String::new();
    for (module, name) in SETTINGS {
        if let Ok(value) = fs::read_to_string(modules.join(module).join("parameters").join(name)) {
            text.push_str(&format!(" {module}.{name}={}", value.trim()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Size;

    fn inputs() -> Inputs {
        let recipe = Recipe {
            vmm: "/v".into(),
            kernel: "/k".into(),
            image: "/i".into(),
            kvm: "/d".into(),
            size: Size { vcpus: 1, memory_mib: 256 },
            kernel_params: String::new(),
        };
        let digests = FileDigests { vmm: "1".into(), kernel: "2".into(), image: "3".into() };
        Inputs::new(&recipe, digests)
    }

    #[test]
    fn every_input_changes_the_key() {
        let base = inputs();
        assert_eq!(base.key(), inputs().key(), "the same machine has the same key");
        let other = |change: fn(&mut Inputs)| {
            let mut inputs = inputs();
            change(&mut inputs);
            inputs.key()
        };
        let mut keys = vec![
            base.key(),
            other(|inputs| inputs.format += 1),
            other(|inputs| inputs.version.push('x')),
            other(|inputs| inputs.vmm = "9".into()),
            other(|inputs| inputs.kernel = "9".into()),
            other(|inputs| inputs.image = "9".into()),
            other(|inputs| inputs.vcpus = 2),
            other(|inputs| inputs.memory_mib = 512),
            other(|inputs| inputs.kernel_params = "x".into()),
            other(|inputs| inputs.cpu.push('x')),
            other(|inputs| inputs.host.push('x')),
        ];
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    #[test]
    fn the_cpu_is_described_by_more_than_its_vendor() {
        assert!(cpu().matches('.').count() > 4, "{}", cpu());
    }

    #[test]
    fn how_kvm_is_set_is_part_of_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let modules = directory.path();
        assert_eq!(settings(modules), "");
        let parameters = modules.join("kvm_intel/parameters");
        fs::create_dir_all(&parameters).unwrap();
        for (ept, expected) in [("Y\n", " kvm_intel.ept=Y"), ("N\n", " kvm_intel.ept=N")] {
            fs::write(parameters.join("ept"), ept).unwrap();
            assert_eq!(settings(modules), expected);
        }
        fs::write(parameters.join("enable_apicv"), "Y\n").unwrap();
        assert_eq!(settings(modules), " kvm_intel.ept=N", "templates don't depend on it");
    }

    #[test]
    fn only_digests_are_keys() {
        assert!(Key::try_from(inputs().key().to_string()).is_ok());
        for text in ["", "..", "ABCDEF", &"g".repeat(64), &"a".repeat(63)] {
            assert_eq!(Key::try_from(text.to_owned()), Err(KeyError), "{text}");
        }
    }
}
