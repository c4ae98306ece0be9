//! The jails of a running pod's processes, read back from `/proc`: what `docs/security.md` says of them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc::{O_ACCMODE, O_PATH, O_RDONLY, PR_SCHED_CORE, PR_SCHED_CORE_GET, c_ulong, prctl};

use super::network::started_with;
use super::{Case, Container, Environment};
use crate::failure::{Explain, Outcome};
use crate::netns::{Namespace, Network};
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{bundle, ensure, ensure_eq, node};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("jail-as-proc-shows-it", as_proc_shows_it).bulkhead_only(),
    Case::new("jail-networks", networks).bulkhead_only(),
    Case::new("jail-core-scheduling", core_scheduling).bulkhead_only(),
    Case::new("jail-leaves-no-core-dump", no_core_dump).bulkhead_only(),
];

/// `CAP_CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `SETGID`, `SETUID`, `SETFCAP`.
const FILE_SERVER_CAPABILITIES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;

/// A process's directory in `/proc`.
struct Proc(PathBuf);

impl Proc {
    fn of(pid: i32) -> Self {
        Self(format!("/proc/{pid}").into())
    }

    fn text(&self, name: &str) -> Outcome<String> {
        let path = self.0.join(name);
        fs::read_to_string(&path).explain(|| path.display().to_string())
    }

    /// A line of a `status` file.
    fn status(&self, name: &str) -> Outcome<String> {
        let text = self.text("status")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned()).explain(|| format!("{name} in {}", self.0.display()))
    }

    fn namespace(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.0.join("ns").join(name);
        fs::read_link(&path).explain(|| path.display().to_string())
    }

    fn threads(&self) -> Outcome<Vec<Proc>> {
        let directory = fs::read_dir(self.0.join("task")).explain(|| "threads".into())?;
        Ok(directory.flatten().map(|entry| Proc(entry.path())).collect())
    }
}

fn as_proc_shows_it(environment: &mut Environment) -> Outcome<String> {
    let container = environment.started("jail", bundle::process(&["sleep", "100000"]), Streams::default())?;
    let shim = container.shim.pid()?;
    let mut evidence = Vec::new();
    for (program, user, capabilities, processes) in
        [("bulkhead-vmm", None, 0, "512"), ("bulkhead-fs", Some("0"), FILE_SERVER_CAPABILITIES, "64")]
    {
        let found = node::descendants(shim, program).into_iter().next();
        let pid = found.explain(|| format!("no {program} below the shim"))?.pid;
        let process = Proc::of(pid);
        // Locked up when all its threads run; the pod was up before.
        eventually("it is locked up", CALL_LIMIT, || {
            for thread in process.threads()? {
                ensure_eq!(thread.status("Seccomp")?, "2", "Seccomp of {}", thread.0.display());
            }
            Ok(())
        })?;
        let threads = process.threads()?;
        for thread in &threads {
            let name = thread.0.display();
            ensure_eq!(thread.status("NoNewPrivs")?, "1", "NoNewPrivs of {name}");
            for set in ["CapInh", "CapAmb"] {
                ensure_eq!(thread.status(set)?, format!("{:016x}", 0), "{set} of {name}");
            }
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                ensure_eq!(thread.status(set)?, format!("{capabilities:016x}"), "{set} of {name}");
            }
            ensure_eq!(thread.status("Groups")?, "", "supplementary groups of {name}");
            // "force mitigated", or what the host has decided for all.
            let speculation = thread.status("Speculation_Store_Bypass")?;
            ensure!(speculation != "thread vulnerable", "Speculation_Store_Bypass of {name}");
        }
        let users = process.status("Uid")?;
        let mut ids: Vec<&str> = users.split_whitespace().collect();
        ids.dedup();
        ensure_eq!(ids.len(), 1, "users of {program}: {users}");
        ensure!(user.map_or(ids[0] != "0", |user| ids[0] == user), "{program} is user {users}");
        for namespace in ["mnt", "net", "cgroup", "ipc", "uts", "pid", "user"] {
            let (own, shims) = (process.namespace(namespace)?, Proc::of(shim).namespace(namespace)?);
            ensure!(own != shims, "{program} is in the shim's {namespace} namespace");
        }
        if user.is_none() {
            ensure_eq!(
                process.text("uid_map")? + &process.text("gid_map")?,
                "",
                "ids that {program} could have"
            );
        }
        expect_no_interface(&process)?;
        for (limit, value) in [
            ("Max core file size", "1"),
            ("Max locked memory", "0"),
            ("Max msgqueue size", "0"),
            ("Max processes", processes),
        ] {
            let limits = process.text("limits")?;
            let found = limits.lines().find_map(|line| line.strip_prefix(limit)).unwrap_or_default();
            let both: Vec<&str> = found.split_whitespace().take(2).collect();
            ensure_eq!(both, [value, value], "{limit} of {program}");
        }
        let cgroup = process.text("cgroup")?;
        ensure!(
            cgroup.contains(&format!("bulkhead-test/{}", container.bundle.id)),
            "{program} is in {cgroup}"
        );
        // Nobody but root can look into it: it is not dumpable.
        let owner = fs::metadata(process.0.join("maps")).explain(|| "its maps".into())?.uid();
        ensure_eq!(owner, 0, "owner of {program}'s files in /proc");
        check_mounts(program, &process.text("mountinfo")?)?;
        if program == "bulkhead-vmm" {
            check_descriptors(&process)?;
        }
        evidence.push(format!("{program}: {} threads", threads.len()));
    }
    container.kill()?;
    container.shim.delete("")?;
    container.release()?;
    Ok(evidence.join(", "))
}

