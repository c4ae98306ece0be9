//! Guest memory: how it is made, and the names the rest of the crate uses for it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
};

use crate::layout::{MMIO_BASE, RAM_ABOVE_4G};

/// What guest memory is made of.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Zeroes of its own.
    Anonymous,
    /// A file that is written through.
    Shared(File),
    /// A file of which a written page becomes the machine's own.
    Private(File),
}

/// Guest-physical memory: one mapping per range of the memory map.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Guest memory as everybody shares it.
pub type SharedRam = Arc<GuestRam>;

/// The size of huge pages. Guest-physical and host addresses must agree below it, or the host can't use any.
const HUGE_PAGE: usize = 2 << 20;

/// No guest memory to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The host refused.
    #[error("can't map {bytes} bytes of guest memory")]
    Map {
        /// What was asked for.
        bytes: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file can't hold guest memory.
    #[error("the memory file has {found} bytes and the guest {wanted}")]
    FileSize {
        /// Bytes of the file.
        found: u64,
        /// Bytes of guest memory.
        wanted: u64,
    },
    /// The file can't be asked for its size.
    #[error("the memory file's size can't be read")]
    FileStatus(#[source] io::Error),
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

/// Maps guest memory; no page of it is touched. It stays until the process ends, as one process is one machine.
pub(crate) fn map_ram(mib: u32, memory: &Memory) -> Result<SharedRam, MemoryError> {
    if let Memory::Shared(file) | Memory::Private(file) = memory {
        let found = file.metadata().map_err(MemoryError::FileStatus)?.len();
        let wanted = u64::from(mib) << 20;
        if found != wanted {
            return Err(MemoryError::FileSize { found, wanted });
        }
    }
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, size) in ram_ranges(mib) {
        let (host, sharing) = match memory {
            Memory::Anonymous => (map_aligned(size, libc::PROT_READ | libc::PROT_WRITE)?, libc::MAP_PRIVATE),
            Memory::Shared(file) => (map_file(file, offset, size, libc::MAP_SHARED)?, libc::MAP_SHARED),
            Memory::Private(file) => (map_private(file, offset, size)?, libc::MAP_PRIVATE),
        };
        // SAFETY: `host` is the start of a mapping of at least `size` bytes that is never unmapped.
        let region =
            unsafe { MmapRegion::build_raw(host, size, libc::PROT_READ | libc::PROT_WRITE, sharing) };
        let region = GuestRegionMmap::new(region.map_err(MemoryError::Region)?, start);
        regions.push(region.ok_or(MemoryError::Overflow(start.0))?);
        offset += size;
    }
    GuestRam::from_regions(regions).map(Arc::new).map_err(MemoryError::Ranges)
}

/// A mapping of part of a file, at an aligned address: the kernel maps pages around one that is missing by windows of the
/// address, which are to be windows of the file as well.
fn map_file(file: &File, offset: usize, size: usize, sharing: libc::c_int) -> Result<*mut u8, MemoryError> {
    let place = map_aligned(size, libc::PROT_NONE)?;
    // SAFETY: it replaces part of the mapping that was just made, which nothing else uses.
    let start = unsafe {
        libc::mmap(
            place.cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::Map { bytes: size, source: io::Error::last_os_error() });
    }
    Ok(start.cast())
}

/// A private mapping of part of a file, in which large holes of the file are zeroes of the process's own from the start. Read
/// through the file, a hole would first become a page of it: a second page in memory for each one that the guest uses, which
/// a file system in memory can't give back, and which counts as this process's.
fn map_private(file: &File, offset: usize, size: usize) -> Result<*mut u8, MemoryError> {
    let start = map_file(file, offset, size, libc::MAP_PRIVATE)?;
    // The first and the last part always come from the file: by them the range is known from outside.
    let end = offset + size.saturating_sub(HUGE_PAGE);
    let mut position = offset + HUGE_PAGE;
    while let Some((hole, hole_end)) = next_hole(file, position, end) {
        position = hole_end;
        let first = hole.next_multiple_of(HUGE_PAGE);
        let length = (hole_end.saturating_sub(first)) & !(HUGE_PAGE - 1);
        if length == 0 {
            continue;
        }
        // SAFETY: it replaces part of the mapping that was just made, which nothing else uses: the range is within it.
        let (place, mapped) = unsafe {
            let place = start.add(first - offset).cast();
            (place, map_zeroes_at(place, length))
        };
        if mapped != place {
            return Err(MemoryError::Map { bytes: length, source: io::Error::last_os_error() });
        }
        // Guests that are restored are small, and many; see `growth`.
        // SAFETY: the mapping that was just made. Kernels without huge pages refuse, which changes nothing.
        unsafe { libc::madvise(place, length, libc::MADV_NOHUGEPAGE) };
    }
    Ok(start)
}

/// Maps zeroes in the place of what is there.
///
/// # Safety
/// Nothing else may use what is mapped there.
unsafe fn map_zeroes_at(place: *mut libc::c_void, length: usize) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: by the caller.
    unsafe { libc::mmap(place, length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) }
}

