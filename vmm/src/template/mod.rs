//! Saved machines: what is written when a machine is saved, and how it is read back.
//!
//! A saved machine is two files. One is guest memory, which is mapped and never read. The other is this module's: a
//! [`MachineState`] behind a header. Whoever keeps the files vouches for them; still, nothing that is read here is taken
//! at its word: sizes are limited, and what a driver could have written goes through the checks that it would have gone
//! through then.

mod format;
mod raw;

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

pub use format::{read, write};
pub(crate) use raw::Raw;

use crate::cpu::{CpuError, VcpuState};
use crate::devices::{DeviceKind, DeviceState};
use crate::ioapic::IoApicState;

/// Everything of a machine but its memory: plain data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// Size of guest memory.
    pub memory_mib: u32,
    /// The features of its first vCPU; the others differ from it in their numbers.
    pub cpuid: Vec<Raw<kvm_cpuid_entry2>>,
    /// Each vCPU.
    pub vcpus: Vec<VcpuState>,
    /// The paravirtual clock.
    pub clock: Raw<kvm_clock_data>,
    /// The IOAPIC.
    pub ioapic: IoApicState,
    /// Each device, in the order of their windows.
    pub devices: Vec<DeviceState>,
}

/// Why a machine can't be saved, or a saved one can't be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    /// The machine doesn't run on a file that could be kept.
    #[error("guest memory is not a file that is written through: boot the machine with one")]
    NotSaveable,
    /// The machine ended while it was stopped.
    #[error("the machine has ended, or a thread of it did not stop in time")]
    NotStopped,
    /// A device is in the middle of something.
    #[error("the {kind:?} device can't be saved: {why}")]
    Busy {
        /// Which one.
        kind: DeviceKind,
        /// What it is doing.
        why: &'static str,
    },
    /// Guest memory is not a file.
    #[error("guest memory must be a template's memory file")]
    NoMemoryFile,
    /// The list of pages to map in advance.
    #[error(transparent)]
    WorkingSet(#[from] crate::working_set::WorkingSetError),
    /// The saved machine was another one.
    #[error("the saved machine has other {0} than the one that is asked for")]
    Mismatch(&'static str),
    /// The saved state of a device makes no sense for it.
    #[error("the saved state of device {index} can't be used: {why}")]
    Device {
        /// Its position.
        index: usize,
        /// What is wrong.
        why: String,
    },
    /// KVM doesn't give or take a vCPU's state.
    #[error("the state of vCPU {id} can't be moved")]
    Vcpu {
        /// Its number.
        id: u8,
        /// Why not.
        #[source]
        source: CpuError,
    },
    /// KVM doesn't give or take another part of the state.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The file with the state can't be read or written, or isn't one.
    #[error("the file with the machine's state can't be used")]
    File(#[from] format::FormatError),
}
