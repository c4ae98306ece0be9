//! How a device interrupts the guest.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// `InterruptStatus` bit: a used buffer notification.
const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit: a configuration change notification.
const CONFIG_CHANGE: u32 = 2;

/// One device's interrupt line and the status bits behind it, shared by the register face and the backend.
///
/// The line is edge-triggered: writing the eventfd (an irqfd) injects one interrupt.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that is raised by writing to `line`, which must be non-blocking.
    pub fn new(line: EventFd) -> Self {
        Interrupt { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), line }
    }

    /// The eventfd behind the line.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells the driver that buffers were used.
    pub fn signal_used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space or the device status changed.
    pub fn signal_config(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// Makes the device status show `DEVICE_NEEDS_RESET`, and tells the driver.
    pub(super) fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.signal_config();
    }

    /// Whether the device status shows `DEVICE_NEEDS_RESET`.
    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The value of the `InterruptStatus` register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Takes a saved status. If anything was pending the line has to be raised, when it is wired.
    pub(super) fn restore(&self, status: u32) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
    }

    /// Raises the line again if the driver has not acknowledged everything.
    pub fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    /// A write to the `InterruptACK` register.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// A reset by the driver.
    pub(super) fn clear(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // The only failure is a full counter: then the line has edges pending anyway.
        let _ = self.line.write(1);
    }
}
