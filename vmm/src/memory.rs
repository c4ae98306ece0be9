//! Guest memory: how it is made, and the names the rest of the crate uses for it.

use std::io;
use std::ptr;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
};

use crate::layout::{MMIO_BASE, RAM_ABOVE_4G};

/// Guest-physical memory: anonymous private mappings, one per range of the memory map.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Guest memory as everybody shares it.
pub type SharedRam = Arc<GuestRam>;

/// The size of huge pages. Guest-physical and host addresses must agree below it, or the host can't use any.
const HUGE_PAGE: usize = 2 << 20;

/// No guest memory to be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused.
    #[error("can't map {bytes} bytes of guest memory")]
    Map {
        /// What was asked for.
        bytes: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A mapping that can't be guest memory.
    #[error("a mapping can't be used as guest memory")]
    Region(#[source] MmapRegionError),
    /// Ranges that don't fit together.
    #[error("the ranges of guest memory don't fit together")]
    Ranges(#[source] GuestRegionCollectionError),
    /// A range past the end of the address space.
    #[error("guest memory at {0:#x} reaches past the end of the address space")]
    Overflow(u64),
}

/// Maps guest memory, all zero and not yet backed by pages of the host. It stays until the process ends, as one process
/// is one machine.
pub fn map_ram(mib: u32) -> Result<SharedRam, MemoryError> {
    let regions = ram_ranges(mib)
        .into_iter()
        .map(|(start, size)| {
            let host = map_aligned(size)?;
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
            // SAFETY: `host` is the start of a mapping of at least `size` bytes that is never unmapped.
            let region = unsafe { MmapRegion::build_raw(host, size, protection, flags) };
            GuestRegionMmap::new(region.map_err(MemoryError::Region)?, start)
                .ok_or(MemoryError::Overflow(start.0))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map(Arc::new).map_err(MemoryError::Ranges)
}

/// A mapping whose start is a multiple of [`HUGE_PAGE`]; some address space around it is wasted.
fn map_aligned(size: usize) -> Result<*mut u8, MemoryError> {
    let bytes = size + HUGE_PAGE;
    // SAFETY: a new anonymous mapping, at an address that the kernel chooses.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::Map { bytes, source: io::Error::last_os_error() });
    }
    let start: *mut u8 = start.cast();
    let offset = start.align_offset(HUGE_PAGE);
    // SAFETY: the offset is less than HUGE_PAGE, which is how much longer the mapping is.
    Ok(unsafe { start.add(offset) })
}

/// Where RAM is: below the window for devices, and the rest above 4 GiB.
pub fn ram_ranges(mib: u32) -> Vec<(GuestAddress, usize)> {
    let size = u64::from(mib) << 20;
    let low = size.min(MMIO_BASE);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(RAM_ABOVE_4G), (size - low) as usize));
    }
    ranges
}

/// The end of the RAM that starts at address 0.
pub fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.iter().next().map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_is_aligned_to_huge_pages_and_zero() {
        let ram = map_ram(64).unwrap();
        let host = ram.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(host.align_offset(HUGE_PAGE), 0);
        let last: u64 = ram.read_obj(GuestAddress((64 << 20) - 8)).unwrap();
        assert_eq!(last, 0);
    }

    #[test]
    fn small_guests_have_one_range() {
        assert_eq!(ram_ranges(128), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ram_ranges(3328), [(GuestAddress(0), 0xd000_0000)]);
    }

    #[test]
    fn large_guests_leave_the_window_for_devices_free() {
        let ranges = ram_ranges(8192);
        assert_eq!(ranges, [(GuestAddress(0), 0xd000_0000), (GuestAddress(1 << 32), 0x1_3000_0000)]);
        assert_eq!(ranges.iter().map(|range| range.1).sum::<usize>(), 8 << 30);
    }
}
