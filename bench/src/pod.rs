//! One pod: started through containerd's API up to the first byte of its workload's output, stopped and removed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::mkfifo;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{OpenOptions, Receiver};

use crate::containerd::client::Client;
use crate::containerd::image;
use crate::containerd::spec::{self, Container};
use crate::proto;
use crate::runtime::Runtime;
use crate::workload::files;
use bulkhead_cri::grpc::GrpcError;

/// The snapshotter that pods' root file systems come from, unless a row is about another one.
pub const SNAPSHOTTER: &str = "overlayfs";
/// How long a workload may be silent.
const OUTPUT_LIMIT: Duration = Duration::from_secs(120);
/// A workload's whole output; it prints a few lines.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// What can go wrong with a pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    /// containerd refused a step.
    #[error("{step}: {source}")]
    Containerd {
        /// Which step.
        step: &'static str,
        /// What it said.
        source: GrpcError,
    },
    /// The FIFO for the workload's output can't be made or read.
    #[error("cannot use the output FIFO {path}: {source}")]
    Fifo {
        /// Where it is.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The specification can't be encoded.
    #[error("cannot encode the specification: {0}")]
    Spec(#[from] serde_json::Error),
    /// No output in time.
    #[error("the workload printed nothing within {} s", OUTPUT_LIMIT.as_secs())]
    Silent,
    /// The output ended before its end mark, or is too long.
    #[error("the workload's output ended too early; it was: {0:?}")]
    Output(String),
    /// The workload failed.
    #[error("the workload exited with {status}: {output:?}")]
    Failed {
        /// Its exit status.
        status: u32,
        /// What it had printed.
        output: String,
    },
}

/// What pods are made from and with.
#[derive(Clone)]
pub struct Pods {
    client: Client,
    /// Where the FIFOs are.
    directory: PathBuf,
    snapshotter: &'static str,
    /// The committed snapshot of the image.
    snapshot: String,
}

/// Makes pods' names unique.
static NEXT_POD: AtomicU64 = AtomicU64::new(1);

/// How long the steps of a start took.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StartTimes {
    /// When the first call was made, by the monotonic clock.
    pub from: Duration,
    /// From the first call to the first byte of output.
    pub total: Duration,
    /// The name and duration of each step, in order; together the total.
    pub steps: [(&'static str, Duration); 4],
}

/// A pod whose workload has begun to print.
pub(crate) struct Pod {
    pods: Pods,
    id: String,
    fifo: PathBuf,
    stdout: Receiver,
    output: Vec<u8>,
}

impl Pods {
    /// Pods out of the committed `snapshot`, with their FIFOs in `directory`.
    pub fn new(client: Client, directory: PathBuf, snapshot: String) -> Self {
        Self { client, directory, snapshotter: SNAPSHOTTER, snapshot }
    }

    /// The same out of a committed snapshot of another snapshotter.
    #[must_use]
    pub(crate) fn on(&self, snapshotter: &'static str, snapshot: String) -> Self {
        Self { snapshotter, snapshot, ..self.clone() }
    }

    /// Starts a pod and waits for the first byte of its output.
    ///
    /// A pod that does not get so far is removed again.
    ///
    /// # Errors
    /// The step that failed.
    pub(crate) async fn start(
        &self,
        runtime: &Runtime,
        container: &Container,
    ) -> Result<(Pod, StartTimes), PodError> {
        let id = format!("{}-{}", runtime.kind.name(), NEXT_POD.fetch_add(1, Ordering::Relaxed));
        let spec = Any {
            type_url: SPEC_TYPE.to_owned(),
            value: serde_json::to_vec(&spec::spec(&id, container))?,
            ..Default::default()
        };
        let fifo = self.directory.join(format!("{id}.out"));
        let stdout = open_fifo(&fifo).map_err(|source| PodError::Fifo { path: fifo.clone(), source })?;
        let mut pod = Pod { pods: self.clone(), id, fifo, stdout, output: Vec::new() };
        match pod.run(runtime, spec).await {
            Ok(times) => Ok((pod, times)),
            Err(error) => {
                // The first error is what matters; the rest is tidying up.
                let _ = pod.stop().await;
                Err(error)
            }
        }
    }

    /// Runs the workload with `args` to its end and gives its output without the end mark.
    ///
    /// # Errors
    /// The step that failed, or a workload that did.
    pub(crate) async fn run(&self, runtime: &Runtime, container: &Container) -> Result<String, PodError> {
        let (mut pod, _) = self.start(runtime, container).await?;
        let output = pod.output_to_end().await;
        let status = pod.pods.client.wait_task(&pod.id).await;
        let stopped = pod.remove().await;
        let output = output?;
        match status.map_err(at("wait"))? {
            0 => stopped.map(|()| output),
            status => Err(PodError::Failed { status, output }),
        }
    }
}

/// The container that prints one byte and then idles.
pub(crate) fn idle() -> Container {
    Container { args: vec![files::PROGRAM.to_owned(), "idle".to_owned()], device: None }
}

fn at(step: &'static str) -> impl Fn(GrpcError) -> PodError {
    move |source| PodError::Containerd { step, source }
}

/// The time of the monotonic clock, which all processes of the node share.
fn monotonic() -> Duration {
    // This clock always exists; a zero would only make phases disappear from the report.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

fn open_fifo(path: &Path) -> io::Result<Receiver> {
    mkfifo(path, Mode::from_bits_truncate(0o600))?;
    OpenOptions::new().open_receiver(path)
}

impl Pod {
    async fn run(&mut self, runtime: &Runtime, spec: Any) -> Result<StartTimes, PodError> {
        let client = &self.pods.client;
        let (from, started) = (monotonic(), Instant::now());
        let mounts = client
            .prepare_snapshot(self.pods.snapshotter, &self.id, &self.pods.snapshot)
            .await
            .map_err(at("prepare the snapshot"))?;
        let container = proto::Container {
            id: self.id.clone(),
            image: image::NAME.to_owned(),
            runtime: MessageField::some(runtime.record()),
            spec: MessageField::some(spec),
            snapshotter: self.pods.snapshotter.to_owned(),
            snapshot_key: self.id.clone(),
            ..Default::default()
        };
        client.create_container(container).await.map_err(at("create the container"))?;
        let recorded = Instant::now();
        client.create_task(&self.id, mounts, &self.fifo).await.map_err(at("create the task"))?;
        let created = Instant::now();
        // The first byte can come before the answer: both are waited for at once, and the later one ends its step.
        let first_byte = async {
            let mut byte = [0];
            let read = tokio::time::timeout(OUTPUT_LIMIT, self.stdout.read_exact(&mut byte)).await;
            read.map(|result| result.map(|_| (byte[0], Instant::now())))
        };
        let start = async { client.start_task(&self.id).await.map(|()| Instant::now()) };
        let (byte, answered) = tokio::join!(first_byte, start);
        let answered = answered.map_err(at("start the task"))?;
        let (byte, printed) = byte
            .map_err(|_| PodError::Silent)?
            .map_err(|source| PodError::Fifo { path: self.fifo.clone(), source })?;
        self.output.push(byte);
        let answered = answered.min(printed);
        Ok(StartTimes {
            from,
            total: printed - started,
            steps: [
                ("records", recorded - started),
                ("create", created - recorded),
                ("start", answered - created),
                ("output", printed - answered),
            ],
        })
    }

    /// The pod's id in containerd.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    async fn output_to_end(&mut self) -> Result<String, PodError> {
        loop {
            if let Some(text) = self.output.strip_suffix(files::END_MARK) {
                return Ok(String::from_utf8_lossy(text).into_owned());
            }
            let read = tokio::time::timeout(OUTPUT_LIMIT, self.stdout.read_buf(&mut self.output)).await;
            let count = read
                .map_err(|_| PodError::Silent)?
                .map_err(|source| PodError::Fifo { path: self.fifo.clone(), source })?;
            if count == 0 || self.output.len() > MAX_OUTPUT_BYTES {
                return Err(PodError::Output(String::from_utf8_lossy(&self.output).into_owned()));
            }
        }
    }

    /// Kills the workload and removes the pod; gives the time from the first call to the last answer.
    ///
    /// # Errors
    /// The step that failed; the later ones are tried all the same.
    pub(crate) async fn stop(self) -> Result<Duration, PodError> {
        let started = Instant::now();
        let killed = async {
            let client = &self.pods.client;
            client.kill_task(&self.id).await.map_err(at("kill the task"))?;
            client.wait_task(&self.id).await.map_err(at("wait for the task"))
        }
        .await;
        let removed = self.remove().await;
        killed?;
        removed?;
        Ok(started.elapsed())
    }

    /// Removes a pod whose workload has ended.
    async fn remove(self) -> Result<(), PodError> {
        let client = &self.pods.client;
        let task = client.delete_task(&self.id).await.map_err(at("delete the task"));
        let container = client.delete_container(&self.id).await.map_err(at("delete the container"));
        let snapshot =
            client.remove_snapshot(self.pods.snapshotter, &self.id).await.map_err(at("remove the snapshot"));
        let fifo = std::fs::remove_file(&self.fifo)
            .map_err(|source| PodError::Fifo { path: self.fifo.clone(), source });
        task.and(container).and(snapshot).and(fifo)
    }
}
