//! The report: facts about the node, and rows of samples.

pub(crate) mod chart;
pub(crate) mod html;
pub mod table;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::stats::percentile;

/// The number in [`Report::format`] of reports made now.
pub const FORMAT: u32 = 1;

/// One run of the benchmark.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Version of this format.
    pub format: u32,
    /// Where it was measured, and with what.
    pub host: Host,
    /// The figures.
    pub rows: Vec<Row>,
    /// What was asked for and could not be measured.
    pub skipped: Vec<Skipped>,
}

/// What the figures' seconds are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Counted instructions: one nanosecond each, whatever the machine underneath was doing; idle time passes at once.
    Virtual,
    /// The real thing.
    Wall,
}

impl Clock {
    /// For people.
    pub(crate) fn explanation(self) -> &'static str {
        match self {
            Self::Virtual => {
                "virtual time: the node is a software CPU that counts one nanosecond per executed instruction. It repeats \
                 within a few percent and ratios between runtimes are meaningful, but caches, memory and devices cost \
                 nothing extra: absolute figures are not those of any hardware"
            }
            Self::Wall => "wall time on the node's own hardware",
        }
    }
}

/// Where it was measured, and with what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// What a second is in this report.
    pub clock: Clock,
    /// The node's kernel release.
    pub kernel: String,
    /// The CPU's model name.
    pub cpu: String,
    /// How many CPUs there are.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Versions of containerd and of the runtimes; ours with its revision.
    pub versions: BTreeMap<String, String>,
    /// Settings that the figures depend on.
    pub settings: BTreeMap<String, String>,
}

/// Which direction is an improvement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Times, sizes, failures.
    Lower,
    /// Rates.
    Higher,
}

/// The samples of one quantity under one runtime.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// What was measured.
    pub row: String,
    /// Under which runtime.
    pub runtime: String,
    /// Of all the numbers.
    pub unit: String,
    /// Which direction is an improvement.
    pub better: Better,
    /// How many samples there are.
    pub n: usize,
    /// Median.
    pub p50: f64,
    /// 90th percentile by nearest rank.
    pub p90: f64,
    /// 99th percentile by nearest rank: the largest of fewer than 100 samples.
    pub p99: f64,
    /// In the order of measurement.
    pub samples: Vec<f64>,
}

/// Something that was asked for and could not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// What it was.
    pub row: String,
    /// Under which runtime.
    pub runtime: String,
    /// Why not.
    pub reason: String,
}

/// A report that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file can't be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file can't be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is no report.
    #[error("{path} is not a report of this benchmark: {source}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The file is a report of another version.
    #[error("{path} has format {found}, this program reads format {FORMAT}; measure again")]
    Format {
        /// Which file.
        path: PathBuf,
        /// What it says.
        found: u32,
    },
}

impl Row {
    /// A row of samples; `None` without any.
    pub(crate) fn new(
        row: &str,
        runtime: &str,
        unit: &str,
        better: Better,
        samples: Vec<f64>,
    ) -> Option<Self> {
        Some(Self {
            row: row.to_owned(),
            runtime: runtime.to_owned(),
            unit: unit.to_owned(),
            better,
            n: samples.len(),
            p50: percentile(&samples, 50.0)?,
            p90: percentile(&samples, 90.0)?,
            p99: percentile(&samples, 99.0)?,
            samples,
        })
    }
}

