//! What the guest sees of the CPU.
//!
//! The base is what this host's KVM supports. On top: the topology of this virtual machine (one socket, one thread per
//! core), a hypervisor that says so, and some features that are hidden because a guest has no business with them.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::{CpuError, kvm_failed};

/// The most entries KVM is asked for.
pub(crate) const MAX_CPUID_ENTRIES: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub(crate) const MONITOR: u32 = 1 << 3;
    pub(crate) const VMX: u32 = 1 << 5;
    pub(crate) const PDCM: u32 = 1 << 15;
    pub(crate) const TSC_DEADLINE: u32 = 1 << 24;
    pub(crate) const HYPERVISOR: u32 = 1 << 31;
}
/// Leaf 1, EDX: several logical processors in the package.
const HTT: u32 = 1 << 28;
/// Leaf 7, EBX: what the guest doesn't get.
const SGX: u32 = 1 << 2;
const PROCESSOR_TRACE: u32 = 1 << 25;
/// Leaf 7, ECX.
const SGX_LAUNCH_CONTROL: u32 = 1 << 30;
/// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
/// KVM's own leaf of features ("KVM CPUID bits" of the kernel's documentation).
const KVM_FEATURES: u32 = 0x4000_0001;
/// Its EAX: what the guest gets. The clock, what makes waiting for another vCPU cheap, and stolen time. Page faults that end later, the clock's
/// first form and what migration needs stay away: the host writes to guest memory for them, and nobody needs them here.
const KVM_FEATURES_SHOWN: u32 = kvm_feature::NOP_IO_DELAY
    | kvm_feature::CLOCKSOURCE2
    | kvm_feature::STEAL_TIME
    | kvm_feature::PV_EOI
    | kvm_feature::PV_UNHALT
    | kvm_feature::PV_TLB_FLUSH
    | kvm_feature::PV_SEND_IPI
    | kvm_feature::PV_SCHED_YIELD
    | kvm_feature::CLOCKSOURCE_STABLE;
mod kvm_feature {
    pub(crate) const NOP_IO_DELAY: u32 = 1 << 1;
    pub(crate) const CLOCKSOURCE2: u32 = 1 << 3;
    pub(crate) const STEAL_TIME: u32 = 1 << 5;
    pub(crate) const PV_EOI: u32 = 1 << 6;
    pub(crate) const PV_UNHALT: u32 = 1 << 7;
    pub(crate) const PV_TLB_FLUSH: u32 = 1 << 9;
    pub(crate) const PV_SEND_IPI: u32 = 1 << 11;
    pub(crate) const PV_SCHED_YIELD: u32 = 1 << 13;
    pub(crate) const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}
/// Leaf 0, EBX: how "AuthenticAMD" and "HygonGenuine" begin.
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
/// Size of a cache line, in units of 8 bytes.
const CLFLUSH_LINE: u32 = 8;

/// The CPUID table of a virtual machine, before it is made one vCPU's own.
#[derive(Debug, Clone)]
pub(crate) struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
}

impl CpuidTemplate {
    /// What a guest with `vcpus` vCPUs gets on this host.
    pub(crate) fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, CpuError> {
        let supported =
            kvm.get_supported_cpuid(MAX_CPUID_ENTRIES).map_err(kvm_failed("learn the features"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_supported(supported.as_slice(), tsc_deadline, vcpus))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], tsc_deadline: bool, vcpus: u8) -> Self {
        let mut entries = supported.to_vec();
        let amd = entries.iter().any(|entry| entry.function == 0 && AMD_VENDORS.contains(&entry.ebx));
        // The topology leaves are written anew, with all of their levels.
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        for entry in &mut entries {
            hide(entry);
            describe_package(entry, vcpus, amd);
            if entry.function == 1 {
                entry.ecx |= leaf1_ecx::HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= leaf1_ecx::TSC_DEADLINE;
                }
            }
        }
        entries.extend(extended_topology(vcpus));
        CpuidTemplate { entries, vcpus }
    }

    /// Gives a vCPU its table; its APIC id is its number.
    pub(crate) fn apply(&self, vcpu: &VcpuFd, id: u8) -> Result<(), CpuError> {
        let table = CpuId::from_entries(&self.for_vcpu(id)).map_err(|_| CpuError::Table)?;
        vcpu.set_cpuid2(&table).map_err(kvm_failed("set the features"))
    }

    /// The table of one vCPU.
    pub(crate) fn for_vcpu(&self, id: u8) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.entries.clone();
        let id = u32::from(id);
        for entry in &mut entries {
            match entry.function {
                1 => {
                    let logical = u32::from(self.vcpus);
                    entry.ebx = id << 24 | logical << 16 | CLFLUSH_LINE << 8 | entry.ebx & 0xff;
                }
                0xb => entry.edx = id,
                0x8000_001e => {
                    // APIC id; core id with one thread per core; node 0 of 1.
                    entry.eax = id;
                    entry.ebx = id;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        entries
    }
}

/// Nested virtualisation, enclaves, tracing, performance counters and idle hints stay on the host.
fn hide(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => entry.ecx &= !(leaf1_ecx::MONITOR | leaf1_ecx::VMX | leaf1_ecx::PDCM),
        7 if entry.index == 0 => {
            entry.ebx &= !(SGX | PROCESSOR_TRACE);
            entry.ecx &= !SGX_LAUNCH_CONTROL;
        }
        5 | 0xa | 0x12 | 0x14 | 0x8000_000a | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_0001 => entry.ecx &= !SVM,
        KVM_FEATURES => entry.eax &= KVM_FEATURES_SHOWN,
        _ => {}
    }
}

