//! When a pod's start reached which point: one line in the log, for the benchmark and for whoever wonders.

use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// The moments of one pod's start so far. Each is named after the phase that ended then.
#[derive(Debug)]
pub(crate) struct Timeline {
    stamps: Mutex<Option<Vec<(&'static str, u64)>>>,
}

impl Timeline {
    /// Begins with the moment at which containerd's request arrived.
    pub(crate) fn new(received_us: u64) -> Timeline {
        Timeline { stamps: Mutex::new(Some(vec![("containerd", received_us)])) }
    }

    /// A phase ends now.
    pub(crate) fn stamp(&self, phase: &'static str) {
        self.stamp_at(phase, now_us());
    }

    /// A phase ended at a moment of [`now_us`].
    pub(crate) fn stamp_at(&self, phase: &'static str, at_us: u64) {
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stamps) = stamps.as_mut() {
            stamps.push((phase, at_us));
        }
    }

    /// Logs what there is, the first time it is called.
    pub(crate) fn finish(&self, container: &str) {
        let stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(stamps) = stamps {
            log::info!("{}", line(container, &stamps));
        }
    }
}

fn line(container: &str, stamps: &[(&'static str, u64)]) -> String {
    let mut line = format!("timeline id={container}");
    for (phase, at_us) in stamps {
        // Writing to a string does not fail.
        let _ = write!(line, " {phase}={at_us}");
    }
    line
}

/// The node's monotonic clock, in microseconds.
pub(crate) fn now_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is valid for the call, which can't fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_what_the_benchmark_reads() {
        assert_eq!(line("c1", &[("containerd", 5), ("shim", 7)]), "timeline id=c1 containerd=5 shim=7");
    }

    #[test]
    fn it_is_written_once_and_takes_nothing_afterwards() {
        let timeline = Timeline::new(now_us());
        timeline.stamp("shim");
        timeline.finish("c1");
        timeline.stamp("late");
        assert!(timeline.stamps.lock().unwrap().is_none());
    }
}
