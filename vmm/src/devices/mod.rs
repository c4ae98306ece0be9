//! Virtio devices.
//!
//! A device has two faces that meet in a [`slot::DeviceSlot`]:
//!
//! - the *register face* ([`mmio::MmioTransport`]), which vCPU threads call on a trapped write. It negotiates features,
//!   takes the driver's queue addresses, checks them, and activates or resets the device; what drivers read is in
//!   [`registers`];
//! - the *backend* (an implementation of [`VirtioDevice`]), which lives on a thread for devices inside a
//!   [`worker::DeviceWorker`] and is called when a queue was kicked or one of its descriptors is ready.
//!
//! ```text
//!            features ok          driver ok, queues sound
//! Inactive ───────────► Inactive ───────────────────────► Activated (queues exist)
//!    ▲                                                        │ reset by the driver
//!    └────────────────────────────────────────────────────────┤
//!                 reset by the driver                         ▼ nonsense from the driver (DeviceFault)
//!                        ◄──────────────────────────── NeedsReset (queues dropped)
//! ```
//!
//! A new device is a file or folder here that implements [`VirtioDevice`] ([`rng`] is the shortest), a [`DeviceKind`], and
//! a line in [`crate::resources`] that makes it from what the shim hands over. If it makes system calls of its own, they
//! go into `seccomp-profiles/vmm-device.json`, or `vmm-storage.json` if it waits for the node's storage.
//!
//! Guest memory can be reached only through [`Virtqueue`]s and the [`Chain`]s they hand out, and these exist only while
//! a device is activated: a device that isn't can't be used.

pub mod balloon;
pub mod blk;
mod chain;
mod config;
pub mod console;
pub mod fs;
pub(crate) mod interrupt;
pub mod mmio;
pub mod net;
pub mod parts;
mod queue;
mod queue_fault;
pub mod registers;
pub mod rng;
pub mod slot;
mod state;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

pub(crate) use chain::{Chain, ChainReader, ChainWriter, MemoryFault};
pub(crate) use config::ConfigSpace;
pub(crate) use interrupt::Interrupt;
pub(crate) use queue::{Progress, Virtqueue};
pub(crate) use queue_fault::QueueFault;
pub use state::DeviceState;
pub(crate) use state::{BackendState, StateFault};
pub(crate) use worker::DeviceEvents;

use std::sync::Arc;

use event_manager::EventSet;

/// Device types (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Network interface (5.1).
    Net,
    /// Block device (5.2).
    Block,
    /// Console (5.3).
    Console,
    /// Entropy source (5.4).
    Entropy,
    /// Memory balloon (5.5).
    Balloon,
    /// Socket device (5.10).
    Vsock,
    /// File system (5.11).
    FileSystem,
}

impl DeviceKind {
    /// The value of the `DeviceID` register.
    pub(crate) const fn id(self) -> u32 {
        match self {
            DeviceKind::Net => 1,
            DeviceKind::Block => 2,
            DeviceKind::Console => 3,
            DeviceKind::Entropy => 4,
            DeviceKind::Balloon => 5,
            DeviceKind::Vsock => 19,
            DeviceKind::FileSystem => 26,
        }
    }
}

/// What the register face has to know of a device.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// Its type.
    pub kind: DeviceKind,
    /// Device-type specific feature bits (0 to 23, 50 and up). `VERSION_1`, `RING_EVENT_IDX` and `RING_INDIRECT_DESC` are
    /// offered for every device.
    pub features: u64,
    /// Those of them that a driver must accept, since the device can't do without.
    pub required: u64,
    /// The greatest size of each queue, a power of two; the length is the number of queues.
    pub queue_sizes: Vec<u16>,
    /// The device-specific configuration space.
    pub config: Arc<ConfigSpace>,
}

/// What a driver did, or what happened to the host's resources, that makes a device stop until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// A queue or descriptor chain breaks the rules.
    #[error("a virtqueue can't be used")]
    Queue(#[from] QueueFault),
    /// A buffer can't be read or written.
    #[error("a buffer can't be used")]
    Memory(#[from] MemoryFault),
    /// The device's own protocol is broken.
    #[error("the driver broke the device's protocol: {0}")]
    Protocol(&'static str),
    /// The host end of the device is broken.
    #[error("the device's backend failed: {what}")]
    Backend {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A descriptor can't be watched.
    #[error("can't watch a descriptor for the device: {0}")]
    Events(event_manager::Error),
}

impl From<event_manager::Error> for DeviceFault {
    fn from(error: event_manager::Error) -> Self {
        DeviceFault::Events(error)
    }
}

/// The queues of an activated device and what was negotiated.
#[derive(Debug)]
pub struct Activated {
    /// One per entry of [`DeviceInfo::queue_sizes`]; a queue that the driver left unused is always empty.
    pub queues: Vec<Virtqueue>,
    /// The feature bits that the driver accepted.
    pub features: u64,
}

impl Activated {
    /// Tells the driver that the configuration space has changed.
    pub(crate) fn signal_config(&self) {
        if let Some(queue) = self.queues.first() {
            queue.signal_config();
        }
    }

    /// Has a queue looked at once more, after the other devices had their turn.
    pub(crate) fn kick(&self, queue: usize) {
        if let Some(ring) = self.queues.get(queue) {
            ring.kick(queue);
        }
    }
}

/// A device's backend. All methods run on its thread, and only those of disks and file systems may wait, for the node's storage.
///
/// Whatever a method reads from guest memory is hostile. An `Err` marks the device as needing a reset
/// (`DEVICE_NEEDS_RESET`, virtio 1.2, section 2.1.1), drops its queues and calls [`VirtioDevice::reset`].
pub trait VirtioDevice: Send {
    /// What the register face has to know; constant over the device's life.
    fn info(&self) -> DeviceInfo;

    /// Called once, on the device's thread, before anything else: watch descriptors that matter from the start.
    fn start(&mut self, events: &mut DeviceEvents<'_, '_>) -> Result<(), DeviceFault> {
        let _ = events;
        Ok(())
    }

    /// The driver is ready. Every queue gets a [`VirtioDevice::queue_ready`] call right after this.
    fn activate(
        &mut self,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let _ = (active, events);
        Ok(())
    }

    /// The driver kicked queue number `queue` (or the device was activated, or the last call returned
    /// [`Progress::More`]). Spurious calls happen.
    fn queue_ready(
        &mut self,
        queue: usize,
        active: &mut Activated,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<Progress, DeviceFault>;

    /// A descriptor that the device watches under `token` is ready. `active` is `None` while the driver isn't ready.
    fn descriptor_ready(
        &mut self,
        token: u32,
        set: EventSet,
        active: Option<&mut Activated>,
        events: &mut DeviceEvents<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let _ = (token, set, active, events);
        Ok(())
    }

    /// What a saved machine has to keep of the backend, or why it can't be saved now. Its thread has ended.
    fn save(&self) -> Result<BackendState, &'static str> {
        Ok(BackendState::None)
    }

    /// Takes a saved state, before its thread starts and anything else is called.
    fn restore(&mut self, state: BackendState) -> Result<(), StateFault> {
        match state {
            BackendState::None => Ok(()),
            _ => Err(StateFault::Impossible("the backend has no such state")),
        }
    }

    /// Forget everything that belongs to the driver: chains in flight, connections. The queues are gone already.
    /// May be called when nothing was ever activated.
    fn reset(&mut self, events: &mut DeviceEvents<'_, '_>) {
        let _ = events;
    }
}
