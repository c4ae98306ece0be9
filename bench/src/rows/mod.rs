//! What is measured: groups of rows that share their pods.

pub(crate) mod block;
pub(crate) mod burst;
pub(crate) mod cri;
pub(crate) mod crowded;
pub(crate) mod inside;
pub(crate) mod memory;
pub(crate) mod network;
pub(crate) mod setup;
pub(crate) mod start;
pub(crate) mod vmm;

use std::path::Path;
use std::time::Duration;

use crate::containerd::Containerd;
use crate::containerd::client::Client;
use crate::containerd::image::Image;
use crate::pod::{PodError, Pods};
use crate::report::{Better, Row, Skipped};
use crate::runtime::{self, Runtime};

/// Groups of rows, in the order in which they are measured.
pub const GROUPS: [Group; 16] = [
    Group::Start,
    Group::Mounts,
    Group::Pods,
    Group::Cri,
    Group::Network,
    Group::Memory,
    Group::Vmm,
    Group::Syscalls,
    Group::Rootfs,
    Group::RootfsChanges,
    Group::RootfsBlock,
    Group::RootfsErofs,
    Group::Block,
    Group::Setup,
    Group::Burst20,
    Group::Burst50,
];

/// Rows that are measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Starting, stopping and removing one pod after the other.
    Start,
    /// Starting one pod after the other where a great deal is mounted.
    Mounts,
    /// Starting one pod after the other beside many idle ones.
    Pods,
    /// Starting pods as the kubelet does.
    Cri,
    /// Traffic with pods.
    Network,
    /// Memory of idle pods.
    Memory,
    /// The VMM alone.
    Vmm,
    /// System calls inside the workload.
    Syscalls,
    /// The root file system inside the workload.
    Rootfs,
    /// The same when what is changed of it is on a disk.
    RootfsChanges,
    /// The same when it is on a disk.
    RootfsBlock,
    /// The same when its layers are.
    RootfsErofs,
    /// A block volume inside the workload.
    Block,
    /// Making root file systems.
    Setup,
    /// 20 pods at once.
    Burst20,
    /// 50 pods at once.
    Burst50,
}

impl Group {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Mounts => "mounts",
            Self::Pods => "pods",
            Self::Cri => "cri",
            Self::Network => "network",
            Self::Memory => "memory",
            Self::Vmm => "vmm",
            Self::Syscalls => "syscalls",
            Self::Rootfs => "rootfs",
            Self::RootfsChanges => inside::CHANGES,
            Self::RootfsBlock => inside::ON_DISKS.group,
            Self::RootfsErofs => inside::ON_LAYERS.group,
            Self::Block => "block",
            Self::Setup => "setup",
            Self::Burst20 => "burst-20",
            Self::Burst50 => "burst-50",
        }
    }

    /// For people: what its rows are.
    pub fn explanation(self) -> &'static str {
        match self {
            Self::Start => "pod start up to the first byte of output, by phase; stop and remove",
            Self::Mounts => "pod start on a node with 2,000 mounts",
            Self::Pods => "pod start beside 200 idle pods",
            Self::Cri => "pod start through the CRI with a pod network, by call; exec; stop and remove",
            Self::Network => {
                "TCP, UDP, requests and connections between the node and a pod, and between pods"
            }
            Self::Memory => {
                "memory per idle pod: drop of the node's free memory, PSS by process, the VMM's own"
            }
            Self::Vmm => "the VMM alone beside QEMU's microvm machine: time to init, memory",
            Self::Syscalls => "getppid, fork and exec, page fault, context switch inside the workload",
            Self::Rootfs => "walk, unpack, small files, sequential read and write inside the workload",
            Self::RootfsChanges => "the same with what is changed on disks",
            Self::RootfsBlock => "the same with root file systems on disks",
            Self::RootfsErofs => "the same with the layers of root file systems on disks",
            Self::Block => "4 KiB random reads and writes of a block volume inside the workload",
            Self::Setup => "first and repeated set-up of a root file system by containerd's snapshotters",
            Self::Burst20 => "20 pods at once: pods a second, slowest start, failures",
            Self::Burst50 => "50 pods at once: the same",
        }
    }

    /// The group of a name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        GROUPS.into_iter().find(|group| group.name() == name)
    }

    /// Measures it.
    pub async fn measure(self, bench: &mut Bench<'_>) {
        match self {
            Self::Start => start::measure(bench).await,
            Self::Mounts => crowded::measure_with_mounts(bench).await,
            Self::Pods => crowded::measure_with_pods(bench).await,
            Self::Cri => cri::measure(bench).await,
            Self::Network => network::measure(bench).await,
            Self::Memory => memory::measure(bench).await,
            Self::Syscalls | Self::Rootfs => inside::measure(bench, self.name()).await,
            Self::RootfsChanges => inside::measure_changes(bench).await,
            Self::RootfsBlock => inside::measure_on(bench, inside::ON_DISKS).await,
            Self::RootfsErofs => inside::measure_on(bench, inside::ON_LAYERS).await,
            Self::Vmm => vmm::measure(bench).await,
            Self::Block => block::measure(bench).await,
            Self::Setup => setup::measure(bench).await,
            Self::Burst20 => burst::measure(bench, 20).await,
            Self::Burst50 => burst::measure(bench, 50).await,
        }
    }
}

