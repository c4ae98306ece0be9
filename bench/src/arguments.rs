//! The command line's arguments.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser, ValueExt};

use crate::report::Clock;
use crate::rows::{GROUPS, Group};
use crate::runtime::{self, Kind};

/// What `bulkhead-bench --help` prints before the list of groups.
pub const HELP: &str = "\
usage: bulkhead-bench run [OPTION...] [GROUP...]     measure; all groups unless some are named
       bulkhead-bench compare A.json B.json          what B does better or worse than A, beyond noise
       bulkhead-bench render REPORT.json             write report.html beside it again, and print the table

options of run:
  --runtimes A,B    only these (default: every one that is installed)
  --rounds N        pods of each runtime in `start` (default 10)
  --out DIR         where report.json and report.html go (default .)
  --work DIR        a new directory for containerd and scratch files (default /run/bulkhead-bench)
  --clock KIND      what the node's clock counts: wall (default) or virtual
  --revision TEXT   what is measured, for the report
  --runsc-platform P  gVisor's platform: systrap (default), kvm or ptrace
";

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// Print [`HELP`] and the groups.
    Help,
    /// Measure.
    Run(Run),
    /// Compare two reports.
    Compare {
        /// The earlier one.
        before: PathBuf,
        /// The later one.
        after: PathBuf,
    },
    /// Render a report again.
    Render {
        /// Its `report.json`.
        report: PathBuf,
    },
}

/// What to measure, and how.
#[derive(Debug, PartialEq)]
pub struct Run {
    /// The groups of rows.
    pub groups: Vec<Group>,
    /// The runtimes; those that are not installed are reported as skipped.
    pub runtimes: Vec<Kind>,
    /// Rounds of the groups that measure one pod after the other.
    pub rounds: usize,
    /// Where the report goes.
    pub out: PathBuf,
    /// A new directory for everything else.
    pub work: PathBuf,
    /// What the node's clock counts.
    pub clock: Clock,
    /// What is measured.
    pub revision: String,
    /// gVisor's platform.
    pub runsc_platform: String,
}

/// A command line that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentsError {
    /// Nothing was asked for.
    #[error("no command given; bulkhead-bench --help lists them")]
    NoCommand,
    /// An argument that is not known, or lacks its value.
    #[error("{0}; bulkhead-bench --help says what there is")]
    Unexpected(#[from] lexopt::Error),
    /// A name that is not known.
    #[error("unknown {what} {name:?}; bulkhead-bench --help lists them")]
    Unknown {
        /// The kind of thing.
        what: &'static str,
        /// The name.
        name: OsString,
    },
    /// A file is missing.
    #[error("{0}")]
    Files(&'static str),
}

/// Reads the arguments.
///
/// # Errors
/// Unknown or missing arguments.
pub fn parse(mut parser: Parser) -> Result<Command, ArgumentsError> {
    match parser.next()? {
        None => Err(ArgumentsError::NoCommand),
        Some(Arg::Long("help") | Arg::Short('h')) => Ok(Command::Help),
        Some(Arg::Value(name)) => match name.to_str() {
            Some("run") => run(parser),
            Some("compare") => {
                let [before, after] = files(parser, "compare needs two reports: A.json B.json")?;
                Ok(Command::Compare { before, after })
            }
            Some("render") => {
                let [report] = files(parser, "render needs one report: REPORT.json")?;
                Ok(Command::Render { report })
            }
            _ => Err(ArgumentsError::Unknown { what: "command", name }),
        },
        Some(other) => Err(other.unexpected().into()),
    }
}

fn files<const COUNT: usize>(
    mut parser: Parser,
    usage: &'static str,
) -> Result<[PathBuf; COUNT], ArgumentsError> {
    let mut files = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Value(file) => files.push(PathBuf::from(file)),
            other => return Err(other.unexpected().into()),
        }
    }
    files.try_into().map_err(|_| ArgumentsError::Files(usage))
}

