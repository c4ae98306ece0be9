//! Many pods at once: how many a second, how long the slowest takes, and whether any fails.

use std::time::Instant;

use super::Bench;
use crate::pod::{self, Pod};
use crate::report::Better;
use crate::runtime::Runtime;

/// Measures a burst of `count` pods of each runtime, one runtime after the other.
pub(crate) async fn measure(bench: &mut Bench<'_>, count: usize) {
    for runtime in bench.runtimes.clone() {
        one(bench, &runtime, count).await;
        bench.progress(&format!("burst of {count}: {} done", runtime.kind.name()));
    }
}

async fn one(bench: &mut Bench<'_>, runtime: &Runtime, count: usize) {
    let name = runtime.kind.name();
    let started = Instant::now();
    let starting: Vec<_> = (0..count)
        .map(|_| {
            let (pods, runtime) = (bench.pods.clone(), runtime.clone());
            tokio::spawn(async move {
                let result = pods.start(&runtime, &pod::idle()).await;
                (result, Instant::now())
            })
        })
        .collect();
    let mut running: Vec<Pod> = Vec::new();
    let mut last = started;
    let mut failures = 0;
    let mut reported = false;
    for task in starting {
        match task.await {
            Ok((Ok((pod, times)), ended)) => {
                running.push(pod);
                last = last.max(ended);
                bench.results.add_time(&format!("burst-{count}-start"), name, times.total);
            }
            Ok((Err(error), _)) => {
                failures += 1;
                // One of many like it.
                if !std::mem::replace(&mut reported, true) {
                    bench.progress(&format!("burst of {count}: a pod failed under {name}: {error}"));
                }
            }
            Err(error) => {
                failures += 1;
                bench.progress(&format!("burst of {count}: a task failed under {name}: {error}"));
            }
        }
    }
    let rate = running.len() as f64 / (last - started).as_secs_f64();
    if running.is_empty() {
        bench.results.skip(&format!("burst-{count}-rate"), name, "no pod started");
    } else {
        bench.results.add(&format!("burst-{count}-rate"), name, "pods/s", Better::Higher, rate);
    }
    let mut unstopped = 0;
    let stopping: Vec<_> = running.into_iter().map(|pod| tokio::spawn(pod.stop())).collect();
    for task in stopping {
        if !matches!(task.await, Ok(Ok(_))) {
            unstopped += 1;
        }
    }
    let failed = (failures + unstopped) as f64;
    bench.results.add(&format!("burst-{count}-failures"), name, "pods", Better::Lower, failed);
}
