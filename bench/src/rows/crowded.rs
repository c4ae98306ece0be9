//! Starting a pod on a node where there is a great deal already: mounts, or pods.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Bench;
use crate::node;
use crate::pod::{self, Pod, PodError};
use crate::runtime::{Kind, Runtime};

/// Pods of each runtime before the first one that counts.
const WARM_UP: usize = 1;

/// What a node with some two hundred pods has.
const MOUNTS: usize = 2000;
const MOUNTS_ROW: &str = "pod-start-2000-mounts";

/// More than a node of the kubelet's defaults may have (110).
const PODS: usize = 200;
const PODS_ROW: &str = "pod-start-200-pods";
/// MiB that a pod takes at most, as `memory-per-pod` has it, with room.
const fn pod_memory(kind: Kind) -> u64 {
    match kind {
        Kind::Bulkhead => 64,
        Kind::Runsc => 30,
        Kind::Runc | Kind::Crun | Kind::BulkheadTemplate => 14,
    }
}

/// Measures starts on a node where many file systems are mounted.
pub(crate) async fn measure_with_mounts(bench: &mut Bench<'_>) {
    let directory = bench.directory.join("mounts");
    if let Err(error) = mount_many(&directory) {
        bench.progress(&format!("SKIPPED mounts: {}: {error}", directory.display()));
        bench.results.skip(MOUNTS_ROW, "all", error.to_string());
    } else {
        let mut runtimes = bench.runtimes.clone();
        for round in 0..WARM_UP + bench.rounds {
            runtimes.rotate_left(1);
            for runtime in &runtimes {
                match one(bench, runtime).await {
                    Ok(took) if round >= WARM_UP => {
                        bench.results.add_time(MOUNTS_ROW, runtime.kind.name(), took);
                    }
                    Ok(_) => {}
                    Err(error) => bench.fail(MOUNTS_ROW, runtime.kind.name(), &error),
                }
            }
            bench.progress(&format!("mounts: round {} of {}", round + 1, WARM_UP + bench.rounds));
        }
    }
    for number in (0..MOUNTS).rev() {
        let _ = umount2(&directory.join(number.to_string()), MntFlags::MNT_DETACH);
    }
}

fn mount_many(directory: &Path) -> io::Result<()> {
    std::fs::create_dir(directory)?;
    for number in 0..MOUNTS {
        let place = directory.join(number.to_string());
        std::fs::create_dir(&place)?;
        mount(Some("bench"), &place, Some("tmpfs"), MsFlags::empty(), Some("size=4k"))?;
    }
    Ok(())
}

/// Measures starts beside many idle pods of the same runtime, one runtime after the other.
pub(crate) async fn measure_with_pods(bench: &mut Bench<'_>) {
    for runtime in bench.runtimes.clone() {
        let name = runtime.kind.name();
        let needed = PODS as u64 * pod_memory(runtime.kind);
        if node::total_memory().saturating_sub(node::used_memory().unwrap_or_default()) < needed << 20 {
            let why = format!("the node has no {needed} MiB of memory left for {PODS} pods");
            bench.progress(&format!("SKIPPED {PODS_ROW} under {name}: {why}"));
            bench.results.skip(PODS_ROW, name, why);
            continue;
        }
        let mut idle = Vec::new();
        if let Err(error) = among_pods(bench, &runtime, &mut idle).await {
            bench.fail(PODS_ROW, name, &error);
        }
        for pod in idle {
            if let Err(error) = pod.stop().await {
                bench.fail(PODS_ROW, name, &error);
            }
        }
        bench.progress(&format!("pods: beside {PODS} pods of {name} done"));
    }
}

async fn among_pods(bench: &mut Bench<'_>, runtime: &Runtime, idle: &mut Vec<Pod>) -> Result<(), PodError> {
    for _ in 0..PODS {
        idle.push(bench.pods.start(runtime, &pod::idle()).await?.0);
    }
    for _ in 0..bench.rounds {
        let took = one(bench, runtime).await?;
        bench.results.add_time(PODS_ROW, runtime.kind.name(), took);
    }
    Ok(())
}

async fn one(bench: &Bench<'_>, runtime: &Runtime) -> Result<Duration, PodError> {
    let (pod, times) = bench.pods.start(runtime, &pod::idle()).await?;
    pod.stop().await?;
    Ok(times.total)
}
