//! The directory with the templates.
//!
//! ```text
//! <template_dir>/            0700, root's: whoever can write here owns every pod
//!   <key>/                   a template; its name is its key
//!     memory                 guest memory, sparse
//!     state                  vCPUs and devices, in the VMM's own format
//!     working-set            the pages that its guests use first; may be missing
//!     meta.json              what it was made from, sizes and digests
//!     used                   its modification time is that of the last use
//!     refused                if the VMM would not restore it: why
//!     doubted                if a guest from it did not answer, and none has since: its modification time says since when
//!   .new-*, .old-*           on the way in and on the way out; never looked at
//!   digests.json             digests of kernels, images and VMMs
//!   lock                     held by whoever makes a template
//! ```
//!
//! A template appears under its key with one rename after everything in it is on disk, and disappears with one. Pods that
//! have its files open go on with them.

mod making;

pub(crate) use making::Draft;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::content::memory_digest;
use super::digests::{Digests, sha256};
use super::key::{FileDigests, Inputs, Key};
use super::recipe::Recipe;

const MEMORY: &str = "memory";
const STATE: &str = "state";
const WORKING_SET: &str = "working-set";
const META: &str = "meta.json";
const USED: &str = "used";
const REFUSED: &str = "refused";
const DOUBTED: &str = "doubted";
const LOCK: &str = "lock";

/// A template from which no guest has answered for so long is of no use. A node that is overloaded, or one guest that was stopped, is no
/// reason to take it from all others.
const DOUBT: Duration = Duration::from_secs(60);

/// The prefixes of what is being made and what is being removed.
const NEW: &str = ".new-";
const OLD: &str = ".old-";

/// The largest state file, bytes: far above what 16 vCPUs come to.
pub(crate) const MAX_STATE: u64 = 16 << 20;

/// `meta.json` and `refused` are never near this size, bytes.
const MAX_TEXT: u64 = 64 * 1024;

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory of the store.
    #[error("can't {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Others than root could put templates there.
    #[error(
        "{0} must belong to the user that the runtime runs as, and be closed to everybody else (chmod 700)"
    )]
    Open(PathBuf),
    /// Somebody else makes a template.
    #[error("another template is being made in {0}")]
    Busy(PathBuf),
    /// One template alone is larger than all may be.
    #[error("the template takes at least {size} bytes, and template_limit is {limit}")]
    Limit {
        /// What it takes on disk.
        size: u64,
        /// What all may take.
        limit: u64,
    },
    /// There is no such template.
    #[error("there is no template {0}")]
    NotFound(Key),
    /// It is not what was published.
    #[error("the template {} is damaged: {reason}; remove it, and it will be made again", .key.short())]
    Damaged {
        /// Which.
        key: Key,
        /// What is wrong with it.
        reason: String,
    },
}

/// `meta.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// What it was made from.
    pub inputs: Inputs,
    /// SHA-256 of `state`.
    pub state_sha256: String,
    /// SHA-256 of the pages in `memory` that are not zero, with their numbers.
    pub memory_sha256: String,
    /// Modification time of `memory`: it is never written again. Nanoseconds since the Unix epoch.
    pub memory_modified_ns: i64,
    /// The guest kernel's release, as the guest says.
    pub guest_kernel: String,
    /// The agent's version.
    pub agent: String,
}

/// A template's files, open for reading.
#[derive(Debug)]
pub(crate) struct Template {
    /// Its name.
    pub key: Key,
    /// Guest memory.
    pub memory: File,
    /// vCPUs and devices.
    pub state: File,
    /// The pages that its guests use first, in the VMM's own format, if that is known.
    pub working_set: Option<File>,
}

/// What there is for a recipe.
#[derive(Debug)]
pub(crate) enum Found {
    /// A template, checked as far as is possible without reading its memory.
    Usable(Template),
    /// None: it has to be made first.
    Missing,
    /// One that is not as it was made; it has been removed. For the operator.
    Damaged(String),
    /// One that the VMM refused before, and why.
    Refused(String),
}

/// One template for the operator's list.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub key: Key,
    /// What it was made from; `None` if that can't be read.
    pub meta: Option<Meta>,
    /// Bytes on disk.
    pub size: u64,
    /// When a pod last started from it, or it was made.
    pub used: SystemTime,
    /// Why the VMM refused it, if it did.
    pub refused: Option<String>,
}

/// A directory with templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    directory: PathBuf,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

