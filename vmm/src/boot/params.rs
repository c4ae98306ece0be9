//! The "zero page": `struct boot_params` with the memory map.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BootError, write_failed};
use crate::layout::{CMDLINE, HIGH_RAM, MP_TABLE, ZERO_PAGE};
use crate::memory::GuestRam;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "A loader without an id of its own."
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn write(
    ram: &GuestRam,
    own_header: Option<setup_header>,
    cmdline_length: usize,
) -> Result<(), BootError> {
    let mut header = own_header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        ..setup_header::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = CMDLINE as u32;
    header.cmdline_size = cmdline_length as u32;

    let map = memory_map(ram);
    let mut params = boot_params { hdr: header, e820_entries: map.len() as u8, ..boot_params::default() };
    params.e820_table[..map.len()].copy_from_slice(&map);
    ram.write_obj(params, GuestAddress(ZERO_PAGE)).map_err(write_failed("the zero page"))
}

/// At most four entries: base memory, the MP table, and one or two ranges of RAM.
fn memory_map(ram: &GuestRam) -> Vec<boot_e820_entry> {
    let entry = |start, end, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let mut map = vec![entry(0, MP_TABLE, E820_RAM), entry(MP_TABLE, HIGH_RAM, E820_RESERVED)];
    for region in ram.iter() {
        let start = region.start_addr().0;
        map.push(entry(start.max(HIGH_RAM), start + region.len(), E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram_ranges;

    #[test]
    fn the_map_covers_all_ram_and_reserves_the_mp_table() {
        let ram = GuestRam::from_ranges(&ram_ranges(64)).unwrap();
        write(&ram, None, 7).unwrap();
        let params: boot_params = ram.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!(params.e820_entries, 3);
        let entry = |index: usize| {
            let entry = params.e820_table[index];
            (entry.addr, entry.size, entry.r#type)
        };
        assert_eq!(entry(0), (0, 0x9fc00, E820_RAM));
        assert_eq!(entry(1), (0x9fc00, 0x60400, E820_RESERVED));
        assert_eq!(entry(2), (0x10_0000, 63 << 20, E820_RAM));
        let header = params.hdr;
        assert_eq!({ header.cmdline_size }, 7);
        assert_eq!({ header.cmd_line_ptr }, 0x20000);
    }
}
