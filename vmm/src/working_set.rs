//! The pages of a template that its guests are known to use first: mapped in advance, and copied where guests write.
//!
//! A page that the guest finds missing costs an exit and a fault of its own, or two if it is read before it is written.
//! Mapped in ranges, ahead of time and while this process waits for the host's kernel anyway, the same pages cost a fraction.
//!
//! [`bulkhead_vmm_protocol::PrepareConfig`] says what the file looks like.

use std::fs::File;
use std::io::{self, Read, Seek};

use bulkhead_vmm_protocol::PAGES_WRITTEN as WRITTEN;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;

/// Bytes of a page.
const PAGE: usize = 4096;

/// Bytes of an entry.
const ENTRY: usize = 8;

/// The largest file, in bytes. A guest that starts a container touches pages in a few hundred ranges.
const MAX_FILE: usize = 1 << 20;

/// The most pages that are copied in advance, whatever the file says: 64 MiB.
const MAX_WRITTEN: usize = 16 * 1024;

/// The file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// It can't be read.
    #[error("the working set can't be read")]
    Read(#[source] io::Error),
    /// It has more than [`MAX_FILE`] bytes, or not a multiple of [`ENTRY`].
    #[error("a working set can't have {0} bytes")]
    Size(usize),
    /// A range that is empty, or not within one range of guest memory.
    #[error("the working set names {count} pages from number {first} on, which the guest does not have")]
    Range {
        /// The first page.
        first: usize,
        /// How many.
        count: usize,
    },
    /// More than anybody would want copied.
    #[error("the working set names more than {MAX_WRITTEN} pages to copy")]
    TooMany,
}

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    first: usize,
    count: usize,
    written: bool,
}

/// Maps the pages that `file` names. That the host can't map some of them is no error: the guest will ask again.
pub fn populate(ram: &GuestRam, file: &mut File) -> Result<(), WorkingSetError> {
    for pages in read(file)? {
        let address = locate(ram, pages)?;
        let advice = if pages.written { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        // SAFETY: the range is part of a mapping of guest memory, which lives as long as the process. Its contents don't
        // change: pages are mapped, or copied, as they are.
        let result = unsafe { libc::madvise(address.cast(), pages.count * PAGE, advice) };
        if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            // Before Linux 5.14 there is no such advice.
            return Ok(());
        }
    }
    Ok(())
}

fn read(file: &mut File) -> Result<Vec<Pages>, WorkingSetError> {
    let mut bytes = Vec::new();
    // The position may be shared with others that read it.
    file.rewind().map_err(WorkingSetError::Read)?;
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes).map_err(WorkingSetError::Read)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Vec<Pages>, WorkingSetError> {
    let (entries, []) = bytes.as_chunks::<ENTRY>() else { return Err(WorkingSetError::Size(bytes.len())) };
    if bytes.len() > MAX_FILE {
        return Err(WorkingSetError::Size(bytes.len()));
    }
    let pages = entries.iter().map(|&[a, b, c, d, e, f, g, h]| {
        let first = u32::from_le_bytes([a, b, c, d]);
        Pages {
            first: (first & !WRITTEN) as usize,
            count: u32::from_le_bytes([e, f, g, h]) as usize,
            written: first & WRITTEN != 0,
        }
    });
    let pages: Vec<Pages> = pages.collect();
    let written = pages.iter().filter(|pages| pages.written);
    if written.fold(0, |total: usize, pages| total.saturating_add(pages.count)) > MAX_WRITTEN {
        return Err(WorkingSetError::TooMany);
    }
    Ok(pages)
}

/// Where pages of the memory file are mapped.
fn locate(ram: &GuestRam, Pages { first, count, .. }: Pages) -> Result<*mut u8, WorkingSetError> {
    let mut before = 0;
    for region in ram.iter() {
        let pages = region.len() as usize / PAGE;
        let within = first.checked_sub(before).filter(|within| *within < pages);
        if let Some(within) = within {
            return if count > 0 && count <= pages - within {
                Ok(region.as_ptr().wrapping_add(within * PAGE))
            } else {
                Err(WorkingSetError::Range { first, count })
            };
        }
        before += pages;
    }
    Err(WorkingSetError::Range { first, count })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::memory::{Memory, map_ram};

    fn entry(first: u32, count: u32) -> Vec<u8> {
        [first.to_le_bytes(), count.to_le_bytes()].concat()
    }

    /// What the kernel says of a page of this process: present, and of its own (not the file's).
    fn state_of(address: *mut u8) -> (bool, bool) {
        let mut word = [0; 8];
        let map = File::open("/proc/self/pagemap").unwrap();
        map.read_exact_at(&mut word, address as u64 / PAGE as u64 * 8).unwrap();
        let word = u64::from_le_bytes(word);
        (word >> 63 == 1, word >> 61 & 1 == 0)
    }

    #[test]
    fn named_pages_are_mapped_and_those_that_are_written_copied() {
        let memory = TempFile::new().unwrap().into_file();
        memory.set_len(64 << 20).unwrap();
        memory.write_all_at(b"template", 5 * PAGE as u64).unwrap();
        let ram = map_ram(64, &Memory::Private(memory)).unwrap();
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&[entry(2, 1), entry(WRITTEN | 4, 2)].concat()).unwrap();
        populate(&ram, &mut file).unwrap();
        let page = |number: u64| ram.get_host_address(GuestAddress(number * PAGE as u64)).unwrap();
        assert_eq!(state_of(page(2)), (true, false));
        assert_eq!(state_of(page(5)), (true, true));
        assert!(!state_of(page(4096)).0);
        let mut text = [0; 8];
        ram.read_slice(&mut text, GuestAddress(5 * PAGE as u64)).unwrap();
        assert_eq!(&text, b"template");
    }

    #[test]
    fn what_the_guest_does_not_have_is_refused() {
        let ram = map_ram(64, &Memory::Anonymous).unwrap();
        let last = (64 << 20) / PAGE as u32 - 1;
        let check = |bytes: &[u8]| {
            let mut file = TempFile::new().unwrap().into_file();
            file.write_all(bytes).unwrap();
            populate(&ram, &mut file)
        };
        assert!(check(&entry(last, 1)).is_ok());
        for (first, count) in [(last, 2), (last + 1, 1), (0, 0), (u32::MAX >> 1, 1), (1, u32::MAX)] {
            assert!(
                matches!(check(&entry(first, count)), Err(WorkingSetError::Range { .. })),
                "{first} {count}"
            );
        }
        assert!(matches!(check(&[0; 7]), Err(WorkingSetError::Size(7))));
        assert!(matches!(check(&vec![0; MAX_FILE + ENTRY]), Err(WorkingSetError::Size(_))));
        assert!(matches!(check(&entry(WRITTEN, u32::MAX)), Err(WorkingSetError::TooMany)));
    }
}
