//! Disks that the host gives to the running guest.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_agent_protocol::{AddDiskRequest, AddDiskResponse, DISKS_DIR};

use super::layers::{self, Part};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::slots::{SlotError, Window, device_below, in_a_process};
use crate::reaper::Reaper;

/// How long the kernel may take to speak with a disk: it reads the partition table and may have to replay a journal.
const LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to write back what it has for one.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(60);

/// How much of a layer's file is read ahead, as text for the kernel, in KiB: each request costs the guest a stop, and the host
/// has what is read in its page cache.
const LAYER_READAHEAD_KIB: &str = "1024";

/// A disk that can't be taken up or let go.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum DiskError {
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("can't ask the kernel about the disk in slot {slot}")]
    System { slot: u32, source: io::Error },
    #[error("there is no block device for slot {slot}")]
    NoDevice { slot: u32 },
    #[error("the parts of the disk in slot {slot} can't be: {what}")]
    Parts { slot: u32, what: &'static str },
}

/// Has the kernel take up the disk in a slot, and mounts the file system on it if that is asked for.
pub(crate) async fn add(request: &AddDiskRequest, reaper: &Reaper) -> Result<AddDiskResponse, DiskError> {
    let added = take_up(request, reaper).await;
    if added.is_err() {
        // The slot is for the next disk then.
        let _ = remove(request.slot, reaper).await;
    }
    added
}

async fn take_up(request: &AddDiskRequest, reaper: &Reaper) -> Result<AddDiskResponse, DiskError> {
    let slot = request.slot;
    let window = Window::of(slot)?;
    let changes = request.overlay.is_some() && request.parts.is_empty();
    if changes {
        mount_changes(&window, request, reaper).await?;
    } else {
        window.bind("take up the disk in", LIMIT, reaper).await?;
    }
    let device = block_device(&window.device())
        .map_err(|source| DiskError::System { slot, source })?
        .ok_or(DiskError::NoDevice { slot })?;
    if changes {
        // It is mounted.
    } else if request.overlay.is_some() {
        mount_layers(&device, request, reaper).await?;
    } else if !request.file_system.is_empty() {
        mount_on(&device, request, reaper).await?;
    }
    Ok(AddDiskResponse { major: device.major, minor: device.minor, ..Default::default() })
}

/// Has the kernel let go of the disk in a slot.
pub(crate) async fn remove(slot: u32, reaper: &Reaper) -> Result<(), DiskError> {
    let target = mount_point(slot);
    let layers = layers::directory(slot);
    if target.exists() {
        in_a_process("unmount the disk in", slot, WRITE_BACK_LIMIT, reaper, || {
            layers::give_up(&layers::changes(slot));
            unmount(&target)?;
            layers::points(&layers).iter().try_for_each(|point| unmount(point))
        })
        .await?;
        let removed = fs::remove_dir(&target).and_then(|()| match fs::remove_dir_all(&layers) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        });
        removed.map_err(|source| DiskError::System { slot, source })?;
    }
    Ok(Window::of(slot)?.unbind("let go of the disk in", WRITE_BACK_LIMIT, reaper).await?)
}

fn unmount(target: &Path) -> io::Result<()> {
    match umount2(target, MntFlags::empty()) {
        // It never was mounted.
        Err(Errno::EINVAL) => Ok(()),
        // Whoever still uses it has lost the disk.
        Err(Errno::EBUSY) => Ok(umount2(target, MntFlags::MNT_DETACH)?),
        result => Ok(result?),
    }
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
    in_a_process("mount the disk in", *slot, LIMIT, reaper, || {
        Ok(mount(Some(&source), &target, Some(file_system.as_str()), flags, Some(data.as_str()))?)
    })
    .await?;
    Ok(())
}

