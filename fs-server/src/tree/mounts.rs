//! What the guest sees of the host's file systems: what tells their inode numbers apart, and how long the guest may cache
//! them.
//!
//! For the guest a view of the tree is one file system with one device number, whatever is in it, so a file's number must be
//! unique across all file systems in the tree: each gets a small slot number, which is put into the upper bits. It stays the same while the
//! guest knows any file of it, and is free for another one afterwards, so pods may mount and unmount for ever.
//!
//! Programs whose inode numbers have 32 bits fail at larger ones. So files of the file system that a view is for have the numbers that they
//! have on the host, and elsewhere the first few slots fit into 32 bits.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bulkhead_vmm_protocol::view_of;
use rustix::io::{Errno, Result};

use super::nodes::Kept;

/// Bits of a small inode number below a small slot: together 32.
const SMALL_BITS: (u32, u16) = (28, 4);

/// Bits of an inode number below the slot. Numbers that need more (overlayfs marks its layers in the topmost bits)
/// are mixed with the slot, and stay unique as long as slots are small.
const NUMBER_BITS: u32 = 48;

/// The most mounts at a time.
const MAX_SLOTS: u16 = u16::MAX;

/// Who may change a mount's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sharing {
    /// The host too (volumes, `ConfigMap`s): the guest must look again soon.
    WithHost,
    /// Only the guest (a container's root file system).
    GuestOnly,
    /// Only the guest, whose kernel mounts an overlay with its upper directory here: a container's changes.
    Changes,
    /// Nobody (layers of an image): the guest may rely on what it was told. Its kernel makes an overlay of it, which takes it badly when it
    /// has to look again and finds something else, or an error.
    Nobody,
}

impl Sharing {
    /// How long the guest may rely on a name or attribute it was told.
    ///
    /// A second is what a change on the host may take to be seen. Nothing changes behind the guest's back otherwise; the
    /// longer time is still limited so that attributes which only the host's file system knows (blocks in use) come right.
    pub(super) fn timeout(self) -> Duration {
        match self {
            Sharing::WithHost => Duration::from_secs(1),
            Sharing::GuestOnly | Sharing::Changes => Duration::from_secs(60),
            Sharing::Nobody => Duration::from_secs(10 * 365 * 24 * 60 * 60),
        }
    }

    /// Whether nobody but the guest changes anything.
    pub(super) fn is_guest_only(self) -> bool {
        self != Sharing::WithHost
    }
}

/// A file system of the host as the guest may use it. The same one by a read-only mount counts as another.
#[derive(Debug)]
pub(super) struct Mount {
    slot: u16,
    key: MountKey,
    /// Others of its mount (see [`Mounts::within`]), which the guest may come back to for as long as it knows this one.
    parts: Mutex<Vec<Arc<Mount>>>,
    /// The number of the view that is for it.
    view: u32,
    /// Who may change its files.
    pub sharing: Sharing,
    /// Device nodes on it that its file system has no room for.
    pub nodes: Kept,
}

impl Mount {
    /// Which of the file systems that the guest knows it is.
    pub(super) fn slot(&self) -> u16 {
        self.slot
    }

    /// Whether files without a mount of their own on them may be on another device; see [`Mounts::within`].
    pub(super) fn has_parts(&self) -> bool {
        !self.parts.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The number by which the guest knows, in a view, the file with this number on it.
    pub(super) fn guest_number(&self, view: u32, number: u64) -> u64 {
        let (bits, slot_bits) = SMALL_BITS;
        if view == self.view {
            number
        } else if view == 0 && self.slot < 1 << slot_bits && number < 1 << bits {
            u64::from(self.slot) << bits | number
        } else {
            number ^ (u64::from(self.slot) + 1) << NUMBER_BITS
        }
    }
}

/// A device, whether it may only be read, and who may change it.
type MountKey = ((u32, u32), bool, Sharing);

/// All mounts that the guest knows files of.
#[derive(Default)]
pub(super) struct Mounts {
    known: Mutex<HashMap<MountKey, Weak<Mount>>>,
}

impl Mounts {
    /// The file system, new if it isn't known.
    pub(super) fn get(&self, device: (u32, u32), read_only: bool, sharing: Sharing) -> Result<Arc<Mount>> {
        let key = (device, read_only, sharing);
        // The map is sound after each statement, whoever may have panicked.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mount) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(mount);
        }
        known.retain(|_, mount| mount.strong_count() > 0);
        let used: BTreeSet<u16> = known.values().filter_map(Weak::upgrade).map(|mount| mount.slot).collect();
        let slot = (0..MAX_SLOTS).find(|slot| !used.contains(slot)).ok_or(Errno::NFILE)?;
        let view = view_of(device.0, device.1);
        let new =
            Arc::new(Mount { slot, key, view, parts: Mutex::default(), sharing, nodes: Kept::default() });
        known.insert(key, Arc::downgrade(&new));
        Ok(new)
    }

