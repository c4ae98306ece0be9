//! What pods get of the node, and what happens at the limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount, umount};
use serde_json::{Value, json};

use super::{Case, Container, Environment, Runtime};
use crate::bundle;
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::process::{self, Running};
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("resources-size-follows-limits", size_follows_limits).cold(),
    Case::new("resources-files-in-memory", files_in_memory),
    Case::new("resources-full-guest", full_guest),
    Case::new("resources-update", update),
    Case::new("resources-memory-comes-back", memory_comes_back).bulkhead_only().own_kernel(),
    Case::new("cold-resources-memory-comes-back", memory_comes_back_booted).cold().own_kernel(),
    Case::new("resources-host-limits", host_limits).bulkhead_only(),
    Case::new("resources-occupied-cgroup", occupied_cgroup).bulkhead_only(),
    Case::new("resources-maxima", maxima).bulkhead_only(),
];

/// Where the host's control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A program that has this many bytes of its own at once; it tells of one whole record.
const USE_400_MB: &str = "dd if=/dev/zero of=/dev/null bs=400000000 count=1 2>&1 | tail -n 1 | cut -d' ' -f1";

fn spec_with(id: &str, script: &str, resources: Value) -> Value {
    let mut spec = bundle::spec(id, bundle::shell(script));
    for (key, value) in resources.as_object().into_iter().flatten() {
        spec["linux"]["resources"][key] = value.clone();
    }
    spec
}

/// A container that is limited to a size can use it.
fn size_follows_limits(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("sized");
    let script = format!("nproc; grep MemTotal /proc/meminfo; {USE_400_MB}");
    let limits = json!({ "memory": { "limit": 1 << 30 }, "cpu": { "quota": 150_000, "period": 100_000 } });
    let output = environment.run_to_end(&id, &spec_with(&id, &script, limits))?.success()?;
    let words: Vec<&str> = output.split_whitespace().collect();
    let [cpus, "MemTotal:", kib, "kB", used] = words[..] else { fail!("output {output:?}") };
    // No more than the node has.
    let wanted = thread::available_parallelism().map_or(1, |node| node.get().min(2)).to_string();
    ensure_eq!((cpus, used), (wanted.as_str(), "1+0"), "CPUs, and records of 400 MB");
    let kib: u64 = kib.parse().explain(|| format!("memory in {output:?}"))?;
    ensure!(kib >= 1 << 20, "{kib} KiB of memory in a pod with a limit of 1 GiB");
    Ok(format!("1 GiB and 1.5 CPUs: {cpus} vCPUs, {kib} KiB, 400 MB used by a process"))
}

/// A volume in the host's memory, as Kubernetes makes one for an `emptyDir` of the medium `Memory`.
fn files_in_memory(environment: &mut Environment) -> Outcome<String> {
    let volume = WorkDir::new("memory")?;
    mount(Some("tmpfs"), volume.path(), Some("tmpfs"), MsFlags::empty(), Some("size=600m"))
        .explain(|| "mount a tmpfs".into())?;
    let written = write_400_mb(environment, volume.path());
    let size = fs::metadata(volume.path().join("file")).map(|metadata| metadata.len());
    umount(volume.path()).explain(|| "unmount the tmpfs".into())?;
    written?;
    ensure_eq!(size.explain(|| "look at the file on the host".into())?, 400_000_000, "bytes on the host");
    Ok("400 MB written by a pod without limits".into())
}

fn write_400_mb(environment: &Environment, volume: &Path) -> Outcome<String> {
    let id = environment.id("volume");
    let mut spec =
        bundle::spec(&id, bundle::shell("dd if=/dev/zero of=/data/file bs=1000000 count=400 2>/dev/null"));
    bundle::add(&mut spec["mounts"], bundle::bind(volume, "/data", &["rbind", "rw"]));
    environment.run_to_end(&id, &spec)?.success()
}

/// Who takes more than there is is ended, and nobody else.
fn full_guest(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("full");
    // Where there is no machine around it, the limit is that of the control group.
    let limit = 180 << 20;
    let limits = match environment.runtime {
        Runtime::Bulkhead => json!({}),
        Runtime::Runc => json!({ "memory": { "limit": limit, "swap": limit } }),
    };
    let container = environment.created(&id, &spec_with(&id, "sleep 1000", limits), Streams::default())?;
    container.shim.start("")?;
    for attempt in ["first", "second"] {
        let ended = container.exec_script(attempt, "tail /dev/zero; echo $?")?;
        ensure_eq!(ended.stdout, "137\n", "the end of what took all memory");
    }
    ensure_eq!(container.exec_script("after", "echo alive")?.success()?, "alive\n", "afterwards");
    let events = environment.host()?.events.wait_for(&id, "/tasks/oom", "", CALL_LIMIT);
    container.finish()?;
    events?;
    Ok("the process was killed, containerd heard of it, the pod went on".into())
}

