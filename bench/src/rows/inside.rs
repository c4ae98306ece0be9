//! What the workload measures itself, inside its container: system calls, the root file system, block volumes.

use super::Bench;
use crate::containerd::spec::Container;
use crate::pod::{PodError, Pods};
use crate::report::Better;
use crate::runtime::Runtime;
use crate::workload::files;

/// The workload that is run on root file systems of several kinds.
const ROOTFS: &str = "rootfs";

/// The snapshotter whose root file systems are disks.
pub(crate) const ON_DISKS: OtherRoots = OtherRoots { snapshotter: "blockfile", group: "rootfs-block" };
/// The one whose layers are.
pub(crate) const ON_LAYERS: OtherRoots = OtherRoots { snapshotter: "erofs", group: "rootfs-erofs" };

/// What the rows begin with whose root file systems' changes are on disks.
pub(crate) const CHANGES: &str = "rootfs-changes";

/// Root file systems of another than the default snapshotter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OtherRoots {
    /// Which.
    pub snapshotter: &'static str,
    /// What the rows begin with.
    pub group: &'static str,
}

/// Runs `workload NAME` once under each runtime and takes over the samples that it prints.
pub(crate) async fn measure(bench: &mut Bench<'_>, name: &str) {
    run_workload(bench, bench.pods.clone(), name, |row| row.to_owned()).await;
}

/// The same for the workload `rootfs` on other root file systems.
pub(crate) async fn measure_on(bench: &mut Bench<'_>, roots: OtherRoots) {
    let OtherRoots { snapshotter, group } = roots;
    let snapshot = bench.image.snapshot();
    if let Err(error) = bench.image.unpack(&bench.client, snapshotter, snapshot).await {
        bench.progress(&format!("SKIPPED {group}: cannot unpack with {snapshotter}: {error}"));
        bench.results.skip(group, "all", format!("cannot unpack with {snapshotter}: {error}"));
        return;
    }
    let pods = bench.pods.on(snapshotter, snapshot.to_owned());
    run_workload(bench, pods, ROOTFS, |row| row.replacen(ROOTFS, group, 1)).await;
}

/// The same with the changes on disks.
pub(crate) async fn measure_changes(bench: &mut Bench<'_>) {
    let mut runtimes = Vec::new();
    for runtime in &bench.runtimes {
        match runtime.with_changes_on_disk() {
            Ok(runtime) => runtimes.push(runtime),
            Err(error) => bench.results.skip(CHANGES, runtime.kind.name(), error.to_string()),
        }
    }
    run_workload_under(bench, runtimes, bench.pods.clone(), ROOTFS, |row| row.replacen(ROOTFS, CHANGES, 1))
        .await;
}

async fn run_workload(bench: &mut Bench<'_>, pods: Pods, name: &str, row_of: impl Fn(&str) -> String) {
    run_workload_under(bench, bench.runtimes.clone(), pods, name, row_of).await;
}

async fn run_workload_under(
    bench: &mut Bench<'_>,
    runtimes: Vec<Runtime>,
    pods: Pods,
    name: &str,
    row_of: impl Fn(&str) -> String,
) {
    let group = row_of(name);
    for runtime in runtimes {
        if let Err(error) = one(bench, &pods, &runtime, name, &row_of).await {
            bench.fail(&group, runtime.kind.name(), &error);
        }
        bench.progress(&format!("{group}: {} done", runtime.kind.name()));
    }
}

async fn one(
    bench: &mut Bench<'_>,
    pods: &Pods,
    runtime: &Runtime,
    name: &str,
    row_of: impl Fn(&str) -> String,
) -> Result<(), PodError> {
    let container =
        Container { args: vec![files::PROGRAM.to_owned(), name.to_owned()], ..Default::default() };
    let output = pods.run(runtime, &container).await?;
    add_samples(bench, runtime, name, &output, row_of)
}

/// Adds the lines `ROW UNIT NUMBER` of a workload's output, to the rows that `row_of` makes of these.
pub(crate) fn add_samples(
    bench: &mut Bench<'_>,
    runtime: &Runtime,
    name: &str,
    output: &str,
    row_of: impl Fn(&str) -> String,
) -> Result<(), PodError> {
    for line in output.lines() {
        let Some((row, unit, value)) = sample(line) else {
            return Err(PodError::Output(format!("the line {line:?} of the workload {name}")));
        };
        let better = if unit.ends_with("/s") { Better::Higher } else { Better::Lower };
        bench.results.add(&row_of(row), runtime.kind.name(), unit, better, value);
    }
    Ok(())
}

fn sample(line: &str) -> Option<(&str, &'static str, f64)> {
    let mut words = line.split(' ');
    let (row, unit, value) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
    let unit = ["ns", "us", "ms", "MB/s", "op/s"].into_iter().find(|known| *known == unit)?;
    Some((row, unit, value)).filter(|_| words.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read() {
        assert_eq!(sample("syscall-getppid ns 45.5"), Some(("syscall-getppid", "ns", 45.5)));
        for line in ["", "a", "a ns", "a ns x", "a miles 4", "a ns 4 5"] {
            assert_eq!(sample(line), None, "{line}");
        }
    }
}
