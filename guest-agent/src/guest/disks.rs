//! Disks that the host gives to the running guest.
//!
//! The machine has a window for each slot, which was found empty when the kernel booted and so has no driver. Once there
//! is a disk in it, the driver is bound by hand; before the disk goes it is unbound.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_agent_protocol::AddDiskResponse;
use tokio::time::timeout;

use crate::reaper::Reaper;
use crate::sys::process::{CloneOptions, clone_process, exit_now};

/// Names the first slot's window, counted from 0, on the kernel's command line.
const PARAMETER: &str = "bulkhead.disk_slots=";

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// How long the kernel may take: it reads the disk's partition table.
const LIMIT: Duration = Duration::from_secs(10);

/// A disk that can't be taken up or let go.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DiskError {
    #[error("there are no slots for disks: no {PARAMETER} on the kernel's command line")]
    NoSlots,
    #[error("can't ask the kernel about slot {slot}")]
    System { slot: u32, source: io::Error },
    #[error("the kernel does not {what} the disk in slot {slot}")]
    Refused { what: &'static str, slot: u32, source: io::Error },
    #[error("the kernel did not {what} the disk in slot {slot} within {} seconds", LIMIT.as_secs())]
    TimedOut { what: &'static str, slot: u32 },
    #[error("there is no block device for slot {slot}")]
    NoDevice { slot: u32 },
}

/// Has the kernel take up the disk in a slot.
pub async fn add(slot: u32, reaper: &Reaper) -> Result<AddDiskResponse, DiskError> {
    let window = window(slot)?;
    tell_driver("bind", "take up", slot, &window, reaper).await?;
    let (major, minor) = numbers(&Path::new(DEVICES).join(window))
        .map_err(|source| DiskError::System { slot, source })?
        .ok_or(DiskError::NoDevice { slot })?;
    Ok(AddDiskResponse { major, minor, ..Default::default() })
}

/// Has the kernel let go of the disk in a slot.
pub async fn remove(slot: u32, reaper: &Reaper) -> Result<(), DiskError> {
    tell_driver("unbind", "let go of", slot, &window(slot)?, reaper).await
}

/// The name of a slot's platform device.
fn window(slot: u32) -> Result<String, DiskError> {
    let command_line =
        fs::read_to_string("/proc/cmdline").map_err(|source| DiskError::System { slot, source })?;
    window_on(&command_line, slot).ok_or(DiskError::NoSlots)
}

fn window_on(command_line: &str, slot: u32) -> Option<String> {
    let value = command_line.split_whitespace().find_map(|word| word.strip_prefix(PARAMETER))?;
    let first: u32 = value.parse().ok()?;
    Some(format!("virtio-mmio.{}", first.checked_add(slot)?))
}

/// Writes a device's name to one of the driver's files, in a process of its own: the write ends when the kernel has
/// spoken with the disk, and a disk that does not answer must not keep the agent.
async fn tell_driver(
    file: &str,
    what: &'static str,
    slot: u32,
    window: &str,
    reaper: &Reaper,
) -> Result<(), DiskError> {
    let system = |source| DiskError::System { slot, source };
    let mut file = OpenOptions::new().write(true).open(Path::new(DRIVER).join(file)).map_err(system)?;
    // SAFETY: the agent runs on one thread.
    let pid = match unsafe { clone_process(CloneOptions::default()) }.map_err(system)? {
        0 => match file.write_all(window.as_bytes()) {
            Ok(()) => exit_now(0),
            Err(error) => exit_now(error.raw_os_error().unwrap_or(libc::EIO)),
        },
        pid => pid,
    };
    match timeout(LIMIT, reaper.expect(pid)).await {
        Ok(Ok(exit)) if exit.status == 0 => Ok(()),
        Ok(exit) => {
            let errno = exit.ok().and_then(|exit| i32::try_from(exit.status).ok()).unwrap_or(libc::EIO);
            Err(DiskError::Refused { what, slot, source: io::Error::from_raw_os_error(errno) })
        }
        Err(_) => Err(DiskError::TimedOut { what, slot }),
    }
}

/// The numbers of the block device of a window: `virtioN/block/NAME/dev` below it.
fn numbers(window: &Path) -> io::Result<Option<(u32, u32)>> {
    let Some(virtio) = entry(window, |name| name.starts_with("virtio"))? else { return Ok(None) };
    let Some(disk) = entry(&virtio.join("block"), |_| true)? else { return Ok(None) };
    let text = fs::read_to_string(disk.join("dev"))?;
    Ok(text
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_counted_from_the_first() {
        let line = "quiet bulkhead.disk_slots=5 virtio_mmio.device=4K@0xd0000000:9\n";
        assert_eq!(window_on(line, 2).as_deref(), Some("virtio-mmio.7"));
        assert_eq!(window_on(line, u32::MAX), None);
        assert_eq!(window_on("quiet", 0), None);
    }

    #[test]
    fn numbers_are_found_below_the_window() {
        let window = std::env::temp_dir().join(format!("bulkhead-disks-{}", std::process::id()));
        let disk = window.join("virtio5/block/vdb");
        fs::create_dir_all(&disk).unwrap();
        fs::create_dir_all(window.join("power")).unwrap();
        fs::write(disk.join("dev"), "254:16\n").unwrap();
        let found = numbers(&window);
        fs::remove_dir_all(&window).unwrap();
        assert_eq!(found.unwrap(), Some((254, 16)));
    }
}
