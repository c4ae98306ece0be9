//! A driver in miniature, for tests of devices: memory, rings, and a worker that runs in the test's own thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::MmioTransport;
use super::queue::{QueueRegisters, Turn};
use super::registers::RegisterMemory;
use super::slot::DeviceSlot;
use super::worker::DeviceWorker;
use super::{
    Activated, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress, VirtioDevice,
};
use crate::memory::{GuestRam, SharedRam};

/// Size of the test's guest memory, in bytes.
pub(crate) const RAM_SIZE: usize = 4 << 20;
/// Where the rings of queue `n` are: `RINGS + n * RING_STRIDE`.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;
/// Where tests may put buffers.
pub(crate) const BUFFERS: u64 = 0x20_0000;

/// `Status` register bits, as the driver sees them.
pub(crate) const NEEDS_RESET: u32 = 64;

/// A descriptor as the driver writes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

/// A buffer that the device reads.
pub(crate) fn readable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: false }
}

/// A buffer that the device writes.
pub(crate) fn writable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: true }
}

/// The driver's view of one device.
pub(crate) struct TestDriver {
    pub ram: SharedRam,
    pub transport: MmioTransport,
    loop_: EventManager<DeviceWorker>,
    queues: Vec<DriverQueue>,
}

#[derive(Debug, Clone, Default)]
struct DriverQueue {
    size: u16,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

/// Fresh guest memory.
pub(crate) fn test_ram() -> SharedRam {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap())
}

