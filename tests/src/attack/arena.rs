//! Where attempts are made: pods of both runtimes, a neighbour that has to survive, and a node that is looked at.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use super::facts::{Facts, Watch};
use super::report::Result as Verdict;
use super::{Attempt, Profile, Program};
use crate::bundle::{self, Bundle};
use crate::cases::{Container, Runtime, status};
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Failure, Outcome};
use crate::layout::Layout;
use crate::leaks::Snapshot;
use crate::process;
use crate::shim::{CALL_LIMIT, CreateOptions, ShimHost};
use crate::stdio::{Stdio, Streams};
use crate::{ensure, ensure_eq, node};

/// How many descriptors and how much memory an attempt may cost a process of ours on the host, beyond what it had before.
const DESCRIPTORS: usize = 4096;
const MEMORY: u64 = 32 << 20;

/// How much of what a program says is shown.
const SAID: usize = 300;

const MODPROBE: &str = "/proc/sys/kernel/modprobe";

/// What an attempt's host side works with.
pub struct Stage {
    runtime: Runtime,
    /// Where the parts are.
    pub layout: Layout,
    /// A directory of the host that no pod gets. `secret` in it holds what no pod may read.
    pub outside: PathBuf,
    /// Where shared directories are made.
    shares: PathBuf,
    /// Mounts of the host that go with the stage, in order.
    mounts: Vec<PathBuf>,
    /// Texts that no program may print.
    secrets: Vec<String>,
}

impl Stage {
    /// Whether the container is one of ours.
    pub fn is_bulkhead(&self) -> bool {
        self.runtime == Runtime::Bulkhead
    }

    /// An empty directory on the host, to be given to the container.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn share(&mut self, name: &str) -> Outcome<PathBuf> {
        let path = self.shares.join(name);
        fs::create_dir_all(&path).explain(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// Mounts something on the host, until the attempt is over.
    ///
    /// # Errors
    /// What `mount` says.
    pub fn mount(&mut self, arguments: &[&str], target: &Path) -> Outcome {
        fs::create_dir_all(target).explain(|| format!("make {}", target.display()))?;
        let mut command = Command::new("mount");
        process::run(command.args(arguments).arg(target), b"", CALL_LIMIT)?.success("mount")?;
        self.mounts.push(target.to_owned());
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for mount in self.mounts.iter().rev() {
            let _ = process::run(Command::new("umount").arg("-l").arg(mount), b"", CALL_LIMIT);
        }
        let _ = fs::remove_dir_all(&self.shares);
    }
}

/// Gives a container a volume.
pub fn volume(spec: &mut Value, source: &Path, destination: &str, options: &[&str]) {
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(bundle::bind(source, destination, options));
    }
}

/// What a program said, and how it ended.
#[derive(Debug, Clone, Default)]
pub struct Said {
    /// Its output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
    /// How it ended, for a person.
    pub end: String,
    /// The container was refused.
    pub refused: bool,
}

impl Said {
    fn short(&self) -> String {
        let text = format!("{} {} [{}]", self.stdout.trim(), self.stderr.trim(), self.end);
        text.replace('\n', " ").chars().take(SAID).collect()
    }
}

/// One pod, and the processes that serve it on the host.
struct Pod {
    container: Container,
    /// Shim, VMM and file server; of runc's the shim.
    servers: Vec<i32>,
}

/// Descriptors and own memory of a process.
#[derive(Debug, Clone, Copy)]
struct Cost {
    descriptors: usize,
    memory: u64,
}

fn cost(pid: i32) -> Option<Cost> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some(Cost { descriptors, memory: node::resident_but_largest_mapping(pid).ok()? })
}

