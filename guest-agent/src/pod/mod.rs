//! The pod's containers and their processes: what exists, in which state, and how it gets from one to the next.

mod container;
mod error;
mod events;
mod pause;
mod process;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent_protocol::{POD_PID_NAMESPACE, Stdio};
use bulkhead_base::id::{MAX_ID, is_sound};

use crate::container::cgroup::Hierarchy;
use crate::container::cgroup::events::OomWatcher;
use crate::container::namespaces::Kind;
use crate::container::plan::ContainerPlan;
use crate::reaper::Reaper;
use crate::stdio::Streams;

pub(crate) use container::Container;
pub(crate) use error::{ErrorClass, PodError};
pub(crate) use events::EventQueue;
pub(crate) use process::Process;

/// Everything there is of the pod inside the guest.
#[derive(Debug)]
pub struct Pod {
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    hierarchy: Hierarchy,
    oom: OomWatcher,
    events: EventQueue,
    null: OwnedFd,
    containers: Mutex<HashMap<String, Slot>>,
    remarks: Mutex<HashSet<String>>,
    /// The first process of the PID namespace that containers share.
    pause: Mutex<Option<libc::pid_t>>,
}

/// Most different remarks that are logged.
const MAX_REMARKS: usize = 64;

/// A container's place, so that its id is taken while it is being made or removed.
#[derive(Debug, Clone)]
enum Slot {
    Busy,
    Ready(Arc<Container>),
}

impl Pod {
    /// An empty pod. Has to be called inside the runtime.
    ///
    /// `cgroups` is where the cgroup v2 hierarchy is mounted.
    pub fn new(reaper: Arc<Reaper>, streams: Arc<Streams>, cgroups: &Path) -> Result<Arc<Self>, PodError> {
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        let pod = Arc::new(Self {
            reaper,
            streams,
            hierarchy: Hierarchy::open(cgroups)?,
            oom: OomWatcher::new()
                .map_err(|source| PodError::System { what: "watch for memory events", source })?,
            events: EventQueue::default(),
            null: null.map_err(|source| PodError::System { what: "open /dev/null", source })?.into(),
            containers: Mutex::default(),
            remarks: Mutex::default(),
            pause: Mutex::default(),
        });
        tokio::spawn(pod.clone().watch_memory());
        Ok(pod)
    }

    /// Events for the host.
    pub(crate) fn events(&self) -> &EventQueue {
        &self.events
    }

    /// Sets a container up. Returns its first process, which waits to be started.
    pub(crate) async fn create(
        self: &Arc<Self>,
        id: &str,
        spec: &[u8],
        stdio: Stdio,
    ) -> Result<Arc<Process>, PodError> {
        check_id("container", id)?;
        let mut plan = ContainerPlan::new(spec).map_err(Box::new)?;
        self.share_processes(&mut plan)?;
        self.reserve(id)?;
        let created = Container::create(self, id, plan, stdio).await;
        let mut containers = self.lock();
        match created {
            Ok(container) => {
                let process = container.init().clone();
                containers.insert(id.to_owned(), Slot::Ready(container));
                Ok(process)
            }
            Err(error) => {
                containers.remove(id);
                Err(error)
            }
        }
    }

    /// A container that is set up.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        match self.lock().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Busy) => Err(PodError::Busy(id.to_owned())),
            None => Err(PodError::NoContainer(id.to_owned())),
        }
    }

    /// A process of a container; an empty exec id is the first one.
    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, PodError> {
        let container = self.container(id)?;
        if exec_id.is_empty() { Ok(container.init().clone()) } else { container.exec(exec_id) }
    }

    /// Removes a container whose first process has ended or was never started.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        container.init().require_deletable(id)?;
        self.lock().insert(id.to_owned(), Slot::Busy);
        let removed = container.remove(self).await;
        let mut containers = self.lock();
        match &removed {
            Ok(()) => containers.remove(id),
            // It can be tried again.
            Err(_) => containers.insert(id.to_owned(), Slot::Ready(container)),
        };
        removed
    }

    /// Whether there is no container.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Ends every process; for the end of the pod.
    pub async fn end_everything(&self) {
        let slots: Vec<Slot> = self.lock().values().cloned().collect();
        for slot in slots {
            if let Slot::Ready(container) = slot
                && let Err(error) = container.cgroup().remove().await
            {
                log::warn!("container {}: {}", container.id(), bulkhead_base::chain(&error));
            }
        }
    }

    /// Logs what a container has to do without, once for all containers: most of them lack the same.
    fn remark(&self, container_id: &str, remark: &str) {
        let mut remarks = self.remarks.lock().unwrap_or_else(PoisonError::into_inner);
        if remarks.len() < MAX_REMARKS && remarks.insert(remark.to_owned()) {
            log::warn!("container {container_id}: {remark}");
        }
    }

    /// Names the pod's PID namespace by the process that has it, which is started for the first container that asks for it.
    fn share_processes(&self, plan: &mut ContainerPlan) -> Result<(), PodError> {
        let shared = Path::new(POD_PID_NAMESPACE);
        if !plan.namespaces.joins(Kind::Pid, shared) {
            return Ok(());
        }
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = match *pause {
            Some(pid) => pid,
            None => *pause.insert(pause::start().map_err(|source| PodError::System {
                what: "start the first process of the pod's PID namespace",
                source,
            })?),
        };
        plan.namespaces.join_instead(Kind::Pid, format!("/proc/{pid}/ns/pid").into());
        Ok(())
    }

    fn reserve(&self, id: &str) -> Result<(), PodError> {
        let mut containers = self.lock();
        if containers.contains_key(id) {
            return Err(PodError::ContainerExists(id.to_owned()));
        }
        containers.insert(id.to_owned(), Slot::Busy);
        Ok(())
    }

    async fn watch_memory(self: Arc<Self>) {
        loop {
            match self.oom.changed().await {
                Ok(ids) => {
                    let containers = ids.iter().filter_map(|id| self.container(id).ok());
                    containers.filter(|container| container.has_new_oom_kills()).for_each(|container| {
                        self.events.push_oom(container.id());
                    });
                }
                Err(error) => {
                    log::error!("memory events are no longer seen: {error}");
                    return;
                }
            }
        }
    }

    fn null(&self) -> std::os::fd::BorrowedFd<'_> {
        self.null.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_id(what: &'static str, id: &str) -> Result<(), PodError> {
    if !is_sound(id) {
        return Err(PodError::Id { what, id: id.chars().take(2 * MAX_ID).collect() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_ids_are_taken() {
        for id in ["a", "redis.1_2-3", &"x".repeat(76)] {
            assert!(check_id("container", id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "ä", "a\0", &"x".repeat(77)] {
            assert!(check_id("container", id).is_err(), "{id}");
        }
    }
}
