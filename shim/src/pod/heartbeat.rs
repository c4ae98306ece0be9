//! Whether the guest's agent still answers.
//!
//! An agent that keeps its connection but is silent would leave a pod that nobody can do anything with. It is asked for an
//! answer now and then, whatever else it is asked. Containers that are paused don't matter: the agent is not among them. A
//! busy guest or node answers late: only a long silence counts, and none in which the host itself holds the VMM.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::Pod;
use super::agent::AgentError;

/// When a guest is asked, and when it is given up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heartbeat {
    /// Between an answer and the next question.
    pub interval: Duration,
    /// An answer that takes longer is missed.
    pub limit: Duration,
    /// So many missed answers in a row are the end.
    pub misses: u32,
}

impl Default for Heartbeat {
    /// A silence of 50 to 60 seconds.
    fn default() -> Heartbeat {
        Heartbeat { interval: Duration::from_secs(10), limit: Duration::from_secs(10), misses: 3 }
    }
}

impl Heartbeat {
    /// Answers when the pod's agent has been silent for too long, with that as the reason.
    pub(super) async fn stops(self, pod: &Pod) -> String {
        let mut missed = 0;
        let mut heard = Instant::now();
        while missed < self.misses {
            tokio::time::sleep(self.interval).await;
            pod.keep_limits();
            // Until it is up, others wait for it, with limits of their own.
            let is_up = pod.is_up.load(Ordering::Relaxed);
            if !is_up || answers(pod, self.limit).await || pod.vmm.is_held() {
                missed = 0;
                heard = Instant::now();
            } else {
                missed += 1;
            }
        }
        format!("the agent in the guest has not answered for {:.0} s", heard.elapsed().as_secs_f64())
    }
}

async fn answers(pod: &Pod, limit: Duration) -> bool {
    match pod.agent.ready(limit).await {
        // That the connection is lost is seen elsewhere. A refusal is an answer.
        Ok(_) | Err(AgentError::Refused { .. } | AgentError::Lost) => true,
        Err(AgentError::TimedOut { .. }) => false,
    }
}
