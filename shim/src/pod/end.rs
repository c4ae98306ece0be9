//! How a pod ends: by itself, because it is stopped, or because the host condemns it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::heartbeat::Heartbeat;
use super::machine::{self, ControlListener};
use super::{Pod, PodError, now_ns};
use crate::error::ApiError;

/// How long the guest has to power itself off before it is killed.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(2);

/// The VMM's own report of the end may come this much later than other signs of it.
const REASON_LIMIT: Duration = Duration::from_millis(300);

/// A pod whose agent is lost is declared dead within this time.
pub(crate) const DEATH_LIMIT: Duration = Duration::from_secs(3);

/// Why a pod is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Death {
    /// For the operator.
    pub reason: String,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: i64,
}

impl Pod {
    /// Why the pod is dead, if it is.
    pub(crate) fn death(&self) -> Option<Death> {
        self.death.borrow().clone()
    }

    /// Answers when the pod is dead.
    pub(crate) async fn died(&self) -> Death {
        what_comes(&self.death).await
    }

    /// An error for requests to a dead pod.
    pub(crate) fn check_alive(&self) -> Result<(), ApiError> {
        match self.death() {
            Some(death) => Err(PodError::Dead(death.reason).into()),
            None => Ok(()),
        }
    }

    /// Ends the virtual machine at once, whatever the guest does or says. The pod's death follows, with this reason.
    pub(crate) fn condemn(&self, reason: impl Into<String>) {
        self.condemned.send_if_modified(|condemned| {
            let is_first = condemned.is_none();
            condemned.get_or_insert_with(|| reason.into());
            is_first
        });
    }

    /// Answers when the pod has been condemned.
    async fn sentence(&self) -> String {
        what_comes(&self.condemned).await
    }

    /// Powers the guest off and releases everything. Idempotent; returns when it is done, whoever began it.
    pub(crate) async fn stop(&self) {
        if !self.stopping.send_replace(true) && self.death().is_none() {
            let powered_off = self.is_up.load(Ordering::Relaxed) && self.power_off().await;
            if !powered_off {
                self.condemn("the host has ended it");
            }
        }
        self.died().await;
        self.resources.lock().await.release().await;
    }

    /// Asks the guest to power itself off; tells whether it did.
    async fn power_off(&self) -> bool {
        self.agent.power_off(POWER_OFF_LIMIT).await;
        let ended = tokio::time::timeout(POWER_OFF_LIMIT, self.died()).await.is_ok();
        if !ended {
            log::warn!("the guest did not power off within {} s and is killed", POWER_OFF_LIMIT.as_secs());
        }
        ended
    }

    /// Waits for the end, whichever part of the pod it comes from, tells everybody, and releases everything.
    pub(super) async fn watch_over(self: Arc<Self>, listening: ControlListener, heartbeat: Heartbeat) {
        let (vmm, fs_server) = self.resources.lock().await.processes();
        let reported = listening.run();
        tokio::pin!(reported);
        let first = tokio::select! {
            biased;
            reason = &mut reported => Sign::Reported(reason),
            ended = wait_for(&vmm) => Sign::Seen(ended.map(|ended| format!("the VMM {ended}"))),
            ended = wait_for(&fs_server) => Sign::Seen(ended.map(|ended| format!("the file server {ended}"))),
            () = self.agent.lost() => Sign::Seen(Some("the agent closed its connection".to_owned())),
            reason = self.sentence() => Sign::Condemned(reason),
            reason = heartbeat.stops(&self) => Sign::Condemned(reason),
        };
        // Whatever was seen first: the VMM knows best, if it still says something; then how it ended.
        let (reported, seen) = match first {
            Sign::Reported(reason) => (Some(reason), None),
            Sign::Seen(seen) => (tokio::time::timeout(REASON_LIMIT, &mut reported).await.ok(), seen),
            Sign::Condemned(reason) => (None, Some(reason)),
        };
        let reason = match reported {
            Some(Some(reason)) => Some(reason.to_string()),
            Some(None) => match tokio::time::timeout(REASON_LIMIT, wait_for(&vmm)).await {
                Ok(Some(ended)) => Some(format!("the VMM {ended}")),
                _ => seen,
            },
            None => seen,
        };
        self.control.close();
        let mut resources = self.resources.lock().await;
        // Before anybody hears of it: who waits for the end of a process may rely on it.
        resources.kill();
        let reason = reason.unwrap_or_else(|| "the VMM closed its control socket".to_owned());
        let reason = if *self.stopping.borrow() {
            log::info!("the pod's virtual machine has ended: {reason}");
            reason
        } else {
            let reason = resources.explain_end(reason);
            log::error!("the pod's virtual machine has ended unexpectedly: {reason}");
            reason
        };
        // Told first: nobody has to wait for what is only housekeeping.
        self.death.send_replace(Some(Death { reason, at_ns: now_ns() }));
        self.agent.hang_up();
        resources.release().await;
    }
}

/// The first sign of the end.
enum Sign {
    /// From the VMM itself, or its socket just closed.
    Reported(Option<bulkhead_vmm_protocol::ExitReason>),
    /// Seen from outside.
    Seen(Option<String>),
    /// The host's own decision: nobody is asked.
    Condemned(String),
}

async fn wait_for(process: &Option<Arc<machine::Jailed>>) -> Option<crate::host::process::Ended> {
    match process {
        Some(process) => process.child.wait().await,
        None => std::future::pending().await,
    }
}

/// What will be there, or is already.
async fn what_comes<T: Clone>(place: &watch::Sender<Option<T>>) -> T {
    let mut place = place.subscribe();
    loop {
        let now = place.borrow_and_update().clone();
        if let Some(now) = now {
            return now;
        }
        if place.changed().await.is_err() {
            // The sender is ours: it can't be gone.
            std::future::pending::<()>().await;
        }
    }
}
