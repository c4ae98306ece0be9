//! Changes of a root file system that are on a disk: a container can't tell, and the node counts what they take up.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use serde_json::json;

use super::{Case, Container, Environment, Runtime, disks, rootfs};
use crate::bundle::{self, Bundle};
use crate::failure::{Explain, Outcome};
use crate::layers::{Layers, mount_ext4};
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("changes-file-operations", rootfs::file_operations).with_changes_on_disk(),
    Case::new("changes-of-layers", of_layers).with_changes_on_disk(),
    Case::new("changes-are-counted", counted).with_changes_on_disk().bulkhead_only(),
    Case::new("changes-room", room).with_changes_on_disk(),
    Case::new("changes-until-full", full).with_changes_on_disk(),
    Case::new("changes-anew", anew).with_changes_on_disk().bulkhead_only(),
    Case::new("changes-read-only", read_only).with_changes_on_disk(),
    Case::new("changes-on-layers-of-erofs", on_erofs).with_changes_on_disk(),
    Case::new("changes-beside-files", beside_files).with_changes_on_disk(),
    Case::new("changes-leave-disks-to-volumes", disks::come_and_go).with_changes_on_disk().bulkhead_only(),
];

/// The only file in the upper directory of a snapshot.
const FILE: &str = ".bulkhead-changes.ext4";

const MIB: u64 = 1 << 20;

/// Bytes that the files in a directory take up, as containerd counts a snapshot's.
fn taken_up(directory: &Path) -> Outcome<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(directory).explain(|| format!("read {}", directory.display()))? {
        let metadata = entry.and_then(|entry| entry.metadata()).explain(|| "look at a file".into())?;
        sum += metadata.blocks() * 512;
    }
    Ok(sum)
}

fn names(directory: &Path) -> Outcome<Vec<String>> {
    let entries = fs::read_dir(directory).explain(|| format!("read {}", directory.display()))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// A bundle on several layers.
fn bundle_on(environment: &Environment, lower: &[PathBuf], script: &str) -> Outcome<Bundle> {
    let id = environment.id("changes");
    let mut bundle = environment.host()?.bundle(&id, &bundle::spec(&id, bundle::shell(script)))?;
    let lower: Vec<String> = lower.iter().map(|layer| layer.display().to_string()).collect();
    for option in bundle.rootfs.iter_mut().flat_map(|mount| &mut mount.options) {
        if option.starts_with("lowerdir=") {
            *option = format!("lowerdir={}", lower.join(":"));
        }
    }
    Ok(bundle)
}

fn of_layers(environment: &mut Environment) -> Outcome<String> {
    let layer = environment.host()?.path().join(environment.id("layer"));
    let make = |name: &str, text: &str| {
        let path = layer.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&layer))
            .and_then(|()| fs::write(&path, text))
            .explain(|| format!("write {}", path.display()))
    };
    make("d/old", "old")?;
    make("d/sub/deep", "deep")?;
    make("many/a", "linked\n")?;
    fs::hard_link(layer.join("many/a"), layer.join("many/b")).explain(|| "link".into())?;
    std::os::unix::fs::symlink("a", layer.join("many/l")).explain(|| "link".into())?;
    let script = "\
        find / -xdev -type f | grep -v '^/\\(proc\\|sys\\|dev\\|run\\)' | xargs stat -c %d | sort -u | wc -l; \
        stat -c '%h' /many/b; [ $(stat -c %i /many/a) = $(stat -c %i /many/b) ] && echo one file; \
        rm -r /d && mkdir /d && ls -A /d | wc -l; echo new >/d/old; cat /d/old; \
        echo more >>/many/a; cat /many/a /many/b | wc -l; rm /many/l; ls /many; \
        mv /etc/passwd /etc/moved && chown 5:6 /etc/moved && chmod 6751 /etc/moved && stat -c '%u:%g %a' /etc/moved; \
        ls /etc/passwd 2>&1; echo again >/etc/passwd; cat /etc/passwd; \
        chmod 4755 /bin/busybox && stat -c %a /bin/busybox; \
        ln /etc/moved /hard; stat -c %h /hard; mkfifo /p && [ -p /p ] && echo fifo; \
        mknod /null c 1 3 && echo x >/null && stat -c %t:%T /null; mkdir -m 1777 /sticky && stat -c %a /sticky; \
        mv /many /renamed 2>/dev/null || echo not renamed; ls -d /many /renamed 2>/dev/null; \
        cd /d; for i in $(seq 300); do echo $i >f$i; done; sync; ls | wc -l; for i in $(seq 300); do mv f$i g$i; done; rm g*; ls; \
        dd if=/dev/zero of=sparse bs=1 count=1 seek=99999999 2>/dev/null; [ $(stat -c %b sparse) -lt 100 ] && echo sparse; \
        fallocate -l 1000000 room && stat -c %s room; echo end";
    let base = environment.layout.rootfs("busybox");
    let bundle = bundle_on(environment, &[layer.clone(), base], script)?;
    // Device nodes that a container makes are to be of use.
    let config = bundle.path.join("config.json");
    let mut spec = bundle::spec(&bundle.id, bundle::shell(script));
    spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    fs::write(&config, spec.to_string()).explain(|| "write a specification".into())?;
    let ended = environment.run_bundle(bundle, CALL_LIMIT)?;
    fs::remove_dir_all(&layer).explain(|| "remove a layer".into())?;
    let expected = "1\n2\none file\n0\nnew\n3\na\nb\n5:6 6751\nls: /etc/passwd: No such file or directory\nagain\n4755\n\
                    2\nfifo\n1:3\n1777\n/renamed\n301\nold\nsparse\n1000000\nend\n";
    ensure_eq!(ended.stdout, expected, "what a container saw; {:?}", ended.stderr);
    Ok("whiteouts, directories made anew, links, owners, set-id, nodes, sparse files: as on an overlay of the node".into())
}

