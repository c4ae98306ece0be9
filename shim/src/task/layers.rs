//! A root file system that is an overlay of erofs layers, as containerd's snapshotter `erofs` has it: what the guest
//! mounts by itself, from one disk with all layers.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_vmm_protocol::{MAX_PARTS, OPAQUE_NOTE};
use containerd_shim_protos::types::mount::Mount;
use nix::errno::Errno;

use crate::host::changes::ChangesDisk;
use crate::host::erofs::{EROFS, Layer, LayerError};
use crate::host::mounts::c_string;

/// What an overlay may be told besides its directories; the rest is for overlays that the host mounts.
const OVERLAY_OPTIONS: [&str; 6] =
    ["index=off", "metacopy=off", "redirect_dir=off", "xino=off", "nfs_export=off", "volatile"];

/// A root file system of layers.
#[derive(Debug)]
pub(crate) struct LayeredRoot {
    /// From the uppermost down, one at least.
    pub layers: Vec<Layer>,
    /// Where what the container changes goes.
    pub changes: Changes,
    /// Further options of the overlay.
    pub options: Vec<String>,
}

/// Where what a container changes goes.
#[derive(Debug)]
pub(crate) enum Changes {
    /// It can't change anything.
    None,
    /// Files of the snapshot.
    Files(ChangedFiles),
    /// A disk.
    Disk(ChangesDisk),
}

/// The part of a snapshot that is written to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ChangedFiles {
    /// The directory with the other two, and nothing else.
    pub directory: PathBuf,
    /// The overlay's upper directory, in it.
    pub upper: String,
    /// Its working directory, in it.
    pub work: String,
}

impl LayeredRoot {
    /// What containerd's mounts are, if they are such a root: an overlay on the host's mounts of erofs files, or one such file.
    /// `on_disk` says whether changes go onto a disk.
    pub(crate) fn of(mounts: &[Mount], on_disk: bool) -> Result<Option<LayeredRoot>, LayerError> {
        let [mount] = mounts else { return Ok(None) };
        if !mount.target.is_empty() {
            return Ok(None);
        }
        match mount.type_.as_str() {
            EROFS => LayeredRoot::single(mount),
            "overlay" => Ok(LayeredRoot::overlay(&mount.options, on_disk)),
            _ => Ok(None),
        }
    }

    fn single(mount: &Mount) -> Result<Option<LayeredRoot>, LayerError> {
        let only_read = mount.options.iter().all(|option| matches!(option.as_str(), "ro" | "loop"));
        if !only_read || !mount.source.starts_with('/') {
            return Ok(None);
        }
        let layers = vec![Layer::open(Path::new(&mount.source))?];
        Ok(Some(LayeredRoot { layers, changes: Changes::None, options: Vec::new() }))
    }

    fn overlay(options: &[String], on_disk: bool) -> Option<LayeredRoot> {
        let Request { lower, upper, options } = Request::parse(options)?;
        if lower.len() > MAX_PARTS || (upper.is_none() && lower.len() < 2) {
            return None;
        }
        let layers = Layer::mounted_at(&lower)?;
        let disk = upper.filter(|_| on_disk).and_then(|(upper, _)| ChangesDisk::or_log(upper));
        let changes = match (upper, disk) {
            (None, _) => Changes::None,
            (Some(_), Some(disk)) => Changes::Disk(disk),
            (Some((upper, work)), None) => Changes::Files(ChangedFiles::of(upper, work)?),
        };
        Some(LayeredRoot { layers, changes, options })
    }
}

/// What an overlay is to be made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    /// Directories of layers, from the uppermost down.
    pub lower: Vec<&'a str>,
    /// The upper and the working directory.
    pub upper: Option<(&'a Path, &'a Path)>,
    /// The others.
    pub options: Vec<String>,
}

impl Request<'_> {
    /// `None` if there is something that a guest could not do as well.
    pub(crate) fn parse(options: &[String]) -> Option<Request<'_>> {
        let (mut lower, mut upper, mut work, mut others) = (None, None, None, Vec::new());
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => lower = Some(value),
                Some(("upperdir", value)) => upper = Some(Path::new(value)),
                Some(("workdir", value)) => work = Some(Path::new(value)),
                _ if matches!(option.as_str(), "" | "rw" | "ro") => {}
                _ if OVERLAY_OPTIONS.contains(&option.as_str()) => others.push(option.clone()),
                _ => return None,
            }
        }
        let lower = lower?;
        // A backslash escapes a colon.
        if lower.contains('\\') {
            return None;
        }
        let lower: Vec<&str> = lower.split(':').collect();
        let upper = match (upper, work) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (None, None) => None,
            _ => return None,
        };
        lower.iter().all(|path| path.starts_with('/')).then_some(Request { lower, upper, options: others })
    }
}

