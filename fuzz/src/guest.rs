//! A guest in miniature: memory, the registers of one device, and its loop, all in the calling thread.
//!
//! An input is a program for it: writes to registers, memory and rings, sound and unsound, kicks, and what the host's end of the
//! device does meanwhile.

use std::sync::Arc;

use bulkhead_vmm::devices::mmio::MmioTransport;
use bulkhead_vmm::devices::registers::RegisterMemory;
use bulkhead_vmm::devices::slot::DeviceSlot;
use bulkhead_vmm::devices::worker::DeviceWorker;
use bulkhead_vmm::devices::{DeviceState, VirtioDevice};
use bulkhead_vmm::memory::{GuestRam, SharedRam};
use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

/// Bytes of guest memory.
pub const RAM_SIZE: usize = 1 << 20;

/// Where the rings of queue `n` are: `RINGS + n * RING_STRIDE`, and in it.
const RINGS: u64 = 0x1000;
const RING_STRIDE: u64 = 0x4000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// Where programs have their buffers.
const BUFFERS: u64 = 0x4_0000;

/// How often the loop turns at a time. A guest whose buffers are rings can have its device go on for ever, as it could by
/// kicking it; each turn for itself must end.
const TURNS: usize = 32;

/// Operations of one program.
const STEPS: usize = 256;

const STATUS: u64 = 0x70;

thread_local! {
    /// Kept, since there are thousands of registers to be made.
    static REGISTERS: Arc<RegisterMemory> = RegisterMemory::new();
}

/// What a program does with the host's end of its device.
pub type Host<'a> = &'a mut dyn FnMut(&mut Input<'_>);

/// The guest.
pub struct Guest {
    ram: SharedRam,
    registers: Arc<RegisterMemory>,
    transport: MmioTransport,
    device_loop: EventManager<DeviceWorker>,
    /// The size of each queue, and the next index of its available ring.
    queues: Vec<(u16, u16)>,
}

/// Guest memory.
pub fn memory(size: usize) -> SharedRam {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size)]).expect("guest memory"))
}

