//! Root file systems of erofs layers, which the guest mounts by itself from one disk.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use containerd_shim_protos::api::Mount;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;

use super::{Case, Container, Ended, Environment, Fixture, Runtime};
use crate::bundle::{self, Bundle};
use crate::failure::{Explain, Outcome};
use crate::layers::{Layers, is_opaque, make_opaque};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("layers-changes-make-an-image", changes),
    Case::new("cold-layers-changes-make-an-image", changes).cold(),
    Case::new("layers-a-hundred", hundred),
    Case::new("layers-read-only", read_only),
    Case::new("layers-in-one-pod", one_pod).bulkhead_only(),
    Case::new("layers-damaged-or-open-to-others", refused).bulkhead_only(),
    Case::new("ctr-layers", through_containerd).on(Fixture::Containerd),
];

/// Says how the guest has its root.
const ROOT: &str = "grep ' / ' /proc/mounts | grep -c changes/fs;";

fn image(environment: &Environment) -> Outcome<Layers> {
    let directory = environment.host()?.path().join(environment.id("image"));
    let mut layers = Layers::new(&environment.layout, directory)?;
    layers.add(&environment.layout.rootfs("busybox"))?;
    Ok(layers)
}

/// A directory beside the layers, to make others in.
fn scratch(environment: &Environment, layers: &Layers) -> Outcome<std::path::PathBuf> {
    let directory = layers.directory().join(environment.id("scratch"));
    fs::create_dir(&directory).explain(|| "make a directory for a layer".into())?;
    Ok(directory)
}

/// Has a bundle keep its changes beside the layers.
fn put_on(layers: &Layers, bundle: &mut Bundle) -> Outcome {
    let snapshot = layers.directory().join(&bundle.id);
    let upper = snapshot.join("fs");
    for directory in [&upper, &snapshot.join("work")] {
        fs::create_dir_all(directory).explain(|| format!("make {}", directory.display()))?;
    }
    if let Some(unused) = std::mem::replace(&mut bundle.upper, upper).parent() {
        fs::remove_dir_all(unused).explain(|| format!("remove {}", unused.display()))?;
    }
    bundle.rootfs = layers.mounts(&bundle.upper, &snapshot.join("work"));
    Ok(())
}

fn bundle_on(environment: &Environment, layers: &Layers, script: &str) -> Outcome<Bundle> {
    let id = environment.id("layers");
    let mut bundle = environment.host()?.bundle(&id, &bundle::spec(&id, bundle::shell(script)))?;
    put_on(layers, &mut bundle)?;
    Ok(bundle)
}

/// Runs a script; gives how it ended, with its changes in `keep`.
fn run(environment: &Environment, layers: &Layers, script: &str, keep: &Path) -> Outcome<Ended> {
    let bundle = bundle_on(environment, layers, script)?;
    let upper = bundle.upper.clone();
    let shim = environment.host()?.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let config = environment.config()?;
    shim.create(&stdio, CreateOptions { config: config.as_deref(), ..CreateOptions::default() })?;
    shim.start("")?;
    let exit = shim.wait("", CALL_LIMIT)?;
    let (stdout, stderr) = (stdio.stdout.to_end(CALL_LIMIT)?, stdio.stderr.to_end(CALL_LIMIT)?);
    // As soon as the end is known, and before the task is deleted, an image may be made of it.
    fs::rename(&upper, keep).explain(|| "take the changes".into())?;
    fs::create_dir(&upper).explain(|| "make a directory in their place".into())?;
    shim.delete("")?;
    Container { bundle, shim, stdio }.release()?;
    Ok(Ended { exit_status: exit.exit_status, stdout, stderr })
}