impl ChangedFiles {
    /// The directory of a snapshot, if there is nothing in it but the two and marks of the snapshotter's, which are empty files:
    /// the guest will be able to write to all of it.
    fn of(upper: &Path, work: &Path) -> Option<ChangedFiles> {
        let directory =
            upper.parent().filter(|parent| parent.is_absolute() && work.parent() == Some(parent))?;
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let (upper, work) = (name(upper)?, name(work)?);
        if upper == work || [&upper, &work].iter().any(|name| name.contains([':', ',', '\\'])) {
            return None;
        }
        for entry in fs::read_dir(directory).ok()? {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            let is_named = [&upper, &work].iter().any(|name| entry.file_name() == name.as_str());
            if !(is_named && metadata.is_dir() || metadata.is_file() && metadata.len() == 0) {
                log::info!("layers are shared as files: {} holds more than changes", directory.display());
                return None;
            }
        }
        if !keeps_attributes(directory) {
            log::info!(
                "layers are shared as files: {} has no room for attributes of users",
                directory.display()
            );
            return None;
        }
        Some(ChangedFiles { directory: directory.to_owned(), upper, work })
    }
}

/// Whether files there can have attributes in which the file server keeps what an overlay notes; a guest's kernel
/// refuses one without. What was a tmpfs before Linux 6.6 has none.
fn keeps_attributes(directory: &Path) -> bool {
    let Ok(path) = c_string(directory) else { return false };
    // SAFETY: both strings end with NUL; no value is asked for.
    let length = unsafe { libc::getxattr(path.as_ptr(), OPAQUE_NOTE.as_ptr(), std::ptr::null_mut(), 0) };
    matches!(Errno::result(length), Ok(_) | Err(Errno::ENODATA))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn overlays_are_understood_or_left_to_the_host() {
        let list =
            options(&["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs", "index=off"]);
        let request = Request::parse(&list).unwrap();
        assert_eq!(request.lower, ["/s/2/fs", "/s/1/fs"]);
        assert_eq!(request.upper, Some((Path::new("/s/3/fs"), Path::new("/s/3/work"))));
        assert_eq!(request.options, ["index=off"]);
        assert_eq!(Request::parse(&options(&["lowerdir=/a:/b"])).unwrap().upper, None);
        for other in [
            &["lowerdir=/a", "upperdir=/u"][..],
            &["upperdir=/u", "workdir=/w"],
            &["lowerdir=a"],
            &["lowerdir=/a\\:b"],
            &["lowerdir=/a:/b", "uidmap=0:1000:1"],
            &["lowerdir=/a:/b", "userxattr"],
            &["lowerdir+=/a"],
        ] {
            assert_eq!(Request::parse(&options(other)), None, "{other:?}");
        }
    }

    #[test]
    fn a_directory_with_anything_else_is_not_shared() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path();
        for name in ["fs", "work"] {
            fs::create_dir_all(directory.join(name)).unwrap();
        }
        fs::write(directory.join(".erofslayer"), "").unwrap();
        let changes = || ChangedFiles::of(&directory.join("fs"), &directory.join("work"));
        assert_eq!(
            changes(),
            Some(ChangedFiles { directory: directory.to_owned(), upper: "fs".into(), work: "work".into() })
        );
        assert_eq!(ChangedFiles::of(&directory.join("fs"), &directory.join("fs/work")), None);
        assert_eq!(ChangedFiles::of(&directory.join("fs"), &directory.join("fs")), None);
        fs::write(directory.join("layer.erofs"), "x").unwrap();
        assert_eq!(changes(), None);
        fs::remove_file(directory.join("layer.erofs")).unwrap();
        fs::create_dir(directory.join("other")).unwrap();
        assert_eq!(changes(), None);
    }

    #[test]
    fn one_layer_alone_is_read_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer");
        fs::write(&path, [0; 4096]).unwrap();
        let mount = |list: &[&str]| Mount {
            type_: EROFS.into(),
            source: path.display().to_string(),
            options: options(list),
            ..Default::default()
        };
        let root = LayeredRoot::of(&[mount(&["ro", "loop"])], true).unwrap().unwrap();
        assert!(root.layers.len() == 1 && matches!(root.changes, Changes::None));
        assert!(LayeredRoot::of(&[mount(&["ro", "device=/x"])], false).unwrap().is_none());
        assert!(LayeredRoot::of(&[mount(&["ro"]), mount(&["ro"])], false).unwrap().is_none());
        fs::remove_file(&path).unwrap();
        assert!(LayeredRoot::of(&[mount(&["ro", "loop"])], false).is_err());
    }
}
