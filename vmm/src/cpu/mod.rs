//! Setting a vCPU up: what it can do (CPUID), and the state the boot protocol asks for.

mod cpuid;
mod registers;
mod state;

pub(crate) use cpuid::CpuidTemplate;
pub(crate) use registers::{set_boot_registers, set_firmware_registers};
pub(crate) use state::{VcpuState, check_size, saved_msrs};

/// Why a vCPU can't be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpuError {
    /// KVM refused.
    #[error("can't {what} of a vCPU")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM doesn't know an MSR.
    #[error("KVM doesn't accept MSR {0:#x}")]
    Msr(u32),
    /// More than is saved: AMX.
    #[error("a vCPU has {size} bytes of floating-point state here, and {most} can be saved")]
    StateSize {
        /// What KVM says that there is.
        size: usize,
        /// What is saved.
        most: usize,
    },
    /// The table of features is too long.
    #[error("the CPUID table is too long")]
    Table,
}

fn kvm_failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError::Kvm { what, source }
}