/// One package with `vcpus` cores of one thread, in the vendors' older leaves.
fn describe_package(entry: &mut kvm_cpuid_entry2, vcpus: u8, amd: bool) {
    let last_core = u32::from(vcpus) - 1;
    match entry.function {
        1 if vcpus > 1 => entry.edx |= HTT,
        1 => entry.edx &= !HTT,
        // Intel's caches: cores in the package; a cache of level 3 is shared by all, the others by nobody.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { last_core } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | last_core << 26;
        }
        // AMD: cores in the package and the width of the APIC id.
        0x8000_0008 if amd => entry.ecx = entry.ecx & !0xf0ff | last_core | id_bits(vcpus) << 12,
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { last_core } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        _ => {}
    }
}

/// Leaf 0xb: threads, then cores, then the end of the list.
fn extended_topology(vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let level = |index, shift, logical, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: index | kind << 8,
        ..kvm_cpuid_entry2::default()
    };
    [level(0, 0, 1, 1), level(1, id_bits(vcpus), vcpus.into(), 2), level(2, 0, 0, 0)]
}

/// Bits that number `vcpus` cores.
fn id_bits(vcpus: u8) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn virtualisation_is_hidden_and_the_hypervisor_shown() {
        let supported = [
            leaf(1, 0, 0, !leaf1_ecx::HYPERVISOR, 0),
            leaf(0xa, 1, 2, 3, 4),
            leaf(0x8000_0001, 0, 0, SVM | 1, 0),
            leaf(0x8000_000a, 1, 1, 1, 1),
            leaf(KVM_FEATURES, u32::MAX, 0, 0, 0),
        ];
        let table = CpuidTemplate::from_supported(&supported, true, 1).for_vcpu(0);
        let asynchronous_page_faults = 1 << 4 | 1 << 10 | 1 << 14;
        assert_eq!(find(&table, KVM_FEATURES, 0).eax & asynchronous_page_faults, 0);
        assert_ne!(find(&table, KVM_FEATURES, 0).eax & kvm_feature::CLOCKSOURCE2, 0);
        let one = find(&table, 1, 0);
        assert_eq!(one.ecx & (leaf1_ecx::VMX | leaf1_ecx::MONITOR), 0);
        assert_eq!(one.ecx & leaf1_ecx::HYPERVISOR, leaf1_ecx::HYPERVISOR);
        assert_eq!(find(&table, 0xa, 0).eax, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 1);
        assert_eq!(find(&table, 0x8000_000a, 0).edx, 0);
    }

    #[test]
    fn each_vcpu_is_a_core_of_one_package() {
        let supported = [
            leaf(0, 13, AMD_VENDORS[0], 0, 0),
            leaf(1, 0, 0, 0, 0),
            leaf(4, 0x3fc0_0121, 0, 0, 0),
            leaf(0xb, 9, 9, 9, 9),
            leaf(0x8000_0008, 0, 0, 0xabcd, 0),
            leaf(0x8000_001e, 9, 9, 9, 9),
        ];
        let table = CpuidTemplate::from_supported(&supported, false, 3).for_vcpu(2);
        let one = find(&table, 1, 0);
        assert_eq!(one.ebx >> 16, 2 << 8 | 3);
        assert_eq!(one.edx & HTT, HTT);
        assert_eq!(one.ecx & leaf1_ecx::TSC_DEADLINE, 0);
        assert_eq!(find(&table, 4, 0).eax >> 26, 2);
        let (threads, cores, end) = (find(&table, 0xb, 0), find(&table, 0xb, 1), find(&table, 0xb, 2));
        assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, 2));
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        assert_eq!((end.ebx, end.ecx), (0, 2));
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0x2b02);
        assert_eq!(find(&table, 0x8000_001e, 0).eax, 2);
    }

    #[test]
    fn ids_have_as_many_bits_as_they_need() {
        assert_eq!([1, 2, 3, 4, 5, 16].map(id_bits), [0, 1, 2, 2, 3, 4]);
    }
}
