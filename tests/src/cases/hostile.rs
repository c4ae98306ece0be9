//! Pods that don't do what they are told, or reach for the host: what the node can still do with them, and what they get.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_base::capabilities::NAMES;
use serde_json::{Value, json};

use super::{Case, Container, Environment, status};
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{bundle, ensure, ensure_eq, process};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("hostile-frozen-container-is-killed", frozen_container_is_killed).bulkhead_only(),
    Case::new("hostile-volume-with-kernel-interfaces", kernel_interfaces).bulkhead_only(),
    Case::new("hostile-volume-that-is-the-whole-host", whole_host).bulkhead_only(),
    Case::new("hostile-mounts-that-come-later", later_mounts).bulkhead_only(),
    Case::new("hostile-root-with-kernel-interfaces", kernel_interfaces_in_the_root).bulkhead_only(),
];

/// The kernel's settings by which a file system of its own would give the host away.
const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

/// Every capability that a container can have, in the guest.
fn privileged(mut process: Value) -> Value {
    process["capabilities"] = bundle::capabilities(&NAMES);
    process
}

/// A container whose shell moves itself out of its control group, where the agent does not look for it, and freezes itself. A
/// second process of the container runs beside.
fn frozen(environment: &Environment) -> Outcome<Container> {
    let id = environment.id("frozen");
    let script = "mkdir /tmp/c; mount -t cgroup2 none /tmp/c && mkdir /tmp/c/ice && echo 1 >/tmp/c/ice/cgroup.procs && echo ready; read go; \
                  echo 1 >/tmp/c/ice/cgroup.freeze; exec sleep 100000";
    let mut spec = bundle::spec(&id, privileged(bundle::shell(script)));
    spec["linux"]["namespaces"] =
        json!([{ "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }]);
    bundle::add(
        &mut spec["mounts"],
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"] }),
    );
    let mut container = environment.created(&id, &spec, Streams { stdin: true, ..Streams::default() })?;
    container.shim.start("")?;
    container.stdio.stdout.until("ready", CALL_LIMIT)?;
    container.exec("beside", &bundle::process(&["sleep", "100000"]), Streams::default())?;
    container.stdio.write(b"go\n")?;
    // It has read the line when the input is empty; the write to the cgroup's file is its next system call.
    std::thread::sleep(Duration::from_millis(500));
    Ok(container)
}

/// Everything in the pod has ended, with a reason, and goes as it would have otherwise.
fn expect_gone(environment: &Environment, container: Container, reason: &str) -> Outcome {
    ensure_eq!(container.shim.wait("beside", CALL_LIMIT)?.exit_status, 137, "exit status of the exec");
    environment.host()?.events.wait_for(&container.bundle.id.clone(), "/tasks/exit", "", CALL_LIMIT)?;
    ensure_eq!(container.shim.state("")?.status.value(), status::STOPPED, "state");
    match container.shim.kill("", 9, false) {
        Ok(()) => crate::fail!("a process of a dead pod was killed"),
        Err(error) => {
            ensure!(error.message.contains(reason), "no reason is given: {error}");
        }
    }
    container.shim.delete("beside")?;
    container.shim.delete("")?;
    container.release()
}

fn frozen_container_is_killed(environment: &mut Environment) -> Outcome<String> {
    let container = frozen(environment)?;
    let since = Instant::now();
    container.shim.kill("", 9, true)?;
    let exit = container.shim.wait("", CALL_LIMIT)?;
    let took = since.elapsed();
    ensure_eq!(exit.exit_status, 137, "exit status");
    ensure!(took < Duration::from_secs(10), "it took {:.1} s", took.as_secs_f64());
    expect_gone(environment, container, "of SIGKILL")?;
    Ok(format!("ended {:.3} s after SIGKILL", took.as_secs_f64()))
}

/// A mount on the host; dropped, it is gone.
struct HostMount(PathBuf);

impl HostMount {
    fn new(arguments: &[&str], target: &Path) -> Outcome<Self> {
        fs::create_dir_all(target).explain(|| format!("make {}", target.display()))?;
        let mut command = Command::new("mount");
        command.args(arguments).arg(target);
        process::run(&mut command, b"", CALL_LIMIT)?.success("mount")?;
        Ok(Self(target.to_owned()))
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        let _ = process::run(command.arg("-l").arg(&self.0), b"", CALL_LIMIT);
    }
}

fn core_pattern() -> Outcome<String> {
    fs::read_to_string(CORE_PATTERN).explain(|| CORE_PATTERN.into())
}

/// Tries to reach the host's kernel through what is mounted below `$1`; what works is printed.
const REACH: &str = "cd \"$1\" || exit 1; \
    for f in proc/version proc/sys/kernel/core_pattern proc/sys/kernel/hostname sys/kernel/uevent_seqnum sys/power/state \
             dev/null dev/kmsg cgroup/cgroup.procs misc/register proc/1/root/etc/passwd; do \
      cat $f >/dev/null 2>&1 && echo \"read $f\"; \
      (echo '|/bin/false' >$f) 2>/dev/null && echo \"wrote $f\"; \
    done; \
    echo ':x:M::\\x00X::/bin/false:' 2>/dev/null >misc/register && echo registered; \
    rm -f dev/null 2>/dev/null; [ -d proc ] && [ $(ls -A proc | wc -l) != 0 ] && echo 'proc is not empty'; \
    [ -d sys ] && [ $(ls -A sys | wc -l) != 0 ] && echo 'sys is not empty'; echo end";

fn reach(path: &str) -> Value {
    privileged(bundle::process(&["/bin/sh", "-c", REACH, "sh", path]))
}

/// A directory as of a change of root: with file systems of the kernel's of its own in it, and a good one.
fn furnished(directory: &Path) -> Outcome<Vec<HostMount>> {
    let mut mounts = Vec::new();
    for (kind, name) in
        [("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev"), ("cgroup2", "cgroup"), ("tmpfs", "tmp")]
    {
        mounts.push(HostMount::new(&["-t", kind, "none"], &directory.join(name))?);
    }
    // Where the kernel has it.
    match HostMount::new(&["-t", "binfmt_misc", "none"], &directory.join("misc")) {
        Ok(mount) => mounts.push(mount),
        Err(_) => fs::remove_dir(directory.join("misc")).explain(|| "remove misc".into())?,
    }
    fs::write(directory.join("tmp/file"), "kept").explain(|| "a file on the tmpfs".into())?;
    Ok(mounts)
}

fn kernel_interfaces(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("chroot");
    let directory = environment.host()?.path().join(&id);
    fs::create_dir_all(&directory).explain(|| "make the volume".into())?;
    let mounts = furnished(&directory)?;
    let before = core_pattern()?;
    let mut evidence = Vec::new();
    for options in [["rbind", "ro"], ["rbind", "rw"]] {
        let id = environment.id("chroot");
        let mut spec = bundle::spec(&id, reach("/tree"));
        bundle::add(&mut spec["mounts"], bundle::bind(&directory, "/tree", &options));
        bundle::add(&mut spec["mounts"], bundle::bind(&directory.join("tmp/file"), "/kept", &["bind", "ro"]));
        let ended = environment.run_to_end(&id, &spec)?;
        ensure_eq!(
            ended.stdout.trim(),
            "end",
            "what was reached with {options:?}; stderr {:?}",
            ended.stderr
        );
        ensure_eq!(core_pattern()?, before, "the host's core_pattern after {options:?}");
        evidence.push(options.join(","));
    }
    ensure!(Path::new("/dev/null").exists(), "the host's /dev/null is gone");
    // The file system that holds files came along.
    let id = environment.id("chroot");
    let mut spec = bundle::spec(&id, bundle::shell("cat /tree/tmp/file"));
    bundle::add(&mut spec["mounts"], bundle::bind(&directory, "/tree", &["rbind", "ro"]));
    ensure_eq!(environment.run_to_end(&id, &spec)?.success()?, "kept", "the file on the tmpfs below");
    for refused in ["proc", "sys", "dev", "cgroup"] {
        let id = environment.id("refused");
        let mut spec = bundle::spec(&id, bundle::shell("true"));
        bundle::add(&mut spec["mounts"], bundle::bind(&directory.join(refused), "/tree", &["rbind", "ro"]));
        let message = refusal(environment, &id, &spec)?;
        ensure!(message.contains("can't be shared with a pod"), "{refused}: {message}");
    }
    drop(mounts);
    fs::remove_dir_all(&directory).explain(|| "remove the volume".into())?;
    Ok(format!("nothing reached through {}; refused as volumes themselves", evidence.join(" and ")))
}

/// What is said when a container can't be created.
fn refusal(environment: &Environment, id: &str, spec: &Value) -> Outcome<String> {
    let host = environment.host()?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let Err(error) = shim.create(&stdio, crate::shim::CreateOptions::default()) else {
        crate::fail!("{id} was created")
    };
    Container { bundle, shim, stdio }.release()?;
    Ok(error.message)
}

fn whole_host(environment: &mut Environment) -> Outcome<String> {
    let before = core_pattern()?;
    let id = environment.id("host");
    let mut spec = bundle::spec(&id, reach("/host"));
    bundle::add(&mut spec["mounts"], bundle::bind(Path::new("/"), "/host", &["rbind", "rslave", "rw"]));
    let ended = environment.run_to_end(&id, &spec)?;
    ensure_eq!(ended.stdout.trim(), "end", "what was reached; stderr {:?}", ended.stderr);
    ensure_eq!(core_pattern()?, before, "the host's core_pattern");
    ensure!(Path::new("/dev/null").exists(), "the host's /dev/null is gone");
    let id = environment.id("host");
    let mut spec = bundle::spec(
        &id,
        bundle::shell("ls /host/etc >/dev/null && ls -A /host/proc /host/sys | grep -v : | grep -c ."),
    );
    bundle::add(&mut spec["mounts"], bundle::bind(Path::new("/"), "/host", &["rbind", "ro"]));
    ensure_eq!(environment.run_to_end(&id, &spec)?.stdout.trim(), "0", "files in /host/proc and /host/sys");
    Ok("the host's files are there; /proc, /sys and /dev are empty".into())
}

fn later_mounts(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("later");
    let directory = environment.host()?.path().join(&id);
    let shared = HostMount::new(&["-t", "tmpfs", "none"], &directory)?;
    let mut command = Command::new("mount");
    process::run(command.arg("--make-shared").arg(&directory), b"", CALL_LIMIT)?
        .success("mount --make-shared")?;
    let mut spec = bundle::spec(&id, privileged(bundle::process(&["sleep", "100000"])));
    bundle::add(&mut spec["mounts"], bundle::bind(&directory, "/tree", &["rbind", "rslave", "rw"]));
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    let before = core_pattern()?;
    let mounts = furnished(&directory)?;
    // A tmpfs can't be told from the host's /dev unless it is mounted nodev.
    let good = HostMount::new(&["-t", "tmpfs", "-o", "nodev", "none"], &directory.join("good"))?;
    fs::write(directory.join("good/file"), "come").explain(|| "a file on the later tmpfs".into())?;
    eventually("the later mount is seen", CALL_LIMIT, || {
        let name = environment.id("look");
        ensure_eq!(container.exec_script(&name, "cat /tree/good/file")?.stdout, "come", "the later file");
        Ok(())
    })?;
    let stdio = container.exec("reach", &reach("/tree"), Streams::default())?;
    container.shim.wait("reach", CALL_LIMIT)?;
    let reached = stdio.stdout.to_end(CALL_LIMIT)?;
    container.shim.delete("reach")?;
    ensure_eq!(reached.trim(), "end", "what was reached");
    ensure_eq!(core_pattern()?, before, "the host's core_pattern");
    ensure!(Path::new("/dev/null").exists(), "the host's /dev/null is gone");
    container.finish()?;
    drop((good, mounts, shared));
    fs::remove_dir_all(&directory).explain(|| "remove the volume".into())?;
    Ok("a tmpfs came in, procfs, sysfs, devtmpfs and cgroup did not".into())
}

/// The bundle's own root directory, when containerd mounts none.
fn kernel_interfaces_in_the_root(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("root");
    let spec = bundle::spec(&id, reach("/tree"));
    let host = environment.host()?;
    let bundle = host.bundle(&id, &spec)?;
    let root = bundle.path.join("rootfs");
    let mut command = Command::new("cp");
    command.arg("-a").arg(environment.layout.rootfs("busybox").join(".")).arg(&root);
    process::run(&mut command, b"", CALL_LIMIT)?.success("cp")?;
    let mounts = furnished(&root.join("tree"))?;
    let before = core_pattern()?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let options = crate::shim::CreateOptions { without_rootfs: true, ..Default::default() };
    shim.create(&stdio, options)?;
    let container = Container { bundle, shim, stdio };
    container.shim.start("")?;
    container.shim.wait("", CALL_LIMIT)?;
    let look = container.stdio.stdout.to_end(CALL_LIMIT)?;
    container.shim.delete("")?;
    ensure_eq!(look.trim(), "end", "what was reached");
    ensure_eq!(core_pattern()?, before, "the host's core_pattern");
    drop(mounts);
    container.release()?;
    Ok("the kernel's file systems below the bundle's root directory are left out".into())
}
