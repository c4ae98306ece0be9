//! The cases of the end-to-end suite, a module per theme, and what they run in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::WaitResponse;
use serde_json::Value;

use crate::attack::arena::Arena;
use crate::bundle::{self, Bundle};
use crate::containerd::PrivateContainerd;
use crate::cri::{Handler, Known, Node, Pod};
use crate::docker::Docker;
use crate::ensure;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::node;
use crate::process::{self, eventually};
use crate::shim::{CALL_LIMIT, CreateOptions, Shim, ShimHost};
use crate::stdio::{Stdio, Streams};

pub(crate) use case::Fixture;
pub use case::{Case, Runtime};

pub(crate) mod alike;
pub(crate) mod attack;
pub(crate) mod bad_input;
mod case;
pub(crate) mod changes;
pub(crate) mod chaos;
pub(crate) mod control;
pub(crate) mod cri;
pub(crate) mod ctr;
pub(crate) mod death;
pub(crate) mod disks;
pub(crate) mod docker;
pub(crate) mod exec;
pub(crate) mod hooks;
pub(crate) mod hostile;
pub(crate) mod io;
pub(crate) mod jail;
pub(crate) mod kernel;
pub(crate) mod layers;
pub(crate) mod lifecycle;
pub(crate) mod likeness;
pub(crate) mod network;
pub(crate) mod oci;
pub(crate) mod operate;
pub(crate) mod ports;
pub(crate) mod resources;
pub(crate) mod rootfs;
pub(crate) mod sandbox;
pub(crate) mod software;
pub(crate) mod template;

/// The status of a task as containerd numbers it.
pub(crate) mod status {
    /// Created, not started.
    pub(crate) const CREATED: i32 = 1;
    /// Running.
    pub(crate) const RUNNING: i32 = 2;
    /// Ended.
    pub(crate) const STOPPED: i32 = 3;
    /// Frozen.
    pub(crate) const PAUSED: i32 = 4;
}

/// The store that pods use without a configuration.
const DEFAULT_STORE: &str = "/var/lib/bulkhead/templates";

/// The configuration of pods that boot, in the shim host's directory.
const COLD_CONFIG: &str = "cold.toml";

/// The same for pods whose containers' changes are on a disk.
const DISK_CONFIG: &str = "disk.toml";

/// How long making the template of the default size may take.
const TEMPLATE_LIMIT: Duration = Duration::from_secs(60);

/// Every case.
pub fn all() -> Vec<Case> {
    [
        lifecycle::CASES,
        exec::CASES,
        io::CASES,
        oci::CASES,
        resources::CASES,
        operate::CASES,
        ports::CASES,
        hooks::CASES,
        rootfs::CASES,
        likeness::CASES,
        software::CASES,
        alike::CASES,
        kernel::CASES,
        disks::CASES,
        layers::CASES,
        changes::CASES,
        network::CASES,
        control::CASES,
        ctr::CASES,
        docker::CASES,
        bad_input::CASES,
        death::CASES,
        sandbox::CASES,
        hostile::CASES,
        attack::CASES,
        jail::CASES,
        chaos::CASES,
        template::CASES,
        cri::CASES,
    ]
    .concat()
}

/// What cases run in; fixtures are started when first needed.
pub struct Environment {
    /// Where the parts are.
    pub layout: Layout,
    /// The runtime under test.
    pub runtime: Runtime,
    shared: Option<Container>,
    containerd: Option<PrivateContainerd>,
    docker: Option<Docker>,
    host: Option<ShimHost>,
    /// The template of the default size.
    template: Option<PathBuf>,
    /// Whether pods boot.
    cold: bool,
    /// Whether containers' changes are on a disk.
    changes_on_disk: bool,
    arena: Option<Arena>,
    node: Option<Node>,
    pods: BTreeMap<Handler, Known>,
    /// The handler under test.
    handler: Handler,
    counter: AtomicU32,
}

impl Environment {
    /// An environment without any fixture yet.
    pub fn new(layout: Layout, runtime: Runtime) -> Self {
        Self {
            layout,
            runtime,
            shared: None,
            containerd: None,
            docker: None,
            host: None,
            template: None,
            cold: false,
            changes_on_disk: false,
            arena: None,
            node: None,
            pods: BTreeMap::new(),
            handler: Handler::Bulkhead,
            counter: AtomicU32::new(0),
        }
    }

