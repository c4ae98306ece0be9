//! Disks that the host gives to the running guest.
//!
//! The machine has a window for each slot, which was found empty when the kernel booted and so has no driver. Once there
//! is a disk in it, the driver is bound by hand; before the disk goes it is unbound. What may take as long as the disk
//! does is done in a process of its own, which may get stuck without the agent.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_agent_protocol::{AddDiskRequest, AddDiskResponse, DISKS_DIR};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::time::timeout;

use crate::reaper::Reaper;
use crate::sys::process::{CloneOptions, clone_process, exit_now};

/// Names the first slot's window, counted from 0, on the kernel's command line.
const PARAMETER: &str = "bulkhead.device_slots=";

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// How long the kernel may take to speak with a disk: it reads the partition table and may have to replay a journal.
const LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to write back what it has for one.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(60);

/// A disk that can't be taken up or let go.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DiskError {
    #[error("there are no slots for devices: no {PARAMETER} on the kernel's command line")]
    NoSlots,
    #[error("can't ask the kernel about slot {slot}")]
    System { slot: u32, source: io::Error },
    #[error("the kernel does not {what} the disk in slot {slot}")]
    Refused { what: &'static str, slot: u32, source: io::Error },
    #[error("the kernel did not {what} the disk in slot {slot} within {} seconds", .limit.as_secs())]
    TimedOut { what: &'static str, slot: u32, limit: Duration },
    #[error("there is no block device for slot {slot}")]
    NoDevice { slot: u32 },
}

/// Has the kernel take up the disk in a slot, and mounts the file system on it if that is asked for.
pub async fn add(request: &AddDiskRequest, reaper: &Reaper) -> Result<AddDiskResponse, DiskError> {
    let added = take_up(request, reaper).await;
    if added.is_err() {
        // The slot is for the next disk then.
        let _ = remove(request.slot, reaper).await;
    }
    added
}

async fn take_up(request: &AddDiskRequest, reaper: &Reaper) -> Result<AddDiskResponse, DiskError> {
    let (slot, window) = (request.slot, window(request.slot)?);
    tell_driver("bind", "take up", slot, &window, LIMIT, reaper).await?;
    let device = block_device(&Path::new(DEVICES).join(window))
        .map_err(|source| DiskError::System { slot, source })?
        .ok_or(DiskError::NoDevice { slot })?;
    if !request.file_system.is_empty() {
        mount_on(&device, request, reaper).await?;
    }
    Ok(AddDiskResponse { major: device.major, minor: device.minor, ..Default::default() })
}

/// Has the kernel let go of the disk in a slot.
pub async fn remove(slot: u32, reaper: &Reaper) -> Result<(), DiskError> {
    let target = mount_point(slot);
    if target.exists() {
        in_a_process("unmount", slot, WRITE_BACK_LIMIT, reaper, || {
            match umount2(&target, MntFlags::empty()) {
                // It never was mounted.
                Err(Errno::EINVAL) => Ok(()),
                // Whoever still uses it has lost the disk.
                Err(Errno::EBUSY) => Ok(umount2(&target, MntFlags::MNT_DETACH)?),
                result => Ok(result?),
            }
        })
        .await?;
        fs::remove_dir(&target).map_err(|source| DiskError::System { slot, source })?;
    }
    tell_driver("unbind", "let go of", slot, &window(slot)?, WRITE_BACK_LIMIT, reaper).await
}

fn mount_point(slot: u32) -> PathBuf {
    Path::new(DISKS_DIR).join(slot.to_string())
}

async fn mount_on(device: &BlockDevice, request: &AddDiskRequest, reaper: &Reaper) -> Result<(), DiskError> {
    let AddDiskRequest { slot, file_system, options, .. } = request;
    let target = mount_point(*slot);
    fs::create_dir_all(&target).map_err(|source| DiskError::System { slot: *slot, source })?;
    let (flags, data) = flags_and_data(options);
    let source = Path::new("/dev").join(&device.name);
    in_a_process("mount", *slot, LIMIT, reaper, || {
        Ok(mount(Some(&source), &target, Some(file_system.as_str()), flags, Some(data.as_str()))?)
    })
    .await
}

/// Options of a mount that are flags to the kernel, and the others. Device nodes on a container's disk mean nothing here.
fn flags_and_data(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::MS_NODEV;
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "lazytime" => flags |= MsFlags::MS_LAZYTIME,
            // The kernel's defaults, and what the host would have needed.
            "" | "rw" | "defaults" | "relatime" | "suid" | "exec" | "dev" | "nodev" | "async" | "loop" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
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

/// Writes a device's name to one of the driver's files; the write ends when the kernel has spoken with the disk.
async fn tell_driver(
    file: &str,
    what: &'static str,
    slot: u32,
    window: &str,
    limit: Duration,
    reaper: &Reaper,
) -> Result<(), DiskError> {
    let path = Path::new(DRIVER).join(file);
    let file = OpenOptions::new().write(true).open(path);
    let mut file = file.map_err(|source| DiskError::System { slot, source })?;
    in_a_process(what, slot, limit, reaper, || file.write_all(window.as_bytes())).await
}

/// Does something in a process of its own, which is given up when it takes too long.
async fn in_a_process(
    what: &'static str,
    slot: u32,
    limit: Duration,
    reaper: &Reaper,
    action: impl FnOnce() -> io::Result<()>,
) -> Result<(), DiskError> {
    // SAFETY: the agent runs on one thread.
    let cloned = unsafe { clone_process(CloneOptions::default()) };
    let pid = match cloned.map_err(|source| DiskError::System { slot, source })? {
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
            Err(DiskError::Refused { what, slot, source: io::Error::from_raw_os_error(errno) })
        }
        Err(_) => Err(DiskError::TimedOut { what, slot, limit }),
    }
}

/// What the kernel made of a disk.
#[derive(Debug, PartialEq, Eq)]
struct BlockDevice {
    name: OsString,
    major: u32,
    minor: u32,
}

/// The block device of a window: `virtioN/block/NAME/dev` below it.
fn block_device(window: &Path) -> io::Result<Option<BlockDevice>> {
    let Some(virtio) = entry(window, |name| name.starts_with("virtio"))? else { return Ok(None) };
    let Some(disk) = entry(&virtio.join("block"), |_| true)? else { return Ok(None) };
    let text = fs::read_to_string(disk.join("dev"))?;
    let numbers = text.trim().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let name = disk.file_name().map(ToOwned::to_owned);
    Ok(numbers.zip(name).map(|((major, minor), name)| BlockDevice { name, major, minor }))
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
        let line = "quiet bulkhead.device_slots=5 virtio_mmio.device=4K@0xd0000000:9\n";
        assert_eq!(window_on(line, 2).as_deref(), Some("virtio-mmio.7"));
        assert_eq!(window_on(line, u32::MAX), None);
        assert_eq!(window_on("quiet", 0), None);
    }

    #[test]
    fn a_block_device_is_found_below_its_window() {
        let window = std::env::temp_dir().join(format!("bulkhead-disks-{}", std::process::id()));
        let disk = window.join("virtio5/block/vdb");
        fs::create_dir_all(&disk).unwrap();
        fs::create_dir_all(window.join("power")).unwrap();
        fs::write(disk.join("dev"), "254:16\n").unwrap();
        let found = block_device(&window);
        fs::remove_dir_all(&window).unwrap();
        assert_eq!(found.unwrap(), Some(BlockDevice { name: "vdb".into(), major: 254, minor: 16 }));
    }

    #[test]
    fn options_are_flags_or_data() {
        let options = ["rw", "loop", "noatime", "data=ordered", "discard"].map(str::to_owned);
        let (flags, data) = flags_and_data(&options);
        assert_eq!(flags, MsFlags::MS_NODEV | MsFlags::MS_NOATIME);
        assert_eq!(data, "data=ordered,discard");
    }
}