impl Guest {
    /// A device that nobody talked to yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::build(device, None).expect("nothing is restored")
    }

    /// A device that goes on from a saved state; `None` if it refuses.
    pub fn restored(device: Box<dyn VirtioDevice>, state: &DeviceState) -> Option<Self> {
        Self::build(device, Some(state))
    }

    fn build(device: Box<dyn VirtioDevice>, state: Option<&DeviceState>) -> Option<Self> {
        let info = device.info();
        let queues = info.queue_sizes.iter().map(|size| (*size, 0)).collect();
        let (ram, registers) = (memory(RAM_SIZE), REGISTERS.with(Arc::clone));
        registers.window(0).show_placeholder();
        let slot = DeviceSlot::new(info.queue_sizes.len(), registers.window(0)).expect("eventfds");
        let mut transport = MmioTransport::new(info, slot.clone(), ram.clone());
        if let Some(state) = state {
            transport.restore(state).ok()?;
        }
        let mut device_loop = EventManager::new_with_capacity(16).expect("a loop");
        device_loop.add_subscriber(DeviceWorker::new(device, slot));
        Some(Guest { ram, registers, transport, device_loop, queues })
    }

    /// Runs a whole program.
    pub fn run(&mut self, input: &mut Input<'_>, host: Host<'_>) {
        if !input.flag() {
            self.start(input);
        }
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            self.step(input, host);
        }
        self.turn();
    }

    /// Lets the device work.
    pub fn turn(&mut self) {
        for _ in 0..TURNS {
            if self.device_loop.run_with_timeout(0).expect("the loop turns") == 0 {
                return;
            }
        }
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.window(0).read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // Past the end of memory there is nothing to be written.
        let _ = self.ram.write_slice(bytes, GuestAddress(address));
    }

    /// Initialises the device as a driver does, with what the input has it leave out.
    fn start(&mut self, input: &mut Input<'_>) {
        let without = match input.u8() {
            0 => 0,
            1 => 1 << 29,
            bit => 1u64 << (bit & 63),
        };
        for status in [0, 1, 3] {
            self.set(STATUS, status);
        }
        for (half, mask) in [(0, without as u32), (1, (without >> 32) as u32)] {
            self.set(0x14, half);
            self.set(0x24, half);
            let offered = self.get(0x10);
            self.set(0x20, offered & !mask);
        }
        self.set(STATUS, 11);
        let sizes = input.u8();
        for index in 0..self.queues.len() {
            let size = self.queues[index].0;
            let size = if sizes >> (index & 7) & 1 != 0 { size.min(2 << index) } else { size };
            self.queues[index] = (size, 0);
            let rings = ring(index);
            self.write(rings + AVAILABLE, &[0; 4]);
            self.write(rings + USED, &[0; 4]);
            self.set(0x30, index as u32);
            self.set(0x38, size.into());
            for (register, address) in [(0x80, rings), (0x90, rings + AVAILABLE), (0xa0, rings + USED)] {
                self.set(register, address as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(STATUS, 15);
        self.turn();
    }

    fn step(&mut self, input: &mut Input<'_>, host: Host<'_>) {
        match input.below(16) {
            0..=3 => self.request(input),
            4 => self.descriptor(input),
            5 => {
                let queue = input.below(self.queues.len());
                self.make_available(queue, input.u8().into());
            }
            6 => {
                let (queue, index) = (input.below(self.queues.len()), input.u16());
                self.write(ring(queue) + AVAILABLE + 2, &index.to_le_bytes());
            }
            7 => {
                let (address, length) = (input.u32() % (RAM_SIZE as u32 + 64), input.u8());
                self.write(address.into(), input.take(length.into()));
            }
            8 => {
                // The rings' flags and events.
                let (queue, value) = (input.below(self.queues.len()), input.u16());
                let (size, _) = self.queues[queue];
                let place = if input.flag() { AVAILABLE } else { AVAILABLE + 4 + 2 * u64::from(size) };
                self.write(ring(queue) + place, &value.to_le_bytes());
            }
            9 => self.turn(),
            10 => {
                let (offset, value, size) = (input.u16() & 0x1ff, input.u64(), input.below(9));
                self.transport.write(offset.into(), &value.to_le_bytes()[..size]);
            }
            11 => {
                let (offset, size) = (input.u16() & 0x3ff, input.below(9));
                self.registers.window(0).read(offset.into(), &mut [0; 8][..size]);
            }
            12 => self.start(input),
            13 => {
                let queue = input.u8();
                self.set(0x50, queue.into());
                self.turn();
            }
            _ => {
                host(input);
                self.turn();
            }
        }
    }

    /// A chain of buffers as a driver makes them, with what the input has it get wrong, and a kick.
    fn request(&mut self, input: &mut Input<'_>) {
        let queue = input.below(self.queues.len());
        let (size, _) = self.queues[queue];
        let (head, count) = (u16::from(input.u8()) % size, 1 + input.below(6) as u16);
        for position in 0..count {
            let (flags, page) = (input.u8(), input.u8());
            let mut length = u32::from(input.u16());
            if flags & 4 != 0 {
                length <<= 4;
            }
            let address = if flags & 8 != 0 { input.telling() } else { BUFFERS + u64::from(page) * 0xc00 };
            let mut bits = flags & 2;
            if position + 1 < count {
                bits |= 1;
            }
            if flags & 0x30 == 0x30 {
                bits |= 4;
            }
            if bits & 2 == 0 {
                let data = input.u8();
                self.write(address, input.take(data.into()));
            }
            let next = (head + position + 1) % size;
            self.write_descriptor(ring(queue), (head + position) % size, (address, length, bits, next));
        }
        self.make_available(queue, head);
        self.set(0x50, queue as u32);
        if input.flag() {
            self.turn();
        }
    }

    /// A descriptor in a table of a queue, or in one for indirect descriptors.
    fn descriptor(&mut self, input: &mut Input<'_>) {
        let table = match input.below(8) {
            index if index < self.queues.len() => ring(index),
            index => BUFFERS + index as u64 * 0xc00,
        };
        let index = input.u8().into();
        let (address, length) = (input.telling(), input.telling() as u32);
        let (flags, next) = (input.u8(), input.u8().into());
        self.write_descriptor(table, index, (address, length, flags, next));
    }

    fn write_descriptor(&self, table: u64, index: u16, (address, length, flags, next): (u64, u32, u8, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12] = flags;
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let (size, next) = &mut self.queues[queue];
        let entry = ring(queue) + AVAILABLE + 4 + 2 * u64::from(*next % *size);
        *next = next.wrapping_add(1);
        let index = *next;
        self.write(entry, &head.to_le_bytes());
        self.write(ring(queue) + AVAILABLE + 2, &index.to_le_bytes());
    }
}

impl Drop for Guest {
    /// The queues of an active device hold its slot, which holds them: a reset takes them away.
    fn drop(&mut self) {
        self.set(STATUS, 0);
    }
}

fn ring(queue: usize) -> u64 {
    RINGS + RING_STRIDE * queue as u64
}