fn memory_comes_back(environment: &mut Environment) -> Outcome<String> {
    comes_back(environment, json!({}), 150_000_000)
}

fn memory_comes_back_booted(environment: &mut Environment) -> Outcome<String> {
    comes_back(environment, json!({ "memory": { "limit": 400 << 20 } }), 200_000_000)
}

/// Memory that a process has had is the node's again soon after its end.
fn comes_back(environment: &mut Environment, resources: Value, used: u64) -> Outcome<String> {
    const LIMIT: Duration = Duration::from_secs(10);
    const ABOVE: u64 = 20 << 20;
    let id = environment.id("memory");
    let container = environment.created(&id, &spec_with(&id, "sleep 1000", resources), Streams::default())?;
    container.shim.start("")?;
    container.exec_script("first", "true")?.success()?;
    let vmm = node::descendants(container.shim.pid()?, "bulkhead-vmm").into_iter().next();
    let pid = vmm.explain(|| "the shim has no VMM".into())?.pid;
    let before = memory_of(pid, "RssAnon")?;
    let script = format!("dd if=/dev/zero of=/dev/null bs={used} count=1 2>/dev/null");
    container.exec_script("uses", &script)?.success()?;
    let ended = Instant::now();
    let most = memory_of(pid, "VmHWM")?;
    ensure!(most >= before + used, "{most} bytes at most of {used} that were used");
    loop {
        let now = memory_of(pid, "RssAnon")?;
        let (from, to, after) = (before >> 20, now >> 20, ended.elapsed());
        if now <= before + ABOVE {
            container.finish()?;
            let after = after.as_secs_f64();
            return Ok(format!("{from} MiB before {used} bytes were used, {to} MiB {after:.1} s after"));
        }
        ensure!(after < LIMIT, "{from} MiB before {used} bytes were used, {to} MiB {after:?} after");
        thread::sleep(Duration::from_millis(100));
    }
}

/// A line of a process's status, bytes.
fn memory_of(pid: i32, line: &str) -> Outcome<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).explain(|| format!("read {path}"))?;
    let value = status.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).explain(|| format!("no {line} in {path}"))
}

fn update(environment: &mut Environment) -> Outcome<String> {
    let container =
        environment.started("updated", bundle::process(&["sleep", "1000"]), Streams::default())?;
    container.shim.update(
        &json!({ "memory": { "limit": 100 << 20 }, "cpu": { "quota": 50_000, "period": 100_000 } }),
    )?;
    let mut evidence = "within the machine: done".to_owned();
    if environment.runtime == Runtime::Bulkhead {
        for (beyond, words) in [
            (json!({ "memory": { "limit": 1 << 30 } }), ["1024 MiB", "MiB for its containers"]),
            (json!({ "cpu": { "quota": 400_000, "period": 100_000 } }), ["4 CPUs", "has 1"]),
        ] {
            let Err(error) = container.shim.update(&beyond) else { fail!("{beyond} was accepted") };
            ensure!(words.iter().all(|word| error.message.contains(word)), "the error is {error}");
            evidence = format!("{evidence}; beyond: {}", error.message);
        }
        let cpu = host_cgroup(&container).join("cpu.max");
        let limit = fs::read_to_string(&cpu).explain(|| format!("read {}", cpu.display()))?;
        ensure_eq!(limit, "50000 100000\n", "the pod's limit on the host");
    }
    container.finish()?;
    Ok(evidence)
}

fn host_cgroup(container: &Container) -> PathBuf {
    Path::new(CGROUPS).join("bulkhead-test").join(&container.bundle.id)
}

