//! The messages on the control socket.

use serde::{Deserialize, Serialize};

use crate::attach::{AttachDisk, AttachNet};
use crate::config::{PrepareConfig, RestoreConfig, VmConfig};

/// What the shim asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Get ready for a machine whose size and memory are all that is known yet: map the memory, create the machine and its
    /// vCPUs in KVM, start the threads. First, and once only.
    ///
    /// This is what takes the time in the host's kernel, so the shim asks for it early and does other things until the reply
    /// comes. When it is refused the VMM ends.
    Prepare(PrepareConfig),
    /// Build the virtual machine and start its vCPUs. After `Prepare`, and once only.
    Boot(Box<VmConfig>),
    /// Instead of `Boot`: take a saved machine up where it was saved. When it is refused the VMM ends, as with `Boot`.
    Restore(Box<RestoreConfig>),
    /// Stop the machine for good and write its state to a file (the packet's only descriptor: empty, open for writing).
    ///
    /// Memory must be [`crate::MemorySource::Shared`]; its file and the state together can be restored. After the reply
    /// the VMM only waits for the shim to close the control socket.
    Save,
    /// Connect a stream (the packet's only descriptor, one end of a `SOCK_STREAM` pair) to a port the guest listens on.
    ///
    /// The reply says that the request was queued. Whether the guest accepts shows on the stream: it is closed when not.
    ConnectVsock {
        /// The guest's port.
        port: u32,
    },
    /// Put a disk into a free slot (its descriptors as in [`AttachDisk`]). The guest's kernel takes
    /// it up when it is made to look there again.
    AttachDisk(AttachDisk),
    /// Put a network interface into a free slot, as [`Request::AttachDisk`] does a disk. The packet's descriptors are the queues
    /// of its tap.
    AttachNet(AttachNet),
    /// Take the device out of a slot. Afterwards the VMM has closed what was behind it, whatever the guest makes of that.
    DetachDevice {
        /// Which one, from 0.
        slot: u8,
    },
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// The answer to the oldest unanswered request.
    Reply(Result<(), Refusal>),
    /// Something happened.
    Event(Event),
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind of failure it was.
    pub kind: RefusalKind,
    /// For the operator: what was tried on what, and why it failed; at most 4 KiB.
    pub message: String,
}

/// Classes of refusals that the shim treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The request itself is wrong.
    InvalidRequest,
    /// The guest kernel can't be loaded.
    Kernel,
    /// A disk can't be used.
    Disk,
    /// KVM refused.
    Kvm,
    /// Not enough memory, descriptors or threads on the host.
    Resources,
    /// The machine can't be saved now, or what was saved can't be restored here: boot one instead.
    Template,
}

/// Something that happened to the virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The virtual machine ended; the VMM process exits after this message.
    Exited(ExitReason),
}

/// Why a virtual machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The agent powered the guest off (a write to the VMM's power port).
    PowerOff,
    /// The guest asked for a reset without a panic: with our kernels, PID 1 ended or somebody called `reboot(2)`.
    Reset,
    /// The guest kernel panicked.
    Panic,
    /// A vCPU shut down: a triple fault.
    TripleFault,
    /// A vCPU can't go on.
    VcpuFailed {
        /// Which one.
        vcpu: u8,
        /// What KVM reported.
        detail: String,
    },
    /// A thread of the VMM itself failed.
    Internal {
        /// What failed.
        detail: String,
    },
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::PowerOff => write!(f, "the guest powered off"),
            ExitReason::Reset => write!(f, "the guest reset itself (its PID 1 ended, or it called reboot)"),
            ExitReason::Panic => write!(f, "the guest kernel panicked"),
            ExitReason::TripleFault => write!(f, "a vCPU of the guest triple-faulted"),
            ExitReason::VcpuFailed { vcpu, detail } => write!(f, "vCPU {vcpu} can't go on: {detail}"),
            ExitReason::Internal { detail } => write!(f, "the VMM failed: {detail}"),
        }
    }
}
