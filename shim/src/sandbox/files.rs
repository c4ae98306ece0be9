//! The files that all containers of a pod have in common, and that nobody else makes for a sandbox of a shim's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::config::{Dns, PodConfig};
use crate::error::{Classify, Code};

/// Where they are in the pod's directory, which goes with the pod.
const DIRECTORY: &str = "etc";

/// What is taken of a file of the host's.
const MAX_COPIED: u64 = 1 << 20;

/// A file that the containers of a pod have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFile {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where containers have it.
    pub destination: &'static str,
}

/// A file that can't be made.
#[derive(Debug, thiserror::Error)]
#[error("can't write the pod's {path}")]
pub(crate) struct FileError {
    path: PathBuf,
    source: io::Error,
}

impl Classify for FileError {
    fn code(&self) -> Code {
        Code::INTERNAL
    }
}

/// Makes the pod's files below its directory: what the kubelet wants in them, or else what the node has.
pub(crate) fn write(directory: &Path, config: &PodConfig) -> Result<Vec<PodFile>, FileError> {
    let directory = directory.join(DIRECTORY);
    fs::create_dir(&directory).map_err(|source| FileError { path: directory.clone(), source })?;
    let hostname = if config.hostname.is_empty() { node_name() } else { config.hostname.clone() };
    let resolv_conf = match &config.dns {
        Some(dns) if !is_empty(dns) => resolv_conf(dns),
        _ => copy("/etc/resolv.conf"),
    };
    let files = [
        ("hostname", format!("{hostname}\n"), "/etc/hostname"),
        ("hosts", copy("/etc/hosts"), "/etc/hosts"),
        ("resolv.conf", resolv_conf, "/etc/resolv.conf"),
    ];
    let write = |(name, content, destination): (&str, String, &'static str)| {
        let source = directory.join(name);
        match fs::write(&source, content) {
            Ok(()) => Ok(PodFile { source, destination }),
            Err(error) => Err(FileError { path: source, source: error }),
        }
    };
    files.into_iter().map(write).collect()
}

fn is_empty(dns: &Dns) -> bool {
    dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty()
}

/// As resolv.conf(5) has it.
fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// The node's own; nothing where it has none.
fn copy(path: &str) -> String {
    use std::io::Read;
    let mut text = String::new();
    if let Ok(file) = fs::File::open(path) {
        let _ = file.take(MAX_COPIED).read_to_string(&mut text);
    }
    text
}

fn node_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_files_are_the_kubelets_or_the_nodes() {
        let directory = tempfile::tempdir().unwrap();
        let dns = Dns {
            servers: vec!["10.0.0.10".into(), "fd00::10".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        let config = PodConfig { hostname: "web-0".into(), dns: Some(dns), ..PodConfig::default() };
        let files = write(directory.path(), &config).unwrap();
        let content = |destination: &str| {
            let file = files.iter().find(|file| file.destination == destination).unwrap();
            fs::read_to_string(&file.source).unwrap()
        };
        assert_eq!(content("/etc/hostname"), "web-0\n");
        assert_eq!(
            content("/etc/resolv.conf"),
            "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::10\noptions ndots:5\n"
        );
        assert_eq!(content("/etc/hosts"), copy("/etc/hosts"));
        assert!(write(directory.path(), &config).is_err(), "they are there already");
    }
}