/// The pod's control group on the host, by a path as systemd writes it.
fn host_limits(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("limits");
    let limits = json!({ "cpu": { "cpus": "0", "shares": 512 }, "memory": { "limit": 64 << 20 } });
    let mut spec = spec_with(&id, "sleep 1000", limits);
    spec["linux"]["cgroupsPath"] = format!("bulkheadtest-pods.slice:bulkhead:{id}").into();
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    let outer = Path::new(CGROUPS).join("bulkheadtest.slice");
    let group = outer.join("bulkheadtest-pods.slice").join(format!("bulkhead-{id}.scope"));
    let read = |file: &str| {
        let path = group.join(file);
        fs::read_to_string(&path)
            .map(|text| text.trim().to_owned())
            .explain(|| format!("read {}", path.display()))
    };
    let found = [read("cpuset.cpus")?, read("cpu.weight")?, read("memory.max")?];
    // What systemd does to a slice none of whose own units needs the controller.
    let control = outer.join("bulkheadtest-pods.slice/cgroup.subtree_control");
    fs::write(&control, "-memory").explain(|| format!("write to {}", control.display()))?;
    ensure!(read("memory.max").is_err(), "the memory controller is still on");
    let restored =
        process::eventually("the limit of memory comes back", Duration::from_secs(15), || read("memory.max"));
    let processes: Vec<String> = read("cgroup.procs")?
        .lines()
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned())
        // KVM's own threads are in the group of the VMM.
        .filter(|name| !name.starts_with("kvm-"))
        .collect();
    container.finish()?;
    ensure_eq!(&restored?, &found[2], "the limit of memory after its controller was off");
    let [cpus, weight, memory] = &found;
    ensure_eq!((cpus.as_str(), weight.as_str()), ("0", "59"), "CPUs and weight");
    // The machine and what serving it costs; and the container's limit where its root file system is in the host's memory.
    let sizes = [384u64 << 20, 448 << 20].map(|size| size.to_string());
    ensure!(sizes.contains(memory), "{memory} bytes of memory");
    ensure_eq!(processes, ["bulkhead-vmm", "bulkhead-fs"], "processes in the control group");
    ensure!(!outer.exists(), "{} is still there", outer.display());
    Ok(format!("{} with the VMM and the file server; gone afterwards", group.display()))
}

/// A control group with somebody in it is nobody's to take, and certainly not to kill.
fn occupied_cgroup(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("occupied");
    let group = Path::new(CGROUPS).join("bulkhead-test").join(&id);
    fs::create_dir_all(&group).explain(|| format!("make {}", group.display()))?;
    let sleeper = Running::start(Command::new("sleep").arg("1000"))?;
    let pid = sleeper.pid();
    let procs = group.join("cgroup.procs");
    fs::write(&procs, pid.to_string()).explain(|| format!("write to {}", procs.display()))?;

    let message = refused(environment, &id, &spec_with(&id, "true", json!({})), None)?;
    let pid = i32::try_from(pid).explain(|| "a process id".into())?;
    let lives = node::process(pid).is_some_and(|process| process.state != 'Z');
    node::kill_hard(pid)?;
    let _ = sleeper.finish(CALL_LIMIT);
    process::eventually("the control group can be removed", Duration::from_secs(2), || {
        fs::remove_dir(&group).explain(|| format!("remove {}", group.display()))
    })?;
    ensure!(lives, "the process in the control group was killed");
    ensure!(message.contains("in use") && message.contains(&id), "the error is {message}");
    Ok(message)
}

fn maxima(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("large");
    let config = environment.host()?.path().join("maxima.toml");
    fs::write(&config, "max_memory = \"512Mi\"\nmax_vcpus = 2\n")
        .explain(|| "write a configuration".into())?;
    let mut evidence = Vec::new();
    for (limits, words) in [
        (json!({ "memory": { "limit": 1 << 30 } }), ["1024 MiB", "512 MiB"]),
        (json!({ "cpu": { "quota": 300_000, "period": 100_000 } }), ["3 CPUs", "allows 2"]),
        (json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 4 << 20 }] }), ["2MB", "4194304"]),
    ] {
        let message = refused(environment, &id, &spec_with(&id, "true", limits), Some(&config))?;
        ensure!(words.iter().all(|word| message.contains(word)), "the error is {message}");
        evidence.push(message);
    }
    Ok(evidence.join("; "))
}

/// Expects a container to be refused; gives the words.
fn refused(environment: &Environment, id: &str, spec: &Value, config: Option<&Path>) -> Outcome<String> {
    let host = environment.host()?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let Err(error) = shim.create(&stdio, CreateOptions { config, ..CreateOptions::default() }) else {
        fail!("the container was created")
    };
    Container { bundle, shim, stdio }.release()?;
    Ok(error.message)
}
