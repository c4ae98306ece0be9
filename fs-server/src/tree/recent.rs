//! Files in a session in which the guest tells nobody what it opens and closes (`FUSE_NO_OPEN_SUPPORT`): those that were read or
//! written lately are held open, by their node ids.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Result;

use super::handles::Handle;

/// The most that are open at a time.
pub(super) const LIMIT: usize = 128;

/// What a file is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Access {
    /// To be read, or anything that any open file will do for.
    Read,
    /// To be changed.
    Write,
}

/// The open files.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    by_node: BTreeMap<u64, Entry>,
    /// Counts uses.
    now: u64,
}

#[derive(Debug)]
struct Entry {
    open: Arc<Handle>,
    access: Access,
    used: u64,
}

impl Recent {
    /// The file of this node id; opens it if it is not here, or not for this.
    pub(super) fn get(
        &self,
        node: u64,
        access: Access,
        open: impl FnOnce() -> Result<File>,
    ) -> Result<Arc<Handle>> {
        if let Some(found) = self.find(node, access) {
            return Ok(found);
        }
        let opened = Arc::new(Handle::new(node, open()?));
        self.put(opened.clone(), access);
        Ok(opened)
    }

    /// The file of this node id if it is here, open for this.
    pub(super) fn find(&self, node: u64, access: Access) -> Option<Arc<Handle>> {
        let mut table = self.lock();
        table.now += 1;
        let now = table.now;
        let entry = table.by_node.get_mut(&node).filter(|entry| entry.access >= access)?;
        entry.used = now;
        Some(entry.open.clone())
    }

    /// Keeps a file that was opened for this.
    pub(super) fn put(&self, open: Arc<Handle>, access: Access) {
        // Declared first, dropped last: closing may write back data.
        let (_evicted, _replaced);
        let mut table = self.lock();
        table.now += 1;
        let used = table.now;
        let oldest = || table.by_node.iter().min_by_key(|(_, entry)| entry.used).map(|(node, _)| *node);
        let evicted = if table.by_node.len() >= LIMIT { oldest() } else { None };
        _evicted = evicted.and_then(|node| table.by_node.remove(&node));
        _replaced = table.by_node.insert(open.node(), Entry { open, access, used });
    }

    /// Closes what the guest has forgotten, once whoever uses it right now is done.
    pub(super) fn remove(&self, node: u64) {
        let _closed = self.lock().by_node.remove(&node);
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let _closed = std::mem::take(&mut self.lock().by_node);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is sound after each statement, whoever may have panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> Result<File> {
        Ok(File::open("/dev/null").unwrap())
    }

    #[test]
    fn a_file_is_opened_once_for_each_use() {
        let recent = Recent::default();
        let read = recent.get(1, Access::Read, null).unwrap();
        assert!(Arc::ptr_eq(&read, &recent.get(1, Access::Read, || unreachable!()).unwrap()));
        let written = recent.get(1, Access::Write, null).unwrap();
        assert!(!Arc::ptr_eq(&read, &written));
        for access in [Access::Read, Access::Write] {
            assert!(Arc::ptr_eq(&written, &recent.get(1, access, || unreachable!()).unwrap()));
        }
        recent.remove(1);
        assert!(recent.find(1, Access::Read).is_none());
    }

    #[test]
    fn the_one_that_was_used_longest_ago_is_closed() {
        let recent = Recent::default();
        for node in 0..LIMIT as u64 {
            recent.get(node, Access::Read, null).unwrap();
        }
        recent.find(0, Access::Read).unwrap();
        recent.get(1000, Access::Read, null).unwrap();
        assert!(recent.find(0, Access::Read).is_some());
        assert!(recent.find(1, Access::Read).is_none());
        recent.clear();
        assert!(recent.find(1000, Access::Read).is_none());
    }
}
