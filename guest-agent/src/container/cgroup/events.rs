//! Watches groups for processes killed for want of memory.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;

use tokio::io::unix::AsyncFd;

use super::Cgroup;
use crate::sys::{c_path, check, fd};

/// One inotify descriptor for the `memory.events` of every group.
#[derive(Debug)]
pub(crate) struct OomWatcher {
    inotify: AsyncFd<OwnedFd>,
    watches: Mutex<HashMap<i32, String>>,
}

impl OomWatcher {
    /// Opens the descriptor. Has to be called inside the runtime.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes a number and returns a new descriptor.
        let fd = check(unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) }.into())?;
        // SAFETY: the call returned a new descriptor that nothing else owns.
        let inotify = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        Ok(Self { inotify: fd::watch(inotify)?, watches: Mutex::default() })
    }

    /// Watches a container's group until it is removed. A group without the memory controller has nothing to watch.
    pub(crate) fn watch(&self, container_id: &str, cgroup: &Cgroup) -> io::Result<()> {
        let file = cgroup.file("memory.events");
        if !file.exists() {
            return Ok(());
        }
        let path = c_path(&file)?;
        // SAFETY: the path is NUL-terminated and outlives the call.
        let watch = check(
            unsafe { libc::inotify_add_watch(self.inotify.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) }
                .into(),
        )?;
        self.lock().insert(watch as i32, container_id.to_owned());
        Ok(())
    }

    /// The containers whose group had a memory event, once there are any.
    pub(crate) async fn changed(&self) -> io::Result<Vec<String>> {
        let mut buffer = [0u8; 4096];
        let read = |fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]| {
            // SAFETY: the buffer is writable for its whole length.
            check(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) } as _)
        };
        let length = loop {
            let mut guard = self.inotify.readable().await?;
            if let Ok(result) = guard.try_io(|fd| read(fd, &mut buffer)) {
                break usize::try_from(result?).unwrap_or_default();
            }
        };
        Ok(self.containers(&buffer[..length]))
    }

    /// Reads `struct inotify_event`s: watch, mask, cookie and name length, four bytes each, then the name.
    fn containers(&self, mut events: &[u8]) -> Vec<String> {
        let mut watches = self.lock();
        let mut ids = Vec::new();
        while let Some((header, rest)) = events.split_at_checked(16) {
            let word =
                |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let (watch, mask, name_length) = (word(0) as i32, word(4), word(12) as usize);
            if mask & libc::IN_IGNORED != 0 {
                watches.remove(&watch);
            } else if let Some(id) = watches.get(&watch).filter(|id| !ids.contains(*id)) {
                ids.push(id.clone());
            }
            events = rest.get(name_length..).unwrap_or_default();
        }
        ids
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, String>> {
        self.watches.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
