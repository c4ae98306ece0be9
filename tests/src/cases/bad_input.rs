//! What is missing, broken or wrong: a clear message at `ctr` in time, and nothing left behind.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::ctr::IMAGE;
use super::{Case, Container, Environment, Fixture};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("bad-kernel-missing", |e| {
        refused(e, "kernel = \"/nonexistent/vmlinux\"", &["/nonexistent/vmlinux", "o such file"])
    })
    .on(Fixture::Containerd)
    .bulkhead_only(),
    Case::new("bad-kernel-truncated", kernel_truncated).on(Fixture::Containerd).bulkhead_only(),
    Case::new("bad-image-truncated", image_truncated).on(Fixture::Containerd).bulkhead_only(),
    Case::new("bad-image-missing", |e| {
        refused(e, "image = \"/nonexistent/guest.erofs\"", &["/nonexistent/guest.erofs", "o such file"])
    })
    .on(Fixture::Containerd)
    .bulkhead_only(),
    Case::new("bad-kvm-missing", |e| {
        refused(e, "kvm = \"/nonexistent/kvm\"", &["/nonexistent/kvm", "o such file"])
    })
    .on(Fixture::Containerd)
    .bulkhead_only(),
    Case::new("bad-kvm-without-permission", kvm_without_permission).on(Fixture::Containerd).bulkhead_only(),
    Case::new("bad-kvm-is-another-device", |e| refused(e, "kvm = \"/dev/null\"", &["KVM"]))
        .on(Fixture::Containerd)
        .bulkhead_only(),
    Case::new("bad-vmm-missing", |e| refused(e, "vmm = \"/nonexistent/vmm\"", &["/nonexistent/vmm"]))
        .on(Fixture::Containerd)
        .bulkhead_only(),
    Case::new("bad-configuration-key", |e| refused(e, "surprise = 1", &["surprise"]))
        .on(Fixture::Containerd)
        .bulkhead_only(),
    Case::new("bad-configuration-missing", configuration_missing).on(Fixture::Containerd).bulkhead_only(),
    Case::new("bad-memory-too-small", |e| refused(e, "memory = \"1Mi\"", &["memory", "64"]))
        .on(Fixture::Containerd)
        .bulkhead_only(),
    Case::new("bad-memory-not-a-quantity", |e| refused(e, "memory = \"lots\"", &["memory", "lots"]))
        .on(Fixture::Containerd)
        .bulkhead_only(),
    Case::new("bad-annotation", annotation).on(Fixture::Containerd).bulkhead_only(),
    Case::new("bad-program-missing", program_missing).on(Fixture::Containerd),
    Case::new("bad-bundle-without-root-file-system", without_rootfs),
];

/// Expects `ctr run` with this configuration, and without templates, to fail in time with a message that contains each of
/// `expected`.
fn refused(environment: &mut Environment, configuration: &str, expected: &[&str]) -> Outcome<String> {
    let id = environment.id("bad");
    let file = environment.containerd()?.path().join(format!("{id}.toml"));
    fs::write(&file, format!("templates = \"off\"\n{configuration}"))
        .explain(|| format!("write {}", file.display()))?;
    let message = run_refused(
        environment,
        &id,
        &["--runtime-config-path", &file.display().to_string()],
        "/bin/true",
        expected,
    )?;
    fs::remove_file(&file).explain(|| format!("remove {}", file.display()))?;
    Ok(message)
}

fn run_refused(
    environment: &mut Environment,
    id: &str,
    options: &[&str],
    program: &str,
    expected: &[&str],
) -> Outcome<String> {
    let runtime = environment.runtime.name();
    let arguments = [&["run", "--rm", "--runtime", runtime], options, &[IMAGE, id, program]].concat();
    let output = environment.containerd()?.ctr(&arguments)?;
    ensure!(output.code != 0, "ctr run was expected to fail; {}", output.said());
    ensure!(output.elapsed <= CALL_LIMIT, "ctr run took {:.1} s to fail", output.elapsed.as_secs_f64());
    for part in expected {
        ensure!(output.stderr.contains(part), "the message does not contain {part:?}: {}", output.said());
    }
    let containers = environment.containerd()?.ctr(&["container", "ls", "-q"])?.stdout;
    ensure!(!containers.lines().any(|line| line == id), "the container is still known to containerd");
    Ok(format!("{:.3} s: {}", output.elapsed.as_secs_f64(), output.stderr.trim()))
}

