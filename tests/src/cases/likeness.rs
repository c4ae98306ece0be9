//! What a container can't tell from one under runc: each case passes there too, or says what a pod has in its place.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::{Case, Container, Environment, Fixture, Runtime};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::process;
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("like-unconfined", unconfined),
    Case::new("like-ipc-sysctls", ipc_sysctls),
    Case::new("like-missing-sysctl", missing_sysctl).bulkhead_only(),
    Case::new("like-read-only-volume", read_only_volume),
    Case::new("like-no-host-name", no_host_name),
    Case::new("like-tmpfs-mode", tmpfs_mode),
    Case::new("like-devices-of-its-own", own_devices),
    Case::new("like-device-nodes", device_nodes),
    Case::new("like-set-id-bits", set_id_bits),
    Case::new("like-one-file-by-two-mounts", one_file),
    Case::new("like-own-users", own_users),
    Case::new("like-shared-processes", shared_processes),
    Case::new("like-the-nodes-clock", clock).on(Fixture::Pod),
    Case::new("like-refusals", refusals).bulkhead_only(),
];

fn unconfined(environment: &mut Environment) -> Outcome<String> {
    let script = "grep ^Seccomp: /proc/self/status | tr -d '\\t'; unshare -U true && echo user namespace";
    let output = environment.run_script("unconfined", script)?.success()?;
    ensure_eq!(output, "Seccomp:0\nuser namespace\n", "a container without a filter in its specification");
    Ok("no filter, and a user namespace of its own".into())
}

fn ipc_sysctls(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("sysctls");
    let script = "cd /proc/sys/kernel; cat shmmax shmmni msgmax; tr '\\t' ' ' <sem";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    spec["annotations"] =
        json!({ "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": id });
    spec["linux"]["sysctl"] = json!({
        "kernel.shmmax": "1073741824", "kernel.shmmni": "100", "kernel.msgmax": "4096", "kernel.sem": "250 32000 100 200"
    });
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure_eq!(output, "1073741824\n100\n4096\n250 32000 100 200\n", "parameters of the pod");
    Ok(output.lines().collect::<Vec<_>>().join(", "))
}

/// Creates a container that must be refused; gives the message.
fn refused(environment: &Environment, id: &str, spec: &Value) -> Outcome<String> {
    let host = environment.host()?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let created = shim.create(&stdio, CreateOptions::default());
    let Err(error) = created else { fail!("the container was created") };
    Container { bundle, shim, stdio }.release()?;
    Ok(error.message)
}

fn missing_sysctl(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("sysctl");
    let mut spec = bundle::spec(&id, bundle::shell("true"));
    spec["linux"]["sysctl"] = json!({ "net.ipv4.no_such_parameter": "1" });
    let message = refused(environment, &id, &spec)?;
    ensure!(
        message.contains("guest's kernel has no parameter") && message.contains("no_such_parameter"),
        "the error: {message}"
    );
    Ok(message)
}

fn read_only_volume(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("volume");
    let volume = environment.host()?.path().join(&id);
    let below = volume.join("below");
    fs::create_dir_all(&below).explain(|| "make the volume".into())?;
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &below, tmpfs, MsFlags::empty(), None::<&str>).explain(|| "mount below".into())?;
    let script =
        "for d in /plain /plain/below /all /all/below; do echo x 2>/dev/null >$d/f && echo $d; done; true";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    bundle::add(&mut spec["mounts"], bundle::bind(&volume, "/plain", &["rbind", "rprivate", "ro"]));
    bundle::add(&mut spec["mounts"], bundle::bind(&volume, "/all", &["rbind", "rprivate", "rro"]));
    let ended = environment.run_to_end(&id, &spec);
    umount2(&below, MntFlags::MNT_DETACH).explain(|| "unmount what is below".into())?;
    fs::remove_dir_all(&volume).explain(|| "remove the volume".into())?;
    ensure_eq!(ended?.success()?, "/plain/below\n", "where the container could write");
    Ok("read-only, but for what is mounted below it; recursively read-only: all of it".into())
}

fn no_host_name(environment: &mut Environment) -> Outcome<String> {
    let output = environment.run_script("nameless", "hostname")?.success()?;
    let node = nix::unistd::gethostname().explain(|| "the node's name".into())?;
    ensure_eq!(output.trim(), node.to_string_lossy(), "the container's host name");
    Ok(output.trim().into())
}

fn tmpfs_mode(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("tmpfs");
    let mut spec = bundle::spec(
        &id,
        bundle::shell("stat -c %a /etc /fresh; df -k /dev/shm | tail -n 1 | awk '{print $2}'"),
    );
    for destination in ["/etc", "/fresh"] {
        bundle::add(
            &mut spec["mounts"],
            json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"] }),
        );
    }
    let output = environment.run_to_end(&id, &spec)?.success()?;
    let lines: Vec<&str> = output.lines().collect();
    ensure_eq!(lines.first(), Some(&"755"), "the mode of a tmpfs over /etc");
    ensure_eq!(lines.last(), Some(&"65536"), "the size of /dev/shm");
    Ok(lines.join(", "))
}