    /// Why a case can't run here, if so.
    pub(crate) fn skip_reason(&self, case: &Case) -> Option<&'static str> {
        if case.bulkhead_only && self.runtime != Runtime::Bulkhead {
            return Some("about our runtime only");
        }
        if case.image.is_some_and(|name| !self.layout.rootfs(name).is_dir()) {
            return Some("the test image that it runs in is not here");
        }
        if case.own_kernel && self.runtime == Runtime::Bulkhead && !self.layout.has_own_kernel() {
            return Some(
                "SKIPPED LOUDLY: the guest kernel is the ready-made one; make kernel builds Bulkhead's own",
            );
        }
        (case.fixture == Fixture::Docker && !Docker::is_there(&self.layout))
            .then_some("there is no Docker here")
    }

    /// Makes the template that pods of the default size start from, unless it is there; other runtimes have none.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn prepare_template(&mut self) -> Outcome {
        if self.template.is_some() || self.runtime != Runtime::Bulkhead {
            return Ok(());
        }
        let started = Instant::now();
        let output = process::run(
            Command::new(self.layout.bin("bulkhead")).args(["template", "build"]),
            b"",
            TEMPLATE_LIMIT,
        )?;
        let said = output.success("bulkhead template build")?.stdout;
        println!(
            "prep template of the default size ({:.3} s): {}",
            started.elapsed().as_secs_f64(),
            said.trim_end()
        );
        self.template = Some(Path::new(DEFAULT_STORE).join(said.split(' ').next().unwrap_or_default()));
        Ok(())
    }

    /// Starts what a case needs unless it runs; returns the directories in which the case must leave nothing.
    ///
    /// # Errors
    /// When it can't be had.
    pub fn prepare(&mut self, case: &Case) -> Outcome<Vec<PathBuf>> {
        let fixture = case.fixture;
        self.prepare_template()?;
        self.cold = false;
        self.changes_on_disk = false;
        if self.host.is_none() {
            let host = ShimHost::new(&self.layout, self.runtime.program())?;
            for (name, text) in
                [(COLD_CONFIG, "templates = \"off\"\n"), (DISK_CONFIG, "root_changes = \"disk\"\n")]
            {
                let file = host.path().join(name);
                fs::write(&file, text).explain(|| format!("write {}", file.display()))?;
            }
            self.host = Some(host);
        }
        if fixture == Fixture::Pod && self.shared.is_none() {
            let container =
                self.started("shared", bundle::process(&["sleep", "100000"]), Streams::default())?;
            self.shared = Some(container);
        }
        if fixture == Fixture::Containerd && self.containerd.is_none() {
            let containerd = PrivateContainerd::start(&self.layout)?;
            containerd.import("busybox")?;
            self.containerd = Some(containerd);
        }
        if fixture == Fixture::Attack && self.arena.is_none() {
            self.arena = Some(Arena::new(self.layout.clone())?);
        }
        if fixture == Fixture::Docker && self.docker.is_none() {
            self.docker = Some(Docker::start(&self.layout)?);
        }
        self.handler = match self.runtime {
            Runtime::Runc => Handler::Runc,
            Runtime::Bulkhead if case.streamed => Handler::BulkheadStreaming,
            Runtime::Bulkhead if case.sandboxed => Handler::BulkheadSandbox,
            Runtime::Bulkhead => Handler::Bulkhead,
        };
        if matches!(fixture, Fixture::Cri | Fixture::CriPods) {
            self.prepare_node(fixture == Fixture::CriPods)?;
            return Ok(self.node()?.watched());
        }
        if fixture == Fixture::Docker {
            return Ok(vec![self.docker()?.containerd().path().join("state")]);
        }
        // Not before: the shared container is for all.
        self.cold = case.cold;
        self.changes_on_disk = case.changes_on_disk;
        let bundles = self.host()?.path().join("bundles");
        let state = self.containerd.as_ref().map(|containerd| containerd.path().join("state"));
        // Processes of the shared container have their FIFOs in its bundle.
        Ok([Some(bundles), state].into_iter().flatten().filter(|_| fixture != Fixture::Pod).collect())
    }

    fn prepare_node(&mut self, pods: bool) -> Outcome {
        if self.node.is_none() {
            self.node = Some(Node::start(&self.layout)?);
        }
        for handler in [Handler::Runc, self.handler].into_iter().filter(|_| pods) {
            if !self.pods.contains_key(&handler) {
                let pod = Pod::run(self.node()?, handler, "shared", |_| {})?;
                let known = pod.known;
                self.pods.insert(handler, known);
            }
        }
        Ok(())
    }

    /// Takes every fixture down.
    pub fn reset(&mut self) {
        if let Some(arena) = self.arena.take() {
            let _ = arena.finish();
        }
        for (_, known) in std::mem::take(&mut self.pods) {
            if let Some(node) = &self.node {
                let _ = Pod { node, known }.finish();
            }
        }
        self.node.take();
        if let Some(shared) = self.shared.take() {
            let _ = shared.finish();
        }
        self.docker.take();
        self.containerd.take();
        self.host.take();
    }

    /// The template of the default size.
    ///
    /// # Errors
    /// When the runtime has none.
    pub(crate) fn template(&self) -> Outcome<&Path> {
        self.template.as_deref().explain(|| "no template was made".into())
    }

    /// The configuration file for pods of the case, if it is not the default one. runc has none.
    ///
    /// # Errors
    /// When there is no shim host.
    pub(crate) fn config(&self) -> Outcome<Option<PathBuf>> {
        let file = match (self.runtime, self.cold, self.changes_on_disk) {
            (Runtime::Bulkhead, true, _) => COLD_CONFIG,
            (Runtime::Bulkhead, _, true) => DISK_CONFIG,
            _ => return Ok(None),
        };
        Ok(Some(self.host()?.path().join(file)))
    }

    /// The shim host.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn host(&self) -> Outcome<&ShimHost> {
        self.host.as_ref().explain(|| "no shim host was started".into())
    }

    /// The shared container.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn shared(&self) -> Outcome<&Container> {
        self.shared.as_ref().explain(|| "no shared container was started".into())
    }

    /// Where attempts to get out are made.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn arena(&mut self) -> Outcome<&mut Arena> {
        self.arena.as_mut().explain(|| "no arena was prepared".into())
    }

    /// The node for pods through the CRI.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn node(&self) -> Outcome<&Node> {
        self.node.as_ref().explain(|| "no node was started".into())
    }

    /// The same, to restart its containerd.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn node_mut(&mut self) -> Outcome<&mut Node> {
        self.node.as_mut().explain(|| "no node was started".into())
    }

    /// The handler under test.
    pub(crate) fn handler(&self) -> Handler {
        self.handler
    }

    /// The shared pod of a handler.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn shared_pod(&self, handler: Handler) -> Outcome<Pod<'_>> {
        let known = self.pods.get(&handler).explain(|| "no shared pod was started".into())?;
        Ok(Pod { node: self.node()?, known: known.clone() })
    }

    /// containerd.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn containerd(&mut self) -> Outcome<&mut PrivateContainerd> {
        self.containerd.as_mut().explain(|| "no containerd was started".into())
    }

    /// Docker.
    ///
    /// # Errors
    /// When the case did not ask for it.
    pub(crate) fn docker(&self) -> Outcome<&Docker> {
        self.docker.as_ref().explain(|| "no Docker was started".into())
    }

    /// An id that no other container has.
    pub(crate) fn id(&self, name: &str) -> String {
        format!("{name}-{}", self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// Logs of the fixtures, for a failure.
    pub(crate) fn logs(&self) -> String {
        let containerd = self.containerd.as_ref().map(PrivateContainerd::log).unwrap_or_default();
        let docker = self.docker.as_ref();
        let docker =
            docker.map(|docker| docker.containerd().log() + &docker.log_tail(10)).unwrap_or_default();
        containerd + &docker + &self.node.as_ref().map(|node| node.containerd().log()).unwrap_or_default()
    }

    /// Creates and starts a container with a process.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn started(&self, name: &str, process: Value, streams: Streams) -> Outcome<Container> {
        let id = self.id(name);
        let container = self.created(&id, &bundle::spec(&id, process), streams)?;
        container.shim.start("")?;
        Ok(container)
    }

    /// Creates a container with a specification.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn created(&self, id: &str, spec: &Value, streams: Streams) -> Outcome<Container> {
        self.created_from(self.host()?.bundle(id, spec)?, streams)
    }

    fn created_from(&self, bundle: Bundle, streams: Streams) -> Outcome<Container> {
        let shim = self.host()?.start(&bundle)?;
        let stdio = shim.stdio("init", streams)?;
        let config = self.config()?;
        shim.create(&stdio, CreateOptions { config: config.as_deref(), ..CreateOptions::default() })?;
        if self.runtime == Runtime::Bulkhead {
            shim.expect_started(if self.cold { "booted" } else { "restored" })?;
        }
        Ok(Container { bundle, shim, stdio })
    }

    /// Runs a container to its end and releases it.
    ///
    /// # Errors
    /// What the shim refuses, and an end later than [`CALL_LIMIT`].
    pub(crate) fn run_to_end(&self, id: &str, spec: &Value) -> Outcome<Ended> {
        self.run_bundle(self.host()?.bundle(id, spec)?, CALL_LIMIT)
    }

    /// Runs the container of a bundle to its end and releases it.
    ///
    /// # Errors
    /// What the shim refuses, and an end later than `limit`.
    pub(crate) fn run_bundle(&self, bundle: Bundle, limit: Duration) -> Outcome<Ended> {
        let container = self.created_from(bundle, Streams::default())?;
        container.shim.start("")?;
        let exit = container.shim.wait("", limit)?;
        let (stdout, stderr) = (container.stdio.stdout.to_end(limit)?, container.stdio.stderr.to_end(limit)?);
        container.finish()?;
        Ok(Ended { exit_status: exit.exit_status, stdout, stderr })
    }

    /// Runs a shell script in a container of its own with the default specification.
    ///
    /// # Errors
    /// As [`run_to_end`](Self::run_to_end).
    pub(crate) fn run_script(&self, name: &str, script: &str) -> Outcome<Ended> {
        let id = self.id(name);
        self.run_to_end(&id, &bundle::spec(&id, bundle::shell(script)))
    }
}