impl Report {
    /// Reads a report.
    ///
    /// # Errors
    /// When there is none, or it is not of this format.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let text =
            fs::read_to_string(path).map_err(|source| ReportError::Read { path: path.to_owned(), source })?;
        let report: Self = serde_json::from_str(&text)
            .map_err(|source| ReportError::Parse { path: path.to_owned(), source })?;
        if report.format != FORMAT {
            return Err(ReportError::Format { path: path.to_owned(), found: report.format });
        }
        Ok(report)
    }

    /// Writes `report.json` and `report.html` into a directory.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn write(&self, directory: &Path) -> Result<(), ReportError> {
        let write = |path: PathBuf, content: String| {
            fs::write(&path, content).map_err(|source| ReportError::Write { path, source })
        };
        fs::create_dir_all(directory)
            .map_err(|source| ReportError::Write { path: directory.to_owned(), source })?;
        write(directory.join("report.json"), self.to_json())?;
        write(directory.join("report.html"), html::page(self))
    }

    /// One row a line, so that a baseline in a repository has readable differences.
    fn to_json(&self) -> String {
        let lines = |values: Vec<serde_json::Value>| {
            values.iter().map(|value| format!("    {value}")).collect::<Vec<_>>().join(",\n")
        };
        let rows = self.rows.iter().filter_map(|row| serde_json::to_value(row).ok()).collect();
        let skipped = self.skipped.iter().filter_map(|row| serde_json::to_value(row).ok()).collect();
        let host = serde_json::to_value(&self.host).unwrap_or_default();
        format!(
            "{{\n  \"format\": {},\n  \"host\": {host:#},\n  \"rows\": [\n{}\n  ],\n  \"skipped\": [\n{}\n  ]\n}}\n",
            self.format,
            lines(rows),
            lines(skipped)
        )
    }

    /// The row of a name and runtime.
    pub(crate) fn row(&self, row: &str, runtime: &str) -> Option<&Row> {
        self.rows.iter().find(|candidate| candidate.row == row && candidate.runtime == runtime)
    }

    /// The names of the rows, each once, in order.
    pub(crate) fn row_names(&self) -> Vec<&str> {
        unique(self.rows.iter().map(|row| row.row.as_str()))
    }

    /// The runtimes, each once, in order.
    pub(crate) fn runtimes(&self) -> Vec<&str> {
        unique(self.rows.iter().map(|row| row.runtime.as_str()))
    }
}

fn unique<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

/// A number with three significant digits, more for large ones.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        medium if medium >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Report {
        let row = |row: &str, runtime: &str, unit: &str, better, samples: &[f64]| {
            Row::new(row, runtime, unit, better, samples.to_vec()).unwrap()
        };
        Report {
            format: FORMAT,
            host: Host {
                clock: Clock::Virtual,
                kernel: "6.1".to_owned(),
                cpu: "CPU <1>".to_owned(),
                cpus: 1,
                memory: 2 << 30,
                versions: [("runc".to_owned(), "1.1".to_owned())].into(),
                settings: BTreeMap::new(),
            },
            rows: vec![
                row("pod-start-cold", "runc", "ms", Better::Lower, &[100.0, 110.0, 105.0]),
                row("pod-start-cold", "bulkhead", "ms", Better::Lower, &[300.0, 310.0, 305.0]),
                row("pod-start-cold/kernel", "bulkhead", "ms", Better::Lower, &[200.0, 210.0, 205.0]),
                row("pod-start-cold/agent", "bulkhead", "ms", Better::Lower, &[100.0, 100.0, 100.0]),
                row("burst-20", "runc", "pods/s", Better::Higher, &[9.5]),
            ],
            skipped: vec![Skipped {
                row: "network".to_owned(),
                runtime: "bulkhead".to_owned(),
                reason: "no <network> yet".to_owned(),
            }],
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("report");
        let report = sample();
        report.write(&directory).unwrap();
        assert_eq!(Report::read(&directory.join("report.json")).unwrap(), report);
        assert!(directory.join("report.html").exists());
    }

    #[test]
    fn other_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        assert!(matches!(Report::read(&path), Err(ReportError::Read { .. })));
        fs::write(&path, "{}").unwrap();
        assert!(matches!(Report::read(&path), Err(ReportError::Parse { .. })));
        let mut report = sample();
        report.format = 99;
        fs::write(&path, report.to_json()).unwrap();
        assert!(matches!(Report::read(&path), Err(ReportError::Format { found: 99, .. })));
    }

    #[test]
    fn a_row_needs_samples() {
        assert_eq!(Row::new("a", "b", "ms", Better::Lower, Vec::new()), None);
        let row = Row::new("a", "b", "ms", Better::Lower, vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((row.n, row.p50, row.p90, row.p99), (3, 2.0, 3.0, 3.0));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([1234.5, 12.345, 1.2345].map(short), ["1234", "12.3", "1.23"]);
    }
}
