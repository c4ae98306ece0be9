//! Booting Linux by the 64-bit boot protocol (`Documentation/arch/x86/boot.rst`, section "64-bit Boot Protocol").

mod cmdline;
mod kernel;
mod mp_table;
mod params;
mod tables;

use std::fs::File;

use vm_memory::GuestMemoryError;

pub(crate) use cmdline::command_line;
pub(crate) use tables::{CODE_SELECTOR, DATA_SELECTOR, GDT_ENTRIES};

use crate::memory::GuestRam;

/// Why a guest can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel can't be loaded.
    #[error("the guest kernel can't be loaded")]
    Kernel(#[from] kernel::KernelError),
    /// The command line can't be used.
    #[error("the kernel command line can't be used")]
    CommandLine(#[from] cmdline::CommandLineError),
    /// Something else doesn't fit into guest memory.
    #[error("{what} can't be written into guest memory")]
    Write {
        /// What it was.
        what: &'static str,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
}

/// Puts a kernel and all that the boot protocol asks for into guest memory. Returns the address of its 64-bit entry.
///
/// `devices` is the number of virtio devices, whose interrupts the MP table lists.
pub fn load(
    ram: &GuestRam,
    kernel: &mut File,
    command_line: &str,
    vcpus: u8,
    devices: usize,
) -> Result<u64, BootError> {
    let loaded = kernel::load(ram, kernel)?;
    cmdline::write(ram, command_line)?;
    params::write(ram, loaded.setup_header, command_line.len())?;
    tables::write(ram)?;
    mp_table::write(ram, vcpus, devices)?;
    Ok(loaded.entry)
}

fn write_failed(what: &'static str) -> impl FnOnce(GuestMemoryError) -> BootError {
    move |source| BootError::Write { what, source }
}