/// Pods, the neighbour and the node's facts.
pub struct Arena {
    layout: Layout,
    work: WorkDir,
    hosts: BTreeMap<&'static str, ShimHost>,
    pods: BTreeMap<(&'static str, Profile), Pod>,
    neighbour: Option<Pod>,
    watch: Watch,
    secrets: Vec<String>,
    modprobe: String,
    counter: u32,
}

impl Arena {
    /// Prepares the node: what the kernel asks modprobe for is written down, and a neighbour runs.
    ///
    /// # Errors
    /// When the node can't be prepared.
    pub fn new(layout: Layout) -> Outcome<Self> {
        let work = WorkDir::new("attack")?;
        let outside = work.path().join("outside");
        fs::create_dir(&outside).explain(|| format!("make {}", outside.display()))?;
        let secret = format!("secret-of-the-host-{}", nonce());
        fs::write(outside.join("secret"), &secret).explain(|| "write the secret".into())?;
        let module_log = work.path().join("modprobe.log");
        let logger = work.path().join("modprobe");
        let script =
            format!("#!/bin/sh\necho \"$@\" >>{}\nexec /sbin/modprobe \"$@\"\n", module_log.display());
        fs::write(&logger, script).explain(|| "write the logger".into())?;
        fs::set_permissions(&logger, fs::Permissions::from_mode(0o755))
            .explain(|| "make it executable".into())?;
        let modprobe = fs::read_to_string(MODPROBE).explain(|| format!("read {MODPROBE}"))?;
        fs::write(MODPROBE, logger.display().to_string()).explain(|| format!("write {MODPROBE}"))?;
        let hosts = [Runtime::Runc, Runtime::Bulkhead]
            .into_iter()
            .map(|runtime| Ok((runtime.name(), ShimHost::new(&layout, runtime.program())?)))
            .collect::<Outcome<_>>()?;
        let mut arena = Self {
            layout,
            work,
            hosts,
            pods: BTreeMap::new(),
            neighbour: None,
            watch: Watch { module_log, outside: vec![outside] },
            secrets: vec![secret],
            modprobe,
            counter: 0,
        };
        arena.start_neighbour()?;
        Ok(arena)
    }

    /// A pod of somebody else: its own files are outside too.
    fn start_neighbour(&mut self) -> Outcome {
        let secret = format!("secret-of-the-neighbour-{}", nonce());
        let script = format!("echo {secret} >/secret; echo up; exec sleep 100000");
        let spec = bundle::spec("neighbour", bundle::shell(&script));
        let pod = self.start(Runtime::Bulkhead, "neighbour", &spec)??;
        pod.container.stdio.stdout.until("up", CALL_LIMIT)?;
        self.secrets.push(secret);
        self.watch.outside.push(pod.container.bundle.upper.clone());
        self.neighbour = Some(pod);
        Ok(())
    }

    fn expect_neighbour(&self) -> Outcome {
        let neighbour = self.neighbour.as_ref().explain(|| "there is no neighbour".into())?;
        for pid in &neighbour.servers {
            ensure!(node::process(*pid).is_some_and(|process| process.state != 'Z'), "process {pid} is gone");
        }
        let shim = &neighbour.container.shim;
        ensure_eq!(shim.state("")?.status.value(), status::RUNNING, "its state");
        Ok(())
    }