fn changes(environment: &mut Environment) -> Outcome<String> {
    let mut layers = image(environment)?;
    let scratch = scratch(environment, &layers)?;
    let second = scratch.join("second");
    let write = |name: &str, text: &str| {
        let path = second.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&second))
            .and_then(|()| fs::write(&path, text))
            .explain(|| format!("write {}", path.display()))
    };
    write("d/old", "old")?;
    write("d/sub/deep", "deep")?;
    write("many/a", "linked")?;
    write("home/new", "only this")?;
    write("bin/special", "")?;
    fs::hard_link(second.join("many/a"), second.join("many/b")).explain(|| "link".into())?;
    fs::set_permissions(second.join("bin/special"), fs::Permissions::from_mode(0o6755))
        .explain(|| "set-id".into())?;
    mknod(&second.join("etc/group"), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0)).or_else(|_| {
        fs::create_dir_all(second.join("etc")).explain(|| "make etc".into())?;
        mknod(&second.join("etc/group"), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))
            .explain(|| "make a whiteout".into())
    })?;
    make_opaque(&second.join("home"))?;

    layers.add(&second)?;
    let first = run(
        environment,
        &layers,
        "ls /home; ls /etc/group 2>&1; stat -c '%h %i' /many/a /many/b | uniq | wc -l; stat -c %a /bin/special; \
         rm -r /d; mkdir /d; echo new >/d/new; ls /d; \
         echo more >>/many/a; stat -c %h /many/a; mv /etc/passwd /etc/moved; chmod 600 /etc/moved; chown 5:6 /etc/moved; \
         ln -s moved /etc/link; ln /etc/moved /etc/hard; rm /bin/special; mkdir -p /n/n; mkfifo /n/fifo; \
         dd if=/dev/urandom of=/n/big bs=64k count=10 2>/dev/null; cp /n/big /n/n/copy; cmp /n/big /n/n/copy && echo same",
        &scratch.join("changes"),
    )?;
    ensure_eq!(
        first.stdout,
        "new\nls: /etc/group: No such file or directory\n1\n6755\nnew\n1\nsame\n",
        "what the first container saw; {:?}",
        first.stderr
    );
    let upper = scratch.join("changes");
    let kind =
        |name: &str| fs::symlink_metadata(upper.join(name)).explain(|| format!("{name} among the changes"));
    ensure!(is_opaque(&upper.join("d"))?, "the directory that was made anew does not hide the old one");
    ensure!(kind("bin/special")?.file_type().is_char_device(), "a removed file has no whiteout");
    ensure!(kind("n/fifo")?.file_type().is_fifo(), "the FIFO is something else");
    let moved = kind("etc/moved")?;
    ensure_eq!(
        (moved.uid(), moved.gid(), moved.mode() & 0o7777, moved.nlink()),
        (5, 6, 0o600, 2),
        "/etc/moved"
    );
    ensure_eq!(kind("n/big")?.len(), 10 * 65536, "the size of the large file");

    layers.add(&upper)?;
    let next = run(
        environment,
        &layers,
        "ls /d /home; ls /etc; readlink /etc/link; stat -c '%u %g %a %h' /etc/hard; ls /bin/special 2>&1; tail -n 1 /many/a; [ -p /n/fifo ] && cmp /n/big /n/n/copy && echo same",
        &scratch.join("next"),
    )?;
    ensure_eq!(
        next.stdout,
        "/d:\nnew\n\n/home:\nnew\nhard\nlink\nmoved\nmoved\n5 6 600 2\nls: /bin/special: No such file or directory\nlinkedmore\nsame\n",
        "what a container on top of the first one's changes saw; {:?}",
        next.stderr
    );
    if environment.runtime == Runtime::Bulkhead {
        let root = run(environment, &layers, ROOT, &scratch.join("root"))?;
        ensure_eq!(root.stdout, "1\n", "whether the guest has made the overlay");
    }
    Ok("whiteouts, opaque directories, links, owners, set-id, kept on the node and seen by the next container".into())
}

