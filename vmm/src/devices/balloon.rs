//! Virtio memory balloon (virtio 1.2, section 5.5), of which only one part is there: the guest reports pages that it does not use
//! (`VIRTIO_BALLOON_F_REPORTING`, section 5.5.6.7), and the host takes them back. The guest is never asked to give any away.
//!
//! What a page holds after that is what guest memory was made of: zeroes, or the template's page. Linux reports pages only if it
//! does not rely on what free pages hold (`init_on_free`, page poisoning), unless `VIRTIO_BALLOON_F_PAGE_POISON` is offered, which
//! it is not.

use std::io;
use std::sync::Arc;

use super::{
    Activated, Chain, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress, VirtioDevice,
};

/// `VIRTIO_BALLOON_F_REPORTING`.
const REPORTING: u64 = 1 << 5;

/// By these queues the guest would tell what it gave away, or takes back.
const UNUSED_QUEUES: usize = 2;

/// The queue with what is free: drivers number those that are there.
const REPORTS: usize = UNUSED_QUEUES;

/// Linux reports up to 32 ranges at a time, and asks for room for as many.
const QUEUE_SIZE: u16 = 32;

const PAGE: usize = 4096;

/// The most that is taken back before the other devices have their turn: 32 of the kernel's largest blocks.
const MAX_BYTES: usize = 32 * (4 << 20);

/// Bytes of the configuration space: the pages that the guest is asked for, and those that it has given, both none.
const CONFIG_SIZE: usize = 8;

/// The balloon. It has no state: what was taken back the guest's kernel knows.
#[derive(Debug, Default)]
pub struct Balloon {
    /// Host memory of a report.
    ranges: Vec<libc::iovec>,
}

// SAFETY: the addresses are those of guest memory, which any thread may use, and the list is empty between two calls.
unsafe impl Send for Balloon {}

impl Balloon {
    fn take_back(&mut self, chain: &Chain) -> Result<(), DeviceFault> {
        self.ranges.clear();
        chain.add_writable_to(&mut self.ranges)?;
        let mut left = MAX_BYTES;
        for range in self.ranges.drain(..) {
            if range.iov_base.align_offset(PAGE) != 0 || range.iov_len % PAGE != 0 {
                return Err(DeviceFault::Protocol("free memory was reported that is not whole pages"));
            }
            // It is an offer: what is too much stays.
            let length = range.iov_len.min(left);
            left -= length;
            // SAFETY: the range is guest memory, which stays mapped, and of which nothing is known but that its contents change
            // at any time; whole pages of it are dropped and come back as what they were made of.
            if length > 0 && unsafe { libc::madvise(range.iov_base, length, libc::MADV_DONTNEED) } != 0 {
                return Err(DeviceFault::Backend {
                    what: "madvise of free guest memory",
                    source: io::Error::last_os_error(),
                });
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::Balloon,
            features: REPORTING,
            required: 0,
            queue_sizes: vec![QUEUE_SIZE; UNUSED_QUEUES + 1],
            config: Arc::new(ConfigSpace::new(vec![0; CONFIG_SIZE])),
        }
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        _events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        if queue != REPORTS || active.features & REPORTING == 0 {
            return active.queues[queue].serve(|_| Ok(0));
        }
        let queue = &mut active.queues[queue];
        let Some(chain) = queue.pop()? else { return Ok(Progress::Done) };
        self.take_back(&chain)?;
        queue.complete(chain, 0)?;
        queue.signal()?;
        Ok(Progress::More)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, RAM_SIZE, TestDriver, readable, writable};
    use super::*;

    const PAGES: u32 = PAGE as u32;

    fn driver() -> TestDriver {
        let driver = TestDriver::activated(Box::new(Balloon::default()), 0);
        driver.write_bytes(BUFFERS, &[7; 4 * PAGE]);
        driver
    }

    #[test]
    fn reported_pages_go_and_no_others() {
        let mut driver = driver();
        let next = BUFFERS + 3 * PAGE as u64;
        let head = driver.add(REPORTS, &[writable(BUFFERS, PAGES), writable(next, PAGES)]);
        driver.kick(REPORTS);
        assert_eq!(driver.take_used(REPORTS), Some((head.into(), 0)));
        assert!(driver.interrupts() > 0);
        let bytes = driver.read_bytes(BUFFERS, 4 * PAGE);
        let holds = |page: usize| bytes[page * PAGE..][..PAGE].iter().all(|byte| *byte == 7);
        assert_eq!([0, 1, 2, 3].map(holds), [false, true, true, false]);
        assert_eq!(bytes[..PAGE], [0; PAGE]);
    }

    #[test]
    fn a_guest_without_a_word_of_reports_loses_nothing() {
        let mut driver = TestDriver::activated(Box::new(Balloon::default()), REPORTING);
        driver.write_bytes(BUFFERS, &[7; PAGE]);
        for queue in 0..3 {
            assert_eq!(driver.request(queue, &[writable(BUFFERS, PAGES)]), Some(0));
        }
        assert_eq!(driver.read_bytes(BUFFERS, PAGE), [7; PAGE]);
    }

    #[test]
    fn what_the_guest_was_not_asked_for_is_not_taken() {
        let mut driver = driver();
        for queue in 0..UNUSED_QUEUES {
            assert_eq!(driver.request(queue, &[readable(BUFFERS, 16)]), Some(0));
            assert_eq!(driver.request(queue, &[writable(BUFFERS, PAGES)]), Some(0));
        }
        assert_eq!(driver.request(REPORTS, &[readable(BUFFERS, PAGES)]), Some(0), "it only reads there");
        assert_eq!(driver.read_bytes(BUFFERS, PAGE), [7; PAGE]);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn parts_of_pages_are_refused() {
        for (address, length) in [(BUFFERS + 1, PAGES), (BUFFERS, PAGES - 1), (BUFFERS + 512, 512)] {
            let mut driver = driver();
            driver.request(REPORTS, &[writable(address, length)]);
            assert!(driver.needs_reset(), "{address:#x}, {length}");
            assert_eq!(driver.read_bytes(BUFFERS, PAGE), [7; PAGE]);
        }
    }

    #[test]
    fn nothing_outside_guest_memory_is_touched() {
        for (address, length) in [
            (RAM_SIZE as u64, PAGES),
            (RAM_SIZE as u64 - PAGE as u64, 2 * PAGES),
            (u64::MAX - 4095, PAGES),
            (0, !4095),
        ] {
            let mut driver = driver();
            driver.request(REPORTS, &[writable(address, length)]);
            assert!(driver.needs_reset(), "{address:#x}, {length}");
        }
    }

    #[test]
    fn reports_are_served_one_at_a_time_but_all() {
        let mut driver = driver();
        for page in 0..4 {
            driver.add(REPORTS, &[writable(BUFFERS + page * PAGE as u64, PAGES)]);
        }
        driver.kick(REPORTS);
        assert_eq!(driver.read_bytes(BUFFERS, 4 * PAGE), [0; 4 * PAGE]);
    }
}
