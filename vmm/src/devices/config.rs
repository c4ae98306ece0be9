//! A device's configuration space (virtio 1.2, section 2.5).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The bytes that the driver reads at offset 0x100 and up. Drivers can't write them.
///
/// Shared by the register face, which reads, and the backend, which may change them.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    generation: AtomicU32,
}

impl ConfigSpace {
    /// A space with the given first contents. Its size never changes.
    pub fn new(bytes: Vec<u8>) -> Self {
        ConfigSpace { bytes: Mutex::new(bytes), generation: AtomicU32::new(0) }
    }

    /// Fills `data` from `offset`; bytes past the end read as zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.lock();
        if let Some(tail) = bytes.get(offset..) {
            let length = tail.len().min(data.len());
            data[..length].copy_from_slice(&tail[..length]);
        }
    }

    /// Replaces bytes from `offset` on and moves the generation; bytes past the end are dropped. The caller signals the
    /// change with [`crate::devices::Interrupt::signal_config`].
    pub fn update(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.lock();
        if let Some(tail) = bytes.get_mut(offset..) {
            let length = tail.len().min(data.len());
            tail[..length].copy_from_slice(&data[..length]);
        }
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// The contents.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// Goes on counting changes from a saved count.
    pub fn set_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// Counts the changes, for the `ConfigGeneration` register.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_past_the_end_are_zero() {
        let config = ConfigSpace::new(vec![1, 2, 3, 4]);
        let mut data = [0xff; 4];
        config.read(2, &mut data);
        assert_eq!(data, [3, 4, 0, 0]);
        config.read(usize::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn an_update_moves_the_generation() {
        let config = ConfigSpace::new(vec![0; 4]);
        config.update(2, &[7, 8, 9]);
        let mut data = [0; 4];
        config.read(0, &mut data);
        assert_eq!(data, [0, 0, 7, 8]);
        assert_eq!(config.generation(), 1);
    }
}
