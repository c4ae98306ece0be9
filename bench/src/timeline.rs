//! The phases of a pod's start as our own parts saw them: one line of the shim's log per pod,
//!
//! ```text
//! ... timeline id=POD containerd=T shim=T vmm=T kernel=T agent=T container=T start=T
//! ```
//!
//! with times of the node's monotonic clock in microseconds. Each is named after the phase that ended then.

use std::time::Duration;

/// Phases in order, with their durations.
pub(crate) type Phases = Vec<(String, Duration)>;

/// The start of a pod, seen from outside: times of the monotonic clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// The pod.
    pub id: String,
    /// When the first call was made.
    pub from: Duration,
    /// When the first byte of output came.
    pub to: Duration,
}

/// The phases of a pod's start, if the log has them. What is left after the last stamp is the phase `output`.
///
/// `None` when there is no line for this pod or its times are not in order within the window: then they are not of this clock.
pub(crate) fn phases(log: &str, window: &Window) -> Option<Phases> {
    let mut last = window.from;
    let mut phases = Phases::new();
    for (name, time) in stamps(log, &window.id)? {
        phases.push((name, time.checked_sub(last)?));
        last = time;
    }
    // The workload's output may overtake the answer that ends the last phase.
    phases.push(("output".to_owned(), window.to.saturating_sub(last)));
    Some(phases)
}

/// From the end of the phase `since` until the agent's first answer.
///
/// `None` when the timeline has not both.
pub(crate) fn until_agent(phases: &Phases, since: &str) -> Option<Duration> {
    let place = |wanted: &str| phases.iter().position(|(name, _)| name == wanted);
    let (begin, agent) = (place(since)?, place("agent")?);
    Some(phases.get(begin + 1..=agent)?.iter().map(|(_, duration)| *duration).sum())
}

fn stamps(log: &str, id: &str) -> Option<Vec<(String, Duration)>> {
    log.lines().find_map(|line| {
        let (_, stamps) = line.split_once("timeline id=")?;
        // A log formatter may have quoted the whole message, and put fields of its own behind it.
        let mut words = stamps.split('"').next()?.split_whitespace();
        if words.next()? != id {
            return None;
        }
        words
            .map_while(|word| word.split_once('='))
            .map(|(name, micros)| Some((name.to_owned(), Duration::from_micros(micros.parse().ok()?))))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "something else\n\
        level=info msg=\"timeline id=bulkhead-1 containerd=1500 shim=2000 agent=9000 start=9500\" runtime=bulkhead\n\
        INFO timeline id=bulkhead-12 containerd=20000 agent=26000\n";

    fn window(id: &str, from: u64, to: u64) -> Window {
        Window { id: id.to_owned(), from: Duration::from_micros(from), to: Duration::from_micros(to) }
    }

    fn micros(phases: &Phases) -> Vec<(&str, u128)> {
        phases.iter().map(|(name, duration)| (name.as_str(), duration.as_micros())).collect()
    }

    #[test]
    fn phases_add_up_to_the_whole() {
        let phases = phases(LOG, &window("bulkhead-1", 1000, 9900)).unwrap();
        assert_eq!(
            micros(&phases),
            [("containerd", 500), ("shim", 500), ("agent", 7000), ("start", 500), ("output", 400)]
        );
    }

    #[test]
    fn the_agent_answers_after_the_request() {
        let phases = phases(LOG, &window("bulkhead-1", 1000, 9900)).unwrap();
        assert_eq!(until_agent(&phases, "shim"), Some(Duration::from_micros(7000)));
        assert_eq!(until_agent(&phases, "machine"), None);
    }

    #[test]
    fn output_may_come_before_the_last_answer() {
        let phases = phases(LOG, &window("bulkhead-12", 19000, 25990)).unwrap();
        assert_eq!(micros(&phases), [("containerd", 1000), ("agent", 6000), ("output", 0)]);
    }

    #[test]
    fn other_pods_and_other_clocks_are_not_taken() {
        assert_eq!(phases(LOG, &window("bulkhead-2", 0, 9900)), None);
        assert_eq!(phases(LOG, &window("bulkhead-1", 1600, 9900)), None);
        assert_eq!(phases("timeline id=a b=x", &window("a", 0, 1)), None);
    }
}