    /// Makes an attempt with a runtime and a profile.
    ///
    /// # Errors
    /// When the harness itself can't go on.
    pub fn attempt(&mut self, attempt: &Attempt, runtime: Runtime, profile: Profile) -> Outcome<Verdict> {
        self.counter += 1;
        let mut stage = Stage {
            runtime,
            layout: self.layout.clone(),
            outside: self.work.path().join("outside"),
            shares: self.work.path().join(format!("shares-{}", self.counter)),
            mounts: Vec::new(),
            secrets: self.secrets.clone(),
        };
        let leaks = Snapshot::take(&[]);
        let id = format!("{}-{}", if runtime == Runtime::Runc { "runc" } else { "bulkhead" }, self.counter);
        let mut spec = None;
        if attempt.alone {
            let mut made = specification(&id, json!({}), profile);
            if let Some(setup) = attempt.setup {
                setup(&mut stage, &mut made)?;
            }
            spec = Some(made);
        } else {
            self.shared(runtime, profile)?;
        }
        let before = Facts::take(&self.watch);
        let (said, mut breaches) = match spec {
            Some(spec) => self.run_alone(attempt, runtime, profile, &id, spec)?,
            None => self.run_shared(attempt, runtime, profile, &id)?,
        };
        let after = Facts::take(&self.watch);
        breaches.extend(before.breaches(&after));
        let told = stage.secrets.iter().any(|secret| said.stdout.contains(secret.as_str()));
        if told {
            breaches.push("read what it was not given".into());
        }
        if let Some(judge) = attempt.judge {
            breaches.extend(judge(&stage, &said)?);
        }
        if !breaches.is_empty() {
            before.restore(&after);
        }
        if let Err(Failure(reason)) = self.expect_neighbour() {
            breaches.push(format!("the neighbour: {reason}"));
        }
        drop(stage);
        if attempt.alone
            && let Err(Failure(left)) = leaks.expect_nothing_left()
        {
            breaches.push(left);
        }
        Ok(Verdict { runtime, profile, breaches, said: said.short() })
    }

    /// The program as the container's own process.
    fn run_alone(
        &mut self,
        attempt: &Attempt,
        runtime: Runtime,
        profile: Profile,
        id: &str,
        mut spec: Value,
    ) -> Outcome<(Said, Vec<String>)> {
        let bundle = self.bundle(runtime, id, &spec)?;
        spec["process"] = self.process(attempt, profile, &bundle);
        fs::write(bundle.path.join("config.json"), spec.to_string())
            .explain(|| "write config.json".into())?;
        let pod = match self.create(runtime, bundle)? {
            Ok(pod) => pod,
            Err(message) => {
                return Ok((Said { end: message, refused: true, ..Said::default() }, Vec::new()));
            }
        };
        let limit = Duration::from_secs(attempt.limit);
        let mut said = Said::default();
        let before: Vec<_> = pod.servers.iter().map(|pid| (*pid, cost(*pid))).collect();
        let shim = &pod.container.shim;
        let mut breaches = Vec::new();
        match shim.start("") {
            Err(error) => said.end = error.message,
            Ok(_) => {
                said.end = match shim.wait("", limit) {
                    Ok(exit) => format!("exit {}", exit.exit_status),
                    Err(_) => "still ran and was killed".into(),
                };
                breaches.extend(grown(&before));
            }
        }
        if shim.state("")?.status.value() == status::RUNNING {
            shim.kill("", 9, true)?;
            shim.wait("", Duration::from_secs(15))?;
        }
        // Names why a machine ended, if it has.
        if let Err(error) = shim.kill("", 9, false)
            && runtime == Runtime::Bulkhead
        {
            said.end = format!("{}; {}", said.end, error.message);
        }
        read(&pod.container.stdio, &mut said);
        pod.container.shim.delete("")?;
        pod.container.release()?;
        Ok((said, breaches))
    }

    /// The program as one more process of a container that runs.
    fn run_shared(
        &mut self,
        attempt: &Attempt,
        runtime: Runtime,
        profile: Profile,
        id: &str,
    ) -> Outcome<(Said, Vec<String>)> {
        let key = (runtime.name(), profile);
        let pod = self.pods.remove(&key).explain(|| "no pod runs".into())?;
        let before: Vec<_> = pod.servers.iter().map(|pid| (*pid, cost(*pid))).collect();
        let process = self.process(attempt, profile, &pod.container.bundle);
        let stdio = pod.container.exec(id, &process, Streams::default())?;
        let shim = &pod.container.shim;
        let end = match shim.wait(id, Duration::from_secs(attempt.limit)) {
            Ok(exit) => format!("exit {}", exit.exit_status),
            Err(_) => {
                let _ = shim.kill(id, 9, false);
                let _ = shim.wait(id, Duration::from_secs(15));
                "still ran and was killed".into()
            }
        };
        let mut said = Said { end, ..Said::default() };
        read(&stdio, &mut said);
        let mut breaches = grown(&before);
        let _ = shim.delete(id);
        if shim.state("")?.status.value() == status::RUNNING {
            self.pods.insert(key, pod);
            return Ok((said, breaches));
        }
        match shim.kill("", 9, false) {
            Err(error) if !error.message.is_empty() => said.end = format!("{}; {}", said.end, error.message),
            _ => breaches.push("the pod ended without a reason".into()),
        }
        pod.container.finish()?;
        Ok((said, breaches))
    }

