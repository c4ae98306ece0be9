//! Starting a pod, and stopping and removing it: the runtimes take turns, so that whatever changes on the node meanwhile
//! meets all of them.

use super::Bench;
use crate::pod;
use crate::runtime::{Kind, Runtime};

/// Pods of each runtime before the first one that counts: caches fill, containerd grows its heap.
const WARM_UP: usize = 1;

/// Measures it.
pub async fn measure(bench: &mut Bench<'_>) {
    let mut runtimes = bench.runtimes.clone();
    for round in 0..WARM_UP + bench.rounds {
        // Every round begins with another runtime.
        let first = round % runtimes.len().max(1);
        runtimes.rotate_left(first);
        let mut failed = Vec::new();
        for runtime in &runtimes {
            if let Err(error) = one(bench, runtime, round >= WARM_UP).await {
                bench.fail(row_name(runtime.kind), runtime.kind.name(), &error);
                failed.push(runtime.kind);
            }
        }
        runtimes.retain(|runtime| !failed.contains(&runtime.kind));
        bench.progress(&format!("start: round {} of {}", round + 1, WARM_UP + bench.rounds));
    }
}

fn row_name(kind: Kind) -> &'static str {
    if kind == Kind::BulkheadTemplate { "pod-start-template" } else { "pod-start-cold" }
}

async fn one(bench: &mut Bench<'_>, runtime: &Runtime, counts: bool) -> Result<(), pod::PodError> {
    let (pod, times) = bench.pods.start(runtime, &pod::idle()).await?;
    let stopped = pod.stop().await?;
    if counts {
        let (row, name) = (row_name(runtime.kind), runtime.kind.name());
        bench.results.add_time(row, name, times.total);
        for (step, duration) in times.steps {
            bench.results.add_time(&format!("{row}/{step}"), name, duration);
        }
        bench.results.add_time("pod-stop", name, stopped);
    }
    Ok(())
}
