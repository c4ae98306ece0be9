//! The kernel command line: the VMM's part describes its devices, the shim's part follows.

use std::fmt::Write;

use bulkhead_base::guest::{DEVICE_SLOTS_PARAMETER, POWER_PORT_PARAMETER};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, write_failed};
use crate::layout::{CMDLINE, CMDLINE_SIZE, MMIO_STRIDE, POWER_PORT, irq, mmio_address};
use crate::memory::GuestRam;

/// What every guest needs of its kernel:
/// - `console=hvc0`: the console is virtio;
/// - `reboot=k,panic_warm panic=-1`: reset through the keyboard controller, at once after a panic, and then leave the
///   "warm" mark at [`crate::layout::RESET_FLAG`] that tells a panic from a reset;
/// - `initcall_blacklist=cmos_init`: no search for a battery-backed clock, which would take a second to be given up;
/// - `cpuhp.parallel=0`: vCPUs start one after the other, rather than all at once to spin until it is their turn, which
///   takes the host's CPU from the one that works.
const BASE: &str = "console=hvc0 reboot=k,panic_warm panic=-1 initcall_blacklist=cmos_init cpuhp.parallel=0";

/// Why a command line can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandLineError {
    /// Longer than the kernel takes.
    #[error("it has {0} bytes: at most {max} are possible", max = CMDLINE_SIZE - 1)]
    TooLong(usize),
    /// A byte that can't be in it.
    #[error("it has a control or non-ASCII character at byte {0}")]
    Character(usize),
}

/// The whole command line for a guest with the given numbers of devices and of slots for later ones behind them, and with the
/// shim's parameters.
pub(crate) fn command_line(
    devices: usize,
    slots: usize,
    parameters: &str,
) -> Result<String, CommandLineError> {
    if let Some(position) = parameters.bytes().position(|byte| !(b' '..=b'~').contains(&byte)) {
        return Err(CommandLineError::Character(position));
    }
    let mut line = format!("{BASE} {POWER_PORT_PARAMETER}{POWER_PORT:#x} {DEVICE_SLOTS_PARAMETER}{devices}");
    for index in 0..devices + slots {
        // Writing to a string can't fail.
        let _ = write!(line, " virtio_mmio.device={MMIO_STRIDE}@{:#x}:{}", mmio_address(index), irq(index));
    }
    if !parameters.is_empty() {
        line.push(' ');
        line.push_str(parameters);
    }
    if line.len() >= CMDLINE_SIZE {
        return Err(CommandLineError::TooLong(line.len()));
    }
    Ok(line)
}

pub(super) fn write(ram: &GuestRam, line: &str) -> Result<(), BootError> {
    ram.write_slice(line.as_bytes(), GuestAddress(CMDLINE))
        .and_then(|()| ram.write_obj(0u8, GuestAddress(CMDLINE + line.len() as u64)))
        .map_err(write_failed("the command line"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_parameters_follow_the_base() {
        let line = command_line(1, 1, "root=/dev/vda quiet").unwrap();
        assert!(line.starts_with("console=hvc0 "));
        assert!(line.ends_with(
            " bulkhead.power_port=0x604 bulkhead.device_slots=1 virtio_mmio.device=512@0xd0000000:9 \
             virtio_mmio.device=512@0xd0000200:10 root=/dev/vda quiet"
        ));
    }

    #[test]
    fn what_the_kernel_would_cut_is_refused() {
        let room = CMDLINE_SIZE - 1 - command_line(0, 0, "").unwrap().len() - 1;
        assert_eq!(command_line(0, 0, &"x".repeat(room)).unwrap().len(), CMDLINE_SIZE - 1);
        assert_eq!(command_line(0, 0, &"x".repeat(room + 1)), Err(CommandLineError::TooLong(CMDLINE_SIZE)));
    }

    #[test]
    fn control_characters_are_refused() {
        assert_eq!(command_line(0, 0, "a\nb"), Err(CommandLineError::Character(1)));
        assert_eq!(command_line(0, 0, "é"), Err(CommandLineError::Character(0)));
    }
}