impl Store {
    /// The store in this directory, which need not exist.
    pub fn new(directory: PathBuf) -> Store {
        Store { directory }
    }

    /// Looks for the template of a recipe, cheaply: no large file is read.
    pub(crate) fn find(&self, recipe: &Recipe) -> Result<Found, StoreError> {
        match self.is_there() {
            Ok(true) => {}
            Ok(false) => return Ok(Found::Missing),
            Err(error) => return Err(error),
        }
        let digests = Digests::load(&self.directory);
        let known = |path: &Path| digests.known(path).map_err(failed("look at", path));
        let (vmm, kernel, image) = (known(&recipe.vmm)?, known(&recipe.kernel)?, known(&recipe.image)?);
        let (Some(vmm), Some(kernel), Some(image)) = (vmm, kernel, image) else { return Ok(Found::Missing) };
        let key = Inputs::new(recipe, FileDigests { vmm, kernel, image }).key();
        let path = self.path(&key);
        if let Some(reason) = read_text(&path.join(REFUSED)) {
            return Ok(Found::Refused(reason));
        }
        match self.open(&key) {
            Ok((template, _)) => {
                // Only the order of removal depends on it.
                let _ = File::options()
                    .write(true)
                    .open(path.join(USED))
                    .and_then(|file| file.set_modified(SystemTime::now()));
                Ok(Found::Usable(template))
            }
            Err(StoreError::NotFound(_)) => Ok(Found::Missing),
            Err(StoreError::Damaged { reason, .. }) => {
                self.remove(&key)?;
                Ok(Found::Damaged(reason))
            }
            Err(error) => Err(error),
        }
    }

