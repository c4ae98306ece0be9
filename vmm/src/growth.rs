//! When a guest stops being a small one: from then on what it has not used of its memory yet comes in huge pages.
//!
//! Most guests are small, and many: of a huge page they would use little. So guest memory begins with ordinary pages. A guest that
//! has moved some megabytes through its devices is about to fill its page cache or its heap, and each ordinary page would cost it
//! an exit and two faults.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;

/// Bytes that a guest moves before it counts as growing. To boot takes half of that.
const ENOUGH: u64 = 8 << 20;

/// Bytes moved so far, in either direction; one process is one machine.
static MOVED: AtomicU64 = AtomicU64::new(0);

/// Counts bytes that a device has moved into guest memory or out of it.
pub(crate) fn moved(ram: &GuestRam, bytes: u64) {
    if is_crossed(MOVED.fetch_add(bytes, Ordering::Relaxed), bytes) {
        allow_huge_pages(ram);
    }
}

fn is_crossed(before: u64, bytes: u64) -> bool {
    before < ENOUGH && before.saturating_add(bytes) >= ENOUGH
}

fn allow_huge_pages(ram: &GuestRam) {
    for region in ram.iter() {
        // What is written through to a file is a template in the making.
        if region.flags() & libc::MAP_SHARED != 0 {
            continue;
        }
        let (Ok(size), start) = (usize::try_from(region.len()), region.as_ptr()) else { continue };
        // SAFETY: the range is a mapping of guest memory, which lives as long as the process, and whose contents stay as they
        // are. Kernels without huge pages refuse, which changes nothing.
        unsafe { libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_enough_once() {
        for (before, bytes, crossed) in [
            (0, ENOUGH - 1, false),
            (0, ENOUGH, true),
            (ENOUGH - 1, 1, true),
            (ENOUGH, 1, false),
            (ENOUGH - 1, 0, false),
            (1, u64::MAX, true),
        ] {
            assert_eq!(is_crossed(before, bytes), crossed, "{before} {bytes}");
        }
    }
}
