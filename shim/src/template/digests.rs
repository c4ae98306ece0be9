//! Digests of large files, remembered: a pod's start must not read 25 MB to learn that nothing has changed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::key::hex;

/// The file in the store.
const FILE: &str = "digests.json";

/// What it is before it has its name. Whoever is killed then leaves it as one that begins a template does, to be removed.
const TEMPORARY: &str = ".new-digests";

/// It never comes near this size, bytes.
const MAX_FILE: u64 = 1 << 20;

/// Entries: a handful in real life. What is dropped is only read again.
const MAX_ENTRIES: usize = 256;

/// A file that changed less than this ago may change again within the resolution of its time stamps.
const SETTLED: Duration = Duration::from_secs(1);

/// By what a file is recognised as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    identity: Identity,
    sha256: String,
}

/// What is remembered, by path.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Digests {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Digests {
    /// Reads what is remembered in the store's directory. A file that is not there or makes no sense is as good as empty:
    /// everything is read again.
    pub(crate) fn load(directory: &Path) -> Digests {
        let read = || -> io::Result<Digests> {
            let mut bytes = Vec::new();
            File::open(directory.join(FILE))?.take(MAX_FILE).read_to_end(&mut bytes)?;
            Ok(Digests { entries: serde_json::from_slice(&bytes)? })
        };
        read().unwrap_or_default()
    }

    /// Writes it back, atomically. Only one process at a time may do this.
    pub(crate) fn save(&mut self, directory: &Path) -> io::Result<()> {
        while self.entries.len() > MAX_ENTRIES {
            self.entries.pop_first();
        }
        let temporary = directory.join(TEMPORARY);
        let written = fs::write(&temporary, serde_json::to_vec(&self.entries)?);
        written.and_then(|()| fs::rename(&temporary, directory.join(FILE))).inspect_err(|_| {
            // The disk is full, most likely.
            let _ = fs::remove_file(&temporary);
        })
    }

    /// The digest of a file that has not changed since it was remembered.
    pub(crate) fn known(&self, path: &Path) -> io::Result<Option<String>> {
        let identity = identity(&fs::metadata(path)?);
        let entry = self.entries.get(path).filter(|entry| entry.identity == identity);
        Ok(entry.map(|entry| entry.sha256.clone()))
    }

    /// The digest of a file, read if need be, and remembered. Waits up to [`SETTLED`] for a file that was just written.
    pub(crate) fn learn(&mut self, path: &Path) -> io::Result<String> {
        if let Some(known) = self.known(path)? {
            return Ok(known);
        }
        let mut file = File::open(path)?;
        let identity = identity(&file.metadata()?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as i128;
        // Not so when the clock went back: the next change would give the file another time, too.
        if let Ok(age) = u64::try_from(now - identity.changed_ns) {
            thread::sleep(SETTLED.saturating_sub(Duration::from_nanos(age)));
        }
        if self::identity(&file.metadata()?) != identity {
            return Err(io::Error::other("it is being changed"));
        }
        let sha256 = sha256(&mut file)?;
        self.entries.insert(path.to_owned(), Entry { identity, sha256: sha256.clone() });
        Ok(sha256)
    }
}

/// The digest of all that is left to read, in hexadecimal.
pub(crate) fn sha256(reader: &mut impl Read) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(hex(&digest.finalize())),
            Ok(length) => digest.update(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn identity(metadata: &fs::Metadata) -> Identity {
    let ns = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    Identity {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.len(),
        modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
        changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_again_only_when_it_changed() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path();
        let path = directory.join("kernel");
        fs::write(&path, "abc").unwrap();
        let mut digests = Digests::load(directory);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let started = std::time::Instant::now();
        assert_eq!(digests.known(&path).unwrap(), None);
        assert_eq!(digests.learn(&path).unwrap(), abc);
        assert!(started.elapsed() > SETTLED / 2, "it had only just been written");
        assert_eq!(digests.learn(&path).unwrap(), abc);
        digests.save(directory).unwrap();
        let mut digests = Digests::load(directory);
        assert_eq!(digests.known(&path).unwrap().as_deref(), Some(abc));

        fs::write(&path, "abd").unwrap();
        assert_eq!(digests.known(&path).unwrap(), None, "same size, other contents");
        assert_ne!(digests.learn(&path).unwrap(), abc);

        fs::write(directory.join(FILE), "{").unwrap();
        assert_eq!(Digests::load(directory), Digests::default());
    }
}
