//! What happens without having been asked for, kept until the host asks.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bulkhead_agent_protocol::AgentEvent;
use tokio::sync::Notify;

/// Most events that are kept; the oldest go first.
const MAX_EVENTS: usize = 256;

/// Events in order.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    events: Mutex<VecDeque<AgentEvent>>,
    added: Notify,
}

impl EventQueue {
    /// A process of a container was killed for want of memory.
    pub(crate) fn push_oom(&self, container_id: &str) {
        let mut event = AgentEvent::new();
        event.set_oom(container_id.to_owned());
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
        drop(events);
        self.added.notify_one();
    }

    /// The next event, once there is one.
    pub(crate) async fn next(&self) -> AgentEvent {
        loop {
            let added = self.added.notified();
            let next = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match next {
                Some(event) => return event,
                None => added.await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn events_come_in_order_and_do_not_pile_up() {
        let queue = EventQueue::default();
        for number in 0..MAX_EVENTS + 2 {
            queue.push_oom(&number.to_string());
        }
        assert_eq!(queue.next().await.oom(), "2");
        assert_eq!(queue.next().await.oom(), "3");
        assert_eq!(queue.events.lock().unwrap().len(), MAX_EVENTS - 2);
    }
}
