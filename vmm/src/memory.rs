//! Guest memory: how it is made, and the names the rest of the crate uses for it.

use std::sync::Arc;

use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{MMIO_BASE, RAM_ABOVE_4G};

/// Guest-physical memory: anonymous private mappings, one per range of the memory map.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Guest memory as everybody shares it. It lives until the last holder drops it.
pub type SharedRam = Arc<GuestRam>;

/// No guest memory to be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The address space doesn't allow it.
    #[error("can't map {mib} MiB of guest memory")]
    Map {
        /// What was asked for.
        mib: u32,
        /// Why not.
        #[source]
        source: FromRangesError,
    },
}

/// Maps guest memory, all zero and not yet backed by pages of the host.
pub fn map_ram(mib: u32) -> Result<SharedRam, MemoryError> {
    GuestRam::from_ranges(&ram_ranges(mib)).map(Arc::new).map_err(|source| MemoryError::Map { mib, source })
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
    use super::*;

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
