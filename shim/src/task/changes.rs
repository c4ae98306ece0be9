//! A root file system whose layers are shared as files while what the container changes is on a disk.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;

use super::layers::Request;
use crate::host::changes::{self, ChangesDisk};

/// Files of shared layers have the overlay's device number, as if everything were on one file system.
const ONE_DEVICE: &str = "xino=on";

/// The name of an empty directory in the overlay's working directory.
const EMPTY: &str = "bulkhead-empty";

/// An overlay that is taken apart: what it lies on, and a disk for the changes.
#[derive(Debug)]
pub(crate) struct CoveredRoot {
    /// What is shared as files, and read only.
    pub lower: Mount,
    /// What is changed.
    pub disk: ChangesDisk,
    /// Options of the guest's overlay.
    pub options: Vec<String>,
}

impl CoveredRoot {
    /// Makes the disk, if containerd's mounts are an overlay that can be written to. What can't be had has a reason in the log, and is
    /// shared as files.
    pub(crate) fn of(mounts: &[Mount]) -> Option<CoveredRoot> {
        let Apart { lower, empty, upper, options } = Apart::of(mounts)?;
        if let Some(empty) = empty
            && let Err(error) = fs::create_dir_all(&empty)
        {
            log::warn!("a container's changes are shared as files: can't make {}: {error}", empty.display());
            return None;
        }
        Some(CoveredRoot { lower, disk: ChangesDisk::or_log(&upper)?, options })
    }
}

/// An overlay in its parts.
#[derive(Debug)]
struct Apart {
    /// The layers as a mount of their own. It is an overlay even of one layer, and so a file system of its own: two containers of an image
    /// would be one directory to the guest, which has one name for a directory.
    lower: Mount,
    /// An empty directory that this needs: the kernel makes no overlay of one layer.
    empty: Option<PathBuf>,
    upper: PathBuf,
    /// Options for the guest.
    options: Vec<String>,
}

impl Apart {
    fn of(mounts: &[Mount]) -> Option<Apart> {
        let [mount] = mounts else { return None };
        if mount.type_ != "overlay" || !mount.target.is_empty() {
            return None;
        }
        let is_map = |option: &String| option.starts_with("uidmap=") || option.starts_with("gidmap=");
        let (maps, others): (Vec<String>, Vec<String>) = mount.options.iter().cloned().partition(is_map);
        let Request { lower, upper, mut options } = Request::parse(&others)?;
        let (upper, work) = upper?;
        let empty = (lower.len() == 1).then(|| work.join(EMPTY));
        let layers = lower.into_iter().map(str::to_owned);
        let layers: Vec<String> = layers.chain(empty.iter().map(|path| path.display().to_string())).collect();
        let lower = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: [vec![format!("lowerdir={}", layers.join(":"))], maps].concat(),
            ..Default::default()
        };
        options.retain(|option| !option.starts_with("xino="));
        options.push(ONE_DEVICE.to_owned());
        Some(Apart { lower, empty, upper: upper.to_owned(), options })
    }
}

/// Removes what an earlier task has left in the upper directory of an overlay.
pub(crate) fn forget_in(mounts: &[Mount]) {
    let upper =
        mounts.iter().flat_map(|mount| &mount.options).find_map(|option| option.strip_prefix("upperdir="));
    if let Some(upper) = upper {
        changes::forget(Path::new(upper));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> [Mount; 1] {
        [Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Default::default()
        }]
    }

    #[test]
    fn an_overlay_is_taken_apart() {
        let dirs = ["workdir=/s/3/work", "upperdir=/s/3/fs", "index=off"];
        let apart = Apart::of(&overlay(&[&dirs[..], &["lowerdir=/s/2/fs:/s/1/fs"]].concat())).unwrap();
        assert_eq!(apart.lower.options, ["lowerdir=/s/2/fs:/s/1/fs"]);
        assert_eq!((apart.upper.to_str().unwrap(), apart.empty), ("/s/3/fs", None));
        assert_eq!(apart.options, ["index=off", "xino=on"]);
        let maps = ["lowerdir=/s/1/fs", "uidmap=0:65536:65536", "gidmap=0:65536:65536"];
        let apart = Apart::of(&overlay(&[&dirs[..], &maps].concat())).unwrap();
        let empty = "/s/3/work/bulkhead-empty";
        assert_eq!(apart.empty.as_deref(), Some(Path::new(empty)));
        let lower = format!("lowerdir=/s/1/fs:{empty}");
        assert_eq!(apart.lower.options, [&lower, "uidmap=0:65536:65536", "gidmap=0:65536:65536"]);
        assert!(Apart::of(&overlay(&["lowerdir=/a:/b"])).is_none());
        assert!(Apart::of(&overlay(&[&dirs[..], &["lowerdir=/a", "userxattr"]].concat())).is_none());
        assert!(Apart::of(&[]).is_none());
    }
}
