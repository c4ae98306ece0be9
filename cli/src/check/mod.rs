//! `bulkhead check`: can pods run on this node?

pub mod cgroup;
pub mod kvm;
pub mod parts;

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What one look at the node gave.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it affects pods.
    pub verdict: Verdict,
    /// What was looked at.
    pub what: &'static str,
    /// What was seen and, unless all is well, what to do.
    pub evidence: String,
}

/// How a finding affects pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Pods run, but lack something.
    Warn,
    /// Pods cannot run.
    Fail,
}

impl Finding {
    fn ok(what: &'static str, evidence: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, what, evidence: evidence.into() }
    }

    fn warn(what: &'static str, evidence: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, what, evidence: evidence.into() }
    }

    fn fail(what: &'static str, evidence: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, what, evidence: evidence.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{verdict}  {}: {}", self.what, self.evidence)
    }
}

/// What keeps the check from being made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It is not known where to look for the installed parts.
    #[error("cannot tell where this program is installed ({0}); give --prefix")]
    Prefix(#[source] io::Error),
    /// The findings can't be printed.
    #[error("cannot write the findings: {0}")]
    Output(#[from] io::Error),
}

/// Looks at everything that pods need and prints a line for each; true if they can run.
///
/// # Errors
/// When the findings can't be printed, or `prefix` is not given and can't be found out.
pub fn run(device: &Path, prefix: Option<&Path>, out: &mut impl Write) -> Result<bool, CheckError> {
    let prefix = match prefix {
        Some(prefix) => prefix.to_owned(),
        None => own_prefix().map_err(CheckError::Prefix)?,
    };
    let mut findings = kvm::check(device);
    findings.push(cgroup::check(Path::new("/sys/fs/cgroup")));
    findings.extend(parts::check(&prefix));
    report(&findings, out)
}

/// `PREFIX` of `PREFIX/bin/bulkhead`.
fn own_prefix() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    match program.parent().and_then(Path::parent) {
        Some(prefix) => Ok(prefix.to_owned()),
        None => Err(io::Error::other(format!("{} is in no bin directory", program.display()))),
    }
}

fn report(findings: &[Finding], out: &mut impl Write) -> Result<bool, CheckError> {
    for finding in findings {
        writeln!(out, "{finding}")?;
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (failed, warned) = (count(Verdict::Fail), count(Verdict::Warn));
    if failed > 0 {
        writeln!(out, "pods cannot run on this node: {failed} of {} checks failed", findings.len())?;
    } else if warned > 0 {
        writeln!(out, "pods can run on this node, with {warned} of {} checks warning", findings.len())?;
    } else {
        writeln!(out, "pods can run on this node: {} of {} checks passed", findings.len(), findings.len())?;
    }
    Ok(failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reported(findings: &[Finding]) -> (bool, String) {
        let mut out = Vec::new();
        let pods_can_run = report(findings, &mut out).unwrap();
        (pods_can_run, String::from_utf8(out).unwrap())
    }

    #[test]
    fn only_failures_keep_pods_from_running() {
        let (can_run, text) = reported(&[Finding::ok("a", "fine"), Finding::warn("b", "so so")]);
        assert!(can_run);
        assert_eq!(
            text,
            "ok    a: fine\nwarn  b: so so\npods can run on this node, with 1 of 2 checks warning\n"
        );

        let (can_run, text) = reported(&[Finding::ok("a", "fine"), Finding::fail("b", "bad")]);
        assert!(!can_run);
        assert!(text.ends_with("FAIL  b: bad\npods cannot run on this node: 1 of 2 checks failed\n"));
    }
}
