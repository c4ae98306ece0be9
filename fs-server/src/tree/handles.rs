//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, Result};

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
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
pub struct Handles {
    limit: usize,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Handle>>>,
}

impl Handles {
    /// Room for `limit` open files.
    pub fn new(limit: usize) -> Self {
        Handles { limit, next: AtomicU64::new(1), open: Mutex::default() }
    }

    /// Fails with `ENFILE` when another open file would be too many.
    pub fn check_room(&self) -> Result<()> {
        if self.lock().len() < self.limit { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Keeps an open file; the number is for the guest.
    pub fn insert(&self, node: u64, file: File) -> Result<u64> {
        let mut open = self.lock();
        if open.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(number, Arc::new(Handle::new(node, file)));
        Ok(number)
    }

    /// The open file of this number, if it was opened by this node id; else `EBADF`.
    pub fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>> {
        self.lock().get(&number).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Closes it, once whoever uses it right now is done.
    pub fn remove(&self, number: u64, node: u64) -> Result<()> {
        // Declared first, dropped last: closing may write back data.
        let _closed;
        let mut open = self.lock();
        match open.get(&number) {
            Some(handle) if handle.node == node => {
                _closed = open.remove(&number);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    /// Closes all.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Handle>>> {
        // The map is sound after each statement, whoever may have panicked.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// A file that was opened by this node id.
    pub fn new(node: u64, file: File) -> Handle {
        Handle { node, file, position: Mutex::new(Some(0)), transfers: AtomicU32::new(0) }
    }

    /// The node id it was opened by.
    pub fn node(&self) -> u64 {
        self.node
    }

    /// Counts another transfer; tells how many there were before it.
    pub fn count_transfer(&self) -> u32 {
        self.transfers.fetch_add(1, Ordering::Relaxed)
    }

    /// Exclusive use of the file's position.
    pub fn lock_position(&self) -> MutexGuard<'_, Option<u64>> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
