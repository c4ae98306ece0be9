//! A disk for what a container changes: a sparse file in the upper directory of its snapshot, so that what it takes up is counted and removed
//! as the snapshot's. Only the guest ever mounts it. It is made anew for each task.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::statvfs::statvfs;

use super::disk::{DiskError, OpenDisk};
use super::ext4::{self, Owner};
use crate::error::chain;

/// Its name, which no image has.
const FILE: &str = ".bulkhead-changes.ext4";

/// Why there is no such disk.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The directory where it would be.
    #[error("can't look at {path}")]
    Look {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody has changed something already, of which an image may be made.
    #[error("there are changes in {0} already")]
    NotEmpty(PathBuf),
    /// The file.
    #[error("can't make {path}")]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file again.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The disk.
#[derive(Debug)]
pub(crate) struct ChangesDisk {
    /// The file, open.
    pub disk: OpenDisk,
}

impl ChangesDisk {
    /// One for the changes that would be in `upper`, as large as there is room beside it; if it can't be had, that is in the log.
    pub(crate) fn or_log(upper: &Path) -> Option<ChangesDisk> {
        match ChangesDisk::make(upper) {
            Ok(disk) => Some(disk),
            Err(error @ ChangesError::NotEmpty(_)) => {
                // What an earlier task has left beside them is not the container's.
                forget(upper);
                log::info!("a container's changes are shared as files: {error}");
                None
            }
            Err(error) => {
                log::warn!("a container's changes are shared as files: {}", chain(&error));
                None
            }
        }
    }

    /// The same, or why not.
    pub(crate) fn make(upper: &Path) -> Result<ChangesDisk, ChangesError> {
        let look = |source| ChangesError::Look { path: upper.to_owned(), source };
        for entry in fs::read_dir(upper).map_err(look)? {
            if entry.map_err(look)?.file_name() != FILE {
                return Err(ChangesError::NotEmpty(upper.to_owned()));
            }
        }
        let metadata = fs::metadata(upper).map_err(look)?;
        let owner = Owner { uid: metadata.uid(), gid: metadata.gid(), mode: metadata.mode() };
        let room = statvfs(upper).map_err(|errno| look(errno.into()))?;
        let size = ext4::size_within(room.blocks_available().saturating_mul(room.fragment_size()));
        forget(upper);
        let path = upper.join(FILE);
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|file| ext4::make(&file, size, owner, seconds()));
        if let Err(source) = made {
            forget(upper);
            return Err(ChangesError::Make { path, source });
        }
        Ok(ChangesDisk { disk: OpenDisk::open_path(path, false)? })
    }
}

/// Removes what an earlier task has left there.
pub(crate) fn forget(upper: &Path) {
    remove(&upper.join(FILE));
}

/// Removes the file. What fails is logged: it goes with the snapshot.
pub(crate) fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("{} stays until its snapshot is removed: {error}", path.display());
        }
        _ => {}
    }
}

fn seconds() -> u32 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since_epoch.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_made_where_nothing_has_been_changed() {
        let directory = tempfile::tempdir().unwrap();
        let upper = directory.path().join("upper");
        assert!(matches!(ChangesDisk::make(&upper), Err(ChangesError::Look { .. })));
        fs::create_dir(&upper).unwrap();
        let first = ChangesDisk::make(&upper).unwrap();
        let metadata = first.disk.file.metadata().unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o600);
        assert!(metadata.len().is_multiple_of(ext4::GROUP) && metadata.blocks() * 512 < 1 << 20);
        let second = ChangesDisk::make(&upper).unwrap();
        assert_ne!(second.disk.file.metadata().unwrap().ino(), metadata.ino(), "it is made anew");
        forget(&upper);
        assert!(!second.disk.path.exists());
        fs::write(upper.join("etc"), "").unwrap();
        assert!(matches!(ChangesDisk::make(&upper), Err(ChangesError::NotEmpty(_))));
    }
}
