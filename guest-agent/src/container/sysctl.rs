//! Kernel parameters of a container (`linux.sysctl`).

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use super::namespaces::Kind;
use crate::sys::{mount, path};

/// A parameter that is not a container's to set, or that could not be set.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum SysctlError {
    #[error("linux.sysctl: {0:?} is not a parameter of a namespace")]
    NotNamespaced(String),
    #[error("linux.sysctl: the guest's kernel has no parameter {0:?}")]
    Missing(String),
    #[error("can't open the kernel parameters")]
    Open(#[source] io::Error),
    #[error("can't set the kernel parameter {name} to {value:?}")]
    Set { name: String, value: String, source: io::Error },
}

/// Parameters of the IPC namespace.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Checks that every parameter belongs to a namespace. Where a container has none of its own, it is the guest's, which is
/// the pod's: the pod has the guest to itself.
pub(crate) fn check<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), SysctlError> {
    for name in names {
        let normal = normal_form(name);
        let is_plain = !relative_path(name).split('/').any(|part| matches!(part, "" | "." | ".."));
        let is_namespaced = normal.starts_with("net.")
            || normal.starts_with("fs.mqueue.")
            || IPC.contains(&normal.as_str())
            || matches!(normal.as_str(), "kernel.domainname" | "kernel.hostname");
        if !(is_plain && is_namespaced) {
            return Err(SysctlError::NotNamespaced(name.clone()));
        }
    }
    Ok(())
}

/// The kind of namespace that a parameter belongs to.
pub(crate) fn namespace_of(name: &str) -> Kind {
    match normal_form(name).as_str() {
        "kernel.domainname" | "kernel.hostname" => Kind::Uts,
        name if name.starts_with("net.") => Kind::Network,
        _ => Kind::Ipc,
    }
}

/// Sets the parameters, through a `/proc` of our own that nothing in the container can stand in for.
pub(crate) fn apply<'a>(
    parameters: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), SysctlError> {
    let mut proc: Option<OwnedFd> = None;
    for (name, value) in parameters {
        let proc = match &proc {
            Some(proc) => proc,
            None => proc.insert(mount::new_file_system("proc", None, &[], 0).map_err(SysctlError::Open)?),
        };
        let file = PathBuf::from(format!("sys/{}", relative_path(name)));
        path::open_beneath(proc.as_fd(), &file, libc::O_WRONLY)
            .and_then(|fd| fs::File::from(fd).write_all(value.as_bytes()))
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => SysctlError::Missing(name.clone()),
                _ => SysctlError::Set { name: name.clone(), value: value.clone(), source },
            })?;
    }
    Ok(())
}

/// sysctl(8) takes both forms: whichever separator comes first is the one between components.
fn separator_is_slash(name: &str) -> bool {
    name.find(['.', '/']).is_some_and(|position| name.as_bytes()[position] == b'/')
}

fn relative_path(name: &str) -> String {
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    if separator_is_slash(name) { name.to_owned() } else { name.chars().map(swap).collect() }
}

fn normal_form(name: &str) -> String {
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    if separator_is_slash(name) { name.chars().map(swap).collect() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(name: &str) -> bool {
        check([name.to_owned()].iter()).is_ok()
    }

    #[test]
    fn only_parameters_of_namespaces_are_allowed() {
        for name in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.1/rp_filter",
            "kernel.shmmax",
            "kernel/sem",
            "kernel.hostname",
            "fs.mqueue.msg_max",
        ] {
            assert!(allowed(name), "{name}");
        }
        for name in [
            "kernel.panic",
            "vm.swappiness",
            "kernel.hostname.x",
            "net",
            "kernel.sem.x",
            "../x",
            "net..x",
            "net/../vm/swappiness",
            "net./.vm",
        ] {
            assert!(!allowed(name), "{name}");
        }
    }

    #[test]
    fn both_separators_name_the_same_file() {
        assert_eq!(relative_path("net.ipv4.conf.eth0/1.rp_filter"), "net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(relative_path("net/ipv4/conf/eth0.1/rp_filter"), "net/ipv4/conf/eth0.1/rp_filter");
    }

    #[test]
    fn a_parameter_that_does_not_exist_is_an_error() {
        let parameter = [("net.bulkhead.nonsense".to_owned(), "1".to_owned())];
        let error = apply(parameter.iter().map(|(name, value)| (name, value))).unwrap_err();
        assert!(error.to_string().contains("has no parameter \"net.bulkhead.nonsense\""), "{error}");
    }
}
