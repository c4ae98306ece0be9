//! The MP configuration table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI finds its CPUs, its
//! IOAPIC and where interrupts arrive.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, write_failed};
use crate::layout::{IOAPIC_BASE, LAPIC_BASE, MP_TABLE, irq};
use crate::memory::GuestRam;

/// Version that local APICs report.
const LAPIC_VERSION: u8 = 0x14;
/// Version that our IOAPIC reports.
const IOAPIC_VERSION: u8 = 0x11;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Family 6 and the features APIC and FPU: what kernels print, and nothing else.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;

const ISA_BUS: u8 = 0;
const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
/// Active high, edge-triggered.
const ACTIVE_HIGH_EDGE: u16 = 1 | 1 << 2;
const ALL_LAPICS: u8 = 0xff;

/// The table's size is bounded by the limits on vCPUs (16) and devices (15): it fits its KiB.
pub(super) fn write(ram: &GuestRam, vcpus: u8, devices: usize) -> Result<(), BootError> {
    let mut bytes = floating_pointer(MP_TABLE + 16);
    bytes.extend(configuration(vcpus, devices));
    ram.write_slice(&bytes, GuestAddress(MP_TABLE)).map_err(write_failed("the MP table"))
}

/// The structure that kernels search for.
fn floating_pointer(table: u64) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((table as u32).to_le_bytes());
    // Length in 16-byte units, revision 1.4, checksum, five feature bytes.
    bytes.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn configuration(vcpus: u8, devices: usize) -> Vec<u8> {
    // APIC ids must differ: the IOAPIC takes the one after the CPUs'.
    let ioapic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };

    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![0, id, LAPIC_VERSION, flags];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = (IOAPIC_BASE as u32).to_le_bytes();
    add(&[2, ioapic_id, IOAPIC_VERSION, 1, a, b, c, d]);
    for device in 0..devices {
        let [flags_low, flags_high] = ACTIVE_HIGH_EDGE.to_le_bytes();
        let irq = irq(device) as u8;
        add(&[3, INTERRUPT, flags_low, flags_high, ISA_BUS, irq, ioapic_id, irq]);
    }
    add(&[4, EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[4, NMI, 0, 0, ISA_BUS, 0, ALL_LAPICS, 1]);

    let mut table = b"PCMP".to_vec();
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"BULKHEADMICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend((LAPIC_BASE as u32).to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    set_checksum(&mut table, 7);
    table
}

/// Makes all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], position: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[position] = sum.wrapping_neg();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_checksums_hold_and_the_largest_table_fits() {
        let pointer = floating_pointer(MP_TABLE + 16);
        assert_eq!(pointer.len(), 16);
        assert_eq!(sum(&pointer), 0);
        let table = configuration(16, 16);
        assert_eq!(sum(&table), 0);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        assert!(pointer.len() + table.len() <= 1024);
    }

    #[test]
    fn the_entries_are_counted_and_of_the_right_size() {
        let table = configuration(2, 3);
        let count = u16::from_le_bytes([table[34], table[35]]);
        assert_eq!(count, 2 + 1 + 1 + 3 + 2);
        let mut rest = &table[44..];
        let mut seen = Vec::new();
        while let Some(kind) = rest.first() {
            seen.push(*kind);
            rest = &rest[if *kind == 0 { 20 } else { 8 }..];
        }
        assert_eq!(seen, [0, 0, 1, 2, 3, 3, 3, 4, 4]);
    }
}
