//! The slots of a machine for devices that come while it runs: which are taken.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_vmm_protocol::DEVICE_SLOTS;

/// How many disks a pod can have. The other slots are left to network interfaces, whose number is known when a pod starts:
/// they may take what no disk has yet.
pub(crate) const MAX_DISKS: u8 = 8;

/// How many of these root file systems leave to disks that containers ask for: they can be shared as files instead.
const LEFT_BY_ROOTS: usize = 2;

/// Which slots are taken.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<[bool; DEVICE_SLOTS as usize]>);

impl Slots {
    /// Takes a slot for a disk.
    pub(crate) fn take_for_disk(&self) -> Option<u8> {
        self.take(0..MAX_DISKS)
    }

    /// Takes a slot for a network interface, one that no disk can have if possible.
    pub(crate) fn take_for_interface(&self) -> Option<u8> {
        self.take((0..DEVICE_SLOTS).rev())
    }

    /// How many more disks there may be for what of a container could be shared as files, if it asks for so many `others`.
    pub(crate) fn room_for_roots(&self, others: usize) -> usize {
        let free = self.lock()[..usize::from(MAX_DISKS)].iter().filter(|taken| !**taken).count();
        free.saturating_sub(LEFT_BY_ROOTS.max(others))
    }

    /// A slot is free again.
    pub(crate) fn give_back(&self, slot: u8) {
        self.lock()[usize::from(slot)] = false;
    }

    fn take(&self, mut candidates: impl Iterator<Item = u8>) -> Option<u8> {
        let mut taken = self.lock();
        let slot = candidates.find(|slot| !taken[usize::from(*slot)])?;
        taken[usize::from(slot)] = true;
        Some(slot)
    }

    fn lock(&self) -> MutexGuard<'_, [bool; DEVICE_SLOTS as usize]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_and_used_again() {
        let slots = Slots::default();
        let mut all = Vec::new();
        assert_eq!(slots.room_for_roots(0), slots.room_for_roots(LEFT_BY_ROOTS));
        assert_eq!(slots.room_for_roots(usize::from(MAX_DISKS) - 1), 1);
        assert_eq!(slots.room_for_roots(usize::from(MAX_DISKS)), 0, "a container's own disks come first");
        while slots.room_for_roots(0) > 0 {
            all.extend(slots.take_for_disk());
        }
        assert_eq!(all.len(), usize::from(MAX_DISKS) - LEFT_BY_ROOTS);
        all.extend((0..MAX_DISKS).map_while(|_| slots.take_for_disk()));
        assert_eq!(all, Vec::from_iter(0..MAX_DISKS));
        assert_eq!(slots.take_for_disk(), None);
        assert_eq!([(); 3].map(|()| slots.take_for_interface()), [Some(9), Some(8), None]);
        slots.give_back(3);
        assert_eq!(slots.take_for_disk(), Some(3));
        slots.give_back(3);
        assert_eq!(slots.take_for_interface(), Some(3));
    }
}