/// The core scheduling cookie of a thread, 0 if it has none; `None` where the host has no core scheduling.
fn cookie(thread: i32) -> Option<u64> {
    let mut cookie = 0u64;
    let [command, thread] = [PR_SCHED_CORE_GET, thread].map(|number| number as c_ulong);
    // SAFETY: the last argument is the address of eight aligned bytes that may be written.
    let result = unsafe { prctl(PR_SCHED_CORE, command, thread, 0 as c_ulong, &raw mut cookie) };
    (result == 0).then_some(cookie)
}

fn core_scheduling(environment: &mut Environment) -> Outcome<String> {
    let mut cookies = Vec::new();
    let mut pods = Vec::new();
    for config in ["core_scheduling = true\n", "core_scheduling = true\n", ""] {
        let id = environment.id("cores");
        let spec = bundle::spec(&id, bundle::process(&["sleep", "100000"]));
        let pod = started_with(environment, &id, &spec, config)?;
        let shim = pod.shim.pid()?;
        let mut of_pod = Vec::new();
        for program in ["bulkhead-vmm", "bulkhead-fs"] {
            let found = node::descendants(shim, program).into_iter().next();
            let pid = found.explain(|| format!("no {program} below the shim"))?.pid;
            for thread in Proc::of(pid).threads()? {
                let name = thread.0.file_name().unwrap_or_default().to_string_lossy().into_owned();
                of_pod.push(cookie(name.parse().explain(|| format!("thread {name}"))?));
            }
        }
        of_pod.dedup();
        ensure_eq!(of_pod.len(), 1, "cookies of the threads of a pod: {of_pod:?}");
        cookies.push((of_pod[0], cookie(shim)));
        pods.push(pod);
    }
    for pod in pods {
        pod.finish()?;
    }
    match cookies[..] {
        [(None, None), (None, None), (None, None)] => {
            Ok("SKIPPED: the node has no SMT, or its kernel no core scheduling".into())
        }
        [(Some(one), Some(0)), (Some(two), Some(0)), (Some(0), Some(0))]
            if one != two && one != 0 && two != 0 =>
        {
            Ok("each pod that is to have a cookie has its own, others and shims have none".into())
        }
        ref other => crate::fail!("cookies of three pods and their shims: {other:?}"),
    }
}

fn expect_no_interface(process: &Proc) -> Outcome {
    let interfaces = process.text("net/dev")?;
    ensure!(interfaces.lines().skip(2).all(|line| line.trim_start().starts_with("lo:")), "{interfaces}");
    Ok(())
}

