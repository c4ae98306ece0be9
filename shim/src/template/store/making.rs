//! How templates come into the store: one process at a time makes them, and they appear whole.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{
    LOCK, MEMORY, META, Meta, NEW, OLD, STATE, Store, StoreError, USED, WORKING_SET, allocated, failed,
    modified_ns, names, remove_tree,
};
use crate::template::content::memory_digest;
use crate::template::digests::{Digests, sha256};
use crate::template::key::{FileDigests, Inputs, Key};
use crate::template::recipe::Recipe;

/// The right to make templates. One process has it at a time.
#[derive(Debug)]
pub(crate) struct BuildLock {
    _lock: Flock<File>,
}

/// A template in the making; removed when it is not published.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(super) path: PathBuf,
    /// Guest memory, of the right size.
    pub memory: File,
    /// Empty.
    pub state: File,
}

impl Store {
    /// Takes the right to make templates, waiting up to `limit` for it, and removes what earlier makers left half done.
    pub(crate) fn lock(&self, limit: Duration) -> Result<BuildLock, StoreError> {
        self.create()?;
        let path = self.directory.join(LOCK);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        let deadline = Instant::now() + limit;
        let lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => {
                    if Instant::now() >= deadline {
                        return Err(StoreError::Busy(self.directory.clone()));
                    }
                    file = back;
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err((_, errno)) => return Err(failed("lock", &path)(errno.into())),
            }
        };
        for name in names(&self.directory)? {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with(NEW) || name.starts_with(OLD) {
                remove_tree(&self.directory.join(name))?;
            }
        }
        Ok(BuildLock { _lock: lock })
    }

    /// What a template of this recipe depends on, now. Reads files that changed.
    pub(crate) fn inputs(&self, recipe: &Recipe, _lock: &BuildLock) -> Result<Inputs, StoreError> {
        let mut digests = Digests::load(&self.directory);
        let mut learn = |path: &Path| digests.learn(path).map_err(failed("read", path));
        let files = FileDigests {
            vmm: learn(&recipe.vmm)?,
            kernel: learn(&recipe.kernel)?,
            image: learn(&recipe.image)?,
        };
        digests.save(&self.directory).map_err(failed("remember digests in", &self.directory))?;
        Ok(Inputs::new(recipe, files))
    }

    /// Begins a template with `memory_mib` MiB of guest memory.
    pub(crate) fn draft(&self, memory_mib: u32, _lock: &BuildLock) -> Result<Draft, StoreError> {
        let path = self.unique(NEW);
        DirBuilder::new().mode(0o700).create(&path).map_err(failed("create", &path))?;
        let create = |name: &str| {
            let path = path.join(name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.open(&path).map_err(failed("create", &path))
        };
        let (memory, state) = match (create(MEMORY), create(STATE)) {
            (Ok(memory), Ok(state)) => (memory, state),
            (Err(error), _) | (_, Err(error)) => {
                let _ = fs::remove_dir_all(&path);
                return Err(error);
            }
        };
        let draft = Draft { path, memory, state };
        let size = u64::from(memory_mib) << 20;
        draft.memory.set_len(size).map_err(failed("size", &draft.path.join(MEMORY)))?;
        Ok(draft)
    }

    /// A new place for files that nobody needs when the lock is released.
    pub(crate) fn scratch(&self, _lock: &BuildLock) -> PathBuf {
        self.unique(NEW)
    }

    /// Puts a finished draft on disk and in its place, and removes the least recently used templates above `limit`
    /// bytes. Nobody may write to the draft's files any more.
    pub(crate) fn publish(
        &self,
        draft: Draft,
        inputs: Inputs,
        guest: (String, String),
        limit: u64,
        _lock: &BuildLock,
    ) -> Result<Key, StoreError> {
        let key = inputs.key();
        let path = |name: &str| draft.path.join(name);
        for (file, name) in [(&draft.memory, MEMORY), (&draft.state, STATE)] {
            file.sync_all().map_err(failed("write", &path(name)))?;
        }
        let mut state = &draft.state;
        io::Seek::rewind(&mut state).map_err(failed("read", &path(STATE)))?;
        let metadata = draft.memory.metadata().map_err(failed("look at", &path(MEMORY)))?;
        let meta = Meta {
            inputs,
            state_sha256: sha256(&mut state).map_err(failed("read", &path(STATE)))?,
            memory_sha256: memory_digest(&draft.memory).map_err(failed("read", &path(MEMORY)))?,
            memory_modified_ns: modified_ns(&metadata),
            guest_kernel: guest.0,
            agent: guest.1,
        };
        write_synced(&path(META), &serde_json::to_vec_pretty(&meta).unwrap_or_default())?;
        write_synced(&path(USED), b"")?;
        sync_directory(&draft.path)?;

        let size = [MEMORY, STATE, WORKING_SET, META].iter().map(|name| allocated(&path(name))).sum();
        if size > limit {
            return Err(StoreError::Limit { size, limit });
        }
        match self.remove(&key) {
            Ok(()) | Err(StoreError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let place = self.path(&key);
        fs::rename(&draft.path, &place).map_err(failed("publish", &place))?;
        sync_directory(&self.directory)?;
        self.shrink(limit, &key)?;
        Ok(key)
    }

    /// Adds the list of the pages that guests of a template use first.
    pub(crate) fn add_working_set(
        &self,
        key: &Key,
        list: &[u8],
        _lock: &BuildLock,
    ) -> Result<(), StoreError> {
        let place = self.path(key).join(WORKING_SET);
        let draft = self.path(key).join(".working-set");
        let _ = fs::remove_file(&draft);
        let written = write_synced(&draft, list);
        written.and_then(|()| fs::rename(&draft, &place).map_err(failed("publish", &place))).inspect_err(
            |_| {
                let _ = fs::remove_file(&draft);
            },
        )
    }

    /// Removes the least recently used templates but `keep` until all together take at most `limit` bytes.
    fn shrink(&self, limit: u64, keep: &Key) -> Result<(), StoreError> {
        let listed = self.list()?;
        let mut total: u64 = listed.iter().map(|listed| listed.size).sum();
        for old in listed.iter().rev().filter(|listed| listed.key != *keep) {
            if total <= limit {
                break;
            }
            match self.remove(&old.key) {
                Ok(()) | Err(StoreError::NotFound(_)) => total -= old.size,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Gone when it was published.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed("write", path))
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(failed("write", path))
}
