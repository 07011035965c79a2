//! Notices when this process stood still: stopped, starved, or on a machine that was suspended.
//!
//! What the peer said before a standstill may be old when it is read after it.

use std::{sync::Mutex, time::Duration};

use rustix::time::{ClockId, clock_gettime};

use super::link::lock;

/// How often the heart beats.
const INTERVAL: Duration = Duration::from_millis(50);
/// A beat that is this late is a standstill.
const LATE: Duration = Duration::from_millis(300);
/// How long a standstill is remembered.
const MEMORY: Duration = Duration::from_secs(2);

/// Time that goes on while the machine is suspended, which [`std::time::Instant`] does not.
pub(super) fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// When the heart last beat, and when it last did so late.
#[derive(Debug)]
pub(super) struct Heartbeat(Mutex<(Duration, Option<Duration>)>);

impl Heartbeat {
    pub(super) fn new() -> Self {
        Self(Mutex::new((now(), None)))
    }

    /// Beats for as long as the gateway runs, and does `each` with every beat.
    pub(super) async fn run(&self, each: impl Fn()) -> ! {
        loop {
            self.beat(now());
            each();
            tokio::time::sleep(INTERVAL).await;
        }
    }

    fn beat(&self, now: Duration) {
        let mut state = lock(&self.0);
        if now.saturating_sub(state.0) > LATE {
            state.1 = Some(now);
        }
        state.0 = now;
    }

    /// Whether this process stands still or has done so lately.
    pub(super) fn stalled_lately(&self) -> bool {
        self.stalled_at(now())
    }

    fn stalled_at(&self, now: Duration) -> bool {
        let state = lock(&self.0);
        now.saturating_sub(state.0) > LATE
            || state
                .1
                .is_some_and(|late| now.saturating_sub(late) < MEMORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standstill_is_seen_before_and_after_the_next_beat() {
        let heart = Heartbeat::new();
        let start = now();
        heart.beat(start);
        let after = |millis| start + Duration::from_millis(millis);
        assert!(!heart.stalled_at(after(200)));
        assert!(heart.stalled_at(after(5000)), "no beat yet");
        heart.beat(after(5000));
        assert!(heart.stalled_at(after(5100)));
        for millis in (5050..7100).step_by(50) {
            heart.beat(after(millis));
        }
        assert!(!heart.stalled_at(after(7100)));
    }
}
