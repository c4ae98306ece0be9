//! The guest's clock follows the node's, when that is set and as it drifts from the guest's.
//!
//! The guest's kernel counts on from the time that it was told at the pod's start, by the processor's counter as it comes; what a time
//! service corrects on the node it does not hear of.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::agent::{Agent, AgentError};
use super::now_ns;

/// How long a guest's clock is left to itself: at 50 ppm, which is bad for a crystal, it is 15 ms off then.
const PERIOD: Duration = Duration::from_secs(300);

/// What a time may have aged on its way for the guest to take it as the present.
const FRESH: Duration = Duration::from_millis(100);

/// Times that are told one after another until one was fresh.
const ATTEMPTS: usize = 5;

/// Tells the guest the time for as long as the pod lives.
pub(crate) async fn follow(agent: Agent) {
    let timer = match Timer::new() {
        Ok(timer) => timer,
        Err(error) => return log::warn!("the guest's clock does not follow the node's: {error}"),
    };
    loop {
        tokio::select! {
            biased;
            () = agent.lost() => return,
            waited = timer.wait(PERIOD) => {
                if let Err(error) = waited {
                    return log::warn!("the guest's clock does not follow the node's any more: {error}");
                }
            }
        }
        if matches!(tell(&agent).await, Err(AgentError::Lost)) {
            return;
        }
    }
}

/// A guest that is slow to take a time has an old one then, until it gets the next.
async fn tell(agent: &Agent) -> Result<(), AgentError> {
    for _ in 0..ATTEMPTS {
        let begin = Instant::now();
        match agent.set_clock(now_ns()).await {
            Ok(()) if begin.elapsed() <= FRESH => return Ok(()),
            Ok(()) => {}
            Err(AgentError::Lost) => return Err(AgentError::Lost),
            Err(error) => log::debug!("the guest's clock may be off: {error}"),
        }
    }
    Ok(())
}

/// Goes off when time has passed, and when the clock is set.
struct Timer(AsyncFd<Fd>);

struct Fd(TimerFd);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Timer {
    fn new() -> io::Result<Self> {
        let timer =
            TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        // SAFETY: the AsyncFd owns the timer, so its descriptor stays open and the same while it is registered.
        let fd = unsafe { AsyncFd::register_with_interest(Fd(timer), Interest::READABLE) };
        fd.map(Timer).map_err(io::Error::from)
    }

    async fn wait(&self, period: Duration) -> io::Result<()> {
        let Timer(fd) = self;
        // The end is a time of the clock, as the kernel asks for where it is to tell that the clock is set.
        let end = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default() + period;
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        match fd.get_ref().0.set(Expiration::OneShot(TimeSpec::from_duration(end)), flags) {
            // Set in the meantime.
            Ok(()) | Err(Errno::ECANCELED) => {}
            Err(errno) => return Err(errno.into()),
        }
        loop {
            let mut ready = fd.readable().await?;
            // A clock that was set is no error here.
            if let Ok(waited) = ready.try_io(|fd| fd.get_ref().0.wait().map_err(io::Error::from)) {
                return waited;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_period_ends_and_another_begins() {
        let timer = Timer::new().unwrap();
        for _ in 0..2 {
            let begin = Instant::now();
            timer.wait(Duration::from_millis(30)).await.unwrap();
            assert!(begin.elapsed() >= Duration::from_millis(25), "{:?}", begin.elapsed());
        }
    }
}
