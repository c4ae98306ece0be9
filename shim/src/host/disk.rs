//! Block devices of the host and images of disks, opened for a guest.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Classify, Code};
use crate::spec::{DeviceNumber, HostDisk};

/// Logical blocks that guests know, in bytes.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;

/// Why a block device can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is none with that number.
    #[error("this host has no block device {}:{}", .0.major, .0.minor)]
    Unknown(DeviceNumber),
    /// It can't be opened.
    #[error("can't open the block device {path}{}", hint(.source))]
    Open {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its node is something else.
    #[error("{path} is not the block device {}:{}", .number.major, .number.minor)]
    Other {
        /// The node.
        path: PathBuf,
        /// What it should be.
        number: DeviceNumber,
    },
    /// Neither a device nor an image.
    #[error("{0} is neither a block device nor a file")]
    Kind(PathBuf),
    /// No guest can use its blocks.
    #[error("{path} has logical blocks of {size} bytes: 512 to 4096 are possible")]
    BlockSize {
        /// Where it is.
        path: PathBuf,
        /// Size of its logical blocks.
        size: u32,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => " for writing, since it is mounted on the host or another pod has it",
        _ => "",
    }
}

impl Classify for DiskError {
    fn code(&self) -> Code {
        Code::FAILED_PRECONDITION
    }
}

/// An open block device, or an open image of a disk.
#[derive(Debug)]
pub(crate) struct OpenDisk {
    /// The device or image.
    pub file: File,
    /// Where it was found.
    pub path: PathBuf,
    /// Whether it is open for reading only.
    pub read_only: bool,
    /// Size of a logical block, bytes.
    pub block_size: u32,
}

impl OpenDisk {
    /// Opens the block device that a container asks for.
    pub(crate) fn open(disk: &HostDisk) -> Result<OpenDisk, DiskError> {
        let number = disk.number;
        let path = node(number).ok_or(DiskError::Unknown(number))?;
        let disk = OpenDisk::open_path(path, disk.read_only)?;
        match disk.file.metadata() {
            Ok(metadata) if metadata.rdev() == libc::makedev(number.major, number.minor) => Ok(disk),
            _ => Err(DiskError::Other { path: disk.path, number }),
        }
    }

    /// Opens a block device or an image.
    ///
    /// A device is claimed for writing: nobody else may mount it or claim it until it is closed. A file system that the
    /// host has mounted while a guest writes to its disk would give the guest the host's kernel.
    pub(crate) fn open_path(path: PathBuf, read_only: bool) -> Result<OpenDisk, DiskError> {
        let failed = |source| DiskError::Open { path: path.clone(), source };
        // On anything but a device the flag has no defined meaning.
        let is_device = fs::metadata(&path).map_err(failed)?.file_type().is_block_device();
        let claim = if is_device && !read_only { libc::O_EXCL } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(claim | libc::O_NONBLOCK)
            .open(&path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        let block_size = match (kind.is_block_device(), kind.is_file()) {
            (true, _) => logical_block_size(&file).map_err(failed)?,
            (_, true) => *BLOCK_SIZES.start(),
            _ => return Err(DiskError::Kind(path)),
        };
        if !BLOCK_SIZES.contains(&block_size) {
            return Err(DiskError::BlockSize { path, size: block_size });
        }
        Ok(OpenDisk { file, path, read_only, block_size })
    }
}

/// Where the kernel put a device's node.
fn node(number: DeviceNumber) -> Option<PathBuf> {
    let description = fs::read_to_string(format!("/sys/dev/block/{}:{}/uevent", number.major, number.minor));
    let description = description.ok()?;
    let name = description.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

fn logical_block_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the argument is a valid place for an int, which this request fills.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(size.unsigned_abs()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let number = DeviceNumber { major: 4095, minor: 7 };
        let error = OpenDisk::open(&HostDisk { number, read_only: true }).unwrap_err();
        assert_eq!(error.to_string(), "this host has no block device 4095:7");
    }

    #[test]
    fn an_image_is_opened_and_other_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = OpenDisk::open_path(path, false).unwrap();
        assert_eq!((disk.read_only, disk.block_size), (false, 512));
        let refused = OpenDisk::open_path("/dev/null".into(), true);
        assert!(matches!(refused, Err(DiskError::Kind(_))), "{refused:?}");
    }

    #[test]
    fn a_device_in_use_gets_a_reason() {
        let source = io::Error::from_raw_os_error(libc::EBUSY);
        let error = DiskError::Open { path: "/dev/sda1".into(), source };
        assert!(error.to_string().ends_with("it is mounted on the host or another pod has it"), "{error}");
    }
}