fn started(environment: &Environment, script: &str) -> Outcome<Container> {
    environment.started("changes", bundle::shell(script), Streams::default())
}

fn counted(environment: &mut Environment) -> Outcome<String> {
    let container = started(environment, "sleep 100000")?;
    let upper = container.bundle.upper.clone();
    ensure_eq!(names(&upper)?, [FILE], "what the node sees of the changes");
    let mode = fs::metadata(upper.join(FILE)).explain(|| "the disk".into())?.mode();
    ensure_eq!(mode & 0o7777, 0o600, "who may read the disk");
    let before = taken_up(&upper)?;
    ensure!(before < MIB, "an empty disk takes up {before} bytes");
    let run = |name: &str, script: &str| container.exec_script(name, script)?.success();
    run("writes", "dd if=/dev/urandom of=/big bs=1M count=20 2>/dev/null; sync")?;
    let written = eventually("the node counts what was written", CALL_LIMIT, || {
        let taken = taken_up(&upper)?;
        ensure!((20 * MIB..24 * MIB).contains(&taken), "{taken} bytes with 20 MiB written");
        Ok(taken)
    })?;
    run("removes", "rm /big; sync")?;
    let removed = eventually("the node has back what was removed", CALL_LIMIT, || {
        let taken = taken_up(&upper)?;
        ensure!(taken < 2 * MIB, "{taken} bytes with 20 MiB removed");
        Ok(taken)
    })?;
    container.kill()?;
    container.shim.delete("")?;
    ensure_eq!(names(&upper)?, [] as [&str; 0], "what is left of a task");
    container.release()?;
    Ok(format!("{} KiB, with 20 MiB {} KiB, without them {} KiB", before >> 10, written >> 10, removed >> 10))
}

fn room(environment: &mut Environment) -> Outcome<String> {
    let container = started(environment, "sleep 100000")?;
    let node = nix::sys::statvfs::statvfs(&container.bundle.upper).explain(|| "statvfs".into())?;
    let node = (node.blocks_available() * node.fragment_size()) >> 10;
    let said = container.exec_script("df", "df -k / | tail -n 1 | awk '{print $4}'")?.success()?;
    let inside: u64 = said.trim().parse().explain(|| format!("df says {said:?}"))?;
    container.finish()?;
    // Whole groups of 128 MiB, less their tables.
    let least = node.min(256 << 20) * 95 / 100;
    ensure!(
        inside + (160 << 10) >= least && inside <= node + 1024,
        "{inside} KiB inside, {node} on the node"
    );
    Ok(format!("{} MiB of the node's {}", inside >> 10, node >> 10))
}

fn full(environment: &mut Environment) -> Outcome<String> {
    let place = environment.host()?.path().join(environment.id("small"));
    mount_ext4(&environment.layout, &place)?;
    let result = fill(environment, &place);
    umount2(&place, MntFlags::MNT_DETACH).explain(|| "unmount".into())?;
    fs::remove_dir(&place).explain(|| "remove a mount point".into())?;
    fs::remove_file(place.with_extension("ext4")).explain(|| "remove a file system".into())?;
    result
}

