//! The state of a device as a saved machine has it: plain data.

use serde::{Deserialize, Serialize};

use super::console::ConsoleState;
use super::mmio::TransportState;
use super::queue::RingPosition;
use super::queue_fault::QueueFault;
use super::vsock::VsockState;

/// One device, both of its faces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The value of its `DeviceID` register.
    pub id: u32,
    /// Its configuration space.
    pub config: Vec<u8>,
    /// How often that has changed.
    pub config_generation: u32,
    /// What the driver wrote.
    pub transport: TransportState,
    /// Its `InterruptStatus` register.
    pub interrupt_status: u32,
    /// While it is activated: where it stands in each ring; `None` for a queue that the driver left unused.
    pub positions: Option<Vec<Option<RingPosition>>>,
    /// The backend's own.
    pub backend: BackendState,
}

/// What a backend has beside its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendState {
    /// Nothing.
    #[default]
    None,
    /// A console.
    Console(ConsoleState),
    /// A socket device.
    Vsock(VsockState),
}

/// Why a device can't take a saved state.
#[derive(Debug, thiserror::Error)]
pub enum StateFault {
    /// It is the state of a device of another type, or of one that is configured differently.
    #[error("it has another {0}")]
    Other(&'static str),
    /// No driver can have brought the device to it.
    #[error("it is impossible: {0}")]
    Impossible(&'static str),
    /// The queues don't fit guest memory.
    #[error("a queue is impossible: {0}")]
    Queue(#[from] QueueFault),
    /// Something on the host that it goes on with wasn't handed over.
    #[error("{0} is missing")]
    Missing(String),
}