fn own_devices(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("devices");
    let script = "echo x >/etc/passwd && [ ! -s /etc/passwd ] && [ -c /etc/passwd ] && echo null; \
                  head -c 3 /etc/group | wc -c; [ -c /dev/fuse ] && (: <>/dev/fuse) && echo fuse";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    bundle::add(&mut spec["mounts"], bundle::bind(Path::new("/dev/null"), "/etc/passwd", &["rbind", "rw"]));
    bundle::add(&mut spec["mounts"], bundle::bind(Path::new("/dev/zero"), "/etc/group", &["rbind", "ro"]));
    spec["linux"]["devices"] =
        json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666 }]);
    bundle::add(
        &mut spec["linux"]["resources"]["devices"],
        json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" }),
    );
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure_eq!(output, "null\n3\nfuse\n", "devices");
    Ok("/dev/null and /dev/zero over files, /dev/fuse".into())
}

fn device_nodes(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("nodes");
    let volume = environment.host()?.path().join(&id);
    fs::create_dir_all(&volume).explain(|| "make the volume".into())?;
    let script = "set -e; mkdir /n; cd /n; mknod null c 1 3; chmod 666 null; echo gone >null; [ -c null ]; stat -c '%F %t:%T %a' null; \
                  mknod disk b 8 0; [ -b disk ]; (: <disk) 2>/dev/null && echo opened; mv null moved; ls -l moved | cut -c1-10; \
                  mknod /v/whiteout c 0 0; stat -c %t:%T /v/whiteout; rm -r /n";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    bundle::add(&mut spec["mounts"], bundle::bind(&volume, "/v", &["rbind", "rw"]));
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure_eq!(output, "character special file 1:3 666\ncrw-rw-rw-\n0:0\n", "device nodes");
    fs::remove_dir_all(&volume).explain(|| "remove the volume".into())?;
    Ok("a null device, a disk that can't be opened, a whiteout".into())
}

fn set_id_bits(environment: &mut Environment) -> Outcome<String> {
    let script = "cd /; cp /bin/busybox s; chmod 6755 s; echo >>s; stat -c %a s; truncate -s 10 s; stat -c %a s; : >s; stat -c %a s";
    let output = environment.run_script("setid", script)?.success()?;
    ensure_eq!(output, "6755\n6755\n6755\n", "the mode after a write, a truncation and an opening");
    Ok("6755 stays".into())
}

fn one_file(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("twice");
    let volume = environment.host()?.path().join(&id);
    fs::create_dir_all(volume.join("sub")).explain(|| "make the volume".into())?;
    let script = "mkfifo /a/sub/p; (echo through >/a/sub/p &); timeout 5 cat /b/p; \
                  flock /a/sub/l sleep 2 & sleep 0.5; flock -n /b/l true || echo busy; \
                  [ $(stat -c %d:%i /a/sub/l) = $(stat -c %d:%i /b/l) ] && echo same; wait";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    bundle::add(&mut spec["mounts"], bundle::bind(&volume, "/a", &["rbind", "rw"]));
    bundle::add(&mut spec["mounts"], bundle::bind(&volume.join("sub"), "/b", &["rbind", "rw"]));
    let ended = environment.run_to_end(&id, &spec)?;
    fs::remove_dir_all(&volume).explain(|| "remove the volume".into())?;
    ensure_eq!(ended.stdout, "through\nbusy\nsame\n", "a FIFO and a lock, stderr {:?}", ended.stderr);
    Ok("a FIFO and a lock through two mounts".into())
}

