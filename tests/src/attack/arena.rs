//! Where attempts are made: pods of both runtimes, a neighbour that has to survive, and a node that is looked at.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::facts::{Facts, Watch};
use super::report::Result as Verdict;
use super::spec::{all_capabilities, specification};
use super::stage::{Said, Stage, nonce};
use super::{Attempt, Profile, Program};
use crate::bundle::{self, Bundle};
use crate::cases::{Container, Runtime, status};
use crate::cleanup::WorkDir;
use crate::failure::{Explain, Failure, Outcome};
use crate::layout::Layout;
use crate::leaks::Snapshot;
use crate::shim::{CALL_LIMIT, CreateOptions, ShimHost};
use crate::stdio::{Stdio, Streams};
use crate::{ensure, ensure_eq, node};

/// How many descriptors and how much memory an attempt may cost a process of ours on the host, beyond what it had before.
const DESCRIPTORS: usize = 64;
const MEMORY: u64 = 32 << 20;

/// Where the templates are that pods start from.
const TEMPLATES: &str = "/var/lib/bulkhead/templates";

const MODPROBE: &str = "/proc/sys/kernel/modprobe";

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
    /// The node after the last attempt, unless that has to be looked at anew.
    last: Option<Facts>,
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
        let programs = layout.bin("");
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
            watch: Watch { module_log, outside: vec![outside, TEMPLATES.into(), programs] },
            secrets: vec![secret],
            modprobe,
            counter: 0,
            last: None,
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
            absent: None,
            listener: None,
            server: None,
            fifo: None,
            victim: None,
        };
        let leaks = Snapshot::take(&[]);
        let id = format!("{}-{}", if runtime == Runtime::Runc { "runc" } else { "bulkhead" }, self.counter);
        let mut spec = None;
        if attempt.alone {
            let mut made = specification(&id, json!({}), profile);
            if let Some(setup) = attempt.setup {
                setup(&mut stage, &mut made)?;
            }
            if let Some(reason) = stage.absent.take() {
                return Ok(Verdict {
                    runtime,
                    profile,
                    breaches: Vec::new(),
                    said: String::new(),
                    absent: Some(reason),
                });
            }
            spec = Some(made);
        } else {
            self.shared(runtime, profile)?;
        }
        // What a setup does to the node is not the attempt's doing.
        let last = self.last.take().filter(|_| attempt.setup.is_none());
        let before = last.unwrap_or_else(|| Facts::take(&self.watch));
        let (said, mut breaches) = match spec {
            Some(spec) => self.run_alone(attempt, &stage, profile, &id, spec)?,
            None => self.run_shared(attempt, runtime, profile, &id)?,
        };
        let after = Facts::take(&self.watch);
        breaches.extend(before.breaches(&after));
        let told = stage.secrets.iter().any(|secret| said.stdout.contains(secret.as_str()));
        if told {
            breaches.push("read what it was not given".into());
        }
        if let Some(victim) = &mut stage.victim
            && !matches!(victim.try_wait(), Ok(None))
        {
            breaches.push("a process of the host was killed".into());
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
        if breaches.is_empty() && attempt.setup.is_none() {
            self.last = Some(after);
        }
        drop(stage);
        if attempt.alone
            && let Err(Failure(left)) = leaks.expect_nothing_left()
        {
            breaches.push(left);
        }
        Ok(Verdict { runtime, profile, breaches, said: said.short(), absent: None })
    }

    /// The program as the container's own process.
    fn run_alone(
        &mut self,
        attempt: &Attempt,
        stage: &Stage,
        profile: Profile,
        id: &str,
        mut spec: Value,
    ) -> Outcome<(Said, Vec<String>)> {
        let runtime = stage.runtime;
        let bundle = self.bundle(runtime, id, &spec)?;
        spec["process"] = self.process(attempt, profile, &bundle);
        if let (Some(victim), Some(environment)) = (&stage.victim, spec["process"]["env"].as_array_mut()) {
            environment.push(format!("VICTIM={}", victim.id()).into());
        }
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
        said.log = shim.log.so_far();
        shim.delete("")?;
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
    pub(crate) fn clear(&mut self) -> Outcome {
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
        // What a guest has in its caches the file server holds open, within a limit of its own.
        let more = if name == "bulkhead-fs" { file_server_limit(*pid) } else { DESCRIPTORS };
        if after.descriptors > before.descriptors + more {
            found.push(format!("{name} has {} descriptors, had {}", after.descriptors, before.descriptors));
        }
        if after.memory > before.memory + MEMORY {
            let mib = |bytes| bytes >> 20;
            found.push(format!("{name} has {} MiB, had {}", mib(after.memory), mib(before.memory)));
        }
    }
    found
}

/// The file server's limit of descriptors; none is as good as zero.
fn file_server_limit(pid: i32) -> usize {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap_or_default();
    let limit = line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let all =
        fs::read_to_string("/proc/sys/fs/file-max").ok().and_then(|text| text.trim().parse::<usize>().ok());
    // A pod may not have the node's whole table.
    if all.is_some_and(|all| limit <= all / 4 * 3) { limit } else { 0 }
}