/// The VMM is where the pod's network is looked for by its process id, and all file servers are in one empty place.
fn networks(environment: &mut Environment) -> Outcome<String> {
    let program = |container: &Container, name: &str| -> Outcome<Proc> {
        let found = node::descendants(container.shim.pid()?, name).into_iter().next();
        Ok(Proc::of(found.explain(|| format!("no {name} below the shim"))?.pid))
    };
    let nodes = Proc("/proc/self".into()).namespace("net")?;

    let id = environment.id("network");
    let mut namespace = Namespace::new(&id)?;
    namespace.add(&Network::bridge(environment.host()?.path(), 77, 1500), "eth0")?;
    let mut spec = bundle::spec(&id, bundle::process(&["sleep", "100000"]));
    spec["linux"]["namespaces"] =
        serde_json::json!([{ "type": "mount" }, { "type": "network", "path": namespace.path() }]);
    let with = environment.created(&id, &spec, Streams::default())?;
    let without = environment.started("alone", bundle::process(&["sleep", "100000"]), Streams::default())?;

    let pods = fs::read_link(namespace.path()).explain(|| "the pod's namespace".into())?;
    ensure_eq!(program(&with, "bulkhead-vmm")?.namespace("net")?, pods, "the VMM's network namespace");
    let alone = program(&without, "bulkhead-vmm")?;
    expect_no_interface(&alone)?;
    let (first, second) = (program(&with, "bulkhead-fs")?, program(&without, "bulkhead-fs")?);
    expect_no_interface(&first)?;
    let empty = first.namespace("net")?;
    ensure_eq!(second.namespace("net")?, empty, "network namespace of another pod's file server");
    for other in [nodes, pods, alone.namespace("net")?] {
        ensure!(other != empty, "file servers are in {}", other.display());
    }
    for container in [with, without] {
        container.kill()?;
        container.shim.delete("")?;
        container.release()?;
    }
    Ok(format!("file servers are in {}", empty.display()))
}

/// One line of mountinfo is one mount; the sixth field has its options.
fn check_mounts(program: &str, mountinfo: &str) -> Outcome {
    for line in mountinfo.lines() {
        let options = line.split(' ').nth(5).unwrap_or_default();
        for option in ["nosuid", "nodev"] {
            ensure!(options.split(',').any(|found| found == option), "{program}: not {option}: {line}");
        }
        let kind = line.split(" - ").nth(1).unwrap_or_default();
        ensure!(
            !["proc ", "sysfs ", "devtmpfs ", "cgroup2 "].iter().any(|bad| kind.starts_with(bad)),
            "{program}: {line}"
        );
    }
    let top = mountinfo.lines().next().unwrap_or_default();
    ensure!(
        top.split(' ').nth(5).unwrap_or_default().starts_with("ro"),
        "{program}'s root is writable: {top}"
    );
    if program == "bulkhead-vmm" {
        ensure_eq!(mountinfo.lines().count(), 1, "mounts of the VMM");
    }
    Ok(())
}

/// What the VMM holds: nothing to look up a path from, and no file of the node's that it could write to.
fn check_descriptors(process: &Proc) -> Outcome {
    let directory = process.0.join("fd");
    let entries = fs::read_dir(&directory).explain(|| directory.display().to_string())?;
    let mut count = 0;
    for entry in entries.flatten() {
        let number = entry.file_name().to_string_lossy().into_owned();
        let link = fs::read_link(entry.path()).explain(|| format!("descriptor {number}"))?;
        let name = link.display().to_string();
        let info = process.text(&format!("fdinfo/{number}"))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default();
        let flags = i32::from_str_radix(flags.trim(), 8).explain(|| format!("flags in {info:?}"))?;
        ensure_eq!(flags & O_PATH, 0, "O_PATH of {name}");
        let status = fs::metadata(entry.path()).explain(|| name.clone())?;
        ensure!(!status.is_dir(), "the VMM holds the directory {name}");
        let memory = name.starts_with("/memfd:");
        ensure!(
            !status.is_file() || memory || flags & O_ACCMODE == O_RDONLY,
            "the VMM may write to the file {name}"
        );
        count += 1;
    }
    ensure!(count > 3, "the VMM has {count} descriptors");
    Ok(())
}