    /// Starts the pod that attempts without needs share, unless it runs.
    fn shared(&mut self, runtime: Runtime, profile: Profile) -> Outcome {
        if self.pods.contains_key(&(runtime.name(), profile)) {
            return Ok(());
        }
        let id = format!("{}-{}-{}", runtime.program(), profile.name(), self.counter);
        let spec = specification(&id, bundle::process(&["sleep", "100000"]), profile);
        let pod = self.start(runtime, &id, &spec)??;
        self.pods.insert((runtime.name(), profile), pod);
        Ok(())
    }

    fn process(&self, attempt: &Attempt, profile: Profile, bundle: &Bundle) -> Value {
        let mut process = match attempt.program {
            Program::Attack(arguments) => bundle::process(&[&["/bin/attack"], arguments].concat()),
            Program::Shell(script) => bundle::shell(script),
        };
        if profile == Profile::Privileged {
            process["capabilities"] = all_capabilities();
            process["noNewPrivileges"] = false.into();
        }
        let neighbour = self.neighbour.as_ref();
        let (files, pid) = neighbour.map_or((String::new(), 0), |pod| {
            let vmm = pod.servers.get(1).copied().unwrap_or_default();
            (pod.container.bundle.upper.display().to_string(), vmm)
        });
        process["env"] = json!([
            "PATH=/bin",
            format!("OUTSIDE={}", self.work.path().join("outside").display()),
            format!("UPPER={}", bundle.upper.display()),
            format!("NEIGHBOUR={files}"),
            format!("NEIGHBOUR_PID={pid}"),
            format!("NODE={}", std::process::id()),
        ]);
        process
    }

    fn host(&self, runtime: Runtime) -> Outcome<&ShimHost> {
        self.hosts.get(runtime.name()).explain(|| format!("no host for {}", runtime.name()))
    }

    /// A bundle over the busybox image with the attack programs.
    fn bundle(&self, runtime: Runtime, id: &str, spec: &Value) -> Outcome<Bundle> {
        let lower =
            format!("{}:{}", self.layout.rootfs("attack").display(), self.layout.rootfs("busybox").display());
        Bundle::new(self.host(runtime)?.path(), id, Path::new(&lower), spec)
    }

    fn start(&self, runtime: Runtime, id: &str, spec: &Value) -> Outcome<Outcome<Pod>> {
        let pod = match self.create(runtime, self.bundle(runtime, id, spec)?)? {
            Ok(pod) => pod,
            Err(message) => return Ok(Err(Failure(format!("create {id}: {message}")))),
        };
        pod.container.shim.start("")?;
        Ok(Ok(pod))
    }

    /// Creates a container; the inner error is the runtime's refusal.
    fn create(&self, runtime: Runtime, bundle: Bundle) -> Outcome<std::result::Result<Pod, String>> {
        let shim = self.host(runtime)?.start(&bundle)?;
        let stdio = shim.stdio("init", Streams::default())?;
        let created = shim.create(&stdio, CreateOptions::default());
        let pid = shim.pid()?;
        let container = Container { bundle, shim, stdio };
        if let Err(error) = created {
            container.release()?;
            return Ok(Err(error.message));
        }
        let mut servers = vec![pid];
        if runtime == Runtime::Bulkhead {
            for program in ["bulkhead-vmm", "bulkhead-fs"] {
                let found = node::descendants(pid, program).into_iter().next();
                servers.push(found.explain(|| format!("no {program} below the shim"))?.pid);
            }
        }
        Ok(Ok(Pod { container, servers }))
    }