/// Writes to a root file system that has less room than the smallest disk.
fn fill(environment: &Environment, place: &Path) -> Outcome<String> {
    let id = environment.id("fills");
    let script = "dd if=/dev/zero of=/big bs=64k count=1000 conv=fsync 2>/dev/null || echo failed; rm /big; sync; \
                  echo fits >/small && cat /small";
    let mut bundle = environment.host()?.bundle(&id, &bundle::spec(&id, bundle::shell(script)))?;
    let (upper, work) = (place.join("fs"), place.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir(directory).explain(|| format!("make {}", directory.display()))?;
    }
    for option in bundle.rootfs.iter_mut().flat_map(|mount| &mut mount.options) {
        match option.split_once('=') {
            Some(("upperdir", _)) => *option = format!("upperdir={}", upper.display()),
            Some(("workdir", _)) => *option = format!("workdir={}", work.display()),
            _ => {}
        }
    }
    let ended = environment.run_bundle(bundle, CALL_LIMIT)?;
    ensure_eq!(ended.stdout, "failed\nfits\n", "on a full file system; {:?}", ended.stderr);
    for directory in [upper, work] {
        fs::remove_dir_all(&directory).explain(|| format!("remove {}", directory.display()))?;
    }
    Ok("a write that does not fit fails, and the container goes on".into())
}

fn anew(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("anew");
    let spec = bundle::spec(&id, bundle::shell("ls /mark; echo x >/mark; sync; cat /mark"));
    let bundle = environment.host()?.bundle(&id, &spec)?;
    // As it is when a shim was killed.
    fs::write(bundle.upper.join(FILE), "no file system").explain(|| "write a file".into())?;
    ensure_eq!(environment.run_bundle(bundle, CALL_LIMIT)?.stdout, "x\n", "what the second task saw");
    Ok("a second task of the container begins with its image".into())
}

fn read_only(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("read-only");
    let mut spec = bundle::spec(&id, bundle::shell("touch /x 2>&1; echo still here"));
    spec["root"]["readonly"] = json!(true);
    let ended = environment.run_to_end(&id, &spec)?;
    ensure_eq!(
        ended.stdout,
        "touch: /x: Read-only file system\nstill here\n",
        "a root that is to be read-only"
    );
    Ok("a root that can't be written to".into())
}

fn on_erofs(environment: &mut Environment) -> Outcome<String> {
    let directory = environment.host()?.path().join(environment.id("image"));
    let mut layers = Layers::new(&environment.layout, directory)?;
    layers.add(&environment.layout.rootfs("busybox"))?;
    let script = "grep -c '^/dev/.* / \\|^overlay / ' /proc/mounts; rm /etc/group; ls /etc/group 2>&1; \
                  rm -r /home; mkdir /home; echo kept >/home/kept; sync; cat /home/kept; mv /etc/passwd /etc/moved; ls /etc/moved";
    let id = environment.id("erofs");
    let mut bundle = environment.host()?.bundle(&id, &bundle::spec(&id, bundle::shell(script)))?;
    let work = bundle.upper.with_file_name("work");
    bundle.rootfs = layers.mounts(&bundle.upper, &work);
    let ended = environment.run_bundle(bundle, CALL_LIMIT)?;
    let expected = "1\nls: /etc/group: No such file or directory\nkept\n/etc/moved\n";
    ensure_eq!(ended.stdout, expected, "changes on top of a layer of erofs; {:?}", ended.stderr);
    Ok("changes on a disk, on top of layers on another".into())
}

fn beside_files(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("beside");
    let bundle = environment
        .host()?
        .bundle(&id, &bundle::spec(&id, bundle::shell("cat /before; echo new >/after")))?;
    let upper = bundle.upper.clone();
    fs::write(upper.join("before"), "was there\n").explain(|| "write a file".into())?;
    let shim = environment.host()?.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let config = environment.config()?;
    shim.create(&stdio, crate::shim::CreateOptions { config: config.as_deref(), ..Default::default() })?;
    shim.start("")?;
    shim.wait("", CALL_LIMIT)?;
    ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?, "was there\n", "what somebody had written before");
    shim.delete("")?;
    let after =
        fs::read_to_string(upper.join("after")).explain(|| "what the container has written".into())?;
    ensure_eq!(after, "new\n", "what the container has written");
    let told = environment.runtime == Runtime::Runc || names(&upper)?.iter().all(|name| name != FILE);
    ensure!(told, "there is a disk beside the files");
    Container { bundle, shim, stdio }.release()?;
    Ok("a snapshot that has changes already stays files".into())
}