/// A core dump is piped to whatever the host's `core_pattern` names, whatever the limit of the file's size. Restores both settings.
struct Piped {
    pattern: String,
    dumpable: String,
}

const PATTERN: &str = "/proc/sys/kernel/core_pattern";
const DUMPABLE: &str = "/proc/sys/fs/suid_dumpable";

impl Piped {
    fn to(program: &Path) -> Outcome<Self> {
        let read = |path: &str| fs::read_to_string(path).explain(|| path.into());
        let before = Self { pattern: read(PATTERN)?, dumpable: read(DUMPABLE)? };
        fs::write(PATTERN, format!("|{} %e", program.display())).explain(|| PATTERN.into())?;
        // As systemd-coredump has it.
        fs::write(DUMPABLE, "2").explain(|| DUMPABLE.into())?;
        Ok(before)
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        let _ = fs::write(DUMPABLE, &self.dumpable);
        let _ = fs::write(PATTERN, &self.pattern);
    }
}

/// Overwrites a process's code with breakpoints: it dies of a fault of its own. (It is the first of its PID namespace, so that
/// signals without a handler don't reach it.)
fn spoil(pid: i32) -> Outcome {
    use std::os::unix::fs::FileExt;
    let maps = Proc::of(pid).text("maps")?;
    let memory = format!("/proc/{pid}/mem");
    let file = fs::OpenOptions::new().write(true).open(&memory).explain(|| memory.clone())?;
    for line in maps.lines().filter(|line| line.contains(" r-xp ") && line.contains('/')) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let (from, to) = range.explain(|| format!("an address in {line:?}"))?;
        let number = |text| u64::from_str_radix(text, 16).explain(|| format!("an address in {line:?}"));
        let (from, to) = (number(from)?, number(to)?);
        let breakpoints = vec![0xcc; usize::try_from(to - from).unwrap_or(0)];
        // The process may be gone before the last byte.
        let _ = file.write_all_at(&breakpoints, from);
    }
    Ok(())
}

fn no_core_dump(environment: &mut Environment) -> Outcome<String> {
    use std::os::unix::fs::PermissionsExt;
    let directory = environment.host()?.path().join(environment.id("core"));
    fs::create_dir_all(&directory).explain(|| "a directory for dumps".into())?;
    let program = directory.join("p");
    fs::write(&program, format!("#!/bin/sh\ncat >/dev/null; echo \"$1\" >>{}/dumped\n", directory.display()))
        .explain(|| "write the program for dumps".into())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .explain(|| "make it executable".into())?;
    let _piped = Piped::to(&program)?;
    let dumped = || fs::read_to_string(directory.join("dumped")).unwrap_or_default();

    for victim in ["bulkhead-fs", "bulkhead-vmm"] {
        // The file server acts as another user on the way.
        let script = "mkdir -m 777 /d; setuidgid 1000:1000 touch /d/f 2>/dev/null || su -s /bin/sh nobody -c 'touch /d/f' || chown 1000 /d; \
                      sleep 100000 & sleep 0.3; echo up; wait";
        let container = environment.started("core", bundle::shell(script), Streams::default())?;
        container.stdio.stdout.until("up", CALL_LIMIT)?;
        let found = node::descendants(container.shim.pid()?, victim).into_iter().next();
        let pid = found.explain(|| format!("no {victim}"))?.pid;
        spoil(pid)?;
        // Makes both of them run. Its end is that of the pod.
        let _ = container.exec("poke", &bundle::shell("echo x >/d/x; sync"), Streams::default());
        ensure_eq!(container.shim.wait("", CALL_LIMIT)?.exit_status, 137, "exit status");
        container.shim.delete("")?;
        container.release()?;
    }
    // Something else that dies so is dumped: what was to be shown can be seen.
    let _ = std::process::Command::new("sh").args(["-c", "kill -ABRT $$"]).status();
    eventually("a shell's dump arrives", CALL_LIMIT, || {
        ensure!(dumped().contains("sh"), "{:?}", dumped());
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(100));
    ensure!(!dumped().contains("bulkhead"), "dumped: {:?}", dumped());
    fs::remove_dir_all(&directory).explain(|| "remove the dumps".into())?;
    Ok("a shell's arrives, the file server's and the VMM's do not".into())
}
