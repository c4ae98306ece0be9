//! A container's root file system, made of the mounts that containerd asks for.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::id_map::IdMap;
use super::mount_request::{MountRequest, common_directory, parse_options};
use super::mounts::{DetachedTree, MAX_OPTIONS, MountError, on_thread};
use super::overlay::Overlay;

/// Makes the mounts of a root file system on the directory `scratch`, each on top of the one before, and gives them as
/// a detached tree.
///
/// It happens on a thread of its own in a mount namespace of its own: nobody else ever sees `scratch` mounted.
pub(crate) async fn assemble(
    mounts: Vec<MountRequest>,
    scratch: PathBuf,
) -> Result<DetachedTree, MountError> {
    if let [request] = mounts.as_slice() {
        let request = request.clone();
        let quickly = on_thread(move || Ok(Overlay::of(&request).and_then(|overlay| overlay.mount())));
        if let Some(tree) = quickly.await? {
            return Ok(tree);
        }
    }
    on_thread(move || {
        let failed = |step| move |source| MountError::Namespace { step, source };
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).map_err(failed("unshare"))?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(failed("make it private"))?;
        for mut request in mounts {
            match IdMap::take(&mut request.options)? {
                Some(map) => mount_mapped(&request, &map, &scratch)?,
                None => mount_one(&request, &scratch)?,
            }
        }
        DetachedTree::bind(&scratch, true)
    })
    .await
}

/// The same with owners mapped: those of an overlay's lower layers, whose upper one already has the right ones, or of what is bound.
fn mount_mapped(request: &MountRequest, map: &IdMap, root: &Path) -> Result<(), MountError> {
    let namespace = map.namespace()?;
    if request.kind != "overlay" {
        let recursive = request.options.iter().any(|option| option == "rbind");
        let tree = DetachedTree::bind(Path::new(&request.source), recursive)?;
        tree.map_ids(namespace.as_fd(), recursive)?;
        if request.options.iter().any(|option| option == "ro") {
            tree.make_read_only(false)?;
        }
        return tree.attach(&target_below(root, &request.target)?);
    }
    // The mapped layers are looked up before the overlay covers them.
    let layers = MountRequest { kind: "tmpfs".into(), source: "layers".into(), ..MountRequest::default() };
    mount_one(&layers, root)?;
    let place = |number: usize| root.join(number.to_string());
    let mut options = request.options.clone();
    for option in &mut options {
        let Some(lower) = option.strip_prefix("lowerdir=") else { continue };
        let mut places = Vec::new();
        for (number, layer) in lower.split(':').enumerate() {
            let tree = DetachedTree::bind(Path::new(layer), false)?;
            tree.map_ids(namespace.as_fd(), false)?;
            let place = place(number);
            std::fs::create_dir(&place)
                .map_err(|source| MountError::MapIds { path: place.clone(), source })?;
            tree.attach(&place)?;
            places.push(place.display().to_string());
        }
        *option = format!("lowerdir={}", places.join(":"));
    }
    mount_one(&MountRequest { options, ..request.clone() }, root)
}

fn mount_one(request: &MountRequest, root: &Path) -> Result<(), MountError> {
    let target = target_below(root, &request.target)?;
    let parsed = parse_options(&request.options)?;
    let (directory, data) = compact_overlay(&request.kind, parsed.data);
    if data.len() > MAX_OPTIONS {
        return Err(MountError::Options { kind: request.kind.clone(), length: data.len() });
    }
    let failed = |source| MountError::Mount {
        kind: request.kind.clone(),
        source_path: request.source.clone(),
        hint: match source {
            Errno::ENODEV => "the host's kernel lacks this file system",
            Errno::ENOENT => "a directory that it names does not exist",
            _ => "the snapshot may be damaged",
        },
        source,
    };
    if let Some(directory) = directory {
        nix::unistd::chdir(Path::new(&directory)).map_err(failed)?;
    }
    let is_bind = parsed.flags.contains(MsFlags::MS_BIND) || request.kind == "bind";
    let flags = if is_bind { parsed.flags | MsFlags::MS_BIND } else { parsed.flags };
    let data = (!data.is_empty()).then_some(data.as_str());
    let outcome = mount(Some(request.source.as_str()), &target, Some(request.kind.as_str()), flags, data);
    let outcome = match outcome {
        // A bind mount takes no other flags the first time.
        Ok(()) if is_bind && flags.contains(MsFlags::MS_RDONLY) => {
            mount(None::<&str>, &target, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)
        }
        other => other,
    };
    nix::unistd::chdir("/").map_err(failed)?;
    outcome.map_err(failed)
}