/// Has the kernel take up the disk with a container's changes, mounts the file system on it, and makes a root of it and of the layer
/// below it, if one is named. A container waits for this: one process does it all.
async fn mount_changes(window: &Window, request: &AddDiskRequest, reaper: &Reaper) -> Result<(), DiskError> {
    let slot = request.slot;
    let (target, changes) = (mount_point(slot), layers::changes(slot));
    let prepare = || fs::create_dir_all(&target).and_then(|()| fs::create_dir_all(&changes));
    prepare().map_err(|source| DiskError::System { slot, source })?;
    let (flags, data) = flags_and_data(&request.options);
    in_a_process("mount a container's changes from", slot, LIMIT, reaper, || {
        window.bind_here()?;
        let device =
            block_device(&window.device())?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let source = Path::new("/dev").join(&device.name);
        mount(Some(&source), &changes, Some(request.file_system.as_str()), flags, Some(data.as_str()))?;
        if request.overlay.lower.is_empty() {
            Ok(())
        } else {
            layers::cover(&changes, &request.overlay, &target)
        }
    })
    .await?;
    Ok(())
}

/// Mounts the file systems that follow each other on a disk, and makes one root of them.
async fn mount_layers(
    device: &BlockDevice,
    request: &AddDiskRequest,
    reaper: &Reaper,
) -> Result<(), DiskError> {
    let slot = request.slot;
    let (target, directory) = (mount_point(slot), layers::directory(slot));
    let parts = Part::of(&request.parts).map_err(|what| DiskError::Parts { slot, what })?;
    let prepare = || {
        fs::create_dir_all(&target)?;
        (0..parts.len()).try_for_each(|number| fs::create_dir_all(directory.join(number.to_string())))
    };
    prepare().map_err(|source| DiskError::System { slot, source })?;
    let source = Path::new("/dev").join(&device.name);
    let (flags, data) = flags_and_data(&request.options);
    let queue = Path::new("/sys/class/block").join(&device.name).join("queue/read_ahead_kb");
    if let Err(error) = fs::write(&queue, LAYER_READAHEAD_KIB) {
        log::warn!("files of layers are read in small pieces: {}: {error}", queue.display());
    }
    in_a_process("mount the layers in", slot, LIMIT, reaper, || {
        let sources = layers::divide(&source, &parts)?;
        for (number, source) in sources.iter().enumerate() {
            let point = directory.join(number.to_string());
            let kind = Some(request.file_system.as_str());
            mount(Some(source), &point, kind, flags, Some(data.as_str()))?;
        }
        Ok(())
    })
    .await?;
    // The working directory of a process of its own may change.
    in_a_process("make an overlay of the layers in", slot, LIMIT, reaper, || {
        layers::unite(&directory, parts.len(), &request.overlay, &target)
    })
    .await?;
    Ok(())
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

/// What the kernel made of a disk.
#[derive(Debug, PartialEq, Eq)]
struct BlockDevice {
    name: OsString,
    major: u32,
    minor: u32,
}

/// The block device of a window: `virtioN/block/NAME/dev` below it.
fn block_device(window: &Path) -> io::Result<Option<BlockDevice>> {
    let Some(disk) = device_below(window, "block")? else { return Ok(None) };
    let text = fs::read_to_string(disk.join("dev"))?;
    let numbers = text.trim().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let name = disk.file_name().map(ToOwned::to_owned);
    Ok(numbers.zip(name).map(|((major, minor), name)| BlockDevice { name, major, minor }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_device_is_found_below_its_window() {
        let directory = tempfile::tempdir().unwrap();
        let window = directory.path();
        let disk = window.join("virtio5/block/vdb");
        fs::create_dir_all(&disk).unwrap();
        fs::create_dir_all(window.join("power")).unwrap();
        fs::write(disk.join("dev"), "254:16\n").unwrap();
        let found = block_device(window).unwrap();
        assert_eq!(found, Some(BlockDevice { name: "vdb".into(), major: 254, minor: 16 }));
    }

    #[test]
    fn options_are_flags_or_data() {
        let options = ["rw", "loop", "noatime", "data=ordered", "discard"].map(str::to_owned);
        let (flags, data) = flags_and_data(&options);
        assert_eq!(flags, MsFlags::MS_NODEV | MsFlags::MS_NOATIME);
        assert_eq!(data, "data=ordered,discard");
    }
}
