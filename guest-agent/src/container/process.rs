//! A process of a container, checked: everything it needs to know of itself.

use std::ffi::{CString, NulError};
use std::path::PathBuf;

use super::capabilities::CapabilitySets;
use super::limits::{LimitError, Limits};
use super::seccomp::Filter;
use super::spec::{self, items};

/// A checked `process` object.
#[derive(Debug, Clone)]
pub struct ProcessPlan {
    /// Program and arguments; at least one.
    pub arguments: Vec<CString>,
    /// Environment, `KEY=value`, without duplicates.
    pub environment: Vec<CString>,
    /// Working directory, absolute.
    pub directory: PathBuf,
    /// Identity.
    pub user: spec::User,
    /// Capabilities.
    pub capabilities: CapabilitySets,
    /// Resource limits and scheduling.
    pub limits: Limits,
    /// Whether `execve` can't add privileges.
    pub no_new_privileges: bool,
    /// System call filter.
    pub filter: Option<Filter>,
    /// Execution domain.
    pub personality: Option<libc::c_ulong>,
    /// Initial size of its terminal.
    pub console_size: Option<spec::ConsoleSize>,
    /// What is left out although asked for, for the log.
    pub remarks: Vec<String>,
}

/// A wrong `process` object.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ProcessError {
    #[error("process.args is empty")]
    NoArguments,
    #[error("process.{property} has a NUL byte in it")]
    Nul { property: &'static str, source: NulError },
    #[error("process.env: {0:?} is not KEY=value")]
    Environment(String),
    #[error("process.cwd {0:?} is not an absolute path")]
    Directory(PathBuf),
    #[error("process.user.umask {0:o} has bits above 777")]
    Umask(u32),
    #[error("process.{0} is not supported")]
    Unsupported(&'static str),
    #[error(transparent)]
    Limit(#[from] LimitError),
}

/// What a process gets from its container.
#[derive(Debug, Clone, Default)]
pub struct Inherited {
    /// System call filter.
    pub filter: Option<Filter>,
    /// Execution domain.
    pub personality: Option<libc::c_ulong>,
    /// Capabilities of a process that names none.
    pub capabilities: CapabilitySets,
}

impl ProcessPlan {
    /// Reads and checks a `process` object.
    pub(crate) fn new(process: &spec::Process, inherited: &Inherited) -> Result<Self, ProcessError> {
        if process.exec_cpu_affinity.is_some() {
            return Err(ProcessError::Unsupported("execCPUAffinity"));
        }
        let mut remarks = Vec::new();
        for (property, label) in
            [("apparmorProfile", &process.apparmor_profile), ("selinuxLabel", &process.selinux_label)]
        {
            if let Some(label) = label.as_deref().filter(|label| !label.is_empty()) {
                remarks.push(format!(
                    "process.{property} {label:?} has no effect: the guest has no such module"
                ));
            }
        }
        let capabilities = match &process.capabilities {
            Some(capabilities) => {
                let (sets, unknown) = CapabilitySets::new(capabilities);
                if !unknown.is_empty() {
                    remarks.push(format!("unknown capabilities left out: {}", unknown.join(", ")));
                }
                sets
            }
            None => inherited.capabilities,
        };
        if !process.cwd.is_absolute() {
            return Err(ProcessError::Directory(process.cwd.clone()));
        }
        if let Some(umask) = process.user.umask.filter(|umask| umask & !0o777 != 0) {
            return Err(ProcessError::Umask(umask));
        }
        Ok(Self {
            arguments: arguments(items(&process.args))?,
            environment: environment(items(&process.env))?,
            directory: process.cwd.clone(),
            user: process.user.clone(),
            capabilities,
            limits: Limits::new(process)?,
            no_new_privileges: process.no_new_privileges,
            filter: inherited.filter.clone(),
            personality: inherited.personality,
            console_size: process.console_size,
            remarks,
        })
    }

    /// The value of an environment variable.
    pub(crate) fn variable(&self, key: &str) -> Option<&[u8]> {
        self.environment.iter().find_map(|entry| {
            entry.as_bytes().strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b"="))
        })
    }
}

fn arguments(args: &[String]) -> Result<Vec<CString>, ProcessError> {
    if args.is_empty() {
        return Err(ProcessError::NoArguments);
    }
    args.iter()
        .map(|arg| {
            CString::new(arg.as_str()).map_err(|source| ProcessError::Nul { property: "args", source })
        })
        .collect()
}

/// The last of several values of a variable counts.
fn environment(env: &[String]) -> Result<Vec<CString>, ProcessError> {
    let key =
        |entry: &str| entry.split_once('=').map(|(key, _)| key.to_owned()).filter(|key| !key.is_empty());
    let mut environment: Vec<(String, CString)> = Vec::new();
    for entry in env {
        let key = key(entry).ok_or_else(|| ProcessError::Environment(entry.clone()))?;
        let text =
            CString::new(entry.as_str()).map_err(|source| ProcessError::Nul { property: "env", source })?;
        match environment.iter_mut().find(|(other, _)| *other == key) {
            Some(slot) => slot.1 = text,
            None => environment.push((key, text)),
        }
    }
    Ok(environment.into_iter().map(|(_, text)| text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<ProcessPlan, ProcessError> {
        ProcessPlan::new(&serde_json::from_str(json).unwrap(), &Inherited::default())
    }

    #[test]
    fn a_process_is_read() {
        let plan = plan(
            r#"{"args": ["sh", "-c", "true"], "env": ["PATH=/bin", "A=1", "A=2", "E="], "cwd": "/tmp",
                "user": {"uid": 5, "gid": 6, "umask": 63, "additionalGids": [7]}, "noNewPrivileges": true,
                "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": ""}"#,
        )
        .unwrap();
        assert_eq!(plan.arguments.len(), 3);
        assert_eq!(plan.environment.len(), 3);
        assert_eq!(plan.variable("A"), Some(&b"2"[..]));
        assert_eq!(plan.variable("E"), Some(&b""[..]));
        assert_eq!(plan.variable("B"), None);
        assert!(plan.no_new_privileges);
        assert_eq!(plan.remarks.len(), 1, "{:?}", plan.remarks);
    }

    #[test]
    fn wrong_processes_are_refused() {
        for (json, text) in [
            (r#"{"args": [], "cwd": "/"}"#, "args is empty"),
            (r#"{"cwd": "/"}"#, "args is empty"),
            (r#"{"args": ["a\u0000b"], "cwd": "/"}"#, "NUL"),
            (r#"{"args": ["a"], "cwd": "tmp"}"#, "absolute"),
            (r#"{"args": ["a"], "cwd": "/", "env": ["NOVALUE"]}"#, "NOVALUE"),
            (r#"{"args": ["a"], "cwd": "/", "user": {"umask": 4095}}"#, "umask"),
            (r#"{"args": ["a"], "cwd": "/", "execCPUAffinity": {}}"#, "execCPUAffinity"),
        ] {
            let error = plan(json).unwrap_err().to_string();
            assert!(error.contains(text), "{json}: {error}");
        }
    }
}
