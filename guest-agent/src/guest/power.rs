//! Powering the guest off: one byte to an I/O port that the VMM watches.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use bulkhead_base::guest::{POWER_OFF, POWER_PORT_PARAMETER};

use crate::sys::process::exit_now;

/// Powers the guest off. If that does not work, a reset ends it too.
pub(crate) fn off() -> ! {
    if let Err(error) = write_port() {
        log::error!("can't power off, resetting instead: {error}");
    }
    // SAFETY: takes a number only.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    // The end of process 1 is the end of the guest.
    exit_now(1)
}

fn write_port() -> io::Result<()> {
    let port = power_port(&fs::read_to_string("/proc/cmdline")?)
        .ok_or_else(|| io::Error::other(format!("no {POWER_PORT_PARAMETER} on the kernel's command line")))?;
    File::options().write(true).open("/dev/port")?.write_all_at(&[POWER_OFF], port.into())
}

fn power_port(command_line: &str) -> Option<u16> {
    let value = command_line.split_whitespace().find_map(|word| word.strip_prefix(POWER_PORT_PARAMETER))?;
    match value.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16).ok(),
        None => value.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read_from_the_command_line() {
        assert_eq!(power_port("console=hvc0 bulkhead.power_port=0x604 quiet\n"), Some(0x604));
        assert_eq!(power_port("bulkhead.power_port=1540"), Some(1540));
        assert_eq!(power_port("bulkhead.power_port=0x10000"), None);
        assert_eq!(power_port("quiet"), None);
    }
}
