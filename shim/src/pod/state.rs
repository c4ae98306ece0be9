//! What the pod holds on the host, on disk as it comes to be: `state.json` in the pod's directory.
//!
//! The `delete` action has no memory but this. Each thing is recorded before or as soon as it exists, so that a shim
//! which is killed at any moment leaves nothing that `delete` can't find.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::process::ProcessId;
use crate::net::Record;

/// The pod's directory in the bundle of the container that the pod was made for.
pub const DIRECTORY: &str = "bulkhead";

const FILE: &str = "state.json";

/// The record itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The shim that owns the pod.
    pub shim: Option<ProcessId>,
    /// The VMM.
    pub vmm: Option<ProcessId>,
    /// The file server.
    pub fs_server: Option<ProcessId>,
    /// The pod's network namespace, if its interfaces are joined to taps.
    pub network: Option<Record>,
    /// The pod's cgroup.
    pub cgroup: Option<PathBuf>,
    /// Parents of the cgroup that the shim made, outermost first.
    pub cgroup_parents: Vec<PathBuf>,
}

/// The record can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file can't be written.
    #[error("can't write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file can't be read.
    #[error("can't read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not what we wrote.
    #[error("{path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl State {
    /// Replaces the record in the pod's directory, atomically.
    pub(crate) fn save(&self, directory: &Path) -> Result<(), StateError> {
        let path = directory.join(FILE);
        write_atomically(&path, &serde_json::to_vec(self).unwrap_or_default())
            .map_err(|source| StateError::Write { path, source })
    }

    /// Reads the record from the pod's directory; `None` if there is none.
    pub fn load(directory: &Path) -> Result<Option<State>, StateError> {
        let path = directory.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| StateError::Damaged { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::Read { path, source }),
        }
    }
}

/// How a container ended, kept in its own bundle for `delete`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    /// The process id that containerd was told.
    pub pid: u32,
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Nanoseconds since the Unix epoch.
    pub exited_at_ns: i64,
}

const EXIT_FILE: &str = "bulkhead-exit.json";

impl ExitRecord {
    /// Writes the record into a container's bundle.
    pub(crate) fn save(&self, bundle: &Path) -> io::Result<()> {
        write_atomically(&bundle.join(EXIT_FILE), &serde_json::to_vec(self).unwrap_or_default())
    }

    /// Reads it; `None` if there is none, or none that makes sense.
    pub(crate) fn load(bundle: &Path) -> Option<ExitRecord> {
        serde_json::from_slice(&fs::read(bundle.join(EXIT_FILE)).ok()?).ok()
    }
}

fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    fs::File::create(&temporary)?.write_all(bytes)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_survives_and_a_damaged_one_is_told() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path();
        assert_eq!(State::load(directory).unwrap(), None);
        let state = State {
            shim: ProcessId::current().ok(),
            cgroup: Some("/sys/fs/cgroup/x".into()),
            ..State::default()
        };
        state.save(directory).unwrap();
        assert_eq!(State::load(directory).unwrap(), Some(state));

        fs::write(directory.join(FILE), "{").unwrap();
        assert!(matches!(State::load(directory), Err(StateError::Damaged { .. })));

        let exit = ExitRecord { pid: 7, status: 137, exited_at_ns: 5 };
        exit.save(directory).unwrap();
        assert_eq!(ExitRecord::load(directory), Some(exit));
    }
}
