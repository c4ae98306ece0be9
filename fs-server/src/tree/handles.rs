//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, Result};

use super::room::Room;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    /// The node id it was opened by.
    node: u64,
    /// The open file.
    pub file: File,
    /// Where a directory's position is, if known. Held while the position of a directory, or of a file for `lseek`, is
    /// used.
    position: Mutex<Option<u64>>,
    /// How often it was read from or written to.
    transfers: AtomicU32,
}

/// All open files and directories. Handle numbers are never used twice.
pub(super) struct Handles {
    room: Arc<Room>,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Handle>>>,
}

impl Handles {
    /// None is open.
    pub(super) fn new(room: Arc<Room>) -> Self {
        Handles { room, next: AtomicU64::new(1), open: Mutex::default() }
    }

    /// Fails with `ENFILE` when another open file would be too many.
    pub(super) fn check_room(&self) -> Result<()> {
        if self.room.is_left() { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Keeps an open file; the number is for the guest.
    pub(super) fn insert(&self, node: u64, file: File) -> Result<u64> {
        if !self.room.take() {
            return Err(Errno::NFILE);
        }
        let mut open = self.lock();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(number, Arc::new(Handle::new(node, file)));
        Ok(number)
    }

    /// The open file of this number, if it was opened by this node id; else `EBADF`.
    pub(super) fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>> {
        self.lock().get(&number).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Closes it, once whoever uses it right now is done.
    pub(super) fn remove(&self, number: u64, node: u64) -> Result<()> {
        // Declared first, dropped last: closing may write back data.
        let _closed;
        let mut open = self.lock();
        match open.get(&number) {
            Some(handle) if handle.node == node => {
                _closed = open.remove(&number);
                self.room.give(1);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let closed = std::mem::take(&mut *self.lock());
        self.room.give(closed.len());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Handle>>> {
        // The map is sound after each statement, whoever may have panicked.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// A file that was opened by this node id.
    pub(crate) fn new(node: u64, file: File) -> Handle {
        Handle { node, file, position: Mutex::new(Some(0)), transfers: AtomicU32::new(0) }
    }

    /// The node id it was opened by.
    pub(crate) fn node(&self) -> u64 {
        self.node
    }

    /// Counts another transfer; tells how many there were before it.
    pub(crate) fn count_transfer(&self) -> u32 {
        self.transfers.fetch_add(1, Ordering::Relaxed)
    }

    /// Exclusive use of the file's position.
    pub(crate) fn lock_position(&self) -> MutexGuard<'_, Option<u64>> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
