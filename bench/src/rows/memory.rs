//! What an idle pod costs in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Bench;
use crate::node::{self, Process};
use crate::pod::{self, Pod, PodError};
use crate::report::Better;
use crate::runtime::Runtime;

/// Pods that idle at the same time.
const PODS: usize = 10;
/// After the last start, for exiting helpers and lazily freed memory.
const SETTLE: Duration = Duration::from_millis(500);
const MIB: f64 = 1024.0 * 1024.0;
/// Mappings from this size on are guest memory: no guest has less, and no other mapping of the VMM is as large.
const GUEST_MEMORY: u64 = 32 << 20;
const VMM: &str = "bulkhead-vmm";

/// Measures it, one runtime after the other.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    for runtime in bench.runtimes.clone() {
        let mut pods = Vec::new();
        if let Err(error) = one(bench, &runtime, &mut pods).await {
            bench.fail("memory-per-pod", runtime.kind.name(), &error);
        }
        for pod in pods {
            if let Err(error) = pod.stop().await {
                bench.fail("memory-per-pod", runtime.kind.name(), &error);
            }
        }
        bench.progress(&format!("memory: {PODS} pods of {} done", runtime.kind.name()));
    }
}

async fn one(bench: &mut Bench<'_>, runtime: &Runtime, pods: &mut Vec<Pod>) -> Result<(), PodError> {
    let name = runtime.kind.name();
    tokio::time::sleep(SETTLE).await;
    let (used_before, containerd_before) = (node::used_memory(), containerd_memory(bench));
    let before: BTreeSet<u32> = node::processes().into_iter().map(|process| process.pid).collect();
    for _ in 0..PODS {
        let (pod, _) = bench.pods.start(runtime, &pod::idle()).await?;
        pods.push(pod);
    }
    tokio::time::sleep(SETTLE).await;
    let per_pod = |bytes: f64| bytes / MIB / PODS as f64;

    match (used_before, node::used_memory()) {
        (Some(before), Some(after)) => {
            let drop = per_pod(after as f64 - before as f64);
            bench.results.add("memory-per-pod", name, "MiB", Better::Lower, drop);
        }
        _ => bench.results.skip("memory-per-pod", name, "/proc/meminfo lacks the figures"),
    }
    let new: Vec<Process> = node::processes()
        .into_iter()
        .filter(|process| !before.contains(&process.pid) && is_program(process))
        .collect();
    let mut by_name: BTreeMap<&str, u64> = BTreeMap::new();
    let mut unshared = 0;
    for process in &new {
        unshared += node::unshared_memory(process.pid).unwrap_or_default();
        // A process that has just ended uses nothing.
        *by_name.entry(&process.name).or_default() +=
            node::proportional_set_size(process.pid).unwrap_or_default();
        if process.name == VMM
            && let Some(resident) = node::resident_without_large_mappings(process.pid, GUEST_MEMORY)
        {
            bench.results.add("vmm-memory", name, "MiB", Better::Lower, resident as f64 / MIB);
        }
    }
    bench.results.add("memory-unshared", name, "MiB", Better::Lower, per_pod(unshared as f64));
    let total: u64 = by_name.values().sum();
    bench.results.add("memory-pss", name, "MiB", Better::Lower, per_pod(total as f64));
    for (program, bytes) in by_name {
        bench.results.add(
            &format!("memory-pss/{program}"),
            name,
            "MiB",
            Better::Lower,
            per_pod(bytes as f64),
        );
    }
    if let (Some(before), Some(after)) = (containerd_before, containerd_memory(bench)) {
        let growth = per_pod(after as f64 - before as f64);
        bench.results.add("memory-containerd-growth", name, "MiB", Better::Lower, growth);
    }
    Ok(())
}

fn containerd_memory(bench: &Bench<'_>) -> Option<u64> {
    node::proportional_set_size(bench.containerd.pid()?)
}

/// Not a kernel thread.
fn is_program(process: &Process) -> bool {
    !process.command_line.is_empty()
}