/// A process that came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Exit code, or 128 plus the signal.
    pub exit_status: u32,
    /// Everything that it wrote to its standard output.
    pub stdout: String,
    /// Everything that it wrote to its standard error.
    pub stderr: String,
}

impl Ended {
    /// The output, if the exit code is 0.
    ///
    /// # Errors
    /// Any other exit code.
    pub(crate) fn success(self) -> Outcome<String> {
        ensure!(
            self.exit_status == 0,
            "exit status {}, stdout {:?}, stderr {:?}",
            self.exit_status,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

/// A container that a shim of its own runs.
pub(crate) struct Container {
    /// Its bundle.
    pub bundle: Bundle,
    /// Its shim.
    pub shim: Shim,
    /// Its streams.
    pub stdio: Stdio,
}

impl Container {
    /// Adds and starts an exec.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn exec(&self, name: &str, process: &Value, streams: Streams) -> Outcome<Stdio> {
        let stdio = self.shim.stdio(name, streams)?;
        self.shim.exec(name, process, &stdio)?;
        self.shim.start(name)?;
        Ok(stdio)
    }

    /// Runs a shell script in the container to its end and releases the exec.
    ///
    /// # Errors
    /// What the shim refuses, and an end later than [`CALL_LIMIT`].
    pub(crate) fn exec_script(&self, name: &str, script: &str) -> Outcome<Ended> {
        let stdio = self.exec(name, &bundle::shell(script), Streams::default())?;
        let exit = self.shim.wait(name, CALL_LIMIT)?;
        let (stdout, stderr) = (stdio.stdout.to_end(CALL_LIMIT)?, stdio.stderr.to_end(CALL_LIMIT)?);
        self.shim.delete(name)?;
        Ok(Ended { exit_status: exit.exit_status, stdout, stderr })
    }

    /// Kills the container's process and waits for its end.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn kill(&self) -> Outcome<WaitResponse> {
        self.shim.kill("", 9, false)?;
        Ok(self.shim.wait("", CALL_LIMIT)?)
    }

    /// Deletes the container, killing it first if need be, and waits for the shim's end, as containerd does.
    ///
    /// # Errors
    /// When any of that does not work.
    pub(crate) fn finish(self) -> Outcome {
        if self.shim.state("")?.status.value() != status::STOPPED {
            let _ = self.shim.kill("", 9, true);
            if self.shim.state("")?.status.value() == status::RUNNING {
                self.shim.wait("", CALL_LIMIT)?;
            }
        }
        self.shim.delete("")?;
        self.release()
    }

    /// Ends the shim after the delete, and removes the bundle.
    ///
    /// # Errors
    /// When the shim stays, or something of the bundle does.
    pub(crate) fn release(self) -> Outcome {
        let pid = self.shim.pid()?;
        self.shim.shutdown()?;
        eventually("the shim ends after shutdown", Duration::from_secs(5), || {
            ensure!(
                node::process(pid).is_none_or(|process| process.state == 'Z'),
                "process {pid} is still there"
            );
            Ok(())
        })?;
        self.bundle.remove()
    }
}
