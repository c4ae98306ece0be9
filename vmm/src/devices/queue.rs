//! A split virtqueue that trusts nothing (virtio 1.2, section 2.7).
//!
//! The ring arithmetic is `virtio-queue`'s. This wrapper adds the rules that make a broken driver a fault of its device
//! rather than silence or a loop: the addresses are checked once and frozen, an available index that runs ahead is
//! fatal, every chain is walked to its end with all of its ranges checked before a device sees it, and a head that is
//! still in flight can't be offered again.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::DeviceFault;
use super::chain::{Chain, Place};
use super::queue_fault::QueueFault;
use super::slot::DeviceSlot;
use crate::growth;
use crate::memory::SharedRam;

/// What the driver wrote to a queue's registers: plain data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// `QueueNum`: number of descriptors.
    pub size: u16,
    /// `QueueReady`.
    pub ready: bool,
    /// `QueueDesc`: guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// `QueueDriver`: guest-physical address of the available ring.
    pub available: u64,
    /// `QueueDevice`: guest-physical address of the used ring.
    pub used: u64,
}

/// Where the device stands in a queue's rings: plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// Index of the next available entry it takes.
    pub next_available: u16,
    /// Index of the next used entry it writes.
    pub next_used: u16,
}

/// Whether a device emptied a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// The queue is empty, or the device will come back to it by itself. It is called again at the next kick.
    Done,
    /// There may be more; the device wants to be called again after the other devices had their turn.
    More,
}

/// How often a device has been given a chain of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// For the first time: what would have to wait may be left.
    First,
    /// Once more: it has to be done.
    Last,
}

/// An activated queue.
#[derive(Debug)]
pub struct Virtqueue {
    /// `None` when the driver left the queue unused.
    ring: Option<Queue>,
    ram: SharedRam,
    slot: Arc<DeviceSlot>,
    /// One bit per descriptor: heads that were popped and not completed.
    in_flight: Vec<u64>,
    /// Index of the used ring up to which the driver was told, or did not want to be.
    signalled: u16,
    /// Of chains that are done with.
    places: Vec<Place>,
}

/// How many places are kept: as many as a device has chains at a time, most often.
const PLACES: usize = 64;

const DESCRIPTOR_SIZE: usize = 16;

impl Virtqueue {
    /// Checks what the driver set up; see [`QueueFault`].
    pub(super) fn new(
        registers: &QueueRegisters,
        max_size: u16,
        event_idx: bool,
        ram: SharedRam,
        slot: Arc<DeviceSlot>,
    ) -> Result<Self, QueueFault> {
        if !registers.ready {
            let (in_flight, places) = (Vec::new(), Vec::new());
            return Ok(Virtqueue { ring: None, ram, slot, in_flight, signalled: 0, places });
        }
        let size = registers.size;
        if size == 0 || size > max_size || !size.is_power_of_two() {
            return Err(QueueFault::Size { size, max: max_size });
        }
        let entries = usize::from(size);
        check_ring(&ram, registers.descriptors, DESCRIPTOR_SIZE * entries, 16)?;
        check_ring(&ram, registers.available, 6 + 2 * entries, 2)?;
        check_ring(&ram, registers.used, 6 + 8 * entries, 4)?;

        let mut ring = Queue::new(max_size).map_err(QueueFault::Ring)?;
        ring.try_set_size(size).map_err(QueueFault::Ring)?;
        ring.try_set_desc_table_address(GuestAddress(registers.descriptors)).map_err(QueueFault::Ring)?;
        ring.try_set_avail_ring_address(GuestAddress(registers.available)).map_err(QueueFault::Ring)?;
        ring.try_set_used_ring_address(GuestAddress(registers.used)).map_err(QueueFault::Ring)?;
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        let in_flight = vec![0; entries.div_ceil(64)];
        Ok(Virtqueue { ring: Some(ring), ram, slot, in_flight, signalled: 0, places: Vec::new() })
    }

    /// Takes the next chain, checked as a whole. `None` means that the queue is empty and that the next chain will
    /// come with a kick.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, QueueFault> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let ram: &crate::memory::GuestRam = &self.ram;
        let mut next = ring.iter(ram).map_err(QueueFault::Ring)?.next();
        if next.is_none() && ring.enable_notification(ram).map_err(QueueFault::Ring)? {
            next = ring.iter(ram).map_err(QueueFault::Ring)?.next();
        }
        let Some(descriptors) = next else { return Ok(None) };

