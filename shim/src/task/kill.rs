//! Signals, and the host's promise of SIGKILL: what it was sent to ends in time, whatever the guest does or says.
//!
//! The guest is asked first, since it alone can end one process of many. When a killed container has not ended in
//! [`KILL_LIMIT`], its pod's virtual machine is ended instead, and with it everything in the pod. A killed exec may be
//! stuck for a reason of the host's (a volume that hangs): it is given up alone, as long as the guest answers at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_shim_protos::api::KillRequest;

use super::container::{Container, Process, State};
use super::service::ended;
use super::shim::Shim;
use crate::error::{ApiError, Code};
use crate::events::Publisher;
use crate::pod::DEATH_LIMIT;
use crate::pod::agent::AgentError;

/// From SIGKILL to the end of the process, or else of its pod: as long as can be, since a large process takes its time to
/// give its memory back, but containerd is to know of the end within ten seconds.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(8);

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// The highest signal there is.
const SIGNALS: u32 = 64;

/// Sends a process, or all of a container, a signal.
pub(crate) async fn kill(shim: &Shim, request: &KillRequest) -> Result<(), ApiError> {
    let (container, process) = shim.process(&request.id, &request.exec_id)?;
    if request.signal > SIGNALS {
        return Err(ApiError::invalid(format!("there is no signal {}", request.signal)));
    }
    if request.all && !request.exec_id.is_empty() {
        return Err(ApiError::invalid("an exec can't be signalled with all processes of its container"));
    }
    // Without a PID namespace of its own, a container's processes may outlive its first.
    let may_outlive = request.all && !container.own_pid_namespace && container.pod.death().is_none();
    if !may_outlive && matches!(process.state(), State::Stopped(_)) {
        return Err(ended(&container));
    }
    if request.signal == SIGKILL {
        return destroy(shim, &container, &process, request.all).await;
    }
    let answer =
        container.pod.agent().signal(&request.id, &request.exec_id, request.signal, request.all).await;
    match answer {
        Ok(()) => Ok(()),
        Err(AgentError::Lost) => {
            let _ = tokio::time::timeout(DEATH_LIMIT, container.pod.died()).await;
            Err(ended(&container))
        }
        Err(error @ AgentError::Refused { code: Code::NOT_FOUND, .. }) => Err(error.into()),
        // A caller that is told of a failure may never come to SIGKILL. Sent is all that it asked for.
        Err(error) => {
            log::warn!("signal {} for {} {}: {error}", request.signal, request.id, request.exec_id);
            Ok(())
        }
    }
}

/// Sends SIGKILL, and sees to it that it is the end; returns when the guest has been told, or was not needed.
pub(crate) async fn destroy(
    shim: &Shim,
    container: &Arc<Container>,
    process: &Arc<Process>,
    all: bool,
) -> Result<(), ApiError> {
    let answered = Arc::new(AtomicBool::new(false));
    tokio::spawn(enforce(container.clone(), process.clone(), answered.clone(), shim.publisher.clone()));
    let pod = &container.pod;
    let answer = tokio::select! {
        biased;
        answer = pod.agent().signal(&container.id, &process.exec_id, SIGKILL, all) => answer,
        _ = pod.died() => return Ok(()),
    };
    answered.store(matches!(answer, Ok(()) | Err(AgentError::Refused { .. })), Ordering::Relaxed);
    match answer {
        Ok(()) => Ok(()),
        Err(error @ AgentError::Refused { code: Code::NOT_FOUND, .. }) => Err(error.into()),
        Err(error) => {
            log::warn!("SIGKILL for {} {}: {error}", container.id, process.exec_id);
            if matches!(process.state(), State::Stopped(_)) {
                // It was about those that outlive it, of which the host can't know whether they end.
                pod.condemn(format!("SIGKILL for all processes of {} failed: {error}", container.id));
            }
            process.ended().await;
            Ok(())
        }
    }
}

/// The deadline of one SIGKILL.
async fn enforce(
    container: Arc<Container>,
    process: Arc<Process>,
    answered: Arc<AtomicBool>,
    publisher: Publisher,
) {
    if tokio::time::timeout(KILL_LIMIT, process.ended()).await.is_ok() {
        return;
    }
    let exec = &process.exec_id;
    let what = if exec.is_empty() { container.id.clone() } else { format!("{exec} in {}", container.id) };
    let reason = format!("the guest did not end {what} within {} s of SIGKILL", KILL_LIMIT.as_secs());
    if !exec.is_empty() && answered.load(Ordering::Relaxed) {
        log::warn!("{reason}: it is given up");
        container.give_up(&process, &publisher).await;
    } else {
        container.pod.condemn(reason);
    }
}
