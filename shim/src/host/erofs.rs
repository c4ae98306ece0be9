//! Layers of an image that are erofs: the files that hold them, opened for a guest that mounts them itself.
//!
//! Nothing of such a file is looked at here: what is in it only a guest's kernel parses.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_vmm_protocol::PART_ALIGNMENT;

use super::mount_table::{MountTable, TableMount};
use super::overlay::mount_id;
use crate::error::{Classify, Code};

/// What the kernel calls the file system.
pub(crate) const EROFS: &str = "erofs";

/// `f_type` of statfs(2).
const MAGIC: i64 = 0xe0f5_e1e2;

const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;

/// Why a layer can't be given to a guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// It can't be opened, or asked about.
    #[error("can't open the layer {path}")]
    Open {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Somebody else could change it.
    #[error("the layer {0} is not a file of root's that only root may write to")]
    Kind(PathBuf),
    /// It is empty, or too large.
    #[error("the layer {path} has {length} bytes")]
    Size {
        /// Where it is.
        path: PathBuf,
        /// Its size.
        length: u64,
    },
}

impl Classify for LayerError {
    fn code(&self) -> Code {
        Code::FAILED_PRECONDITION
    }
}

/// A file with a layer, open for reading.
#[derive(Debug)]
pub(crate) struct Layer {
    /// The file.
    pub file: File,
    /// Where it was found.
    pub path: PathBuf,
    /// How many bytes of a disk it takes up.
    pub room: u64,
}

impl Layer {
    /// Opens one: a regular file that belongs to root and that nobody else may write to.
    pub(crate) fn open(path: &Path) -> Result<Layer, LayerError> {
        let failed = |source| LayerError::Open { path: path.to_owned(), source };
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
            return Err(LayerError::Kind(path.to_owned()));
        }
        let length = metadata.len();
        let room = length.checked_next_multiple_of(PART_ALIGNMENT).filter(|&room| room > 0);
        let room = room.ok_or_else(|| LayerError::Size { path: path.to_owned(), length })?;
        Ok(Layer { file, path: path.to_owned(), room })
    }

    /// The layers that are mounted at `points`, if there is an erofs at each whose file can be told without doubt.
    pub(crate) fn mounted_at(points: &[&str]) -> Option<Vec<Layer>> {
        // Of other snapshotters' layers this is all that is asked.
        if points.is_empty() || !points.iter().all(|point| is_erofs(Path::new(point))) {
            return None;
        }
        let table = match MountTable::read() {
            Ok(table) => table,
            Err(error) => {
                log::warn!("layers are shared as files, as the mount table can't be read: {error}");
                return None;
            }
        };
        let by_id: HashMap<u64, &TableMount> = table.iter().map(|mount| (mount.id, mount)).collect();
        let layer = |point: &&str| {
            let mount = by_id.get(&mount_id(point).ok()?)?;
            let whole = mount.point == Path::new(point) && mount.root == Path::new("/");
            if whole && mount.kind == EROFS { behind(mount) } else { None }
        };
        let layers: Option<Vec<Layer>> = points.iter().map(layer).collect();
        if layers.is_none() {
            log::info!("layers are shared as files: what some of them are mounted from can't be told");
        }
        layers
    }
}

fn is_erofs(point: &Path) -> bool {
    // The kernel's numbers have 32 bits, whatever the type they come in.
    nix::sys::statfs::statfs(point).is_ok_and(|stat| i64::from(stat.filesystem_type().0 as u32) == MAGIC)
}

/// The file that an erofs is mounted from: the mount's source itself, or behind the loop device that is.
fn behind(mount: &TableMount) -> Option<Layer> {
    let refused =
        |error: LayerError| log::warn!("layers are shared as files: {}", crate::error::chain(&error));
    match mount.source.to_str()?.strip_prefix("/dev/loop") {
        Some(number) => {
            let number: u32 = number.parse().ok()?;
            let path = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
            let layer = Layer::open(Path::new(path.strip_suffix('\n')?)).map_err(refused).ok()?;
            let device = File::open(&mount.source).ok()?;
            let metadata = device.metadata().ok()?;
            let is_mounts = metadata.rdev() == libc::makedev(mount.device.0, mount.device.1);
            let file = layer.file.metadata().ok()?;
            let expected =
                Backing { device: (libc::major(file.dev()), libc::minor(file.dev())), inode: file.ino() };
            (is_mounts && backing(&device).ok()? == Some(expected)).then_some(layer)
        }
        None if mount.source.to_str()?.starts_with('/') => {
            Layer::open(Path::new(&mount.source)).map_err(refused).ok()
        }
        None => None,
    }
}

/// The file behind a loop device.
#[derive(Debug, PartialEq, Eq)]
struct Backing {
    device: (u32, u32),
    inode: u64,
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// What is behind a loop device; `None` if that is but a part of a file.
fn backing(device: &File) -> io::Result<Option<Backing>> {
    let mut info = MaybeUninit::<LoopInfo>::zeroed();
    // SAFETY: the argument has the layout of the structure that this request fills.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes are a valid value, and the kernel has filled it in.
    let info = unsafe { info.assume_init() };
    // As the kernel's `huge_encode_dev` writes it.
    let (low, high) = (info.device as u32, info.device >> 32);
    let device = (low >> 8 & 0xfff, low & 0xff | low >> 12 & 0xfff00);
    let whole = info.offset == 0 && info.size_limit == 0 && high == 0;
    Ok(whole.then_some(Backing { device, inode: info.inode }))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_what_others_cannot_change_is_a_layer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer");
        fs::write(&path, [0; 5000]).unwrap();
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o600);
        assert_eq!(Layer::open(&path).unwrap().room, 8192);
        for open_to_others in [0o620, 0o602] {
            mode(open_to_others);
            assert!(matches!(Layer::open(&path), Err(LayerError::Kind(_))));
        }
        mode(0o644);
        fs::write(&path, []).unwrap();
        assert!(matches!(Layer::open(&path), Err(LayerError::Size { length: 0, .. })));
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        assert!(matches!(Layer::open(&path), Err(LayerError::Kind(_))));
        fs::remove_file(&path).unwrap();
        assert!(matches!(Layer::open(&path), Err(LayerError::Open { .. })));
        assert!(matches!(Layer::open(Path::new("/dev/null")), Err(LayerError::Kind(_))));
    }

    #[test]
    fn directories_are_no_layers() {
        assert!(Layer::mounted_at(&[]).is_none());
        assert!(Layer::mounted_at(&["/"]).is_none());
        assert!(Layer::mounted_at(&["/no/such/directory"]).is_none());
    }
}
