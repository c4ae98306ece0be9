//! Starting a pod, and stopping and removing it: the runtimes take turns, so that whatever changes on the node meanwhile
//! meets all of them.

use std::time::Duration;

use super::Bench;
use crate::pod::{self, PodError};
use crate::runtime::{Kind, Runtime};
use crate::timeline::{self, Window};

/// Pods of each runtime before the first one that counts: caches fill, containerd grows its heap.
const WARM_UP: usize = 1;

/// After a pod's end the kernel still frees what it had: no runtime is to pay for the one before it in line.
const SETTLE: Duration = Duration::from_millis(200);

/// A start that counted.
struct Start {
    kind: Kind,
    window: Window,
    /// The steps as the caller saw them.
    steps: [(&'static str, Duration); 4],
}

/// Measures it.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    let mut runtimes = bench.runtimes.clone();
    let mut starts = Vec::new();
    for round in 0..WARM_UP + bench.rounds {
        // Every round begins with another runtime.
        let first = round % runtimes.len().max(1);
        runtimes.rotate_left(first);
        let mut failed = Vec::new();
        for runtime in &runtimes {
            match one(bench, runtime, round >= WARM_UP).await {
                Ok(start) => starts.extend(start),
                Err(error) => {
                    bench.fail(row_name(runtime.kind), runtime.kind.name(), &error);
                    failed.push(runtime.kind);
                }
            }
        }
        runtimes.retain(|runtime| !failed.contains(&runtime.kind));
        bench.progress(&format!("start: round {} of {}", round + 1, WARM_UP + bench.rounds));
    }
    add_phases(bench, &starts);
}

fn row_name(kind: Kind) -> &'static str {
    if kind == Kind::BulkheadTemplate { "pod-start-template" } else { "pod-start-cold" }
}

/// Starts and stops one pod.
async fn one(bench: &mut Bench<'_>, runtime: &Runtime, counts: bool) -> Result<Option<Start>, PodError> {
    let (pod, times) = bench.pods.start(runtime, &pod::idle()).await?;
    let id = pod.id().to_owned();
    let stopped = pod.stop().await?;
    tokio::time::sleep(SETTLE).await;
    if !counts {
        return Ok(None);
    }
    bench.results.add_time(row_name(runtime.kind), runtime.kind.name(), times.total);
    if !runtime.kind.is_bulkhead() {
        // They have no templates: it is the same pod that ours is compared with.
        bench.results.add_time(row_name(Kind::BulkheadTemplate), runtime.kind.name(), times.total);
    }
    bench.results.add_time("pod-stop", runtime.kind.name(), stopped);
    let window = Window { id, from: times.from, to: times.from + times.total };
    Ok(Some(Start { kind: runtime.kind, window, steps: times.steps }))
}

/// Where the time went: by our own parts' account where there is one, else by the caller's.
fn add_phases(bench: &mut Bench<'_>, starts: &[Start]) {
    let log = std::fs::read_to_string(bench.containerd.log_path()).unwrap_or_default();
    for Start { kind, window, steps } in starts {
        let own = if kind.is_bulkhead() { timeline::phases(&log, window) } else { None };
        let request = if *kind == Kind::BulkheadTemplate { "restore-to-agent" } else { "boot-to-agent" };
        for (row, since) in [(request, "machine"), ("vmm-start-to-agent", "prepare")] {
            if let Some(duration) = own.as_ref().and_then(|phases| timeline::until_agent(phases, since)) {
                bench.results.add_time(row, kind.name(), duration);
            }
        }
        let phases = own.unwrap_or_else(|| {
            steps.iter().map(|(name, duration)| ((*name).to_owned(), *duration)).collect()
        });
        for (name, duration) in phases {
            bench.results.add_time(&format!("{}/{name}", row_name(*kind)), kind.name(), duration);
        }
    }
}