/// What the groups measure with, and where they put their figures.
pub struct Bench<'a> {
    /// The containerd that everything runs under.
    pub containerd: &'a Containerd,
    /// The connection to it.
    pub client: Client,
    /// Its image.
    pub image: &'a Image,
    /// Makes pods of the image.
    pub pods: Pods,
    /// The runtimes that take part.
    pub runtimes: Vec<Runtime>,
    /// Where files that a group needs can be put.
    pub directory: &'a Path,
    /// Rounds of the groups that measure one pod after the other.
    pub rounds: usize,
    /// Receives a line for each bit of progress.
    pub progress: &'a dyn Fn(&str),
    /// What was measured so far.
    pub results: Results,
}

/// Figures, collected sample by sample.
#[derive(Debug, Default)]
pub struct Results {
    series: Vec<Series>,
    skipped: Vec<Skipped>,
}

#[derive(Debug)]
struct Series {
    row: String,
    runtime: &'static str,
    unit: &'static str,
    better: Better,
    samples: Vec<f64>,
}

impl Results {
    /// Adds a sample to the row of this name and runtime.
    pub(crate) fn add(
        &mut self,
        row: &str,
        runtime: &'static str,
        unit: &'static str,
        better: Better,
        sample: f64,
    ) {
        match self.series.iter_mut().find(|series| series.row == row && series.runtime == runtime) {
            Some(series) => series.samples.push(sample),
            None => {
                self.series.push(Series { row: row.to_owned(), runtime, unit, better, samples: vec![sample] })
            }
        }
    }

    /// Adds a duration, in milliseconds.
    pub(crate) fn add_time(&mut self, row: &str, runtime: &'static str, duration: Duration) {
        self.add(row, runtime, "ms", Better::Lower, duration.as_secs_f64() * 1e3);
    }

    /// Notes that something could not be measured.
    pub fn skip(&mut self, row: &str, runtime: &str, reason: impl Into<String>) {
        self.skipped.push(Skipped {
            row: row.to_owned(),
            runtime: runtime.to_owned(),
            reason: reason.into(),
        });
    }

    /// The finished rows, those of one quantity together, and what was skipped.
    pub fn finish(mut self) -> (Vec<Row>, Vec<Skipped>) {
        let mut names: Vec<String> = Vec::new();
        for series in &self.series {
            if !names.contains(&series.row) {
                names.push(series.row.clone());
            }
        }
        // The runtimes took turns: which came first is of no interest.
        let place = |series: &Series| {
            let position = runtime::ALL.iter().position(|kind| kind.name() == series.runtime);
            position.unwrap_or(runtime::ALL.len())
        };
        self.series.sort_by_key(place);
        let rows = names
            .iter()
            .flat_map(|name| self.series.iter().filter(move |series| series.row == *name))
            .filter_map(|series| {
                Row::new(&series.row, series.runtime, series.unit, series.better, series.samples.clone())
            })
            .collect();
        (rows, self.skipped)
    }
}

impl Bench<'_> {
    /// Tells how far it is.
    pub(crate) fn progress(&self, text: &str) {
        (self.progress)(text);
    }

    /// Notes a runtime that fails in a group, and says so at once.
    pub(crate) fn fail(&mut self, row: &str, runtime: &'static str, error: &PodError) {
        self.progress(&format!("FAILED {row} under {runtime}: {error}"));
        self.results.skip(row, runtime, error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_row_come_together() {
        let mut results = Results::default();
        results.add("a", "crun", "ms", Better::Lower, 2.0);
        results.add("a", "runc", "ms", Better::Lower, 1.0);
        results.add("b", "runc", "ms", Better::Lower, 5.0);
        results.add("a", "runc", "ms", Better::Lower, 3.0);
        results.skip("c", "runc", "why");
        let (rows, skipped) = results.finish();
        let summary: Vec<(&str, &str, usize)> =
            rows.iter().map(|row| (row.row.as_str(), row.runtime.as_str(), row.n)).collect();
        assert_eq!(summary, [("a", "runc", 2), ("a", "crun", 1), ("b", "runc", 1)]);
        assert_eq!(skipped[0].reason, "why");
    }

    #[test]
    fn groups_have_names() {
        for group in GROUPS {
            assert_eq!(Group::from_name(group.name()), Some(group));
        }
    }
}
