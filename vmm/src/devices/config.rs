//! A device's configuration space (virtio 1.2, section 2.5).

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION;
use vm_memory::ByteValued;

use super::registers::Registers;

/// The bytes that the driver reads at offset 0x100 and up. Drivers can't write them.
///
/// Shared by the register face, which shows them, and the backend, which may change them.
#[derive(Debug, Default)]
pub struct ConfigSpace(Mutex<Contents>);

#[derive(Debug, Default)]
struct Contents {
    bytes: Vec<u8>,
    generation: u32,
    /// Where the driver sees them.
    shown: Option<Registers>,
}

impl ConfigSpace {
    /// A space with the given first contents. Its size never changes.
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        ConfigSpace(Mutex::new(Contents { bytes, ..Contents::default() }))
    }

    /// A space with the structure that the device's section of the specification gives.
    pub(crate) fn of(structure: &impl ByteValued) -> Self {
        Self::new(structure.as_slice().to_vec())
    }

    /// Shows the space, and from now on every change, to the driver.
    pub(super) fn show(&self, registers: &Registers) {
        let mut contents = self.lock();
        registers.store_config(&contents.bytes);
        registers.store(VIRTIO_MMIO_CONFIG_GENERATION, contents.generation);
        contents.shown = Some(registers.clone());
    }

    /// Replaces bytes from `offset` on and moves the generation; bytes past the end are dropped. The caller signals the
    /// change with [`crate::devices::Interrupt::signal_config`].
    pub(crate) fn update(&self, offset: usize, data: &[u8]) {
        let mut contents = self.lock();
        if let Some(tail) = contents.bytes.get_mut(offset..) {
            let length = tail.len().min(data.len());
            tail[..length].copy_from_slice(&data[..length]);
        }
        contents.generation = contents.generation.wrapping_add(1);
        if let Some(registers) = &contents.shown {
            registers.store_config(&contents.bytes);
            registers.store(VIRTIO_MMIO_CONFIG_GENERATION, contents.generation);
        }
    }

    /// The contents.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Goes on counting changes from a saved count; before it is shown.
    pub(crate) fn set_generation(&self, generation: u32) {
        self.lock().generation = generation;
    }

    /// Counts the changes, for the `ConfigGeneration` register.
    pub(crate) fn generation(&self) -> u32 {
        self.lock().generation
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::registers::RegisterMemory;
    use super::*;

    #[test]
    fn an_update_is_shown_and_moves_the_generation() {
        let config = ConfigSpace::new(vec![0; 4]);
        config.set_generation(6);
        let registers = RegisterMemory::new().window(0);
        config.show(&registers);
        config.update(2, &[7, 8, 9]);
        let mut data = [0xff; 6];
        registers.read(0x100, &mut data);
        assert_eq!(data, [0, 0, 7, 8, 0, 0]);
        assert_eq!((config.generation(), registers.load(VIRTIO_MMIO_CONFIG_GENERATION)), (7, 7));
        config.update(usize::MAX, &[1]);
        assert_eq!(config.contents(), [0, 0, 7, 8]);
    }
}
