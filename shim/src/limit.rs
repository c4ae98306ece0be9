//! A limit on how often something that the guest causes may happen on the host.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket.
#[derive(Debug)]
pub(crate) struct RateLimit {
    /// Tokens that can be saved up.
    burst: u32,
    /// How long one token takes to come.
    interval: Duration,
    tokens: u32,
    refilled: Instant,
    refused: u64,
}

impl RateLimit {
    /// Allows `burst` at once and then one in each `interval`.
    pub(crate) fn new(burst: u32, interval: Duration) -> RateLimit {
        RateLimit { burst, interval, tokens: burst, refilled: Instant::now(), refused: 0 }
    }

    /// Whether it may happen now.
    pub(crate) fn allow(&mut self) -> bool {
        let now = Instant::now();
        let due = now.duration_since(self.refilled).as_nanos() / self.interval.as_nanos().max(1);
        if due > 0 {
            let due = u32::try_from(due).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(due).min(self.burst);
            self.refilled = now;
        }
        if self.tokens == 0 {
            self.refused += 1;
            return false;
        }
        self.tokens -= 1;
        true
    }

    /// How many were refused since this was last asked.
    pub(crate) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_cut_to_the_burst_and_recovers_slowly() {
        let mut limit = RateLimit::new(3, Duration::from_secs(1));
        let allowed = (0..100).filter(|_| limit.allow()).count();
        assert_eq!(allowed, 3);
        assert_eq!(limit.take_refused(), 97);
        assert_eq!(limit.take_refused(), 0);

        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(limit.allow() && limit.allow() && !limit.allow());
    }
}