/// The first bytes of a file, in a file of its own below containerd's directory.
fn truncated(environment: &mut Environment, whole: &Path, bytes: u64) -> Outcome<PathBuf> {
    let name = environment.id("truncated");
    let part = environment.containerd()?.path().join(name);
    let mut source = File::open(whole).explain(|| format!("open {}", whole.display()))?.take(bytes);
    let mut target = File::create(&part).explain(|| format!("make {}", part.display()))?;
    io::copy(&mut source, &mut target).explain(|| format!("copy {}", whole.display()))?;
    Ok(part)
}

fn kernel_truncated(environment: &mut Environment) -> Outcome<String> {
    let whole = environment.layout.share("vmlinux");
    let kernel = truncated(environment, &whole, 4 << 20)?;
    let message = refused(environment, &format!("kernel = {kernel:?}"), &["kernel"])?;
    fs::remove_file(&kernel).explain(|| "remove the truncated kernel".into())?;
    Ok(message)
}

fn image_truncated(environment: &mut Environment) -> Outcome<String> {
    let whole = environment.layout.share("guest.erofs");
    let image = truncated(environment, &whole, 64 << 10)?;
    let message = refused(environment, &format!("image = {image:?}"), &["guest"])?;
    fs::remove_file(&image).explain(|| "remove the truncated image".into())?;
    Ok(message)
}

/// Root may open every device but on a file system that is mounted `nodev`.
fn kvm_without_permission(environment: &mut Environment) -> Outcome<String> {
    let directory = environment.containerd()?.path().join("nodev");
    fs::create_dir(&directory).explain(|| "make the mount point".into())?;
    mount(Some("tmpfs"), &directory, Some("tmpfs"), MsFlags::MS_NODEV, None::<&str>)
        .explain(|| "mount a tmpfs".into())?;
    let device = directory.join("kvm");
    let result = mknod(&device, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(10, 232))
        .explain(|| "make a device node".into())
        .and_then(|()| {
            refused(environment, &format!("kvm = {device:?}"), &["nodev/kvm", "ermission denied"])
        });
    umount(&directory).explain(|| "unmount the tmpfs".into())?;
    fs::remove_dir(&directory).explain(|| "remove the mount point".into())?;
    result
}

fn configuration_missing(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("bad");
    run_refused(
        environment,
        &id,
        &["--runtime-config-path", "/nonexistent/config.toml"],
        "/bin/true",
        &["/nonexistent/config.toml"],
    )
}

fn annotation(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("bad");
    run_refused(
        environment,
        &id,
        &["--annotation", "io.bulkhead.memory=-5Mi"],
        "/bin/true",
        &["io.bulkhead.memory", "annotations = true"],
    )
}

fn program_missing(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("bad");
    run_refused(environment, &id, &[], "/no/such/program", &["/no/such/program", "no such file"])
}

fn without_rootfs(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("bare");
    let host = environment.host()?;
    let bundle = host.bundle(&id, &bundle::spec(&id, bundle::shell("true")))?;
    fs::remove_dir(bundle.path.join("rootfs")).explain(|| "remove the bundle's rootfs".into())?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let Err(error) = shim.create(&stdio, CreateOptions { without_rootfs: true, ..CreateOptions::default() })
    else {
        fail!("a container without a root file system was created")
    };
    ensure!(
        error.message.contains("rootfs"),
        "the error does not say that it is about the root file system: {error}"
    );
    Container { bundle, shim, stdio }.release()?;
    Ok(error.message)
}
