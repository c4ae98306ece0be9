//! Mounts below volumes that the guest has gone into, and what becomes of them when the host unmounts them.
//!
//! Nothing tells the guest, which looks again sooner or later; until then the server would keep the file system busy on the
//! host. So what it holds there it lets go, and whatever the guest still asks about it is answered with `ESTALE`.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::SharedTree;
use super::host::{Attributes, open_entry};

/// Mounts by their numbers, each with the directory and the name by which it was entered.
#[derive(Debug, Default)]
pub(super) struct Crossings(Mutex<HashMap<u64, (u64, CString)>>);

impl Crossings {
    /// Notes that the mount was entered by this name in the directory with that node id.
    pub(super) fn note(&self, mount: u64, parent: u64, name: &CStr) {
        let mut known = self.lock();
        if !known.get(&mount).is_some_and(|(directory, by)| *directory == parent && by.as_c_str() == name) {
            known.insert(mount, (parent, name.to_owned()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (u64, CString)>> {
        // The map is sound after each statement, whoever may have panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SharedTree {
    /// Lets go of all files on mounts that are not there any more.
    pub(crate) fn drop_unmounted(&self) {
        let mut known: Vec<(u64, (u64, CString))> =
            self.crossings.lock().iter().map(|(mount, by)| (*mount, by.clone())).collect();
        let mut dropped = HashSet::new();
        loop {
            let is_gone = |mount, (parent, name): &(u64, CString)| {
                dropped.contains(parent) || !self.leads_to(*parent, name, mount)
            };
            let mut gone: HashSet<u64> =
                known.iter().filter(|(mount, by)| is_gone(*mount, by)).map(|(mount, _)| *mount).collect();
            if gone.is_empty() {
                return;
            }
            known.retain(|(mount, _)| !gone.contains(mount));
            // The kernel gives a mount's number to the next one. Who enters that notes it before its files are known, so nobody
            // does while this is locked.
            let mut crossings = self.crossings.lock();
            gone.retain(|mount| crossings.get(mount).is_none_or(|by| is_gone(*mount, by)));
            crossings.retain(|mount, _| !gone.contains(mount));
            let nodes = self.inodes.drop_mounts(&gone);
            if let Some(recent) = &self.recent {
                nodes.iter().for_each(|node| recent.remove(*node));
            }
            dropped.extend(nodes);
        }
    }

    /// Whether a name in a directory still leads to this mount. What can't be told counts as yes.
    fn leads_to(&self, parent: u64, name: &CStr, mount: u64) -> bool {
        let Ok(parent) = self.inodes.get(parent) else { return true };
        match open_entry(&*parent, name) {
            Ok(found) => Attributes::of(&found).map_or(true, |attributes| attributes.mount_id() == mount),
            Err(errno) => errno != rustix::io::Errno::NOENT,
        }
    }
}
