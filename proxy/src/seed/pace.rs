//! A limit on the rate at which disks are read.

use std::time::{Duration, Instant};

/// What may be read at once after a pause, as time at the rate.
const BURST: Duration = Duration::from_millis(100);

/// Says how long to wait so that a rate is kept.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_sec: Option<u64>,
    /// What was read is paid for at this time.
    paid_at: Option<Instant>,
}

impl Pace {
    /// Keeps `bytes_per_sec`; `None` is no limit.
    pub(super) fn new(bytes_per_sec: Option<u64>) -> Self {
        Self {
            bytes_per_sec,
            paid_at: None,
        }
    }

    /// The pause after `bytes` were read.
    pub(super) fn pause(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.bytes_per_sec else {
            return Duration::ZERO;
        };
        #[expect(
            clippy::cast_precision_loss,
            reason = "a time need not be exact to the byte"
        )]
        let cost = Duration::try_from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let cost = cost.unwrap_or(Duration::MAX);
        // Time in which nothing was read does not add up.
        let since = self
            .paid_at
            .unwrap_or(now)
            .max(now.checked_sub(BURST).unwrap_or(now));
        let paid_at = since.checked_add(cost).unwrap_or(since);
        self.paid_at = Some(paid_at);
        paid_at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_whatever_reading_takes() {
        let mut pace = Pace::new(Some(10 << 20));
        let start = Instant::now();
        let mut now = start;
        for step in 0..100 {
            // Reading takes up to 50 ms of the 100 ms that a MiB may take.
            now += Duration::from_millis(step % 50);
            now += pace.pause(1 << 20, now);
        }
        let took = (now - start).as_secs_f64();
        assert!((9.8..10.2).contains(&took), "{took}");
        // After a long pause there is no rush.
        now += Duration::from_secs(60);
        assert_eq!(pace.pause(1 << 20, now), Duration::ZERO);
        assert!(pace.pause(1 << 20, now) > Duration::from_millis(90));
    }

    #[test]
    fn no_limit_is_no_pause() {
        assert_eq!(
            Pace::new(None).pause(usize::MAX, Instant::now()),
            Duration::ZERO
        );
    }
}