        let head = descriptors.head_index();
        if head >= ring.size() {
            return Err(QueueFault::Head(head));
        }
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        if self.in_flight[word] & bit != 0 {
            return Err(QueueFault::InFlight(head));
        }
        let place = self.places.pop().unwrap_or_default();
        let chain = Chain::walk(descriptors, usize::from(ring.size()), &self.ram, place)?;
        self.in_flight[word] |= bit;
        Ok(Some(chain))
    }

    /// Undoes the last [`Virtqueue::pop`], whose chain this must be.
    pub(crate) fn put_back(&mut self, chain: Chain) {
        if let Some(ring) = &mut self.ring {
            ring.go_to_previous_position();
        }
        self.release(chain);
    }

    /// Returns a chain to the driver, `written` bytes of its writable buffers filled. Follow with
    /// [`Virtqueue::signal`] once per batch.
    pub(crate) fn complete(&mut self, chain: Chain, written: u32) -> Result<(), QueueFault> {
        self.complete_together(std::iter::once((chain, written)))
    }

    /// Returns chains to the driver, which sees either none of them or all.
    pub(crate) fn complete_together(
        &mut self,
        chains: impl Iterator<Item = (Chain, u32)>,
    ) -> Result<(), QueueFault> {
        let mut next = self.ring.as_ref().map_or(0, QueueT::next_used);
        let mut moved = 0;
        for (chain, written) in chains {
            moved += chain.readable_len() as u64 + u64::from(written);
            if let Some(ring) = &self.ring {
                let entry = ring.used_ring() + 4 + 8 * u64::from(next % ring.size());
                let element = u64::from(chain.head()) | u64::from(written) << 32;
                self.ram.write_obj(element.to_le(), GuestAddress(entry)).map_err(ring_failed)?;
                next = next.wrapping_add(1);
            }
            self.release(chain);
        }
        growth::moved(&self.ram, moved);
        let Some(ring) = &mut self.ring else { return Ok(()) };
        ring.set_next_used(next);
        self.ram
            .store(next.to_le(), GuestAddress(ring.used_ring() + 2), Ordering::Release)
            .map_err(ring_failed)
    }

    /// Interrupts the guest if the driver wants to hear of the chains completed since the last call.
    pub(crate) fn signal(&mut self) -> Result<(), QueueFault> {
        let Some(ring) = &self.ring else { return Ok(()) };
        let next = ring.next_used();
        let told = std::mem::replace(&mut self.signalled, next);
        // The driver sees what is used before it is asked.
        fence(Ordering::SeqCst);
        let wanted = if ring.event_idx_enabled() {
            let event = GuestAddress(ring.avail_ring() + 4 + 2 * u64::from(ring.size()));
            let event = u16::from_le(self.ram.load(event, Ordering::Relaxed).map_err(ring_failed)?);
            // Whether that entry is among those since (section 2.7.10).
            next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(told)
        } else {
            true
        };
        if wanted {
            self.slot.interrupt.signal_used();
        }
        Ok(())
    }

    /// Serves chains one after the other until the queue is empty or a bounded number was served.
    ///
    /// `serve` returns how many bytes it wrote to the chain's writable buffers.
    pub(crate) fn serve(
        &mut self,
        mut serve: impl FnMut(&Chain) -> Result<u32, DeviceFault>,
    ) -> Result<Progress, DeviceFault> {
        self.serve_in_turns(|chain, _| serve(chain).map(Some))
    }

    /// The same in two turns: a chain for which `serve` returns `None` in the first is served once more when all others have been.
    pub(crate) fn serve_in_turns(
        &mut self,
        mut serve: impl FnMut(&Chain, Turn) -> Result<Option<u32>, DeviceFault>,
    ) -> Result<Progress, DeviceFault> {
        let mut progress = if self.ring.is_some() { Progress::More } else { Progress::Done };
        let mut left = Vec::new();
        let mut completed = false;
        for _ in 0..self.size() {
            let Some(chain) = self.pop()? else {
                progress = Progress::Done;
                break;
            };
            match serve(&chain, Turn::First)? {
                Some(written) => {
                    self.complete(chain, written)?;
                    completed = true;
                }
                None => left.push(chain),
            }
        }
        if completed {
            self.signal()?;
        }
        for chain in left {
            // A driver that waits for this one shall not wait for the next.
            let written = serve(&chain, Turn::Last)?.unwrap_or(0);
            self.complete(chain, written)?;
            self.signal()?;
        }
        Ok(progress)
    }

    /// Number of descriptors; 0 when the driver left the queue unused.
    pub(crate) fn size(&self) -> u16 {
        self.ring.as_ref().map_or(0, QueueT::size)
    }

    /// Index of the next available entry it takes, which counts those it took; 0 when the driver left the queue unused.
    pub(super) fn next_available(&self) -> u16 {
        self.ring.as_ref().map_or(0, QueueT::next_avail)
    }

    /// Where the device stands in the rings; `None` when the driver left the queue unused.
    pub(crate) fn position(&self) -> Option<RingPosition> {
        self.ring
            .as_ref()
            .map(|ring| RingPosition { next_available: ring.next_avail(), next_used: ring.next_used() })
    }

    /// Goes on from where another device was in the same rings. An index that makes no sense shows at the next
    /// [`Virtqueue::pop`].
    pub(super) fn resume(&mut self, position: RingPosition) {
        if let Some(ring) = &mut self.ring {
            ring.set_next_avail(position.next_available);
            ring.set_next_used(position.next_used);
            self.signalled = position.next_used;
        }
    }

    /// Whether the driver says that it has seen all that is used: it wants to hear of the next.
    pub(super) fn is_seen(&self) -> bool {
        let Some(ring) = &self.ring else { return true };
        let event = GuestAddress(ring.avail_ring() + 4 + 2 * u64::from(ring.size()));
        ring.event_idx_enabled()
            && self
                .ram
                .load(event, Ordering::Acquire)
                .is_ok_and(|event| u16::from_le(event) == ring.next_used())
    }

    /// Whether the driver has made buffers available that were not taken. Only reads, so it leaves no trace in memory.
    pub(super) fn has_available(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| {
            ring.avail_idx(&*self.ram, Ordering::Acquire).is_ok_and(|index| index.0 != ring.next_avail())
        })
    }

    /// How many chains were popped and not completed.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.iter().map(|word| word.count_ones()).sum()
    }

    /// Interrupts the guest to have a look at the device's configuration.
    pub(super) fn signal_config(&self) {
        self.slot.interrupt.signal_config();
    }

    /// Has the device called for this queue, number `index`, as if the driver had kicked it.
    pub(super) fn kick(&self, index: usize) {
        if let Some(kick) = self.slot.kicks.of(index) {
            // The only failure is a full counter: then the device is about to be called anyway.
            let _ = kick.write(1);
        }
    }

    fn release(&mut self, chain: Chain) {
        let head = chain.head();
        if let Some(word) = self.in_flight.get_mut(usize::from(head / 64)) {
            *word &= !(1 << (head % 64));
        }
        if self.places.len() < PLACES {
            self.places.push(chain.into_place());
        }
    }
}