fn hundred(environment: &mut Environment) -> Outcome<String> {
    const COUNT: usize = 100;
    let mut layers = image(environment)?;
    let scratch = scratch(environment, &layers)?;
    for number in 1..COUNT {
        let source = scratch.join(number.to_string());
        fs::create_dir_all(source.join("l"))
            .and_then(|()| fs::write(source.join("l").join(number.to_string()), number.to_string()))
            .and_then(|()| fs::write(source.join("last"), number.to_string()))
            .explain(|| "make a layer".into())?;
        layers.add(&source)?;
    }
    let script = "ls /l | wc -l; cat /last; echo; cat /l/* | wc -c; echo x >/l/new; ls /l | wc -l";
    let ended = run(environment, &layers, script, &scratch.join("changes"))?;
    ensure_eq!(ended.stdout, "99\n99\n189\n100\n", "what is in the layers; {:?}", ended.stderr);
    if environment.runtime == Runtime::Bulkhead {
        let root = run(environment, &layers, ROOT, &scratch.join("root"))?;
        ensure_eq!(root.stdout, "1\n", "whether the guest has made the overlay");
    }
    Ok(format!("{COUNT} layers"))
}

fn read_only(environment: &mut Environment) -> Outcome<String> {
    let layers = image(environment)?;
    let script = "touch /x 2>&1; echo still here";
    let id = environment.id("layers");
    let mut spec = bundle::spec(&id, bundle::shell(script));
    spec["root"]["readonly"] = json!(true);
    let mut bundle = environment.host()?.bundle(&id, &spec)?;
    put_on(&layers, &mut bundle)?;
    let expected = "touch: /x: Read-only file system\nstill here\n";
    ensure_eq!(
        environment.run_bundle(bundle, CALL_LIMIT)?.stdout,
        expected,
        "a root that is to be read-only"
    );
    // As the snapshotter has a view of one layer.
    let id = environment.id("view");
    let mut spec = bundle::spec(&id, bundle::shell(script));
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        // There is no such directory, and none can be made.
        mounts.retain(|mount| mount["destination"] != "/run");
    }
    let mut bundle = environment.host()?.bundle(&id, &spec)?;
    bundle.rootfs = vec![view(&layers.blob(0))];
    ensure_eq!(environment.run_bundle(bundle, CALL_LIMIT)?.stdout, expected, "a view of one layer");
    Ok("nothing could be written".into())
}

fn view(blob: &Path) -> Mount {
    Mount {
        type_: "erofs".into(),
        source: blob.display().to_string(),
        options: vec!["ro".into(), "loop".into()],
        ..Mount::default()
    }
}

