//! Devices that the host gives to the running guest.
//!
//! The machine has a window for each slot, which was found empty when the kernel booted and so has no driver. Once there
//! is a device in it, the driver is bound by hand; before the device goes it is unbound. What may take as long as the
//! device does is done in a process of its own, which may get stuck without the agent.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_base::guest::DEVICE_SLOTS_PARAMETER;
use tokio::time::timeout;

use crate::reaper::Reaper;
use crate::sys::process::{CloneOptions, clone_process, exit_now};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// What can't be done about a slot.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum SlotError {
    #[error("there are no slots for devices: no {DEVICE_SLOTS_PARAMETER} on the kernel's command line")]
    NoSlots,
    #[error("can't ask the kernel about slot {slot}")]
    System { slot: u32, source: io::Error },
    #[error("the kernel does not {what} slot {slot}")]
    Refused { what: &'static str, slot: u32, source: io::Error },
    #[error("the kernel did not {what} slot {slot} within {} seconds", .limit.as_secs())]
    TimedOut { what: &'static str, slot: u32, limit: Duration },
}

/// A slot's window.
#[derive(Debug)]
pub(crate) struct Window {
    slot: u32,
    /// The name of the platform device.
    name: String,
}

impl Window {
    /// The window of a slot.
    pub(crate) fn of(slot: u32) -> Result<Window, SlotError> {
        let command_line =
            fs::read_to_string("/proc/cmdline").map_err(|source| SlotError::System { slot, source })?;
        let name = name_on(&command_line, slot).ok_or(SlotError::NoSlots)?;
        Ok(Window { slot, name })
    }

    /// The device's directory.
    pub(crate) fn device(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.name)
    }

    /// Has the driver take the device up; `what` is that in the words of an error, before "slot 1".
    pub(crate) async fn bind(
        &self,
        what: &'static str,
        limit: Duration,
        reaper: &Reaper,
    ) -> Result<(), SlotError> {
        self.tell_driver("bind", what, limit, reaper).await
    }

    /// The same, on the calling process's own time.
    pub(crate) fn bind_here(&self) -> io::Result<()> {
        OpenOptions::new().write(true).open(Path::new(DRIVER).join("bind"))?.write_all(self.name.as_bytes())
    }

    /// Has the driver let go of the device.
    pub(crate) async fn unbind(
        &self,
        what: &'static str,
        limit: Duration,
        reaper: &Reaper,
    ) -> Result<(), SlotError> {
        self.tell_driver("unbind", what, limit, reaper).await
    }

    /// Writes the device's name to one of the driver's files; the write ends when the kernel has spoken with the device.
    async fn tell_driver(
        &self,
        file: &str,
        what: &'static str,
        limit: Duration,
        reaper: &Reaper,
    ) -> Result<(), SlotError> {
        let slot = self.slot;
        let file = OpenOptions::new().write(true).open(Path::new(DRIVER).join(file));
        let mut file = file.map_err(|source| SlotError::System { slot, source })?;
        in_a_process(what, slot, limit, reaper, || file.write_all(self.name.as_bytes())).await
    }
}

fn name_on(command_line: &str, slot: u32) -> Option<String> {
    let value = command_line.split_whitespace().find_map(|word| word.strip_prefix(DEVICE_SLOTS_PARAMETER))?;
    let first: u32 = value.parse().ok()?;
    Some(format!("virtio-mmio.{}", first.checked_add(slot)?))
}

/// What the driver made of the device in a window: `virtioN/CLASS/NAME` below it.
pub(crate) fn device_below(window: &Path, class: &str) -> io::Result<Option<PathBuf>> {
    let Some(virtio) = entry(window, |name| name.starts_with("virtio"))? else { return Ok(None) };
    entry(&virtio.join(class), |_| true)
}

/// The first entry of a directory whose name fits.
fn entry(directory: &Path, fits: impl Fn(&str) -> bool) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&fits) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Does something in a process of its own, which is given up when it takes too long.
pub(crate) async fn in_a_process(
    what: &'static str,
    slot: u32,
    limit: Duration,
    reaper: &Reaper,
    action: impl FnOnce() -> io::Result<()>,
) -> Result<(), SlotError> {
    // SAFETY: the agent runs on one thread.
    let cloned = unsafe { clone_process(CloneOptions::default()) };
    let pid = match cloned.map_err(|source| SlotError::System { slot, source })? {
        0 => match action() {
            Ok(()) => exit_now(0),
            Err(error) => exit_now(error.raw_os_error().unwrap_or(libc::EIO)),
        },
        pid => pid,
    };
    match timeout(limit, reaper.expect(pid)).await {
        Ok(Ok(exit)) if exit.status == 0 => Ok(()),
        Ok(exit) => {
            let errno = exit.ok().and_then(|exit| i32::try_from(exit.status).ok()).unwrap_or(libc::EIO);
            Err(SlotError::Refused { what, slot, source: io::Error::from_raw_os_error(errno) })
        }
        Err(_) => Err(SlotError::TimedOut { what, slot, limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_counted_from_the_first() {
        let line = "quiet bulkhead.device_slots=5 virtio_mmio.device=512@0xd0000000:9\n";
        assert_eq!(name_on(line, 2).as_deref(), Some("virtio-mmio.7"));
        assert_eq!(name_on(line, u32::MAX), None);
        assert_eq!(name_on("quiet", 0), None);
    }
}
