//! What can go wrong while a machine is made or started.

use std::io;

use crate::boot::BootError;
use crate::cpu::CpuError;
use crate::device_loop::LoopError;
use crate::memory::MemoryError;
use crate::resources::ResourceError;
use crate::template::TemplateError;

/// Why a virtual machine can't be built or started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// Something that came with the configuration can't be used.
    #[error("the virtual machine's configuration can't be used")]
    Resources(#[from] ResourceError),
    /// No memory.
    #[error("no memory for the guest")]
    Memory(#[from] MemoryError),
    /// Nothing to boot.
    #[error("the guest can't be booted")]
    Boot(#[from] BootError),
    /// The descriptor isn't KVM, or is a KVM that we can't use.
    #[error("KVM can't be used: {0}")]
    NoKvm(&'static str),
    /// A KVM that is too old.
    #[error("KVM can't be used: it lacks {0}; a newer kernel is needed")]
    Lacking(&'static str),
    /// KVM refused.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A vCPU can't be set up.
    #[error("vCPU {id} can't be set up")]
    Vcpu {
        /// Its number.
        id: u8,
        /// Why not.
        #[source]
        source: CpuError,
    },
    /// The host is out of something.
    #[error("the host refused {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device thread.
    #[error("the devices can't be started")]
    Devices(#[from] LoopError),
    /// A saved machine can't be restored.
    #[error("the saved machine can't be restored")]
    Template(#[from] TemplateError),
}

pub(crate) fn kvm_failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

pub(super) fn host_failed(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}
