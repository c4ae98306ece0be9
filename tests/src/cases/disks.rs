//! Block devices of the node in pods.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Mount;
use nix::libc::O_EXCL;
use serde_json::{Value, json};

use super::{Case, Container, Environment};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::freeze::Frozen;
use crate::layers::Ext4;
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::volume::{SIZE, Volume};
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("disk-is-read-and-written", read_and_written),
    Case::new("cold-disk-is-read-and-written", read_and_written).cold(),
    Case::new("disk-read-only", read_only).bulkhead_only(),
    Case::new("disk-survives-an-update", update).bulkhead_only(),
    Case::new("disk-in-use-is-refused", in_use).bulkhead_only(),
    Case::new("disk-unknown-is-refused", unknown),
    Case::new("disks-come-and-go-in-a-pod", come_and_go).bulkhead_only(),
    Case::new("disk-root-file-system", root_file_system).bulkhead_only(),
    Case::new("cold-disk-root-file-system", root_file_system).cold(),
    Case::new("disk-root-file-system-damaged", damaged_root).bulkhead_only(),
    Case::new("disk-that-hangs-holds-up-nothing-else", hangs).bulkhead_only(),
];

fn volume(environment: &Environment) -> Outcome<Volume> {
    Volume::new(environment.host()?.path(), &environment.id("volume"))
}

/// Prints the text of sector 9 of a device.
fn read(device: &str) -> String {
    format!("dd if={device} bs=512 skip=9 count=1 2>/dev/null | head -c 16; echo;")
}

/// Writes a text to sector 100 of a device and flushes it.
fn write(text: &str, device: &str) -> String {
    format!("echo '{text} ' | dd of={device} bs=512 seek=100 conv=notrunc,fsync 2>&1;")
}

fn read_and_written(environment: &mut Environment) -> Outcome<String> {
    let (volume, id) = (volume(environment)?, environment.id("disk"));
    let script = format!(
        "{} {} blockdev --getsize64 /dev/data; ls -l /dev/data | cut -c1-10; mknod /dev/other b 254 0; head -c 1 /dev/other 2>&1",
        read("/dev/data"),
        write("written", "/dev/data")
    );
    let mut spec = bundle::spec(&id, bundle::shell(&script));
    volume.add_to(&mut spec, "/dev/data", "rwm");
    let ended = environment.run_to_end(&id, &spec)?;
    let lines: Vec<&str> = ended.stdout.lines().collect();
    ensure_eq!(lines.first(), Some(&"0000000000000009"), "what sector 9 says");
    ensure!(lines.contains(&SIZE.to_string().as_str()), "the size is not {SIZE}: {lines:?}");
    ensure!(lines.contains(&"brw-rw----"), "type and mode of the node: {lines:?}");
    ensure!(ended.stdout.contains("not permitted"), "another disk of the guest could be opened: {lines:?}");
    ensure_eq!(volume.sector(100)?, "written", "what the container wrote");
    ensure_eq!(volume.sector(101)?, format!("{:016}", 101), "the sector behind it");
    Ok(format!("{SIZE} bytes at {} read and written", volume.device.display()))
}

fn read_only(environment: &mut Environment) -> Outcome<String> {
    let (volume, id) = (volume(environment)?, environment.id("disk"));
    let script = format!(
        "{} {} cat /sys/block/vd?/ro | tr '\\n' ' '",
        read("/dev/data"),
        write("written", "/dev/data")
    );
    let mut spec = bundle::spec(&id, bundle::shell(&script));
    volume.add_to(&mut spec, "/dev/data", "rm");
    let output = environment.run_to_end(&id, &spec)?.stdout;
    ensure!(output.starts_with("0000000000000009\n"), "what sector 9 says: {output:?}");
    ensure!(output.contains("not permitted"), "it could be opened for writing: {output:?}");
    // The guest's image and the volume.
    ensure!(output.ends_with("1 1 "), "the disk itself is not read-only: {output:?}");
    ensure_eq!(volume.sector(100)?, format!("{:016}", 100), "sector 100");
    Ok("it can be read, and neither the node nor the disk be written to".into())
}

fn update(environment: &mut Environment) -> Outcome<String> {
    let (volume, id) = (volume(environment)?, environment.id("disk"));
    let mut spec = bundle::spec(&id, bundle::process(&["sleep", "100000"]));
    volume.add_to(&mut spec, "/dev/data", "rwm");
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    // As containerd's CRI plugin does: all of them, with one changed.
    let mut resources = spec["linux"]["resources"].clone();
    resources["pids"] = json!({ "limit": 40 });
    container.shim.update(&resources)?;
    let output = container.exec_script("reads", &read("/dev/data"))?.success()?;
    ensure_eq!(output, "0000000000000009\n", "what sector 9 says");
    container.finish()?;
    Ok("rules that came with new limits name the host's numbers, and the disk could still be read".into())
}