    /// The file system of a file that was reached through `mount` without entering another: the same one, as a rule. But layers
    /// of an overlay that lie on file systems of their own keep device and inode numbers of theirs, and so do subvolumes of
    /// btrfs; to the same number belong different files there.
    pub(super) fn within(&self, mount: &Arc<Mount>, device: (u32, u32)) -> Result<Arc<Mount>> {
        let (own, read_only, sharing) = mount.key;
        if device == own {
            return Ok(mount.clone());
        }
        let mut parts = mount.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = parts.iter().find(|part| part.key.0 == device) {
            return Ok(part.clone());
        }
        let part = self.get(device, read_only, sharing)?;
        parts.push(part.clone());
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_numbers_of_two_file_systems_differ_for_the_guest() {
        let mounts = Mounts::default();
        let one = mounts.get((0, 1), false, Sharing::WithHost).unwrap();
        for other in [
            ((0, 2), false, Sharing::WithHost),
            ((0, 1), true, Sharing::WithHost),
            ((0, 1), false, Sharing::GuestOnly),
        ] {
            let other = mounts.get(other.0, other.1, other.2).unwrap();
            let layer_bit = 1 << 62;
            for (number, others) in
                [(42, 42), (42 | layer_bit, 42), (42 | layer_bit, 42 | layer_bit), (1 << 28, 0)]
            {
                assert_ne!(one.guest_number(0, number), other.guest_number(0, others));
                assert_ne!(one.guest_number(7, number), other.guest_number(7, others));
            }
        }
        let again = mounts.get((0, 1), false, Sharing::WithHost).unwrap();
        assert_eq!(one.guest_number(0, 42), again.guest_number(0, 42));
    }

    #[test]
    fn numbers_have_32_bits_where_they_can() {
        let mounts = Mounts::default();
        let _top = mounts.get((0, 1), false, Sharing::WithHost).unwrap();
        let root = mounts.get((0, 2), false, Sharing::GuestOnly).unwrap();
        assert_eq!(root.guest_number(0, 42), 1 << 28 | 42);
        assert!(root.guest_number(0, 1 << 28) > u64::from(u32::MAX));
        // A volume in its own view, and what leads there.
        let volume = mounts.get((8, 1), false, Sharing::WithHost).unwrap();
        let view = view_of(8, 1);
        for number in [42, u64::MAX] {
            assert_eq!(volume.guest_number(view, number), number);
        }
        assert!(root.guest_number(view, 42) > u64::from(u32::MAX));
    }

    #[test]
    fn parts_of_a_mount_are_told_apart_and_stay() {
        let mounts = Mounts::default();
        let root = mounts.get((0, 1), true, Sharing::GuestOnly).unwrap();
        assert!(Arc::ptr_eq(&mounts.within(&root, (0, 1)).unwrap(), &root));
        assert!(!root.has_parts());
        let slot = mounts.within(&root, (0, 2)).unwrap().slot;
        assert_ne!(slot, root.slot);
        assert!(root.has_parts());
        let other = mounts.get((0, 3), true, Sharing::GuestOnly).unwrap();
        assert_ne!(other.slot, slot, "nobody knows a file of the part, but the guest knows its mount");
        assert_eq!(mounts.within(&root, (0, 2)).unwrap().slot, slot);
    }

    #[test]
    fn numbers_of_parts_differ_in_the_view_of_their_mount_too() {
        let mounts = Mounts::default();
        let volume = mounts.get((0, 40), false, Sharing::WithHost).unwrap();
        let subvolume = mounts.within(&volume, (0, 41)).unwrap();
        for view in [0, view_of(0, 40)] {
            assert_ne!(volume.guest_number(view, 256), subvolume.guest_number(view, 256));
        }
        assert_eq!(volume.guest_number(view_of(0, 40), 256), 256);
        assert!(subvolume.guest_number(0, 256) < 1 << 32);
    }

    #[test]
    fn slots_are_used_again_when_a_file_system_is_forgotten() {
        let mounts = Mounts::default();
        let _stays = mounts.get((0, 1), false, Sharing::WithHost).unwrap();
        for minor in 2..200_000 {
            let passing = mounts.get((0, minor), false, Sharing::GuestOnly).unwrap();
            assert_eq!(passing.slot, 1);
        }
    }
}
