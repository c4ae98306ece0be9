//! How many inodes and open files there may be, in all sessions together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::recent;

/// The part of the descriptors that may be inodes; the rest may be open files, but for [`SPARE_FDS`].
const INODE_SHARE: (usize, usize) = (3, 4);

/// Descriptors that are neither: sockets, roots, one or two per request under way, files that were used lately, and files that
/// stand for devices on old file systems, which may be [`KEPT_SHARE`](super::KEPT_SHARE) of these.
const SPARE_FDS: usize = 64 + recent::LIMIT;

/// Room for so many of a kind.
#[derive(Debug)]
pub(crate) struct Room {
    limit: usize,
    taken: AtomicUsize,
}

impl Room {
    /// None of it is taken.
    pub(crate) fn new(limit: usize) -> Arc<Room> {
        Arc::new(Room { limit, taken: AtomicUsize::new(0) })
    }

    /// Whether there is room for one more right now.
    pub(crate) fn is_left(&self) -> bool {
        self.taken.load(Ordering::Relaxed) < self.limit
    }

    /// Takes room for one. `false`: there is none.
    pub(crate) fn take(&self) -> bool {
        let one_more = |taken| (taken < self.limit).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// Gives back what was taken.
    pub(crate) fn give(&self, count: usize) {
        self.taken.fetch_sub(count, Ordering::Relaxed);
    }
}

/// What sessions share.
#[derive(Debug, Clone)]
pub(crate) struct Rooms {
    /// For inodes that the guest knows.
    pub inodes: Arc<Room>,
    /// For files and directories that it has open.
    pub handles: Arc<Room>,
}

impl Rooms {
    /// Divides so many descriptors.
    pub(crate) fn of(open_files: usize) -> Rooms {
        let room = open_files.saturating_sub(SPARE_FDS);
        let inodes = room / INODE_SHARE.1 * INODE_SHARE.0;
        Rooms { inodes: Room::new(inodes), handles: Room::new(room - inodes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_gives_back_another_may_take() {
        let room = Room::new(2);
        assert!(room.take() && room.is_left() && room.take());
        assert!(!room.is_left() && !room.take());
        room.give(2);
        assert!(room.take() && room.take() && !room.take());
    }

    #[test]
    fn few_descriptors_are_no_room() {
        assert!(!Rooms::of(SPARE_FDS).inodes.is_left());
        assert!(!Rooms::of(0).handles.take());
    }
}
