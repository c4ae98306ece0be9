//! `bulkhead check`: can pods run on this node, and how well are they kept apart?

pub(crate) mod cgroup;
pub(crate) mod containerd;
pub(crate) mod host;
pub(crate) mod kvm;
pub(crate) mod modules;
pub(crate) mod parts;
pub(crate) mod processor;

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bulkhead_shim::config::{Config, Source};
use bulkhead_shim::host::core_scheduling;
use serde::Serialize;

/// What one look at the node gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// How it affects pods.
    pub verdict: Verdict,
    /// What was looked at.
    #[serde(rename = "check")]
    pub what: &'static str,
    /// What was seen.
    pub evidence: String,
    /// Why it matters, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// How a finding affects pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Verdict {
    /// As it should be.
    #[serde(rename = "ok")]
    Ok,
    /// Pods run, but lack something.
    #[serde(rename = "warning")]
    Warn,
    /// Pods cannot run.
    #[serde(rename = "error")]
    Fail,
}

impl Finding {
    fn new(verdict: Verdict, what: &'static str, evidence: impl Into<String>) -> Self {
        Self { verdict, what, evidence: evidence.into(), why: None, mend: None }
    }

    fn ok(what: &'static str, evidence: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, what, evidence)
    }

    fn warn(what: &'static str, evidence: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, what, evidence)
    }

    fn fail(what: &'static str, evidence: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, what, evidence)
    }

    /// Says why it matters.
    fn because(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    /// Says what mends it.
    fn mended_by(mut self, command: impl Into<String>) -> Self {
        self.mend = Some(command.into());
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{verdict}  {}: {}", self.what, self.evidence)?;
        if let Some(why) = &self.why {
            write!(f, "\n      why: {why}")?;
        }
        if let Some(mend) = &self.mend {
            write!(f, "\n      mend: {mend}")?;
        }
        Ok(())
    }
}

/// What keeps the check from being made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// It is not known where to look for the installed parts.
    #[error("cannot tell where this program is installed ({0}); give --prefix")]
    Prefix(#[source] io::Error),
    /// The findings can't be printed.
    #[error("cannot write the findings: {0}")]
    Output(#[from] io::Error),
}

/// What `bulkhead check` looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// The KVM device, if it is not the configured one.
    pub device: Option<PathBuf>,
    /// Where Bulkhead is installed, if it was given.
    pub prefix: Option<PathBuf>,
    /// The shim's configuration file, if it is not what containerd's configuration names.
    pub config: Option<PathBuf>,
    /// containerd's main configuration file.
    pub containerd: PathBuf,
    /// Print JSON.
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: None,
            prefix: None,
            config: None,
            containerd: crate::containerd::DEFAULT_FILE.into(),
            json: false,
        }
    }
}

/// Looks at everything that pods need and prints what it finds; true if they can run.
///
/// # Errors
/// When the findings can't be printed, or `prefix` is not given and can't be found out.
pub(crate) fn run(options: &Options, out: &mut impl Write) -> Result<bool, CheckError> {
    let prefix = match &options.prefix {
        Some(prefix) => prefix.clone(),
        None => own_prefix().map_err(CheckError::Prefix)?,
    };
    let root = Path::new("/");
    let registered = containerd::check(root, &options.containerd);
    let source = match (&options.config, &registered.config_path) {
        (Some(path), _) | (None, Some(path)) => Source::File(path.clone()),
        (None, None) => Source::Default,
    };
    let configured = Config::load_for(&source, &prefix);
    let device = match (&options.device, &configured) {
        (Some(device), _) => device.clone(),
        (None, Ok(config)) => config.kvm.clone(),
        (None, Err(_)) => "/dev/kvm".into(),
    };
    let mut findings = kvm::check(&device);
    findings.extend(modules::check(root));
    let cores = host::CoreScheduling {
        wanted: configured.as_ref().is_ok_and(|config| config.core_scheduling),
        possible: core_scheduling::is_possible(),
    };
    findings.extend(host::check(root, cores));
    findings.push(cgroup::check(Path::new("/sys/fs/cgroup")));
    match configured {
        Ok(config) => findings.extend(parts::check(&prefix, &config)),
        Err(error) => findings.push(
            Finding::fail("configuration", bulkhead_base::chain(&error))
                .because("every pod is refused with this error"),
        ),
    }
    findings.push(parts::unaltered(root, &prefix));
    findings.extend(registered.findings);
    if options.json { report_json(&findings, out) } else { report(&findings, out) }
}

/// `PREFIX` of `PREFIX/bin/bulkhead`.
///
/// # Errors
/// When that is not how this program is installed.
pub(crate) fn own_prefix() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    match program.parent().and_then(Path::parent) {
        Some(prefix) => Ok(prefix.to_owned()),
        None => Err(io::Error::other(format!("{} is in no bin directory", program.display()))),
    }
}

fn count(findings: &[Finding], verdict: Verdict) -> usize {
    findings.iter().filter(|finding| finding.verdict == verdict).count()
}

fn report(findings: &[Finding], out: &mut impl Write) -> Result<bool, CheckError> {
    for finding in findings {
        writeln!(out, "{finding}")?;
    }
    let (failed, warned) = (count(findings, Verdict::Fail), count(findings, Verdict::Warn));
    if failed > 0 {
        writeln!(out, "pods cannot run on this node: {failed} of {} checks failed", findings.len())?;
    } else if warned > 0 {
        writeln!(out, "pods can run on this node, with {warned} of {} checks warning", findings.len())?;
    } else {
        writeln!(out, "pods can run on this node: {} of {} checks passed", findings.len(), findings.len())?;
    }
    Ok(failed == 0)
}

fn report_json(findings: &[Finding], out: &mut impl Write) -> Result<bool, CheckError> {
    let can_run = count(findings, Verdict::Fail) == 0;
    let report = serde_json::json!({ "pods_can_run": can_run, "checks": findings });
    writeln!(out, "{report:#}")?;
    Ok(can_run)
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
        let (can_run, text) =
            reported(&[Finding::ok("a", "fine"), Finding::warn("b", "so so").because("x").mended_by("y z")]);
        assert!(can_run);
        assert_eq!(
            text,
            "ok    a: fine\nwarn  b: so so\n      why: x\n      mend: y z\n\
             pods can run on this node, with 1 of 2 checks warning\n"
        );

        let (can_run, text) = reported(&[Finding::ok("a", "fine"), Finding::fail("b", "bad")]);
        assert!(!can_run);
        assert!(text.ends_with("FAIL  b: bad\npods cannot run on this node: 1 of 2 checks failed\n"));
    }

    #[test]
    fn programs_read_json() {
        let mut out = Vec::new();
        let findings = [Finding::ok("a", "fine"), Finding::fail("b", "bad").mended_by("y")];
        assert!(!report_json(&findings, &mut out).unwrap());
        let report: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            report,
            serde_json::json!({ "pods_can_run": false, "checks": [
                { "check": "a", "verdict": "ok", "evidence": "fine" },
                { "check": "b", "verdict": "error", "evidence": "bad", "mend": "y" },
            ]})
        );
    }
}