impl TestDriver {
    /// A device that nobody talked to yet.
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let info = device.info();
        let ram = test_ram();
        let slot = DeviceSlot::new(info.queue_sizes.len(), RegisterMemory::new().window(0)).unwrap();
        let mut loop_ = EventManager::new_with_capacity(16).unwrap();
        loop_.add_subscriber(DeviceWorker::new(device, slot.clone()));
        let queues =
            info.queue_sizes.iter().map(|&size| DriverQueue { size, ..DriverQueue::default() }).collect();
        TestDriver { ram: ram.clone(), transport: MmioTransport::new(info, slot, ram), loop_, queues }
    }

    /// A device that went through the whole initialisation with all offered features but `without`.
    pub(crate) fn activated(device: Box<dyn VirtioDevice>, without: u64) -> Self {
        let mut driver = TestDriver::new(device);
        driver.negotiate(without);
        for queue in 0..driver.queues.len() {
            driver.write_queue(queue, driver.queue_registers(queue));
        }
        driver.set(0x70, 1 | 2 | 8 | 4);
        assert_eq!(driver.get(0x70), 15, "activation failed");
        driver.run();
        driver
    }

    /// Resets the device and initialises it again, with empty rings.
    pub(crate) fn restart(&mut self) {
        self.negotiate(0);
        for queue in 0..self.queues.len() {
            let registers = self.queue_registers(queue);
            self.queues[queue] = DriverQueue { size: registers.size, ..DriverQueue::default() };
            self.write_bytes(registers.available, &[0; 4]);
            self.write_bytes(registers.used, &[0; 4]);
            self.write_queue(queue, registers);
        }
        self.set(0x70, 1 | 2 | 8 | 4);
        self.run();
    }

    /// Runs the thread's loop until nothing is left to do.
    pub(crate) fn run(&mut self) {
        for _ in 0..1000 {
            if self.loop_.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device doesn't come to rest");
    }

    /// Runs the loop until `done` or 5 s have passed.
    pub(crate) fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = std::time::Instant::now();
        while !done(self) {
            assert!(start.elapsed().as_secs() < 5, "the device didn't get there in time");
            self.loop_.run_with_timeout(10).unwrap();
        }
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.slot().registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Up to `FEATURES_OK`.
    pub(crate) fn negotiate(&mut self, without: u64) {
        self.set(0x70, 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        for (sel, mask) in [(0, without as u32), (1, (without >> 32) as u32)] {
            self.set(0x14, sel);
            let offered = self.get(0x10);
            self.set(0x24, sel);
            self.set(0x20, offered & !mask);
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11, "features refused");
    }

    /// Sound registers for a queue.
    pub(crate) fn queue_registers(&self, queue: usize) -> QueueRegisters {
        let base = RINGS + RING_STRIDE * queue as u64;
        QueueRegisters {
            size: self.queues[queue].size,
            ready: true,
            descriptors: base,
            available: base + AVAILABLE,
            used: base + USED,
        }
    }

    pub(crate) fn write_queue(&mut self, queue: usize, registers: QueueRegisters) {
        self.set(0x30, queue as u32);
        self.set(0x38, registers.size.into());
        for (offset, address) in
            [(0x80, registers.descriptors), (0x90, registers.available), (0xa0, registers.used)]
        {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, registers.ready.into());
    }

    /// Writes one raw descriptor.
    pub(crate) fn write_descriptor(&mut self, queue: usize, index: u16, buffer: Buffer, next: Option<u16>) {
        let flags = u16::from(next.is_some()) | if buffer.writable { 2 } else { 0 };
        self.write_raw_descriptor(
            queue,
            index,
            buffer.address,
            buffer.length,
            flags,
            next.unwrap_or_default(),
        );
    }

    pub(crate) fn write_raw_descriptor(
        &mut self,
        queue: usize,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let at = GuestAddress(self.queue_registers(queue).descriptors + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.write_slice(&bytes, at).unwrap();
    }

    /// Puts a head into the available ring.
    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let registers = self.queue_registers(queue);
        let state = &mut self.queues[queue];
        let entry = registers.available + 4 + 2 * u64::from(state.next_available % state.size);
        state.next_available = state.next_available.wrapping_add(1);
        let index = state.next_available;
        self.ram.write_obj(head, GuestAddress(entry)).unwrap();
        self.ram.write_obj(index, GuestAddress(registers.available + 2)).unwrap();
    }

    /// Overwrites the available ring's index.
    pub(crate) fn set_available_index(&mut self, queue: usize, index: u16) {
        let registers = self.queue_registers(queue);
        self.ram.write_obj(index, GuestAddress(registers.available + 2)).unwrap();
    }

    /// Makes a chain of buffers available, without a kick; returns its head.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let size = self.queues[queue].size;
        let head = self.queues[queue].next_descriptor;
        for (position, buffer) in buffers.iter().enumerate() {
            let index = (head + position as u16) % size;
            let next = (position + 1 < buffers.len()).then_some((index + 1) % size);
            self.write_descriptor(queue, index, *buffer, next);
        }
        self.queues[queue].next_descriptor = (head + buffers.len() as u16) % size;
        self.make_available(queue, head);
        head
    }

    /// Notifies the device and lets it work.
    pub(crate) fn kick(&mut self, queue: usize) {
        self.set(0x50, queue as u32);
        self.run();
    }

    /// Makes a chain available, kicks, and returns how many bytes the device says it wrote, if it used the chain.
    pub(crate) fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Option<u32> {
        let head = self.add(queue, buffers);
        self.kick(queue);
        let (used, length) = self.take_used(queue)?;
        assert_eq!(used, u32::from(head));
        Some(length)
    }

    /// The next entry of the used ring that wasn't taken yet: head and length.
    pub(crate) fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let registers = self.queue_registers(queue);
        let index: u16 = self.ram.read_obj(GuestAddress(registers.used + 2)).unwrap();
        let state = &mut self.queues[queue];
        if index == state.next_used {
            return None;
        }
        let entry = registers.used + 4 + 8 * u64::from(state.next_used % state.size);
        state.next_used = state.next_used.wrapping_add(1);
        Some((
            self.ram.read_obj(GuestAddress(entry)).unwrap(),
            self.ram.read_obj(GuestAddress(entry + 4)).unwrap(),
        ))
    }

    pub(crate) fn write_bytes(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read_bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Whether the device is dead until reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.get(0x70) & NEEDS_RESET != 0
    }

    /// Takes the interrupts raised since the last call: the count of edges on the line.
    pub(crate) fn interrupts(&self) -> u64 {
        self.transport.slot().interrupt().line().read().unwrap_or(0)
    }
}

/// A device of two queues that copies what it reads to what it writes, for tests of the framework.
#[derive(Debug, Default)]
pub(crate) struct Echo {
    pub resets: Arc<AtomicU32>,
}

impl VirtioDevice for Echo {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::Entropy,
            features: 1 << 3,
            required: 0,
            queue_sizes: vec![16, 256],
            config: Arc::new(ConfigSpace::new(vec![1, 2, 3, 4, 5, 6, 7, 8])),
        }
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        _events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        active.queues[queue].serve_in_turns(|chain, turn| {
            let mut buffer = [0; 4096];
            let length = chain.reader().read(&mut buffer)?;
            if turn == Turn::First && buffer[..length].starts_with(b"later") {
                return Ok(None);
            }
            Ok(Some(chain.writer().write(&buffer[..length])? as u32))
        })
    }

    fn reset(&mut self, _events: &mut DeviceEvents<'_, '_>) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// A small generator of reproducible nonsense (xorshift64*).
pub(crate) struct Nonsense(pub u64);

impl Nonsense {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`, which isn't zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
