//! Listing directories.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::{Errno, Result};

use super::SharedTree;
use super::handles::Handle;

/// Bytes of entries that are asked of the host at a time.
const BUFFER: usize = 8 * 1024;

/// One entry as the host lists it.
pub struct Listed<'a> {
    pub name: &'a CStr,
    pub number: u64,
    pub kind: FileType,
    /// Where the next entry is.
    pub next: u64,
}

impl<'a> Listed<'a> {
    /// As the FUSE library wants it.
    pub fn to_dir_entry(&self, guest_number: u64) -> DirEntry<'a> {
        DirEntry {
            ino: guest_number,
            offset: self.next,
            type_: dirent_type(self.kind),
            name: self.name.to_bytes(),
        }
    }

    /// Whether it is the directory itself or its parent.
    pub fn is_dots(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }
}

/// Calls `add` for each entry from `offset` on, until it answers `false`: no more room.
///
/// An error counts only before the first entry; after that the guest gets what there is, and the error with its next
/// request.
pub fn list(handle: &Handle, offset: u64, mut add: impl FnMut(&Listed<'_>) -> Result<bool>) -> Result<()> {
    let _position = handle.lock_position();
    seek(&handle.file, SeekFrom::Start(offset))?;
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut entries = RawDir::new(&handle.file, &mut buffer);
    let mut first = true;
    while let Some(entry) = entries.next() {
        let result = entry.and_then(|entry| {
            add(&Listed {
                name: entry.file_name(),
                number: entry.ino(),
                kind: entry.file_type(),
                next: entry.next_entry_cookie(),
            })
        });
        match result {
            Ok(true) => first = false,
            Ok(false) => break,
            Err(errno) if first => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(())
}

impl SharedTree {
    /// Looks up a listed entry so that it can be told along with its name. An entry without a node id means that the
    /// guest has to ask for it itself: the name is gone already, or there is no room for another inode.
    pub(super) fn look_up_listed(&self, directory: u64, listed: &Listed<'_>) -> Result<Entry> {
        if listed.is_dots() {
            return Ok(Entry::default());
        }
        match self.look_up(directory, listed.name) {
            Err(Errno::NOENT | Errno::NFILE | Errno::MFILE | Errno::ACCESS) => Ok(Entry::default()),
            result => result,
        }
    }
}

/// `DT_*` of a file type.
fn dirent_type(kind: FileType) -> u32 {
    // IFTODT of dirent.h.
    kind.as_raw_mode() >> 12
}