/// More containers than may have their layers on a disk.
fn one_pod(environment: &mut Environment) -> Outcome<String> {
    const COUNT: usize = 8;
    const ON_DISKS: usize = 5;
    let layers = image(environment)?;
    let config = environment.host()?.path().join("files.toml");
    fs::write(&config, "root_changes = \"files\"\n").explain(|| format!("write {}", config.display()))?;
    let annotations = |kind: &str, sandbox: &str| json!({ "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox });
    let create = |id: &str, script: &str, annotations: serde_json::Value| -> Outcome<Container> {
        let mut spec = bundle::spec(id, bundle::shell(script));
        spec["annotations"] = annotations;
        let host = environment.host()?;
        let mut bundle = host.bundle(id, &spec)?;
        put_on(&layers, &mut bundle)?;
        let shim = host.start(&bundle)?;
        let stdio = shim.stdio("init", Streams::default())?;
        shim.create(&stdio, CreateOptions { config: Some(&config), ..CreateOptions::default() })?;
        shim.start("")?;
        Ok(Container { bundle, shim, stdio })
    };
    let sandbox = environment.id("pod");
    let pod = create(&sandbox, "sleep 100000", annotations("sandbox", &sandbox))?;
    // The slots serve again for those that come later.
    for round in 0..2 {
        let members = (0..COUNT)
            .map(|number| {
                let script = format!("echo {number} >/own; ls /own*; {ROOT} sleep 100000");
                create(&environment.id("member"), &script, annotations("container", &sandbox))
            })
            .collect::<Outcome<Vec<_>>>()?;
        let mut on_disks = 0;
        for (number, member) in members.into_iter().enumerate() {
            let own = member.exec_script("own", "cat /own")?.success()?;
            ensure_eq!(own, format!("{number}\n"), "the container's own file");
            on_disks += usize::from(member.exec_script("root", ROOT)?.stdout == "1\n");
            ensure_eq!(
                fs::read_to_string(member.bundle.upper.join("own")).explain(|| "own".into())?,
                own,
                "the file on the node"
            );
            member.kill()?;
            member.shim.delete("")?;
            member.bundle.remove()?;
        }
        ensure_eq!(on_disks, ON_DISKS, "containers whose layers are on a disk, in round {round}");
    }
    pod.finish()?;
    Ok(format!("{COUNT} containers, {ON_DISKS} with a disk of layers, the others with files"))
}

fn refused(environment: &mut Environment) -> Outcome<String> {
    let layers = image(environment)?;
    let scratch = scratch(environment, &layers)?;
    let attempt = |rootfs: Vec<Mount>| -> Outcome<String> {
        let mut bundle = bundle_on(environment, &layers, "true")?;
        bundle.rootfs = rootfs;
        let shim = environment.host()?.start(&bundle)?;
        let stdio = shim.stdio("init", Streams::default())?;
        let created = shim.create(&stdio, CreateOptions::default());
        Container { bundle, shim, stdio }.release()?;
        match created {
            Ok(_) => fail!("a container was created"),
            Err(error) => Ok(error.to_string()),
        }
    };
    let blob = scratch.join("nonsense.erofs");
    fs::write(&blob, vec![0x5a; 1 << 20]).explain(|| "write nonsense".into())?;
    let damaged = attempt(vec![view(&blob)])?;
    ensure!(
        damaged.contains("does not mount the layers") && damaged.contains("nonsense.erofs"),
        "the error: {damaged}"
    );
    fs::copy(layers.blob(0), &blob).explain(|| "copy a layer".into())?;
    fs::set_permissions(&blob, fs::Permissions::from_mode(0o666)).explain(|| "open it to all".into())?;
    let open = attempt(vec![view(&blob)])?;
    ensure!(open.contains("only root may write to"), "the error: {open}");
    let missing = attempt(vec![view(&scratch.join("missing"))])?;
    ensure!(missing.contains("can't open the layer"), "the error: {missing}");
    Ok(damaged)
}

fn through_containerd(environment: &mut Environment) -> Outcome<String> {
    const SNAPSHOTTER: &str = "erofs";
    let (id, runtime) = (environment.id("erofs"), environment.runtime.name());
    let ours = environment.runtime == Runtime::Bulkhead;
    let containerd = environment.containerd()?;
    containerd.import_for("busybox", SNAPSHOTTER)?;
    let script = format!("{ROOT} rm -r /home; mkdir /home; echo kept >/home/kept; cat /home/kept");
    let run = ["run", "--snapshotter", SNAPSHOTTER, "--runtime", runtime, super::ctr::IMAGE, &id];
    let output = containerd.ctr(&[&run[..], &["/bin/sh", "-c", &script]].concat())?;
    let elapsed = output.elapsed;
    let count = if ours { "1" } else { "0" };
    ensure_eq!(output.success("ctr run")?.stdout, format!("{count}\nkept\n"), "root and file");
    // An image of the changes, as `ctr commit` and its like make it.
    let snapshots = ["snapshots", "--snapshotter", SNAPSHOTTER];
    containerd.ctr(&[&snapshots[..], &["diff", &id]].concat())?.success("ctr snapshots diff")?;
    containerd.ctr(&["container", "delete", "--keep-snapshot", &id])?.success("ctr container delete")?;
    containerd.ctr(&[&snapshots[..], &["commit", "committed", &id]].concat())?.success("commit")?;
    let view = [&snapshots[..], &["view", "looked-at", "committed"]].concat();
    containerd.ctr(&view)?.success("ctr snapshots view")?;
    // containerd mounts layers until they go with their image; those of this one it would mount again.
    let mounts = fs::read_to_string("/proc/self/mounts").explain(|| "read the mounts".into())?;
    let below = containerd.path().join("layers/snapshots");
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for point in points.filter(|point| point.starts_with(&below)) {
        umount2(point, MntFlags::MNT_DETACH).explain(|| format!("unmount {}", point.display()))?;
    }
    Ok(format!("run, and committed, in {:.3} s", elapsed.as_secs_f64()))
}