fn own_users(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("users");
    let script =
        "id -u; tr -s ' ' </proc/self/uid_map; [ -d /sys/class ] && echo sysfs; touch /tmp/x 2>&1; echo $?";
    let mut spec = bundle::spec(&id, bundle::shell(script));
    let map = json!([{ "containerID": 0, "hostID": 0, "size": 65536 }]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    bundle::add(&mut spec["linux"]["namespaces"], json!({ "type": "user" }));
    let output = environment.run_to_end(&id, &spec)?.success()?;
    ensure_eq!(output, "0\n 0 0 65536\nsysfs\n0\n", "a container with users of its own");
    Ok("a user namespace, with a sysfs".into())
}

/// A pod whose containers share their processes, and one that joins another one's, as the CRI plugin makes them.
fn shared_processes(environment: &mut Environment) -> Outcome<String> {
    let sandbox = environment.id("pod");
    let annotations = |kind: &str| json!({ "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox });
    let mut spec = bundle::spec(&sandbox, bundle::process(&["sleep", "100001"]));
    spec["annotations"] = annotations("sandbox");
    let pod = environment.created(&sandbox, &spec, Streams::default())?;
    let sandbox_pid = pod.shim.start("")?;

    let member = |process: Value, pid: Option<u32>| -> Outcome<(Container, u32)> {
        let id = environment.id("member");
        let mut spec = bundle::spec(&id, process);
        spec["annotations"] = annotations("container");
        let joined = |kind: &str, pid: u32| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{}", if kind == "network" { "net" } else { kind }) });
        let own = pid.map_or(json!({ "type": "pid" }), |pid| joined("pid", pid));
        spec["linux"]["namespaces"] = json!([
            own,
            { "type": "mount" },
            joined("network", sandbox_pid),
            joined("ipc", sandbox_pid),
            joined("uts", sandbox_pid)
        ]);
        let host = environment.host()?;
        let bundle = host.bundle(&id, &spec)?;
        let shim = host.start(&bundle)?;
        let stdio = shim.stdio("init", Streams::default())?;
        shim.create(&stdio, CreateOptions::default()).explain(|| "create a container".into())?;
        let started = shim.start("").explain(|| "start a container".into())?;
        Ok((Container { bundle, shim, stdio }, started))
    };
    let end = |container: Container| -> Outcome<String> {
        container.shim.wait("", CALL_LIMIT)?;
        let output = container.stdio.stdout.to_end(CALL_LIMIT)?;
        container.shim.delete("")?;
        container.bundle.remove()?;
        Ok(output)
    };
    let (first, first_pid) = member(bundle::process(&["sleep", "100002"]), None)?;
    let (second, second_pid) = member(bundle::process(&["sleep", "100003"]), None)?;
    ensure!(
        first_pid != second_pid && first_pid != sandbox_pid,
        "process ids of the tasks: {sandbox_pid}, {first_pid}, {second_pid}"
    );
    for pid in [first_pid, second_pid] {
        ensure!(Path::new(&format!("/proc/{pid}")).exists(), "there is no process {pid}");
    }
    let look = "ps -o args | grep -o '^sleep.*' | sort";
    for (target, expected) in
        [(sandbox_pid, "sleep 100001\n"), (first_pid, "sleep 100002\n"), (second_pid, "sleep 100003\n")]
    {
        let (container, _) = member(bundle::shell(look), Some(target))?;
        ensure_eq!(end(container)?, expected, "processes seen by one that joined process {target}");
    }
    for container in [first, second] {
        container.kill()?;
        end(container)?;
    }
    pod.finish()?;
    Ok("the sandbox's processes, and those of each container".into())
}

fn refusals(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("refused");
    let mut profile = bundle::spec(&id, bundle::shell("true"));
    profile["process"]["apparmorProfile"] = "my-profile".into();
    let message = refused(environment, &id, &profile)?;
    ensure!(message.contains("AppArmor profile \"my-profile\""), "the error: {message}");
    let id = environment.id("refused");
    let mut shared = bundle::spec(&id, bundle::shell("true"));
    bundle::add(&mut shared["mounts"], bundle::bind(Path::new("/tmp"), "/data", &["rbind", "rshared"]));
    let message = refused(environment, &id, &shared)?;
    ensure!(message.contains("Bidirectional"), "the error: {message}");
    // What asks for the host's processes gets the pod's.
    let id = environment.id("host-pid");
    let mut spec = bundle::spec(&id, bundle::shell("echo $$; ps | wc -l"));
    spec["linux"]["namespaces"] =
        json!([{ "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }]);
    if environment.runtime == Runtime::Bulkhead {
        let output = environment.run_to_end(&id, &spec)?.success()?;
        ensure!(output.starts_with("1\n"), "the first process of the pod: {output:?}");
    }
    Ok(message)
}

/// The node's clock, set to another time until this is dropped.
struct OtherTime {
    before: Duration,
    since: Instant,
}

impl OtherTime {
    fn set(by: Duration) -> Outcome<Self> {
        let other = OtherTime { before: node_time(), since: Instant::now() };
        set_node_time(other.before + by)?;
        Ok(other)
    }
}

impl Drop for OtherTime {
    fn drop(&mut self) {
        let _ = set_node_time(self.before + self.since.elapsed());
    }
}

fn node_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn set_node_time(time: Duration) -> Outcome {
    let time = format!("@{}", time.as_secs());
    process::run(Command::new("date").args(["-s", &time]), b"", CALL_LIMIT)?.success("date").map(drop)
}

fn clock(environment: &mut Environment) -> Outcome<String> {
    const HOUR: Duration = Duration::from_secs(3600);
    const LIMIT: Duration = Duration::from_secs(10);
    let (pod, name) = (environment.shared()?, environment.id("clock"));
    let mut asked = 0;
    // How far off the container's clock is, once it is right.
    let mut off = || -> Outcome<u64> {
        let begin = Instant::now();
        loop {
            asked += 1;
            let text = pod.exec_script(&format!("{name}-{asked}"), "date +%s")?.success()?;
            let time: u64 = text.trim().parse().explain(|| format!("a time in {text:?}"))?;
            let off = node_time().as_secs().abs_diff(time);
            if off <= 2 {
                return Ok(off);
            }
            ensure!(begin.elapsed() < LIMIT, "the container's clock is {off} s off the node's");
        }
    };
    off()?;
    let later = OtherTime::set(HOUR)?;
    let after = off().explain(|| "an hour later".into())?;
    drop(later);
    let back = off().explain(|| "back again".into())?;
    Ok(format!("set an hour on and back: {after} s and {back} s off"))
}