fn run(mut parser: Parser) -> Result<Command, ArgumentsError> {
    let mut run = Run {
        groups: Vec::new(),
        runtimes: runtime::ALL.to_vec(),
        rounds: 10,
        out: PathBuf::from("."),
        work: PathBuf::from("/run/bulkhead-bench"),
        clock: Clock::Wall,
        revision: "unknown".to_owned(),
        runsc_platform: "systrap".to_owned(),
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
            Arg::Long("runtimes") => run.runtimes = runtimes(&parser.value()?.string()?)?,
            Arg::Long("rounds") => run.rounds = parser.value()?.parse()?,
            Arg::Long("out") => run.out = parser.value()?.into(),
            Arg::Long("work") => run.work = parser.value()?.into(),
            Arg::Long("clock") => run.clock = clock(parser.value()?)?,
            Arg::Long("revision") => run.revision = parser.value()?.string()?,
            Arg::Long("runsc-platform") => run.runsc_platform = platform(parser.value()?)?,
            Arg::Value(name) => match name.to_str().and_then(Group::from_name) {
                Some(group) => run.groups.push(group),
                None => return Err(ArgumentsError::Unknown { what: "group of rows", name }),
            },
            other => return Err(other.unexpected().into()),
        }
    }
    if run.groups.is_empty() {
        run.groups = GROUPS.to_vec();
    }
    Ok(Command::Run(run))
}

fn runtimes(names: &str) -> Result<Vec<Kind>, ArgumentsError> {
    let unknown = |name: &str| ArgumentsError::Unknown { what: "runtime", name: name.into() };
    names.split(',').map(|name| Kind::from_name(name).ok_or_else(|| unknown(name))).collect()
}

fn clock(name: OsString) -> Result<Clock, ArgumentsError> {
    match name.to_str() {
        Some("wall") => Ok(Clock::Wall),
        Some("virtual") => Ok(Clock::Virtual),
        _ => Err(ArgumentsError::Unknown { what: "clock", name }),
    }
}

/// The name ends up in a shell script, so only the known ones are taken.
fn platform(name: OsString) -> Result<String, ArgumentsError> {
    match name.to_str() {
        Some(known @ ("systrap" | "kvm" | "ptrace")) => Ok(known.to_owned()),
        _ => Err(ArgumentsError::Unknown { what: "gVisor platform", name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Command, String> {
        parse(Parser::from_args(arguments)).map_err(|error| error.to_string())
    }

    #[test]
    fn run_measures_everything_by_default() {
        let Command::Run(run) = parsed(&["run"]).unwrap() else { panic!("not a run") };
        assert_eq!(run.groups, GROUPS);
        assert_eq!(run.runtimes, runtime::ALL);
        assert_eq!(run.clock, Clock::Wall);
    }

    #[test]
    fn options_are_read() {
        let Command::Run(run) =
            parsed(&["run", "start", "--runtimes", "runc,crun", "--rounds=3", "--clock", "virtual"]).unwrap()
        else {
            panic!("not a run")
        };
        assert_eq!(run.groups, [Group::Start]);
        assert_eq!(run.runtimes, [Kind::Runc, Kind::Crun]);
        assert_eq!(run.rounds, 3);
        assert_eq!(run.clock, Clock::Virtual);
        assert_eq!(
            parsed(&["compare", "a", "b"]),
            Ok(Command::Compare { before: "a".into(), after: "b".into() })
        );
        assert_eq!(parsed(&["render", "a"]), Ok(Command::Render { report: "a".into() }));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (arguments, said) in [
            (&[][..], "no command"),
            (&["walk"][..], "walk"),
            (&["run", "sleep"][..], "sleep"),
            (&["run", "--runtimes", "docker"][..], "docker"),
            (&["run", "--rounds", "many"][..], "many"),
            (&["run", "--clock", "sundial"][..], "sundial"),
            (&["run", "--runsc-platform", "x; rm"][..], "x; rm"),
            (&["compare", "a"][..], "two reports"),
            (&["render", "a", "b"][..], "one report"),
        ] {
            let error = parsed(arguments).unwrap_err();
            assert!(error.contains(said), "{arguments:?}: {error}");
        }
    }
}
