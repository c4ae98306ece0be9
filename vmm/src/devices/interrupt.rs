//! How a device interrupts the guest.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS};
use vmm_sys_util::eventfd::EventFd;

use super::registers::Registers;

/// `InterruptStatus` bit: a used buffer notification.
pub(crate) const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit: a configuration change notification.
const CONFIG_CHANGE: u32 = 2;

/// One device's interrupt line and the status bits behind it, shared by the register face and the backend.
///
/// The line is edge-triggered: writing the eventfd (an irqfd) injects one interrupt.
///
/// The bit for used buffers stays once it was set: a driver that looks at its queues for nothing loses little, and so KVM can drop
/// the acknowledgement, of which nobody has to hear.
#[derive(Debug)]
pub(crate) struct Interrupt {
    registers: Registers,
    needs_reset: AtomicBool,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that is raised by writing to `line`, which must be non-blocking.
    pub(crate) fn new(line: EventFd, registers: Registers) -> Self {
        Interrupt { registers, needs_reset: AtomicBool::new(false), line }
    }

    /// The eventfd behind the line.
    pub(crate) fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells the driver that buffers were used.
    pub(crate) fn signal_used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space or the device status changed.
    pub(crate) fn signal_config(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// Makes the device status show `DEVICE_NEEDS_RESET`, and tells the driver.
    pub(super) fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.show_needs_reset();
        self.signal_config();
    }

    /// Whether the device status shows `DEVICE_NEEDS_RESET`.
    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Shows the device status, which is `status` and perhaps `DEVICE_NEEDS_RESET`.
    pub(super) fn show_status(&self, status: u32) {
        self.registers.store(VIRTIO_MMIO_STATUS, status);
        // Either this finds it or the backend shows it after this.
        if self.needs_reset() {
            self.show_needs_reset();
        }
    }

    fn show_needs_reset(&self) {
        self.registers.set_bits(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET);
    }

    /// The value of the `InterruptStatus` register.
    pub(super) fn status(&self) -> u32 {
        self.registers.load(VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    /// Takes a saved status. The line has to be raised when it is wired, if that is not zero.
    pub(super) fn restore(&self, status: u32) {
        self.registers.store(VIRTIO_MMIO_INTERRUPT_STATUS, status & (USED_BUFFER | CONFIG_CHANGE));
    }

    /// Raises the line again, for what the status says.
    pub(crate) fn raise_again(&self) {
        self.raise(0);
    }

    /// A write to the `InterruptACK` register.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.registers.clear_bits(VIRTIO_MMIO_INTERRUPT_STATUS, bits & CONFIG_CHANGE);
    }

    /// A reset by the driver.
    pub(super) fn clear(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.registers.store(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
    }

    fn raise(&self, bits: u32) {
        self.registers.set_bits(VIRTIO_MMIO_INTERRUPT_STATUS, bits);
        // The only failure is a full counter: then the line has edges pending anyway.
        let _ = self.line.write(1);
    }
}
