//! Which pages of a template's memory a machine has used: by what its VMM has mapped.
//!
//! The list that comes out is for the VMM, whose protocol describes it: first every page that was written, then one page of each
//! window in which any was only read, since the kernel maps those around it on the same occasion.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use bulkhead_vmm_protocol::PAGES_WRITTEN as WRITTEN;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Bits of an entry in `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): in memory, in swap space, and still
/// the file's.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Pages that the kernel maps at once when one of them is read (`fault_around_bytes`, 64 KiB unless changed).
const WINDOW: u32 = 16;

/// Entries of the page map that are read at once.
const CHUNK: usize = 32 * 1024;

/// The pages can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// A file about the process.
    #[error("can't read {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM has other memory.
    #[error("the pod did not start from the template")]
    NotMapped,
}

/// A mapping of the memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Of the mapping's start in the file, bytes.
    offset: u64,
}

/// The pages that were used, in their order.
#[derive(Debug, Default)]
struct Used {
    /// First and number of pages that follow each other.
    written: Vec<(u32, u32)>,
    /// The first of each window.
    read: Vec<u32>,
}

impl Used {
    /// Adds a page by its entry in the page map.
    fn add(&mut self, number: u32, entry: u64) {
        if entry & (PRESENT | SWAPPED) == 0 {
            return;
        }
        if entry & OF_FILE != 0 {
            if self.read.last().is_none_or(|last| last / WINDOW != number / WINDOW) {
                self.read.push(number);
            }
            return;
        }
        match self.written.last_mut() {
            Some((first, count)) if *first + *count == number => *count += 1,
            _ => self.written.push((number, 1)),
        }
    }

    fn list(&self) -> Vec<u8> {
        let written = self.written.iter().map(|&(first, count)| (first | WRITTEN, count));
        let read = self.read.iter().map(|&number| (number, 1));
        written.chain(read).flat_map(|(a, b)| [a.to_le_bytes(), b.to_le_bytes()].concat()).collect()
    }
}

/// The list of the pages of the file with this inode number that the process `pid` uses.
pub(crate) fn used_pages(pid: u32, inode: u64) -> Result<Vec<u8>, PagesError> {
    let failed = |path: &str| {
        let path = path.to_owned();
        move |source| PagesError::Read { path, source }
    };
    let path = format!("/proc/{pid}/maps");
    let maps = mappings(&fs::read_to_string(&path).map_err(failed(&path))?, inode);
    if maps.is_empty() {
        return Err(PagesError::NotMapped);
    }
    let path = format!("/proc/{pid}/pagemap");
    let pages = File::open(&path).map_err(failed(&path))?;
    let mut used = Used::default();
    let mut buffer = vec![0; CHUNK * 8];
    for map in maps {
        let mut address = map.start;
        while address < map.end {
            let count = (((map.end - address) / PAGE) as usize).min(CHUNK);
            let bytes = &mut buffer[..count * 8];
            pages.read_exact_at(bytes, address / PAGE * 8).map_err(failed(&path))?;
            let first = (map.offset + address - map.start) / PAGE;
            for (&entry, number) in bytes.as_chunks::<8>().0.iter().zip(first..) {
                used.add(number as u32, u64::from_le_bytes(entry));
            }
            address += count as u64 * PAGE;
        }
    }
    Ok(used.list())
}

/// The ranges of memory that stand for a file, from `/proc/PID/maps`: between writable mappings of it lie those of its holes,
/// which are zeroes of the process's own.
fn mappings(maps: &str, inode: u64) -> Vec<Mapping> {
    let mut ranges: Vec<Mapping> = Vec::new();
    for map in file_mappings(maps, inode) {
        match ranges.last_mut() {
            Some(range) if map.start.wrapping_sub(map.offset) == range.start.wrapping_sub(range.offset) => {
                range.end = map.end;
            }
            _ => ranges.push(map),
        }
    }
    ranges
}

fn file_mappings(maps: &str, inode: u64) -> Vec<Mapping> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let writable = words.next()?.starts_with("rw");
        let offset = words.next()?;
        let number: u64 = words.nth(1)?.parse().ok()?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let mapping = Mapping { start: hex(start)?, end: hex(end)?, offset: hex(offset)? };
        (writable && number == inode).then_some(mapping)
    };
    maps.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_mappings_are_found() {
        let maps = "7f0000000000-7f0000002000 rw-p 00001000 00:19 38     /run/t/memory\n\
                    7f0000003000-7f0000004000 r--p 00000000 00:19 38     /run/t/memory\n\
                    7f0000005000-7f0000006000 rw-p 00000000 00:00 0 \n\
                    7f0000007000-7f0000008000 rw-p 00000000 fe:01 380    /other\n";
        let expected = Mapping { start: 0x7f00_0000_0000, end: 0x7f00_0000_2000, offset: 0x1000 };
        assert_eq!(mappings(maps, 38), [expected]);
        let with_holes = "7f0000000000-7f0000002000 rw-p 00000000 00:19 38     /run/t/memory\n\
                          7f0000002000-7f0000005000 rw-p 00000000 00:00 0 \n\
                          7f0000005000-7f0000006000 rw-p 00005000 00:19 38     /run/t/memory\n\
                          7f0000016000-7f0000017000 rw-p 00006000 00:19 38     /run/t/memory\n";
        let expected =
            [(0x7f00_0000_0000, 0x7f00_0000_6000, 0), (0x7f00_0001_6000, 0x7f00_0001_7000, 0x6000)];
        assert_eq!(
            mappings(with_holes, 38),
            expected.map(|(start, end, offset)| Mapping { start, end, offset })
        );
    }

    #[test]
    fn written_pages_are_all_listed_and_read_ones_by_windows() {
        let mut used = Used::default();
        let (read, own) = (PRESENT | OF_FILE, PRESENT);
        for (number, entry) in [
            (0, read),
            (1, read),
            (2, own),
            (3, SWAPPED),
            (4, 0),
            (5, own),
            (9, read),
            (21, read),
            (30, read),
        ] {
            used.add(number, entry);
        }
        assert_eq!(used.written, [(2, 2), (5, 1)]);
        assert_eq!(used.read, [0, 21]);
        let expected: Vec<u8> = [WRITTEN | 2, 2, WRITTEN | 5, 1, 0, 1, 21, 1]
            .iter()
            .flat_map(|n: &u32| n.to_le_bytes())
            .collect();
        assert_eq!(used.list(), expected);
    }

    #[test]
    fn a_process_of_ours_is_read() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * PAGE).unwrap();
        let inode = file.metadata().unwrap().ino();
        let pid = std::process::id();
        assert!(matches!(used_pages(pid, inode), Err(PagesError::NotMapped)));
        use std::os::fd::AsRawFd;
        // SAFETY: a new private mapping of a file of eight pages, of which one is written.
        unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                8 * PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            start.cast::<u8>().add(3 * PAGE as usize).write_volatile(1);
        }
        assert_eq!(
            used_pages(pid, inode).unwrap(),
            [(WRITTEN | 3).to_le_bytes(), 1u32.to_le_bytes()].concat()
        );
    }
}