/// The next hole of `file` from `position` on and before `end`; none either if the file system doesn't know.
fn next_hole(file: &File, position: usize, end: usize) -> Option<(usize, usize)> {
    let seek = |from: usize, whence| {
        // SAFETY: lseek has no memory arguments.
        usize::try_from(unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) }).ok()
    };
    if position >= end {
        return None;
    }
    let hole = seek(position, libc::SEEK_HOLE).filter(|hole| *hole < end)?;
    // After the last data there is nothing to be found.
    Some((hole, seek(hole, libc::SEEK_DATA).unwrap_or(end).min(end)))
}

/// An anonymous mapping whose start is a multiple of [`HUGE_PAGE`], in the middle of a larger one that nobody may touch: what
/// runs past either end of guest memory faults.
fn map_aligned(size: usize, protection: libc::c_int) -> Result<*mut u8, MemoryError> {
    let bytes = size + 2 * HUGE_PAGE;
    // SAFETY: a new anonymous mapping, at an address that the kernel chooses.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::Map { bytes, source: io::Error::last_os_error() });
    }
    let start: *mut u8 = start.cast();
    let offset = match start.align_offset(HUGE_PAGE) {
        0 => HUGE_PAGE,
        offset => offset,
    };
    // SAFETY: the offset is at most HUGE_PAGE, and the mapping longer by twice that.
    let start = unsafe { start.add(offset) };
    // SAFETY: part of the mapping that was just made, which nothing else uses.
    if unsafe { libc::mprotect(start.cast(), size, protection) } != 0 {
        return Err(MemoryError::Map { bytes: size, source: io::Error::last_os_error() });
    }
    Ok(start)
}

/// Where RAM is: below the window for devices, and the rest above 4 GiB.
pub(crate) fn ram_ranges(mib: u32) -> Vec<(GuestAddress, usize)> {
    let size = u64::from(mib) << 20;
    let low = size.min(MMIO_BASE);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(RAM_ABOVE_4G), (size - low) as usize));
    }
    ranges
}

/// The end of the RAM that starts at address 0.
pub(crate) fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.iter().next().map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_is_aligned_to_huge_pages_and_zero() {
        let ram = map_ram(64, &Memory::Anonymous).unwrap();
        let host = ram.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(host.align_offset(HUGE_PAGE), 0);
        let last: u64 = ram.read_obj(GuestAddress((64 << 20) - 8)).unwrap();
        assert_eq!(last, 0);
    }

    #[test]
    fn nothing_may_be_touched_around_it() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(64 << 20).unwrap();
        for memory in [Memory::Anonymous, Memory::Private(file.try_clone().unwrap()), Memory::Shared(file)] {
            let ram = map_ram(64, &memory).unwrap();
            let first = ram.get_host_address(GuestAddress(0)).unwrap() as usize;
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let at = |address: usize| {
                let holds = |line: &&str| {
                    let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
                    let number = |text| usize::from_str_radix(text, 16).unwrap();
                    (number(from)..number(to)).contains(&address)
                };
                maps.lines().find(holds).and_then(|line| line.split(' ').nth(1)).unwrap()
            };
            assert!(at(first).starts_with("rw-"), "{memory:?}");
            assert_eq!([at(first - 1), at(first + (64 << 20))], ["---p"; 2], "{memory:?}");
        }
    }

    #[test]
    fn a_private_mapping_leaves_the_file_alone_and_a_shared_one_does_not() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        assert!(matches!(
            map_ram(64, &Memory::Shared(file.try_clone().unwrap())),
            Err(MemoryError::FileSize { found: 0, .. })
        ));
        file.set_len(64 << 20).unwrap();
        let private = map_ram(64, &Memory::Private(file.try_clone().unwrap())).unwrap();
        let shared = map_ram(64, &Memory::Shared(file)).unwrap();
        let (one, other) = (GuestAddress(0x1000), GuestAddress(0x2000));
        private.write_obj(1u64, one).unwrap();
        shared.write_obj(2u64, other).unwrap();
        assert_eq!(shared.read_obj::<u64>(one).unwrap(), 0);
        assert_eq!(private.read_obj::<u64>(other).unwrap(), 2);
    }

    #[test]
    fn what_a_guest_writes_into_a_hole_is_not_in_memory_twice() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let file =
            vmm_sys_util::tempfile::TempFile::new_in(std::path::Path::new("/dev/shm")).unwrap().into_file();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"data", 20 << 20).unwrap();
        let before = file.metadata().unwrap().blocks();
        let ram = map_ram(64, &Memory::Private(file.try_clone().unwrap())).unwrap();
        let mut text = [0; 4];
        ram.read_slice(&mut text, GuestAddress(20 << 20)).unwrap();
        assert_eq!(&text, b"data");
        let of_file = || file.metadata().unwrap().blocks() - before;
        for place in [3, 19, 23, 40, 61] {
            let place = GuestAddress(place << 20);
            assert_eq!(ram.read_obj::<u64>(place).unwrap(), 0);
            ram.write_obj(place.0, place).unwrap();
            assert_eq!(ram.read_obj::<u64>(place).unwrap(), place.0);
        }
        assert_eq!(of_file(), 0);
        // The ends stay the file's.
        for place in [0, 63 << 20] {
            ram.write_obj(1u8, GuestAddress(place)).unwrap();
        }
        assert_eq!(of_file(), 2 * 8);
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
