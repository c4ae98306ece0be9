//! Traffic over the pod network: between the node and a pod, and between two pods of one runtime.

use super::Bench;
use crate::cri::{CriError, Node};
use crate::report::Better;
use crate::runtime::{Kind, Runtime};
use crate::workload::net;

/// The whole set is measured so often for each runtime, in turns.
const ROUNDS: usize = 3;
const ROW: &str = "tcp-1-stream-to-pod";

/// Measures it.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    // A pod that has booted is no different from one of a template here.
    let mut runtimes = bench.runtimes.clone();
    if runtimes.iter().any(|runtime| runtime.kind == Kind::BulkheadTemplate) {
        runtimes.retain(|runtime| runtime.kind != Kind::Bulkhead);
    }
    let node = match Node::start(&bench.directory.join("network"), bench.image, &runtimes).await {
        Ok(node) => node,
        Err(error) => {
            bench.progress(&format!("SKIPPED network: {error}"));
            bench.results.skip(ROW, "all", error.to_string());
            return;
        }
    };
    for round in 0..ROUNDS.min(bench.rounds) {
        let mut failed = Vec::new();
        for runtime in &runtimes {
            if let Err(error) = one(bench, &node, runtime).await {
                bench.progress(&format!("FAILED network under {}: {error}", runtime.kind.name()));
                bench.results.skip(ROW, runtime.kind.name(), error.to_string());
                failed.push(runtime.kind);
            }
        }
        runtimes.retain(|runtime| !failed.contains(&runtime.kind));
        let next = runtimes.len().min(1);
        runtimes.rotate_left(next);
        bench.progress(&format!("network: round {} done", round + 1));
    }
}

async fn one(bench: &mut Bench<'_>, node: &Node, runtime: &Runtime) -> Result<(), CriError> {
    let (server, _) = node.run(runtime, &["serve"]).await?;
    let result = with_server(bench, node, runtime, &server).await;
    let stopped = server.stop().await;
    result?;
    stopped.map(drop)
}

async fn with_server(
    bench: &mut Bench<'_>,
    node: &Node,
    runtime: &Runtime,
    server: &crate::cri::Pod<'_>,
) -> Result<(), CriError> {
    let address = server.address().await?;
    let samples = tokio::task::spawn_blocking(move || net::measure(address))
        .await
        .map_err(|error| CriError::Traffic(std::io::Error::other(error)))?
        .map_err(CriError::Traffic)?;
    for (row, unit, value) in samples {
        let better = if unit.ends_with("/s") { Better::Higher } else { Better::Lower };
        bench.results.add(row, runtime.kind.name(), unit, better, value);
    }
    let (client, _) = node.run(runtime, &["wait"]).await?;
    let fetched = client.exec(&["fetch", &address.to_string()]).await;
    client.stop().await?;
    let (output, _) = fetched?;
    let rate = output.trim().parse().map_err(|_| CriError::Failed { code: 0, output })?;
    bench.results.add("tcp-pod-to-pod", runtime.kind.name(), "MB/s", Better::Higher, rate);
    Ok(())
}