fn ring_failed(error: vm_memory::GuestMemoryError) -> QueueFault {
    QueueFault::Ring(virtio_queue::Error::GuestMemory(error))
}

fn check_ring(ram: &SharedRam, address: u64, length: usize, alignment: u64) -> Result<(), QueueFault> {
    if address == 0 || !address.is_multiple_of(alignment) {
        return Err(QueueFault::Alignment { address, alignment });
    }
    if !vm_memory::GuestMemoryBackend::check_range(&**ram, GuestAddress(address), length) {
        return Err(QueueFault::RingRange { address, length });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, Buffer, Echo, Nonsense, RAM_SIZE, TestDriver, readable, writable};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const EVENT_IDX: u64 = 1 << 29;

    fn echo() -> TestDriver {
        TestDriver::activated(Box::new(Echo::default()), 0)
    }

    /// Makes descriptor 0 available and expects the device to give up.
    fn assert_fatal(mut driver: TestDriver, why: &str) {
        driver.make_available(0, 0);
        driver.kick(0);
        assert!(driver.needs_reset(), "accepted: {why}");
        assert_eq!(driver.take_used(0), None, "served: {why}");
    }

    #[test]
    fn a_chain_is_served_across_its_buffers() {
        let mut driver = echo();
        driver.write_bytes(BUFFERS, b"abcdef");
        let chain = [
            readable(BUFFERS, 2),
            readable(BUFFERS + 2, 0),
            readable(BUFFERS + 2, 4),
            writable(BUFFERS + 0x100, 1),
            writable(BUFFERS + 0x200, 100),
        ];
        assert_eq!(driver.request(0, &chain), Some(6));
        assert_eq!(driver.read_bytes(BUFFERS + 0x100, 1), b"a");
        assert_eq!(driver.read_bytes(BUFFERS + 0x200, 5), b"bcdef");
    }

    #[test]
    fn what_has_to_wait_comes_last_and_in_order() {
        let mut driver = echo();
        for (at, text) in [(0, "later 1"), (16, "at once"), (32, "later 2"), (48, "at once")] {
            driver.write_bytes(BUFFERS + at, text.as_bytes());
        }
        let heads = [0, 16, 32, 48]
            .map(|at| driver.add(0, &[readable(BUFFERS + at, 7), writable(BUFFERS + 0x100 + at, 7)]));
        driver.kick(0);
        let used: Vec<_> = std::iter::from_fn(|| driver.take_used(0)).collect();
        let order = [1, 3, 0, 2].map(|place: usize| (u32::from(heads[place]), 7));
        assert_eq!(used, order);
        assert_eq!(driver.read_bytes(BUFFERS + 0x120, 7), b"later 2");
    }

    #[test]
    fn the_rings_wrap() {
        let mut driver = echo();
        for round in 0..70_000u32 {
            assert_eq!(
                driver.request(0, &[readable(BUFFERS, round % 7), writable(BUFFERS, 7)]),
                Some(round % 7)
            );
        }
    }

    #[test]
    fn an_indirect_table_is_followed() {
        let mut driver = echo();
        let table = BUFFERS + 0x1000;
        driver.write_bytes(BUFFERS, b"text");
        for (index, address, length, flags) in [(0, BUFFERS, 4, NEXT), (1, BUFFERS + 64, 4, WRITE)] {
            let mut entry = u64::to_le_bytes(address).to_vec();
            entry.extend(u32::to_le_bytes(length));
            entry.extend(u16::to_le_bytes(flags));
            entry.extend(u16::to_le_bytes(1));
            driver.write_bytes(table + 16 * index, &entry);
        }
        driver.write_raw_descriptor(0, 0, table, 32, INDIRECT, 0);
        driver.make_available(0, 0);
        driver.kick(0);
        assert_eq!(driver.take_used(0), Some((0, 4)));
        assert_eq!(driver.read_bytes(BUFFERS + 64, 4), b"text");
    }

    #[test]
    fn broken_chains_are_fatal() {
        type Raw = (u64, u32, u16, u16);
        let cases: [(&str, &[Raw]); 9] = [
            ("a loop", &[(BUFFERS, 1, NEXT, 0)]),
            ("a loop of two", &[(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)]),
            ("a link past the table", &[(BUFFERS, 1, NEXT, 16)]),
            ("a buffer past memory", &[(RAM_SIZE as u64 - 1, 2, 0, 0)]),
            ("a buffer that wraps", &[(u64::MAX, 2, 0, 0)]),
            ("a huge buffer", &[(BUFFERS, u32::MAX, 0, 0)]),
            ("a readable buffer after a writable one", &[(BUFFERS, 1, NEXT | WRITE, 1), (BUFFERS, 1, 0, 0)]),
            ("an indirect table of odd size", &[(BUFFERS, 17, INDIRECT, 0)]),
            ("an indirect table outside memory", &[(RAM_SIZE as u64, 16, INDIRECT, 0)]),
        ];
        for (why, descriptors) in cases {
            let mut driver = echo();
            for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
                driver.write_raw_descriptor(0, index as u16, *address, *length, *flags, *next);
            }
            assert_fatal(driver, why);
        }
    }

    #[test]
    fn an_empty_or_nested_indirect_table_is_fatal() {
        let mut driver = echo();
        driver.write_raw_descriptor(0, 0, BUFFERS, 0, INDIRECT, 0);
        assert_fatal(driver, "an empty table");

        let mut driver = echo();
        let mut inner = BUFFERS.to_le_bytes().to_vec();
        inner.extend(16u32.to_le_bytes());
        inner.extend(INDIRECT.to_le_bytes());
        inner.extend([0; 2]);
        driver.write_bytes(BUFFERS, &inner);
        driver.write_raw_descriptor(0, 0, BUFFERS, 16, INDIRECT, 0);
        assert_fatal(driver, "a nested table");
    }

    #[test]
    fn a_chain_longer_than_the_queue_is_fatal() {
        let mut driver = echo();
        let table = BUFFERS + 0x1000;
        for index in 0..17u16 {
            let mut entry = BUFFERS.to_le_bytes().to_vec();
            entry.extend(1u32.to_le_bytes());
            entry.extend((if index < 16 { NEXT } else { 0 }).to_le_bytes());
            entry.extend((index + 1).to_le_bytes());
            driver.write_bytes(table + 16 * u64::from(index), &entry);
        }
        driver.write_raw_descriptor(0, 0, table, 17 * 16, INDIRECT, 0);
        assert_fatal(driver, "17 buffers in a queue of 16");
    }

    #[test]
    fn an_available_index_that_runs_ahead_is_fatal() {
        let mut driver = echo();
        driver.set_available_index(0, 17);
        driver.kick(0);
        assert!(driver.needs_reset());
        assert!(driver.interrupts() > 0, "the driver isn't told");
    }

    #[test]
    fn a_head_past_the_table_is_fatal() {
        let mut driver = echo();
        driver.make_available(0, 16);
        driver.kick(0);
        assert!(driver.needs_reset());
    }

    #[test]
    fn a_reset_brings_a_dead_device_back() {
        let mut driver = echo();
        driver.set_available_index(0, 1000);
        driver.kick(0);
        assert!(driver.needs_reset());

        driver.set(0x70, 0);
        assert!(!driver.needs_reset());
        let registers = driver.queue_registers(0);
        driver.write_bytes(registers.available, &[0; 4]);
        driver.negotiate(0);
        driver.write_queue(0, registers);
        driver.set(0x70, 15);
        driver.kick(0);
        assert_eq!(driver.request(0, &[readable(BUFFERS, 3), writable(BUFFERS + 8, 3)]), Some(3));
    }

    #[test]
    fn interrupts_are_held_back_when_the_driver_says_so() {
        let mut driver = echo();
        let registers = driver.queue_registers(0);
        // Event index: not before the tenth used entry.
        driver.write_bytes(registers.available + 4 + 2 * 16, &9u16.to_le_bytes());
        driver.interrupts();
        for _ in 0..9 {
            driver.request(0, &[writable(BUFFERS, 1)]);
        }
        assert_eq!(driver.interrupts(), 0);
        driver.request(0, &[writable(BUFFERS, 1)]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn without_the_event_index_every_batch_interrupts() {
        let mut driver = TestDriver::activated(Box::new(Echo::default()), EVENT_IDX);
        driver.interrupts();
        for _ in 0..3 {
            driver.request(0, &[writable(BUFFERS, 1)]);
        }
        assert_eq!(driver.interrupts(), 3);
    }

    #[test]
    fn random_rings_never_panic_and_always_come_to_rest() {
        let mut nonsense = Nonsense(0x1234_5678);
        let mut faults = 0;
        for _ in 0..3000 {
            let mut driver = echo();
            for index in 0..16 {
                // Mostly plausible, so that the walk gets somewhere.
                let buffer = Buffer {
                    address: BUFFERS + nonsense.below(0x1_0000),
                    length: nonsense.below(300) as u32,
                    writable: nonsense.below(2) == 0,
                };
                let next = (nonsense.below(3) != 0).then(|| nonsense.below(18) as u16);
                driver.write_descriptor(0, index, buffer, next);
                if nonsense.below(8) == 0 {
                    let (address, length) = (nonsense.next() >> nonsense.below(64), nonsense.next() as u32);
                    let flags = nonsense.below(8) as u16;
                    driver.write_raw_descriptor(0, index, address, length, flags, nonsense.next() as u16);
                }
            }
            for _ in 0..nonsense.below(20) {
                driver.make_available(0, nonsense.below(17) as u16);
            }
            driver.kick(0);
            faults += u32::from(driver.needs_reset());
        }
        assert!((1000..3000).contains(&faults), "{faults} of 3000 rings were faulty");
    }
}
