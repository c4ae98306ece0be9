//! Volumes: everything that the kubelet mounts into containers is a directory or file of the node.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use bulkhead_cri::proto::{self, MountPropagation};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::cases::Environment;
use crate::cri::Handler;
use crate::ensure_eq;
use crate::failure::{Explain, Outcome};

/// A directory or file of the node in a container.
pub(crate) fn volume(host: &Path, inside: &str) -> proto::Mount {
    proto::Mount {
        container_path: inside.to_owned(),
        host_path: host.display().to_string(),
        ..Default::default()
    }
}

/// A mebibyte of memory.
pub(crate) fn tmpfs(path: &Path) -> Outcome {
    mount(Some("tests"), path, Some("tmpfs"), MsFlags::MS_NODEV, Some("size=1m"))
        .explain(|| format!("mount {}", path.display()))
}

/// Directories and files, read-only or not, with mounts below them, behind links, and what is written to them.
pub(crate) fn kinds(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let directory = node.directory("volumes")?;
    let result = (|| {
        let paths = ["plain", "over", "over/below", "memory", "sub"].map(|name| directory.join(name));
        let [plain, over, below, memory, sub] = &paths;
        let write =
            |path: &Path, text: &str| fs::write(path, text).explain(|| format!("write {}", path.display()));
        for path in &paths {
            fs::create_dir(path).explain(|| format!("make {}", path.display()))?;
        }
        tmpfs(memory)?;
        tmpfs(below)?;
        fs::create_dir_all(sub.join("path/in/it")).explain(|| "make a sub-path".into())?;
        write(&sub.join("path/in/it/file"), "sub\n")?;
        write(&plain.join("file"), "plain\n")?;
        write(&below.join("file"), "below\n")?;
        let file = directory.join("single");
        write(&file, "single\n")?;
        // As ConfigMaps are: the name is a link to a link.
        symlink("..data/key", plain.join("key")).explain(|| "make a link".into())?;
        fs::create_dir(plain.join("..1")).explain(|| "make a version".into())?;
        write(&plain.join("..1/key"), "value\n")?;
        symlink("..1", plain.join("..data")).explain(|| "make a link".into())?;
        let link = directory.join("link");
        symlink(plain, &link).explain(|| "make a link".into())?;
        fs::set_permissions(memory, fs::Permissions::from_mode(0o2777)).explain(|| "set a mode".into())?;

        let script = "cat /plain/file /plain/key /link/file /single /sub/file /ro/below/file; \
            echo w >/plain/written && cat /plain/written; echo m >/memory/m; stat -c '%a' /memory; \
            touch /ro/x; touch /ro/below/x && echo below; echo new >/single; echo ro >/single-ro; \
            awk '$2 ~ /^.(plain|memory)$/ { print $2, substr($4, 1, 2) }' /proc/mounts";
        let ask = |handler: Handler| -> Outcome<String> {
            write(&file, "single\n")?;
            let pod = environment.shared_pod(handler)?;
            let ended = pod.run_script("volumes", script, |config| {
                let read_only = |mount: proto::Mount| proto::Mount { readonly: true, ..mount };
                config.mounts = vec![
                    volume(plain, "/plain"),
                    volume(&link, "/link"),
                    volume(memory, "/memory"),
                    volume(&sub.join("path/in/it"), "/sub"),
                    volume(&file, "/single"),
                    read_only(volume(&file, "/single-ro")),
                    read_only(volume(over, "/ro")),
                ];
            })?;
            ensure_eq!(fs::read_to_string(plain.join("written")).ok().as_deref(), Some("w\n"), "on the host");
            ensure_eq!(fs::read_to_string(&file).ok().as_deref(), Some("new\n"), "the file on the host");
            let _ = fs::remove_file(plain.join("written"));
            let _ = fs::remove_file(below.join("x"));
            Ok(ended.stdout + &ended.stderr)
        };
        let right = ask(Handler::Runc)?;
        ensure_eq!(ask(environment.handler())?, right, "answer, and runc's");
        Ok(format!("{} lines as with runc", right.lines().count()))
    })();
    for path in ["over/below", "memory"] {
        let _ = umount2(&directory.join(path), MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(&directory);
    result
}

/// What is mounted on the node below a volume while the container runs shows up in it, if the pod asks for that.
pub(crate) fn mounted_later(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let directory = node.directory("later")?;
    let result = (|| {
        let below = directory.join("below");
        fs::create_dir(&below).explain(|| format!("make {}", below.display()))?;
        // Propagation needs a shared mount to come from.
        mount(Some(&directory), &directory, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .explain(|| "bind".into())?;
        mount(None::<&str>, &directory, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .explain(|| "share".into())?;
        let pod = environment.shared_pod(environment.handler())?;
        let container = pod.start("sees", "sleep 100000", |config| {
            let propagation = MountPropagation::PROPAGATION_HOST_TO_CONTAINER.into();
            config.mounts = vec![
                proto::Mount { propagation, ..volume(&directory, "/later") },
                volume(&directory, "/private"),
            ];
        })?;
        let look = "cat /later/below/file; ls /private/below";
        for round in ["first", "second"] {
            // The second is not even nodev.
            let flags = if round == "first" { MsFlags::MS_NODEV } else { MsFlags::empty() };
            mount(Some("tests"), &below, Some("tmpfs"), flags, Some("size=1m"))
                .explain(|| format!("mount {}", below.display()))?;
            fs::write(below.join("file"), round).explain(|| "write".into())?;
            // What the container knows of the directory it may believe for a second.
            let said = container.exec(&format!("sleep 1.1; {look}"))?;
            ensure_eq!(said.stdout, round, "seen inside: {said:?}");
            // Plainly, although the container has just looked at it.
            umount2(&below, MntFlags::empty()).explain(|| format!("unmount {}", below.display()))?;
            let said = container.exec(&format!("sleep 1.1; {look}"))?;
            ensure_eq!(said.stdout, "", "seen after the node has unmounted it: {said:?}");
        }
        container.stop(Duration::ZERO)?;
        container.remove()?;
        Ok("seen while it is there; never in the private one".to_owned())
    })();
    let _ = umount2(&directory.join("below"), MntFlags::MNT_DETACH);
    let _ = umount2(&directory, MntFlags::MNT_DETACH);
    let _ = fs::remove_dir_all(&directory);
    result
}
