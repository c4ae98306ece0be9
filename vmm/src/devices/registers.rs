//! The registers of devices as their drivers read them.
//!
//! They are memory that guests see and can't write, so that a read costs no exit: drivers look at `InterruptStatus` at every
//! interrupt. Whatever changes a register writes it here as well. Only writes of the guest come to the VMM, except that KVM itself
//! takes the acknowledgement of used buffers (see [`super::Interrupt`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_VERSION};

use crate::layout::{MAX_DEVICES, MMIO_STRIDE};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout.
const VERSION: u32 = 2;

const PAGE: usize = 4096;
/// Registers of a window.
const WORDS: usize = MMIO_STRIDE as usize / 4;
const PAGES: usize = (MAX_DEVICES * MMIO_STRIDE as usize).div_ceil(PAGE);

#[repr(C, align(4096))]
#[derive(Debug)]
struct Page([AtomicU32; PAGE / 4]);

/// All windows of a machine, in whole pages.
#[derive(Debug)]
pub struct RegisterMemory(Box<[Page; PAGES]>);

impl RegisterMemory {
    /// Windows without devices.
    pub fn new() -> Arc<Self> {
        let page = |_| Page(std::array::from_fn(|_| AtomicU32::new(0)));
        let memory = Arc::new(RegisterMemory(Box::new(std::array::from_fn(page))));
        (0..MAX_DEVICES).for_each(|window| memory.window(window).show_placeholder());
        memory
    }

    /// Host address of the first window.
    pub(crate) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Bytes of all windows.
    pub(crate) const fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }

    /// The registers of window number `index`.
    pub fn window(self: &Arc<Self>, index: usize) -> Registers {
        Registers { memory: self.clone(), first: index * WORDS }
    }
}

/// The registers of one window.
#[derive(Debug, Clone)]
pub struct Registers {
    memory: Arc<RegisterMemory>,
    /// Number of its first word among those of all windows.
    first: usize,
}

impl Registers {
    fn word(&self, index: usize) -> Option<&AtomicU32> {
        let index = self.first + (index < WORDS).then_some(index)?;
        self.memory.0.get(index / (PAGE / 4)).and_then(|page| page.0.get(index % (PAGE / 4)))
    }

    fn register(&self, offset: u32) -> Option<&AtomicU32> {
        self.word(offset as usize / 4)
    }

    /// Shows a window without a device: drivers leave alone what has device id 0 (virtio 1.2, section 4.2.2).
    pub fn show_placeholder(&self) {
        (0..WORDS).filter_map(|index| self.word(index)).for_each(|word| word.store(0, Ordering::SeqCst));
        self.identify();
    }

    /// Shows the magic value and the version.
    pub(super) fn identify(&self) {
        self.store(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        self.store(VIRTIO_MMIO_VERSION, VERSION);
    }

    /// What the register at `offset` shows.
    pub(super) fn load(&self, offset: u32) -> u32 {
        self.register(offset).map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    pub(super) fn store(&self, offset: u32, value: u32) {
        if let Some(word) = self.register(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    pub(super) fn set_bits(&self, offset: u32, bits: u32) {
        if let Some(word) = self.register(offset) {
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
        }
    }

    pub(super) fn clear_bits(&self, offset: u32, bits: u32) {
        if let Some(word) = self.register(offset) {
            word.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Shows a configuration space; what does not fit the window is left out.
    pub(super) fn store_config(&self, bytes: &[u8]) {
        for (chunk, offset) in bytes.chunks(4).zip((VIRTIO_MMIO_CONFIG..).step_by(4)) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(offset, u32::from_le_bytes(word));
        }
    }

    /// What a read of `data.len()` bytes at `offset` of the window finds. Past its end that is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let word = usize::try_from(at / 4).ok().and_then(|index| self.word(index));
            let word = word.map_or([0; 4], |word| word.load(Ordering::SeqCst).to_ne_bytes());
            *byte = word[(at % 4) as usize];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(registers: &Registers, offset: u64, size: usize) -> Vec<u8> {
        let mut data = vec![0xee; size];
        registers.read(offset, &mut data);
        data
    }

    #[test]
    fn windows_do_not_touch_each_other() {
        let memory = RegisterMemory::new();
        let windows: Vec<_> = (0..MAX_DEVICES).map(|index| memory.window(index)).collect();
        for window in &windows {
            assert_eq!([0, 4, 8].map(|offset| window.load(offset)), [MAGIC, VERSION, 0]);
        }
        windows[7].store_config(&[0xff; 4096]);
        windows[8].store(0x60, 7);
        assert_eq!(windows[7].load(MMIO_STRIDE as u32 - 4), u32::MAX);
        assert_eq!(windows[8].load(0), MAGIC);
        assert_eq!((windows[7].load(0x60), windows[9].load(0x60)), (0, 0));
        windows[8].show_placeholder();
        assert_eq!((windows[8].load(0), windows[8].load(0x60)), (MAGIC, 0));
        windows[MAX_DEVICES - 1].store(0x60, 5);
        assert_eq!(windows[MAX_DEVICES - 1].load(0x60), 5);
    }

    #[test]
    fn the_configuration_space_takes_any_access() {
        let window = RegisterMemory::new().window(3);
        window.store_config(&[1, 2, 3, 4, 5, 6]);
        assert_eq!(read(&window, 0x100, 1), [1]);
        assert_eq!(read(&window, 0x101, 2), [2, 3]);
        assert_eq!(read(&window, 0x100, 8), [1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(read(&window, MMIO_STRIDE - 2, 4), [0; 4]);
        assert_eq!(read(&window, u64::MAX - 7, 4), [0; 4]);
    }

    #[test]
    fn it_is_whole_pages_below_the_next_window() {
        let memory = RegisterMemory::new();
        assert_eq!((memory.address() % 4096, memory.size() % 4096), (0, 0));
        assert!(memory.size() >= MMIO_STRIDE * MAX_DEVICES as u64);
    }
}