fn target_below(root: &Path, target: &str) -> Result<PathBuf, MountError> {
    let mut path = root.to_owned();
    for component in Path::new(target).components() {
        match component {
            std::path::Component::RootDir | std::path::Component::CurDir => {}
            std::path::Component::Normal(name) => path.push(name),
            _ => return Err(MountError::Path(PathBuf::from(target))),
        }
    }
    Ok(path)
}

/// Shortens the lower directories of an overlay that would not fit into a page: by their common directory, which the
/// mounting thread then has to be in.
fn compact_overlay(kind: &str, data: Vec<String>) -> (Option<String>, String) {
    let joined = data.join(",");
    if kind != "overlay" || joined.len() <= MAX_OPTIONS {
        return (None, joined);
    }
    let Some(lower) = data.iter().find_map(|option| option.strip_prefix("lowerdir=")) else {
        return (None, joined);
    };
    let directories: Vec<&str> = lower.split(':').collect();
    let Some(common) = common_directory(&directories) else {
        return (None, joined);
    };
    let shortened: Vec<&str> =
        directories.iter().filter_map(|directory| directory.strip_prefix(&common)).collect();
    let replacement = format!("lowerdir={}", shortened.join(":"));
    let data: Vec<&str> = data
        .iter()
        .map(|option| if option.starts_with("lowerdir=") { replacement.as_str() } else { option.as_str() })
        .collect();
    (Some(common), data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn many_layers_are_shortened_by_their_common_directory() {
        let lower: Vec<String> = (0..200).map(|n| format!("/var/lib/containerd/snapshots/{n}/fs")).collect();
        let data =
            vec!["index=off".to_owned(), format!("lowerdir={}", lower.join(":")), "upperdir=/u".to_owned()];
        let (directory, text) = compact_overlay("overlay", data);
        assert_eq!(directory.as_deref(), Some("/var/lib/containerd/snapshots/"));
        assert!(text.starts_with("index=off,lowerdir=0/fs:1/fs:"));
        assert!(text.ends_with(":199/fs,upperdir=/u") && text.len() < MAX_OPTIONS);
    }

    #[test]
    fn few_layers_stay_as_they_are() {
        let data = options(&["lowerdir=/a/1:/a/2"]);
        assert_eq!(compact_overlay("overlay", data), (None, "lowerdir=/a/1:/a/2".to_owned()));
    }

    #[tokio::test]
    async fn owners_are_mapped() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path();
        for name in ["1", "2", "upper", "work", "root"] {
            std::fs::create_dir_all(directory.join(name)).unwrap();
        }
        std::fs::write(directory.join("1/file"), "x").unwrap();
        let path = directory.display();
        let request = |kind: &str, source: String, others: &[String]| MountRequest {
            kind: kind.into(),
            source,
            target: String::new(),
            options: [&options(&["uidmap=0:100000:65536", "gidmap=0:200000:65536"])[..], others].concat(),
        };
        let layers = [
            format!("lowerdir={path}/2:{path}/1"),
            format!("upperdir={path}/upper"),
            format!("workdir={path}/work"),
        ];
        let requests =
            [request("bind", format!("{path}/1"), &[]), request("overlay", "overlay".into(), &layers)];
        for request in requests {
            let kind = request.kind.clone();
            match assemble(vec![request], directory.join("root")).await {
                Ok(tree) => {
                    let status =
                        nix::sys::stat::fstatat(&tree, "file", nix::fcntl::AtFlags::empty()).unwrap();
                    assert_eq!((status.st_uid, status.st_gid), (100_000, 200_000), "{kind}");
                }
                Err(MountError::MapIds { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    eprintln!("SKIPPED: the file system of {path} can't map owners");
                }
                Err(error) => panic!("{kind}: {}", crate::error::chain(&error)),
            }
        }
    }

    #[test]
    fn targets_stay_below_the_root() {
        assert_eq!(target_below(Path::new("/r"), "/a/b").unwrap(), Path::new("/r/a/b"));
        assert_eq!(target_below(Path::new("/r"), "").unwrap(), Path::new("/r"));
        assert!(target_below(Path::new("/r"), "a/../../b").is_err());
    }
}
