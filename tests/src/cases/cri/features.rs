//! What the kubelet asks of a runtime handler only where it says that it can do it.
//!
//! containerd up to 2.1 reads the features of runtimes with runc's name only, and ends by a nil pointer when a pod of any other asks for
//! recursive read-only mounts (the kubelet does not ask then). So there is a handler of ours with that name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_cri::proto::{self, NamespaceMode};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use protobuf::MessageField;

use super::like_runc::security;
use crate::cases::Environment;
use crate::cri::{Handler, Pod};
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq};

/// What the handlers say they can do.
pub(crate) fn announced(environment: &mut Environment) -> Outcome<String> {
    let status =
        environment.node()?.client().status(&proto::StatusRequest::default()).explain(|| "status".into())?;
    let ours = status.runtime_handlers.iter().find(|handler| handler.name == Handler::BulkheadAsRunc.name());
    let features = ours.map(|handler| handler.features.clone().unwrap_or_default()).unwrap_or_default();
    ensure!(features.recursive_read_only_mounts, "recursive read-only mounts");
    ensure!(features.user_namespaces, "user namespaces");
    Ok("recursive read-only mounts, user namespaces".into())
}

fn volume(host: &Path, inside: &str) -> proto::Mount {
    proto::Mount {
        container_path: inside.to_owned(),
        host_path: host.display().to_string(),
        ..Default::default()
    }
}

/// A read-only volume whose mounts below are read-only too.
pub(crate) fn recursive_read_only(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let directory = node.directory("recursive")?;
    let result = (|| {
        let below = directory.join("below");
        fs::create_dir(&below).explain(|| format!("make {}", below.display()))?;
        mount(Some("tests"), &below, Some("tmpfs"), MsFlags::MS_NODEV, Some("size=1m"))
            .explain(|| format!("mount {}", below.display()))?;
        fs::write(below.join("file"), "below\n").explain(|| "write".into())?;
        let ask = |handler: Handler| -> Outcome<String> {
            let pod = Pod::run(node, handler, "recursive", |_| {})?;
            let script = "cat /all/below/file; \
                          for d in /all /all/below /top /top/below; do echo x 2>/dev/null >$d/f && echo $d; done; true";
            let ended = pod.run_script("recursive", script, |config| {
                let read_only = |mount: proto::Mount| proto::Mount { readonly: true, ..mount };
                let all = proto::Mount { recursive_read_only: true, ..volume(&directory, "/all") };
                config.mounts = vec![read_only(all), read_only(volume(&directory, "/top"))];
            })?;
            let _ = fs::remove_file(below.join("f"));
            pod.finish()?;
            ended.success()
        };
        let right = ask(Handler::Runc)?;
        ensure_eq!(ask(Handler::BulkheadAsRunc)?, right, "answer, and runc's");
        Ok(right.replace('\n', " "))
    })();
    let _ = umount2(&directory.join("below"), MntFlags::MNT_DETACH);
    let _ = fs::remove_dir_all(&directory);
    result
}

/// The users of a pod on the node.
const FIRST_ID: u32 = 100_000;

fn mapping() -> proto::IDMapping {
    proto::IDMapping { host_id: FIRST_ID, container_id: 0, length: 65536, ..Default::default() }
}

fn pods_users(options: &mut proto::NamespaceOption) {
    options.userns_options = MessageField::some(proto::UserNamespace {
        mode: NamespaceMode::POD.into(),
        uids: vec![mapping()],
        gids: vec![mapping()],
        ..Default::default()
    });
}

/// `hostUsers: false`: root in the pod is somebody else on the node, and its volumes have the owners that the pod gives them.
pub(crate) fn own_users(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let directory = node.directory("users")?;
    let handler = match environment.handler() {
        Handler::Bulkhead => Handler::BulkheadAsRunc,
        other => other,
    };
    let ask = || -> Outcome<String> {
        let pod = Pod::run(node, handler, "users", |config| {
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            pods_users(context.namespace_options.mut_or_insert_default());
        });
        let pod = match pod {
            // With a pause container, whose image comes first.
            Err(failure) if failure.0.contains("can't map the owners of the files in") => {
                return Ok("SKIPPED: the node's file system can't map owners".into());
            }
            pod => pod?,
        };
        let [plain, mapped] = ["plain", "mapped"].map(|name| directory.join(name));
        for path in [&plain, &mapped] {
            fs::create_dir(path).explain(|| format!("make {}", path.display()))?;
        }
        std::os::unix::fs::chown(&plain, Some(FIRST_ID), Some(FIRST_ID)).explain(|| "chown".into())?;
        let users = |config: &mut proto::ContainerConfig| {
            pods_users(security(config).namespace_options.mut_or_insert_default());
            let map = vec![mapping()];
            let mapped =
                proto::Mount { uid_mappings: map.clone(), gid_mappings: map, ..volume(&mapped, "/mapped") };
            config.mounts = vec![volume(&plain, "/plain"), mapped];
        };
        let script = "tr -s ' ' </proc/self/uid_map; id -u; stat -c %u /bin/busybox / /proc/1 /plain /mapped; \
            touch /new && stat -c %u /new; touch /plain/f; touch /mapped/f; chown 7 /mapped/f && stat -c %u /mapped/f; \
            hostname; ls -ld /dev/null | cut -c1-10; echo x >/dev/null; ls /sys/class/net | tr '\\n' ' '; ls -d /dev/mqueue; \
            mount -t tmpfs none /mnt 2>&1 || mkdir /m && echo made; su -s /bin/sh nobody -c 'id -u' 2>&1; \
            (httpd -p 80 -h / && echo serves) 2>&1";
        let container = match pod.start("first", &format!("{script}; echo up; exec sleep 100000"), users) {
            // containerd's own mount of the image fails.
            Err(failure) if failure.0.contains("failed to prepare idmapped overlay") => {
                pod.finish()?;
                return Ok(
                    "the pod runs; SKIPPED its containers: the node's file system can't map owners".into()
                );
            }
            started => started?,
        };
        let first = container.wait_for_output("up")?;
        let (first_users, exec) = (
            container.exec("readlink /proc/1/ns/user")?.success()?,
            container.exec("id -u; touch /mapped/exec")?,
        );
        ensure_eq!(exec.stdout, "0\n", "an exec: {exec:?}");
        let second = pod.run_script(
            "second",
            "cat /proc/self/uid_map | tr -s ' '; id -u; readlink /proc/self/ns/user",
            users,
        )?;
        let owner = |path: &Path| {
            fs::metadata(path).map(|metadata| metadata.uid()).explain(|| format!("{}", path.display()))
        };
        let owners = [owner(&plain.join("f"))?, owner(&mapped.join("f"))?, owner(&mapped.join("exec"))?];
        container.stop(Duration::ZERO)?;
        pod.finish()?;
        ensure_eq!(owners, [FIRST_ID, 7, 0], "owners of new files on the node; inside: {first}");
        ensure!(first.starts_with(" 0 100000 65536\n0\n0\n0\n0\n0\n0\n0\n7\n"), "inside: {first}");
        ensure!(first.contains("serves") && first.contains("eth0"), "inside: {first}");
        let second = second.success()?;
        ensure!(second.starts_with(" 0 100000 65536\n0\n"), "in the second: {second}");
        ensure!(
            handler == Handler::BulkheadSandbox || second.ends_with(&first_users),
            "one namespace: {second}, {first_users}"
        );
        Ok(first.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let result = ask();
    let _ = fs::remove_dir_all(&directory);
    result
}
