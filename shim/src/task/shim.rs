//! What one shim serves: a pod, once it has one, and the containers in it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use log::LevelFilter;
use tokio::sync::watch;

use super::container::{Container, Process};
use super::streams::Streams;
use crate::error::ApiError;
use crate::events::Publisher;
use crate::limit::RateLimit;
use crate::pod::Pod;
use crate::pod::agent::AgentError;
use crate::sandbox::members::Members;

/// Events of the guest that are passed on at once, and then one in each interval.
const EVENT_BURST: u32 = 32;
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// containerd has the last events within this time, or does without.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// The pod of this shim.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    /// The pod, alive or dead.
    pub pod: Option<Arc<Pod>>,
    /// The process in the guest whose PID namespace is the pod's: the first container's first one, if it has one of its own.
    pub first_process: Option<u32>,
    /// Set if the pod is a sandbox of the Sandbox API, which ends it: others go with their last container.
    pub sandbox: Option<Members>,
}

/// Releasing what a condemned pod held takes no longer, or something is wrong with the host.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The state behind the Task API.
#[derive(Debug)]
pub(crate) struct Shim {
    /// For containerd.
    pub publisher: Publisher,
    /// Logged whatever the configuration says: containerd's own debug switch.
    pub least_logged: LevelFilter,
    /// Held while a pod or a container is made or the pod is released: one at a time.
    pub slot: tokio::sync::Mutex<Slot>,
    /// The pod that was launched last, also while it is being made.
    launched: Mutex<Weak<Pod>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// For processes' standard streams that are no FIFOs.
    pub streams: Arc<Streams>,
    exiting: watch::Sender<bool>,
}

impl Shim {
    /// A shim without a pod.
    pub(crate) fn new(publisher: Publisher, least_logged: LevelFilter) -> Shim {
        Shim {
            publisher,
            least_logged,
            slot: tokio::sync::Mutex::default(),
            launched: Mutex::default(),
            containers: Mutex::default(),
            streams: Arc::default(),
            exiting: watch::Sender::new(false),
        }
    }

    /// The containers, by id.
    pub(crate) fn containers(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container by its id.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, ApiError> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| ApiError::not_found(format!("there is no container {id:?} in this pod")))
    }

    /// A process by its container's id and its own; the latter is empty for the container's first.
    pub(crate) fn process(
        &self,
        id: &str,
        exec_id: &str,
    ) -> Result<(Arc<Container>, Arc<Process>), ApiError> {
        let container = self.container(id)?;
        match container.process(exec_id) {
            Some(process) => Ok((container, process)),
            None => Err(ApiError::not_found(format!("there is no exec {exec_id:?} in the container {id:?}"))),
        }
    }

    /// Watches a process until it ends.
    pub(crate) fn watch(&self, container: &Arc<Container>, process: &Arc<Process>) {
        tokio::spawn(container.clone().watch(process.clone(), self.publisher.clone()));
    }

    /// Releases the pod if no container is left in it and it is no sandbox; tells whether there is none any more.
    pub(crate) async fn release_if_empty(&self) -> bool {
        let mut slot = self.slot.lock().await;
        if slot.sandbox.is_some() || !self.containers().is_empty() {
            return false;
        }
        if let Some(pod) = slot.pod.take() {
            pod.stop().await;
        }
        slot.first_process = None;
        true
    }

    /// Ends the pod whatever is in it; every container is reported as ended.
    pub(crate) async fn end_pod(&self) {
        let pod = self.slot.lock().await.pod.clone();
        if let Some(pod) = pod {
            pod.stop().await;
        }
        self.await_containers().await;
    }

    /// Answers when every container of a pod that ends is reported as ended.
    pub(crate) async fn await_containers(&self) {
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for container in containers {
            container.init.ended().await;
        }
    }

    /// Notes a pod that has been launched.
    pub(crate) fn note_launched(&self, pod: &Arc<Pod>) {
        *self.launched.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(pod);
    }

    /// The same as [`Shim::end_pod`], at once and without asking the guest. A pod that is only being made fails.
    pub(crate) async fn end_now(&self, reason: &str) {
        let pod = self.launched.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(pod) = pod {
            pod.condemn(reason);
        }
        if tokio::time::timeout(END_LIMIT, self.end_pod()).await.is_err() {
            log::error!("the pod could not be released within {} s", END_LIMIT.as_secs());
        }
    }

    /// Asks the server to end.
    pub(crate) fn exit(&self) {
        self.exiting.send_replace(true);
    }

    /// Answers when the server is to end, after containerd has had the last events.
    pub(crate) async fn exiting(&self) {
        // The sender is ours: it can't be gone.
        let _ = self.exiting.subscribe().wait_for(|exiting| *exiting).await;
        self.publisher.flush(FLUSH_LIMIT).await;
    }

    /// Passes events of the guest on until the pod is dead. A guest that floods us is slowed down.
    pub(crate) async fn pass_events(self: Arc<Self>, pod: Arc<Pod>) {
        let mut limit = RateLimit::new(EVENT_BURST, EVENT_INTERVAL);
        loop {
            let event = tokio::select! {
                biased;
                _ = pod.died() => return,
                event = pod.agent().next_event() => event,
            };
            match event {
                Ok(event) if event.has_oom() => {
                    if let Ok(container) = self.container(event.oom()) {
                        container.report_oom(&self.publisher);
                    }
                }
                Ok(_) => {}
                // The pod's death follows.
                Err(AgentError::Lost) => return,
                Err(error) => log::debug!("no events from the agent: {error}"),
            }
            if !limit.allow() {
                tokio::time::sleep(EVENT_INTERVAL).await;
            }
        }
    }
}