/// Why a container with this specification is not created.
fn refused(environment: &Environment, id: &str, spec: &Value) -> Outcome<String> {
    let host = environment.host()?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let config = environment.config()?;
    match shim.create(&stdio, CreateOptions { config: config.as_deref(), ..CreateOptions::default() }) {
        Ok(_) => fail!("the container was created"),
        Err(error) => {
            Container { bundle, shim, stdio }.release()?;
            Ok(error.to_string())
        }
    }
}

fn in_use(environment: &mut Environment) -> Outcome<String> {
    let (volume, id) = (volume(environment)?, environment.id("disk"));
    let mut spec = bundle::spec(&id, bundle::process(&["true"]));
    volume.add_to(&mut spec, "/dev/data", "rwm");
    // As a mount does.
    let claim = OpenOptions::new().read(true).custom_flags(O_EXCL).open(&volume.device);
    let claim = claim.explain(|| format!("claim {}", volume.device.display()))?;
    let error = refused(environment, &id, &spec)?;
    ensure!(error.contains("it is mounted on the host or another pod has it"), "the error: {error}");
    drop(claim);
    let id = environment.id("disk");
    environment.run_to_end(&id, &spec)?.success()?;
    Ok(error)
}

fn unknown(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("disk");
    let mut spec = bundle::spec(&id, bundle::process(&["true"]));
    spec["linux"]["devices"] = json!([{ "path": "/dev/x", "type": "b", "major": 4095, "minor": 7 }]);
    let error = refused(environment, &id, &spec)?;
    ensure!(error.contains("no block device 4095:7"), "the error: {error}");
    Ok(error)
}