    /// Ends the pods that attempts share.
    ///
    /// # Errors
    /// When one does not go, or something is left of it.
    pub fn clear(&mut self) -> Outcome {
        for (_, pod) in std::mem::take(&mut self.pods) {
            pod.container.finish()?;
        }
        Ok(())
    }

    /// Ends every pod.
    ///
    /// # Errors
    /// When one does not go, or the neighbour's files are not as they were.
    pub fn finish(mut self) -> Outcome {
        self.clear()?;
        if let Some(neighbour) = self.neighbour.take() {
            let secret = neighbour.container.exec_script("look", "cat /secret")?.stdout;
            ensure!(
                self.secrets.iter().any(|known| *known == secret.trim()),
                "the neighbour's file has {secret:?}"
            );
            neighbour.container.finish()?;
        }
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let _ = fs::write(MODPROBE, &self.modprobe);
    }
}

fn read(stdio: &Stdio, said: &mut Said) {
    said.stdout = stdio.stdout.to_end(CALL_LIMIT).unwrap_or_default();
    said.stderr = stdio.stderr.to_end(CALL_LIMIT).unwrap_or_default();
}

/// Which of the processes on the host have grown beyond bounds.
fn grown(before: &[(i32, Option<Cost>)]) -> Vec<String> {
    let mut found = Vec::new();
    for (pid, before) in before {
        let (Some(before), Some(after)) = (before, cost(*pid)) else { continue };
        let name = node::process(*pid).map_or_else(String::new, |process| process.name);
        if after.descriptors > before.descriptors + DESCRIPTORS {
            found.push(format!("{name} has {} descriptors, had {}", after.descriptors, before.descriptors));
        }
        if after.memory > before.memory + MEMORY {
            let mib = |bytes| bytes >> 20;
            found.push(format!("{name} has {} MiB, had {}", mib(after.memory), mib(before.memory)));
        }
    }
    found
}

fn all_capabilities() -> Value {
    let names = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE \
                 NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN \
                 SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE \
                 MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE";
    let all: Vec<String> = names.split_whitespace().map(|name| format!("CAP_{name}")).collect();
    json!({ "bounding": all, "effective": all, "permitted": all, "inheritable": all })
}

/// What containerd writes for a container, an ordinary or a privileged one.
fn specification(id: &str, process: Value, profile: Profile) -> Value {
    let mut process = process;
    let mut spec = bundle::spec(id, Value::Null);
    if profile == Profile::Privileged {
        if process["capabilities"].is_object() {
            process["capabilities"] = all_capabilities();
        }
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["devices"] = host_devices();
        spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "ro");
            }
        }
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                                "options": ["nosuid", "noexec", "nodev", "relatime", "rw"] }));
        }
    }
    spec["process"] = process;
    spec
}

/// All device nodes of the host, as a privileged container gets them.
fn host_devices() -> Value {
    let mut found = Vec::new();
    for path in node::tree(Path::new("/dev")) {
        let Ok(status) = fs::symlink_metadata(&path) else { continue };
        let kind = status.file_type();
        if !kind.is_char_device() && !kind.is_block_device() {
            continue;
        }
        found.push(json!({
            "path": path, "type": if kind.is_block_device() { "b" } else { "c" },
            "major": major(status.rdev()), "minor": minor(status.rdev()),
            "fileMode": status.mode() & 0o777, "uid": status.uid(), "gid": status.gid(),
        }));
    }
    found.into()
}

/// A number that nobody guesses.
fn nonce() -> String {
    fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default().trim().to_owned()
}
