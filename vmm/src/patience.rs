//! How readily a thread of disks interrupts the guest that it shares a CPU of the node with.
//!
//! The first of many requests would have the thread run at once, serve that one and interrupt the guest, which then makes the next:
//! for each an exit, two switches of the CPU and an interrupt. A thread that waits until the guest gives up the CPU finds them all. But of
//! a guest that makes one request and waits for it, each would take longer. Which of the two a guest does can't be seen from requests that
//! are served at once, so now and then it is tried. On a CPU of its own the thread runs at once either way.

use std::io;

/// Requests that have to come together for it to be worth while.
const MANY: u32 = 4;

/// Times that requests come between two tries: what is begun with, and what it becomes by doubling as long as tries are in vain.
const TRY_EVERY: u32 = 32;
const TRY_EVERY_AT_MOST: u32 = 4096;

/// What a thread has learnt so far.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Whether the thread lets others finish first.
    patient: bool,
    /// Times until the next try.
    left: u32,
    /// Times between tries.
    every: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { patient: false, left: TRY_EVERY, every: TRY_EVERY }
    }
}

impl Patience {
    /// Learns from how many requests were there at once, and has the calling thread act accordingly.
    pub(crate) fn found(&mut self, requests: u32) {
        let before = self.patient;
        self.learn(requests);
        if self.patient != before && set_policy(self.patient).is_err() {
            // As nothing changed, nothing was tried.
            self.patient = before;
        }
    }

    fn learn(&mut self, requests: u32) {
        if !self.patient {
            self.left -= 1;
            if self.left == 0 {
                self.patient = true;
                // Already now: it may turn out that the thread can't try.
                self.left = self.every;
            }
        } else if requests >= MANY {
            self.every = TRY_EVERY;
        } else {
            self.every = (self.every * 2).min(TRY_EVERY_AT_MOST);
            self.left = self.every;
            self.patient = false;
        }
    }
}

/// Linux doesn't preempt anybody for a thread of the policy `SCHED_BATCH` that wakes up.
fn set_policy(patient: bool) -> io::Result<()> {
    let policy = if patient { libc::SCHED_BATCH } else { libc::SCHED_OTHER };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is only read, and lives until the call has returned.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often it is patient in so many times, with a guest that makes so many requests when it is let.
    fn patient(patience: &mut Patience, times: u32, requests: u32) -> u32 {
        (0..times)
            .map(|_| {
                let patient = patience.patient;
                patience.learn(if patient { requests } else { 1 });
                u32::from(patient)
            })
            .sum()
    }

    #[test]
    fn whom_it_pays_for_has_it_from_the_first_try_on() {
        let mut patience = Patience::default();
        assert_eq!(patient(&mut patience, TRY_EVERY, MANY), 0);
        assert_eq!(patient(&mut patience, 1000, MANY), 1000);
    }

    #[test]
    fn with_others_it_is_tried_ever_more_rarely_and_never_given_up() {
        let mut patience = Patience::default();
        assert_eq!(patient(&mut patience, 10_000, MANY - 1), 8);
        assert_eq!(patient(&mut patience, 10 * (TRY_EVERY_AT_MOST + 1), 1), 10);
    }

    #[test]
    fn a_guest_that_changes_its_ways_is_noticed() {
        let mut patience = Patience::default();
        patient(&mut patience, 100, MANY);
        assert_eq!(patient(&mut patience, 2 * TRY_EVERY, 1), 1);
        assert!(patient(&mut patience, TRY_EVERY_AT_MOST, MANY) > TRY_EVERY_AT_MOST - 4 * TRY_EVERY);
    }

    #[test]
    fn a_try_that_can_not_be_made_is_made_again_in_its_time() {
        let mut patience = Patience::default();
        let tries = (0..10 * TRY_EVERY).filter(|_| {
            patience.learn(1);
            std::mem::take(&mut patience.patient)
        });
        assert_eq!(tries.count(), 10);
    }

    #[test]
    fn the_thread_has_the_policy_that_was_learnt() {
        // SAFETY: no memory arguments.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let mut patience = Patience::default();
        for _ in 0..TRY_EVERY {
            assert_eq!(policy(), libc::SCHED_OTHER);
            patience.found(1);
        }
        assert_eq!(policy(), libc::SCHED_BATCH);
        patience.found(MANY);
        assert_eq!(policy(), libc::SCHED_BATCH);
        patience.found(1);
        assert_eq!(policy(), libc::SCHED_OTHER);
    }
}
