//! Listing directories.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::{Errno, Result};

use super::SharedTree;
use super::handles::Handle;
use super::inodes::Inode;
use super::mounts::Mount;

/// The most bytes of entries that are asked of the host at a time, and the least: one entry with the longest name.
const BUFFER: (usize, usize) = (280, 8 * 1024);

/// How many bytes of the host's entries fit into a reply of `size` bytes, however they are cut: the shortest entry has 24
/// bytes on the host, and 32 in a reply, or 160 with attributes.
pub(super) fn fitting(size: u32, with_attributes: bool) -> usize {
    let in_reply = if with_attributes { 160 } else { 32 };
    (size as usize / in_reply * 24).clamp(BUFFER.0, BUFFER.1)
}

/// One entry as the host lists it.
pub(super) struct Listed<'a> {
    pub name: &'a CStr,
    pub number: u64,
    pub kind: FileType,
    /// Where the next entry is.
    pub next: u64,
}

impl<'a> Listed<'a> {
    /// As the FUSE library wants it.
    pub(super) fn to_dir_entry(&self, guest_number: u64) -> DirEntry<'a> {
        DirEntry {
            ino: guest_number,
            offset: self.next,
            type_: dirent_type(self.kind),
            name: self.name.to_bytes(),
        }
    }

    /// Whether it is the directory itself or its parent.
    pub(super) fn is_dots(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }
}

/// Calls `add` for entries from `offset` on, as many as the host gives in `room` bytes, until it answers `false`: no more
/// space. None at all means that there are no more.
///
/// Where the guest goes on from where it was, the directory's own position is used and not set: on some file systems
/// (tmpfs before Linux 6.6) an offset is a count, and means another entry once others are removed.
///
/// An error counts only before the first entry; after that the guest gets what there is, and the error with its next
/// request.
pub(super) fn list(
    handle: &Handle,
    offset: u64,
    room: usize,
    mut add: impl FnMut(&Listed<'_>) -> Result<bool>,
) -> Result<()> {
    let mut position = handle.lock_position();
    if position.take() != Some(offset) {
        seek(&handle.file, SeekFrom::Start(offset))?;
    }
    let mut buffer = [MaybeUninit::uninit(); BUFFER.1];
    let mut entries = RawDir::new(&handle.file, &mut buffer[..room.min(BUFFER.1)]);
    let mut reached = offset;
    while let Some(entry) = entries.next().transpose()? {
        let listed = Listed {
            name: entry.file_name(),
            number: entry.ino(),
            kind: entry.file_type(),
            next: entry.next_entry_cookie(),
        };
        let next = listed.next;
        match add(&listed) {
            Ok(true) => reached = next,
            Err(errno) if reached == offset => return Err(errno),
            Ok(false) | Err(_) => return Ok(()),
        }
        if entries.is_buffer_empty() {
            break;
        }
    }
    *position = Some(reached);
    Ok(())
}

impl SharedTree {
    /// The number that the guest will find the entry to have. Where a directory's files may be on other devices than itself, a
    /// listing does not say on which: then `found` tells, by the mount that the entry is reached by and its part of it.
    pub(super) fn number_of_listed(
        &self,
        directory: &Inode,
        listed: &Listed<'_>,
        found: impl FnOnce() -> Result<(u64, Arc<Mount>)>,
    ) -> u64 {
        let mount = &directory.mount;
        if !mount.has_parts() || listed.is_dots() {
            return mount.guest_number(directory.view, listed.number);
        }
        match found() {
            Ok((mount_id, part)) if mount_id == directory.mount_id() => {
                part.guest_number(directory.view, listed.number)
            }
            // What something is mounted on is the directory's own; what is gone already has no number.
            _ => mount.guest_number(directory.view, listed.number),
        }
    }

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
