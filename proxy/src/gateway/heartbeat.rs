//! Notices when this process stood still: stopped, starved, or on a machine that was suspended.
//!
//! What the peer said before a standstill may be old when it is read after it.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use super::link::lock;

/// How often the heart beats.
const INTERVAL: Duration = Duration::from_millis(50);
/// A beat that is this late is a standstill.
const LATE: Duration = Duration::from_millis(300);
/// How long a standstill is remembered.
const MEMORY: Duration = Duration::from_secs(2);

/// When the heart last beat, and when it last did so late.
#[derive(Debug)]
pub(super) struct Heartbeat(Mutex<(Instant, Option<Instant>)>);

impl Heartbeat {
    pub(super) fn new() -> Self {
        Self(Mutex::new((Instant::now(), None)))
    }

    /// Beats for as long as the gateway runs.
    pub(super) async fn run(&self) -> ! {
        loop {
            self.beat(Instant::now());
            tokio::time::sleep(INTERVAL).await;
        }
    }

    fn beat(&self, now: Instant) {
        let mut state = lock(&self.0);
        if now.duration_since(state.0) > LATE {
            state.1 = Some(now);
        }
        state.0 = now;
    }

    /// Whether this process stands still or has done so lately.
    pub(super) fn stalled_lately(&self) -> bool {
        self.stalled_at(Instant::now())
    }

    fn stalled_at(&self, now: Instant) -> bool {
        let state = lock(&self.0);
        now.duration_since(state.0) > LATE
            || state
                .1
                .is_some_and(|late| now.duration_since(late) < MEMORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standstill_is_seen_before_and_after_the_next_beat() {
        let heart = Heartbeat::new();
        let start = Instant::now();
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