    /// Opens a template and checks everything but the contents of its memory.
    fn open(&self, key: &Key) -> Result<(Template, Meta), StoreError> {
        let path = self.path(key);
        let damaged = |reason: String| StoreError::Damaged { key: key.clone(), reason };
        let open = |name: &str| {
            let path = path.join(name);
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound if !self.path(key).exists() => StoreError::NotFound(key.clone()),
                    io::ErrorKind::NotFound => damaged(format!("{name} is missing")),
                    _ => StoreError::Io { action: "open", path, source: error },
                })
        };
        let (meta_file, memory, mut state) = (open(META)?, open(MEMORY)?, open(STATE)?);
        let unreadable =
            |name: &'static str| move |error: io::Error| damaged(format!("{name} can't be read: {error}"));

        let mut bytes = Vec::new();
        meta_file.take(MAX_TEXT).read_to_end(&mut bytes).map_err(unreadable(META))?;
        let meta: Meta =
            serde_json::from_slice(&bytes).map_err(|error| damaged(format!("{META}: {error}")))?;
        if meta.inputs.key() != *key {
            return Err(damaged("it was made for another key".into()));
        }
        let expected = u64::from(meta.inputs.memory_mib) << 20;
        let metadata = memory.metadata().map_err(unreadable(MEMORY))?;
        if metadata.len() != expected || !metadata.is_file() {
            return Err(damaged(format!("{MEMORY} has {} bytes instead of {expected}", metadata.len())));
        }
        if modified_ns(&metadata) != meta.memory_modified_ns {
            return Err(damaged(format!("{MEMORY} was changed after it was made")));
        }
        let length = state.metadata().map_err(unreadable(STATE))?.len();
        if length == 0 || length > MAX_STATE {
            return Err(damaged(format!("{STATE} has {length} bytes")));
        }
        if sha256(&mut state).map_err(unreadable(STATE))? != meta.state_sha256 {
            return Err(damaged(format!("{STATE} does not have its digest")));
        }
        io::Seek::rewind(&mut state).map_err(unreadable(STATE))?;
        // Only how fast it starts depends on this one.
        let working_set = open(WORKING_SET).ok();
        Ok((Template { key: key.clone(), memory, state, working_set }, meta))
    }

    /// Checks a template completely, its memory included.
    pub fn verify(&self, key: &Key) -> Result<(), StoreError> {
        let (template, meta) = self.open(key)?;
        let digest = memory_digest(&template.memory).map_err(failed("read", &self.path(key).join(MEMORY)))?;
        if digest != meta.memory_sha256 {
            let reason = format!("{MEMORY} does not have its digest");
            return Err(StoreError::Damaged { key: key.clone(), reason });
        }
        Ok(())
    }

    /// Every template, the most recently used first.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        if !self.is_there()? {
            return Ok(Vec::new());
        }
        let mut listed = Vec::new();
        for name in names(&self.directory)? {
            let Some(key) = name.to_str().and_then(|name| Key::try_from(name.to_owned()).ok()) else {
                continue;
            };
            let path = self.path(&key);
            let meta = File::open(path.join(META))
                .ok()
                .and_then(|file| serde_json::from_reader(file.take(MAX_TEXT)).ok());
            let size =
                [MEMORY, STATE, WORKING_SET, META].iter().map(|name| allocated(&path.join(name))).sum();
            let modified =
                |name: &str| fs::metadata(path.join(name)).and_then(|metadata| metadata.modified());
            let used = modified(USED).or_else(|_| modified(META)).unwrap_or(SystemTime::UNIX_EPOCH);
            listed.push(Listed { refused: read_text(&path.join(REFUSED)), key, meta, size, used });
        }
        listed.sort_by_key(|listed| std::cmp::Reverse(listed.used));
        Ok(listed)
    }

    /// Removes a template. Pods that started from it are not affected.
    pub fn remove(&self, key: &Key) -> Result<(), StoreError> {
        let path = self.path(key);
        let away = self.unique(OLD);
        match fs::rename(&path, &away) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound(key.clone()));
            }
            Err(error) => return Err(failed("remove", &path)(error)),
        }
        remove_tree(&away)
    }

    /// Marks a template as one that the VMM does not restore, so that it is not tried again.
    pub(crate) fn refuse(&self, key: &Key, reason: &str) -> Result<(), StoreError> {
        let path = self.path(key).join(REFUSED);
        fs::write(&path, reason).map_err(failed("write", &path))
    }

    /// Takes note that a guest from a template did not answer in time, and removes it if that has been so for [`DOUBT`] without any that did.
    pub fn doubt(&self, key: &Key) -> Result<(), StoreError> {
        let path = self.path(key).join(DOUBTED);
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // Somebody has removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed("write", &path)(error)),
        }
        let since = fs::metadata(&path).and_then(|metadata| metadata.modified());
        match since.map(|since| since.elapsed().unwrap_or_default()) {
            Ok(age) if age >= DOUBT => self.remove(key),
            // A guest has answered meanwhile.
            _ => Ok(()),
        }
    }

    /// Takes note that a guest from a template did answer.
    pub fn trust(&self, key: &Key) {
        // In nearly all cases there is no such file.
        let _ = fs::remove_file(self.path(key).join(DOUBTED));
    }

    /// The inode number of a template's memory file.
    pub(crate) fn memory_inode(&self, key: &Key) -> Result<u64, StoreError> {
        let path = self.path(key).join(MEMORY);
        fs::metadata(&path).map(|metadata| metadata.ino()).map_err(failed("look at", &path))
    }

    /// The template of this name, if there is one that pods can start from.
    pub(crate) fn sound(&self, key: &Key) -> Option<Template> {
        if self.path(key).join(REFUSED).exists() {
            return None;
        }
        self.open(key).map(|(template, _)| template).ok()
    }

    /// Whether the directory exists; an error if others than us can write to it.
    fn is_there(&self) -> Result<bool, StoreError> {
        let metadata = match fs::symlink_metadata(&self.directory) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed("look at", &self.directory)(error)),
        };
        let ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if !metadata.is_dir() || !ours || metadata.permissions().mode() & 0o077 != 0 {
            return Err(StoreError::Open(self.directory.clone()));
        }
        Ok(true)
    }

    fn create(&self) -> Result<(), StoreError> {
        if let Some(parent) = self.directory.parent() {
            fs::create_dir_all(parent).map_err(failed("create", parent))?;
        }
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("create", &self.directory)(error));
            }
            _ => {}
        }
        self.is_there().map(drop)
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.directory.join(String::from(key.clone()))
    }

    fn unique(&self, prefix: &str) -> PathBuf {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        self.directory.join(format!("{prefix}{}-{number}", std::process::id()))
    }
}

fn names(directory: &Path) -> Result<Vec<std::ffi::OsString>, StoreError> {
    let entries = || fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>();
    entries().map_err(failed("list", directory))
}

fn remove_tree(path: &Path) -> Result<(), StoreError> {
    let removed = match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(path),
        other => other,
    };
    match removed {
        // Somebody else removes it as well.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The text in a small file; `None` if there is none.
fn read_text(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_TEXT).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Bytes on disk; none for what is not there.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

fn modified_ns(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

#[cfg(test)]
mod tests;
