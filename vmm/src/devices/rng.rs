//! Virtio entropy device (virtio 1.2, section 5.4): one queue; the driver offers buffers, the device fills them.

use std::sync::Arc;

use super::{
    Activated, Chain, ConfigSpace, DeviceEvents, DeviceFault, DeviceInfo, DeviceKind, Progress, VirtioDevice,
};

/// The most bytes handed out for one request; drivers ask again for more.
const MAX_REQUEST: usize = 256;

/// Queue size: the driver has one request at a time.
const QUEUE_SIZE: u16 = 8;

/// The entropy device. It has no state: every byte comes from the host kernel's generator when it is asked for.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    fn fill(chain: &Chain) -> Result<u32, DeviceFault> {
        let mut bytes = [0; MAX_REQUEST];
        let length = chain.writable_len().min(MAX_REQUEST);
        let got = random(&mut bytes[..length])?;
        let written = chain.writer().write(&bytes[..got])?;
        Ok(written as u32)
    }
}

impl VirtioDevice for Rng {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::Entropy,
            features: 0,
            required: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::new(ConfigSpace::default()),
        }
    }

    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        _events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault> {
        active.queues[queue].serve(Self::fill)
    }
}

/// Waits until the host's generator has been seeded, which on a host that has just booted and whose processor has no
/// generator of its own takes up to a second: the kernel gathers randomness when somebody waits for it, and only then. Whoever
/// started this process limits the time. The device doesn't wait, and a guest that it has nothing for loses it.
///
/// # Errors
/// When the host has no generator.
pub fn wait_for_seed() -> std::io::Result<()> {
    let mut byte = [0];
    if random(&mut byte).is_ok() {
        return Ok(());
    }
    log::info!("waiting for the host's random number generator to be seeded");
    loop {
        // SAFETY: the pointer and length are those of a live, exclusive array.
        match unsafe { libc::getrandom(byte.as_mut_ptr().cast(), byte.len(), 0) } {
            0.. => return Ok(()),
            _ => match std::io::Error::last_os_error() {
                error if error.kind() == std::io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Up to 256 bytes of the host's randomness: never blocks, and never comes back short once the host has seeded it.
fn random(buffer: &mut [u8]) -> Result<usize, DeviceFault> {
    // SAFETY: the pointer and length are those of a live, exclusive slice.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), libc::GRND_NONBLOCK) };
    usize::try_from(got)
        .map_err(|_| DeviceFault::Backend { what: "getrandom", source: std::io::Error::last_os_error() })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, TestDriver, readable, writable};
    use super::*;

    #[test]
    fn a_host_that_runs_tests_has_randomness() {
        wait_for_seed().unwrap();
    }

    #[test]
    fn a_request_is_filled_with_randomness() {
        let mut driver = TestDriver::activated(Box::new(Rng), 0);
        assert_eq!(driver.request(0, &[writable(BUFFERS, 64)]), Some(64));
        assert_eq!(driver.request(0, &[writable(BUFFERS + 64, 64)]), Some(64));
        let bytes = driver.read_bytes(BUFFERS, 128);
        assert_ne!(bytes[..64], [0; 64]);
        assert_ne!(bytes[..64], bytes[64..]);
        assert!(driver.interrupts() > 0);
    }

    #[test]
    fn a_huge_request_gets_a_bounded_answer() {
        let mut driver = TestDriver::activated(Box::new(Rng), 0);
        assert_eq!(driver.request(0, &[writable(BUFFERS, 1 << 20)]), Some(MAX_REQUEST as u32));
        assert_eq!(driver.read_bytes(BUFFERS + MAX_REQUEST as u64, 16), [0; 16]);
    }

    #[test]
    fn a_request_without_room_is_answered_with_nothing() {
        let mut driver = TestDriver::activated(Box::new(Rng), 0);
        assert_eq!(driver.request(0, &[readable(BUFFERS, 64)]), Some(0));
        assert!(!driver.needs_reset());
    }
}
