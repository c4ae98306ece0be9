//! Pods through the CRI: from the kubelet's first call to the first byte of output, an exec beside, and the way out. The
//! runtimes take turns.

use super::Bench;
use crate::cri::{CriError, Node};
use crate::runtime::Runtime;

/// Pods of each runtime before the first one that counts.
const WARM_UP: usize = 1;
const ROW: &str = "cri-start";

/// Measures it.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    let node = match Node::start(&bench.directory.join("cri"), bench.image, &bench.runtimes).await {
        Ok(node) => node,
        Err(error) => {
            bench.progress(&format!("SKIPPED cri: {error}"));
            bench.results.skip(ROW, "all", error.to_string());
            return;
        }
    };
    let mut runtimes = bench.runtimes.clone();
    for round in 0..WARM_UP + bench.rounds {
        let next = runtimes.len().min(1);
        runtimes.rotate_left(next);
        let mut failed = Vec::new();
        for runtime in &runtimes {
            if let Err(error) = one(bench, &node, runtime, round >= WARM_UP).await {
                bench.progress(&format!("FAILED {ROW} under {}: {error}", runtime.kind.name()));
                bench.results.skip(ROW, runtime.kind.name(), error.to_string());
                failed.push(runtime.kind);
            }
        }
        runtimes.retain(|runtime| !failed.contains(&runtime.kind));
        bench.progress(&format!("cri: round {} of {}", round + 1, WARM_UP + bench.rounds));
    }
}

async fn one(bench: &mut Bench<'_>, node: &Node, runtime: &Runtime, counts: bool) -> Result<(), CriError> {
    let (pod, times) = node.run(runtime, &["wait"]).await?;
    let exec = pod.exec(&["exit"]).await;
    let stopped = pod.stop().await?;
    let (_, exec) = exec?;
    if counts {
        for (row, duration) in [
            (ROW, times.sandbox + times.create + times.start),
            ("cri-start/sandbox", times.sandbox),
            ("cri-start/create", times.create),
            ("cri-start/start", times.start),
            ("cri-exec", exec),
            ("cri-stop", stopped),
        ] {
            bench.results.add_time(row, runtime.kind.name(), duration);
        }
    }
    Ok(())
}