/// Mounts of a root file system in an image, as the snapshotter `blockfile` gives them.
fn image_mounts(image: &Path, options: &[&str]) -> Vec<Mount> {
    vec![Mount {
        type_: "ext4".into(),
        source: image.display().to_string(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }]
}

fn root_file_system(environment: &mut Environment) -> Outcome<String> {
    let image = environment.host()?.path().join(environment.id("root"));
    let source = environment.layout.rootfs("busybox").with_extension("ext4");
    fs::copy(&source, &image).explain(|| format!("copy {}", source.display()))?;
    let volume = volume(environment)?;
    let run = |options: &[&str], script: &str| -> Outcome<String> {
        let id = environment.id("root");
        let mut spec = bundle::spec(&id, bundle::shell(script));
        volume.add_to(&mut spec, "/dev/data", "rwm");
        let shared = environment.host()?.path().to_owned();
        spec["mounts"].as_array_mut().explain(|| "mounts".into())?.push(bundle::bind(
            &shared,
            "/mnt",
            &["rbind", "ro"],
        ));
        let host = environment.host()?;
        let mut bundle = host.bundle(&id, &spec)?;
        bundle.rootfs = image_mounts(&image, options);
        let ended = environment.run_bundle(bundle, CALL_LIMIT)?;
        ended.success()
    };
    let script = format!(
        "grep ' / ' /proc/mounts | cut -d' ' -f3; echo kept >/kept; mkdir /dir; ln -s kept /dir/link; ls /mnt | grep -c bundles; {}",
        read("/dev/data")
    );
    let first = run(&["rw", "loop"], &script)?;
    ensure_eq!(first, "ext4\n1\n0000000000000009\n", "root, volume and disk of the first container");
    let second = run(
        &["ro", "loop"],
        "cat /kept; readlink /dir/link; touch /kept 2>&1; grep -c ' / .* ro,' /proc/mounts",
    )?;
    ensure_eq!(
        second,
        "kept\nkept\ntouch: /kept: Read-only file system\n1\n",
        "what the second container found"
    );
    fs::remove_file(&image).explain(|| format!("remove {}", image.display()))?;
    Ok("ext4 in an image is the guest's root beside shared volumes and disks; what one container wrote the next one read".into())
}

fn damaged_root(environment: &mut Environment) -> Outcome<String> {
    let image = environment.host()?.path().join(environment.id("root"));
    fs::write(&image, vec![0x5a; 1 << 20]).explain(|| format!("write {}", image.display()))?;
    let id = environment.id("root");
    let host = environment.host()?;
    let mut bundle = host.bundle(&id, &bundle::spec(&id, bundle::process(&["true"])))?;
    bundle.rootfs = image_mounts(&image, &["rw", "loop"]);
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let created = shim.create(&stdio, CreateOptions::default());
    let Err(error) = created else { fail!("a root file system of nonsense was mounted") };
    Container { bundle, shim, stdio }.release()?;
    fs::remove_file(&image).explain(|| format!("remove {}", image.display()))?;
    let error = error.to_string();
    ensure!(error.contains("does not mount the disk") && error.contains("root-"), "the error: {error}");
    Ok(error)
}

/// A pod as the CRI plugin makes it, whose containers come one after the other: one asks for all disks that there are, one for more.
pub(super) fn come_and_go(environment: &mut Environment) -> Outcome<String> {
    const SLOTS: usize = 8;
    let annotations = |kind: &str, sandbox: &str| json!({ "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox });
    let sandbox = environment.id("pod");
    let mut spec = bundle::spec(&sandbox, bundle::process(&["sleep", "100000"]));
    spec["annotations"] = annotations("sandbox", &sandbox);
    // As the CRI's is, so that nothing of it needs a disk.
    spec["root"]["readonly"] = json!(true);
    let pod = environment.created(&sandbox, &spec, Streams::default())?;
    pod.shim.start("")?;

    let volumes = (0..=SLOTS).map(|_| volume(environment)).collect::<Outcome<Vec<_>>>()?;
    let member = |volumes: &[Volume], script: &str| -> Outcome<(Container, Result<u32, String>)> {
        let id = environment.id("member");
        let mut spec = bundle::spec(&id, bundle::shell(script));
        spec["annotations"] = annotations("container", &sandbox);
        for (number, volume) in volumes.iter().enumerate() {
            volume.add_to(&mut spec, &format!("/dev/data{number}"), "rwm");
        }
        let host = environment.host()?;
        let bundle = host.bundle(&id, &spec)?;
        let shim = host.start(&bundle)?;
        let stdio = shim.stdio("init", Streams::default())?;
        let created = shim.create(&stdio, CreateOptions::default()).map_err(|error| error.to_string());
        Ok((Container { bundle, shim, stdio }, created))
    };
    let run = |volumes: &[Volume], script: &str| -> Outcome<String> {
        let (container, created) = member(volumes, script)?;
        created.explain(|| "create a container".into())?;
        container.shim.start("")?;
        container.shim.wait("", CALL_LIMIT)?;
        let output = container.stdio.stdout.to_end(CALL_LIMIT)?;
        container.shim.delete("")?;
        container.bundle.remove()?;
        Ok(output)
    };

    let every: String =
        (0..SLOTS).map(|number| write(&format!("first{number}"), &format!("/dev/data{number}"))).collect();
    run(&volumes[..SLOTS], &every)?;
    for (number, volume) in volumes[..SLOTS].iter().enumerate() {
        ensure_eq!(volume.sector(100)?, format!("first{number}"), "what the first container wrote");
    }
    // Let go of with the container, though the pod lives.
    for volume in &volumes {
        let claim = OpenOptions::new().read(true).custom_flags(O_EXCL).open(&volume.device);
        claim.explain(|| format!("claim {} after its container", volume.device.display()))?;
    }
    let (refused, created) = member(&volumes, "true")?;
    let Err(error) = created else { fail!("{} disks were attached", volumes.len()) };
    ensure!(error.contains("no slot left for a disk"), "the error: {error}");
    refused.bundle.remove()?;
    // The slots serve again, for other disks.
    let output = run(&volumes[SLOTS..], &(read("/dev/data0") + &write("second", "/dev/data0")))?;
    ensure!(output.starts_with("0000000000000009\n"), "what sector 9 says: {output:?}");
    ensure_eq!(volumes[SLOTS].sector(100)?, "second", "what the second container wrote");
    pod.finish()?;
    Ok(format!("{SLOTS} disks, each let go with its container; one more: {error}"))
}

/// A volume on a file system of the node that is frozen while the container writes: its disk can't go on, the rest of the pod does.
fn hangs(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("disk");
    let directory = environment.host()?.path().join(&id);
    let file_system = Ext4::new(&environment.layout, directory)?;
    let volume = Volume::new(file_system.path(), "volume")?;
    let script = format!(
        "until test -e /go; do sleep 0.02; done; echo writes; {} echo wrote",
        write("late", "/dev/data")
    );
    let mut spec = bundle::spec(&id, bundle::shell(&script));
    volume.add_to(&mut spec, "/dev/data", "rwm");
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    let frozen = Frozen::new(file_system.path())?;
    container.exec_script("go", "touch /go")?.success()?;
    container.stdio.stdout.until("writes", CALL_LIMIT)?;
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(100));
        let since = Instant::now();
        let said = container.exec_script(&format!("meanwhile-{round}"), "echo alive")?.success()?;
        ensure_eq!(said, "alive\n", "what a command says meanwhile");
        ensure!(since.elapsed() < Duration::from_secs(1), "it took {:?}", since.elapsed());
    }
    ensure!(!container.stdio.stdout.so_far().contains("wrote"), "the disk did not hang");
    drop(frozen);
    container.stdio.stdout.until("wrote", CALL_LIMIT)?;
    container.finish()?;
    ensure_eq!(volume.sector(100)?, "late", "what the container wrote in the end");
    Ok("commands run in a pod whose disk hangs, and the disk goes on when the node's does".into())
}
