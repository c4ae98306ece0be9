//! An overlay mounted without a copy of the host's mount table.
//!
//! The kernel takes layers only from the mount namespace that the caller is in. Snapshotters keep all of a node's layers
//! below one directory, so that directory alone is brought into a small namespace, and the layers are named from there:
//! which also makes the names short enough for an overlay of any depth.

use std::io;
use std::mem::MaybeUninit;
use std::path::Path;

use nix::mount::mount;
use nix::unistd::chdir;

use super::mount_request::{MountRequest, common_directory, parse_options};
use super::mounts::{DetachedTree, MAX_OPTIONS, c_string};
use super::small_namespace::{POINTS, enter_new};

/// Options whose values are directories; the first is a list of them.
const DIRECTORIES: [&str; 3] = ["lowerdir=", "upperdir=", "workdir="];

/// An overlay whose layers are all on one mount, below one directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overlay {
    /// That directory, with its trailing slash.
    base: String,
    flags: nix::mount::MsFlags,
    /// Options in which the directories are relative to `base`.
    data: String,
}

impl Overlay {
    /// Understands a request for one; `None` if it has to be mounted where everything of the host can be seen.
    pub(crate) fn of(request: &MountRequest) -> Option<Overlay> {
        if request.kind != "overlay" || !request.target.is_empty() {
            return None;
        }
        let is_mapped = |option: &String| option.starts_with("uidmap=") || option.starts_with("gidmap=");
        if request.options.iter().any(is_mapped) {
            return None;
        }
        let parsed = parse_options(&request.options).ok()?;
        let directories: Vec<&str> = parsed
            .data
            .iter()
            .filter_map(|option| split(option))
            .flat_map(|(_, value)| value.split(':'))
            .collect();
        // A backslash escapes a colon.
        if directories.iter().any(|path| !path.starts_with('/') || path.contains('\\')) {
            return None;
        }
        let base = common_directory(&directories)?;
        let relative = |option: &String| match split(option) {
            Some((key, value)) => {
                let names: Vec<&str> = value.split(':').filter_map(|path| path.strip_prefix(&base)).collect();
                format!("{key}{}", names.join(":"))
            }
            None => option.clone(),
        };
        let data = parsed.data.iter().map(relative).collect::<Vec<_>>().join(",");
        let on_one_mount = {
            let mount = mount_id(&base).ok()?;
            directories.iter().all(|path| mount_id(path).is_ok_and(|id| id == mount))
        };
        (on_one_mount && data.len() <= MAX_OPTIONS).then_some(Overlay { base, flags: parsed.flags, data })
    }

    /// Mounts it; the calling thread must be one that [`super::mounts::on_thread`] has started. `None` if that can't be done
    /// this way.
    pub(crate) fn mount(&self) -> Option<DetachedTree> {
        let [_, layers, root] = POINTS;
        let mounted = DetachedTree::bind(Path::new(&self.base), false)
            .map_err(|error| error.to_string())
            .and_then(|base| {
                enter_new().map_err(|error| error.to_string())?;
                base.attach(Path::new(layers)).map_err(|error| error.to_string())?;
                chdir(layers)
                    .and_then(|()| {
                        mount(Some("overlay"), root, Some("overlay"), self.flags, Some(self.data.as_str()))
                    })
                    .map_err(|errno| errno.to_string())?;
                DetachedTree::bind(Path::new(root), false).map_err(|error| error.to_string())
            });
        mounted
            .inspect_err(|reason| {
                log::debug!("an overlay is mounted in a copy of the host's namespace: {reason}")
            })
            .ok()
    }
}

fn split(option: &str) -> Option<(&str, &str)> {
    DIRECTORIES.iter().find_map(|key| Some((*key, option.strip_prefix(key)?)))
}

/// The number of the mount that `path` is on.
pub(crate) fn mount_id(path: impl AsRef<Path>) -> io::Result<u64> {
    let c_path = c_string(path.as_ref()).map_err(io::Error::other)?;
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path is NUL-terminated, and the structure is the one that the call fills.
    let result = unsafe {
        libc::statx(libc::AT_FDCWD, c_path.as_ptr(), flags, libc::STATX_MNT_ID, status.as_mut_ptr())
    };
    nix::errno::Errno::result(result)?;
    // SAFETY: zeroes are a valid value, and the kernel has filled it in.
    let status = unsafe { status.assume_init() };
    if status.stx_mask & libc::STATX_MNT_ID == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(status.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use tempfile::TempDir;

    struct Layers(TempDir);

    impl Layers {
        fn new() -> Layers {
            let directory = tempfile::tempdir().unwrap();
            for layer in ["1/fs", "2/fs", "3/fs", "3/work"] {
                fs::create_dir_all(directory.path().join(layer)).unwrap();
            }
            Layers(directory)
        }

        fn request(&self) -> MountRequest {
            let path = self.0.path().display();
            MountRequest {
                kind: "overlay".into(),
                source: "overlay".into(),
                target: String::new(),
                options: vec![
                    "index=off".into(),
                    format!("lowerdir={path}/2/fs:{path}/1/fs"),
                    format!("upperdir={path}/3/fs"),
                    format!("workdir={path}/3/work"),
                ],
            }
        }
    }

    #[test]
    fn layers_are_named_from_their_common_directory() {
        let layers = Layers::new();
        let overlay = Overlay::of(&layers.request()).unwrap();
        assert_eq!(overlay.base, format!("{}/", layers.0.path().display()));
        assert_eq!(overlay.data, "index=off,lowerdir=2/fs:1/fs,upperdir=3/fs,workdir=3/work");
    }

    #[test]
    fn what_lies_on_several_mounts_is_left_to_others() {
        let layers = Layers::new();
        let mut request = layers.request();
        request.options[1].push_str(":/proc/sys");
        assert_eq!(Overlay::of(&request), None);
        let mut missing = layers.request();
        missing.options[1].push_str("/missing");
        assert_eq!(Overlay::of(&missing), None);
        assert_eq!(Overlay::of(&MountRequest { target: "/below".into(), ..layers.request() }), None);
        assert_eq!(Overlay::of(&MountRequest { kind: "bind".into(), ..layers.request() }), None);
    }
}
