//! The GDT and the page tables that the 64-bit boot protocol starts with: the first 4 GiB mapped one to one.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, write_failed};
use crate::layout::{GDT, PAGE_TABLES};
use crate::memory::GuestRam;

/// `__BOOT_CS`: a 64-bit code segment.
pub(crate) const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS`: a flat data segment.
pub(crate) const DATA_SELECTOR: u16 = 0x18;

/// Null, null, code (64-bit, execute and read), data (read and write), each with base 0 and limit 4 GiB.
pub(crate) const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PAGE: u64 = 4096;
/// Page directories, each for 1 GiB.
const DIRECTORIES: u64 = 4;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

pub(super) fn write(ram: &GuestRam) -> Result<(), BootError> {
    let mut gdt = [0; 32];
    for (bytes, entry) in gdt.as_chunks_mut::<8>().0.iter_mut().zip(GDT_ENTRIES) {
        *bytes = entry.to_le_bytes();
    }
    ram.write_slice(&gdt, GuestAddress(GDT)).map_err(write_failed("the GDT"))?;

    let pdpt = PAGE_TABLES + PAGE;
    let directories = pdpt + PAGE;
    let failed = || write_failed("page tables");
    ram.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES)).map_err(failed())?;
    for directory in 0..DIRECTORIES {
        let entry = (directories + directory * PAGE) | PRESENT_WRITABLE;
        ram.write_obj(entry, GuestAddress(pdpt + 8 * directory)).map_err(failed())?;
        let mut table = [0; PAGE as usize];
        for (bytes, page) in table.as_chunks_mut::<8>().0.iter_mut().zip(directory * 512..) {
            *bytes = (page << 21 | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes();
        }
        ram.write_slice(&table, GuestAddress(directories + directory * PAGE)).map_err(failed())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_4_gib_are_mapped_one_to_one() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&ram).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            ram.read_obj(GuestAddress((table & !0xfff) + 8 * index)).unwrap()
        };
        for address in [0u64, 0x10_0123, 0x4020_0000, 0xd000_0000, 0xffff_ffff] {
            let pdpt = entry(PAGE_TABLES, address >> 39);
            let directory = entry(pdpt, address >> 30 & 511);
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(page & 0x83, 0x83, "{address:#x}");
            assert_eq!(page & !0x1f_ffff | address & 0x1f_ffff, address);
        }
    }
}
