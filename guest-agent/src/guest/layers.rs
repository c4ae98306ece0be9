//! Layers of an image: several file systems that follow each other on one disk, and the overlay that is made of them. Or the
//! other way round: what a container changes, on a disk, and the overlay of that and layers from elsewhere.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::{LAYERS_DIR, Overlay};
use nix::mount::{MsFlags, mount};
use nix::unistd::chdir;

use crate::sys::check;

/// What parts begin and end at.
const ALIGNMENT: u64 = 4096;

/// The most partitions that the kernel knows on a disk.
const MAX_PARTS: usize = 255;

/// `_IOR('X', 125, __u32)`, and its argument.
const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
static WITHOUT_FLUSH: u32 = 2;

const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;

/// Where the layers on the disk in a slot are mounted.
pub(crate) fn directory(slot: u32) -> PathBuf {
    Path::new(LAYERS_DIR).join(slot.to_string())
}

/// Where a file system for a container's changes is mounted, likewise.
pub(crate) fn changes(slot: u32) -> PathBuf {
    directory(slot).join("changes")
}

/// The mount points in such a directory.
pub(crate) fn points(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Has the kernel write nothing more to a file system with changes, if there is one: nobody will read them.
pub(crate) fn give_up(changes: &Path) {
    // Neither the directory nor the overlay on it is there for other disks.
    let Ok(directory) = File::open(changes) else { return };
    // SAFETY: the argument is a valid place for the number that this request reads.
    let result =
        unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_SHUTDOWN as _, &raw const WITHOUT_FLUSH) };
    if result < 0 {
        log::debug!("{} is written back: {}", changes.display(), io::Error::last_os_error());
    }
}

/// The same with all there are.
pub(crate) fn give_up_all() {
    for slot in points(Path::new(LAYERS_DIR)) {
        give_up(&slot.join("changes"));
    }
}

/// A part of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    start: i64,
    length: i64,
}

impl Part {
    /// Parts of these lengths, one after the other.
    pub(crate) fn of(lengths: &[u64]) -> Result<Vec<Part>, &'static str> {
        if lengths.is_empty() || lengths.len() > MAX_PARTS {
            return Err("there are none, or more than 255");
        }
        let mut start = 0i64;
        let mut parts = Vec::with_capacity(lengths.len());
        for &length in lengths {
            if length == 0 || !length.is_multiple_of(ALIGNMENT) {
                return Err("one has not a multiple of 4096 bytes");
            }
            let length = i64::try_from(length).map_err(|_| "one is too large")?;
            let end = start.checked_add(length).ok_or("they are too large")?;
            parts.push(Part { start, length });
            start = end;
        }
        Ok(parts)
    }
}

/// `struct blkpg_partition` of `linux/blkpg.h`.
#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Request {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *mut Partition,
}

/// Makes a partition of each part of a disk, whatever is on it; gives the devices. A single part is the disk.
pub(crate) fn divide(device: &Path, parts: &[Part]) -> io::Result<Vec<PathBuf>> {
    if let [_] = parts {
        return Ok(vec![device.to_owned()]);
    }
    let disk = File::open(device)?;
    let mut devices = Vec::with_capacity(parts.len());
    for (number, part) in (1..).zip(parts) {
        let Part { start, length } = *part;
        let mut partition = Partition { start, length, number, device_name: [0; 64], volume_name: [0; 64] };
        let mut request = Request {
            operation: BLKPG_ADD_PARTITION,
            flags: 0,
            length: size_of::<Partition>() as libc::c_int,
            data: &raw mut partition,
        };
        // SAFETY: the request has the kernel's layout, and its data are there until the call returns.
        check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw mut request) }.into())?;
        let mut name = device.as_os_str().to_owned();
        name.push(number.to_string());
        devices.push(name.into());
    }
    Ok(devices)
}

/// Mounts the overlay of `count` layers, whose mount points are named by their numbers in `directory`, on `target`.
///
/// The working directory changes: names of layers have to be short, as the kernel takes a page of options.
pub(crate) fn unite(directory: &Path, count: usize, overlay: &Overlay, target: &Path) -> io::Result<()> {
    if overlay.upper.is_empty() && count == 1 {
        let layer = directory.join("0");
        return Ok(mount(Some(&layer), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?);
    }
    chdir(directory)?;
    let layers: Vec<String> = (0..count).map(|number| number.to_string()).collect();
    mount_overlay(&layers.join(":"), overlay, target)
}

/// Mounts the overlay of a directory and the changes on a disk whose file system is mounted on `changes`.
pub(crate) fn cover(changes: &Path, overlay: &Overlay, target: &Path) -> io::Result<()> {
    chdir(changes)?;
    mount_overlay(&overlay.lower, overlay, target)
}

fn mount_overlay(lower: &str, overlay: &Overlay, target: &Path) -> io::Result<()> {
    let flags = if overlay.upper.is_empty() { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let data = options(lower, overlay);
    Ok(mount(Some("overlay"), target, Some("overlay"), flags, Some(data.as_str()))?)
}

fn options(lower: &str, overlay: &Overlay) -> String {
    let mut options = vec![format!("lowerdir={lower}")];
    if !overlay.upper.is_empty() {
        options.push(format!("upperdir={}", overlay.upper));
        options.push(format!("workdir={}", overlay.work));
    }
    options.extend(overlay.options.iter().cloned());
    options.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other() {
        let part = |start, length| Part { start, length };
        assert_eq!(Part::of(&[4096, 8192]), Ok(vec![part(0, 4096), part(4096, 8192)]));
        assert_eq!(Part::of(&[4096; 255]).map(|parts| parts.len()), Ok(255));
        let max = i64::MAX as u64 / 4096 * 4096;
        for wrong in [&[][..], &[4096; 256], &[0], &[4097], &[u64::MAX - 4095], &[max, 8192]] {
            assert!(Part::of(wrong).is_err());
        }
    }

    #[test]
    fn a_hundred_layers_are_options_that_fit_a_page() {
        let overlay = Overlay {
            upper: "/run/bulkhead/roots/c/changes/fs".into(),
            work: "/run/bulkhead/roots/c/changes/work".into(),
            options: vec!["index=off".into()],
            ..Default::default()
        };
        assert_eq!(
            options("0:1:2", &overlay),
            "lowerdir=0:1:2,upperdir=/run/bulkhead/roots/c/changes/fs,workdir=/run/bulkhead/roots/c/changes/work,index=off"
        );
        let most = (0..MAX_PARTS).map(|number| number.to_string()).collect::<Vec<_>>().join(":");
        assert!(options(&most, &overlay).len() < 4096);
        assert_eq!(options("0:1", &Overlay::default()), "lowerdir=0:1");
    }
}
