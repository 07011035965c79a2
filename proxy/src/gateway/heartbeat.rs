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

/// A peer that was not heard for so long, and then is, may say what it said before: a packet that was lost in
/// an outage is sent again when the path is back.
const SILENCE: Duration = Duration::from_millis(500);
/// How long after a silence what is heard may be of before.
const REPETITION: Duration = Duration::from_secs(1);

/// When a peer was heard, by the packets that came.
#[derive(Debug, Default)]
pub(super) struct Hearing(Mutex<Heard>);

#[derive(Debug, Default)]
struct Heard {
    packets: u64,
    at: Duration,
    /// When the last silence ended.
    after_silence: Option<Duration>,
}

impl Hearing {
    /// So many packets have come so far. Wants to be told several times within [`SILENCE`].
    pub(super) fn note(&self, packets: u64, now: Duration) {
        let mut heard = lock(&self.0);
        if packets == heard.packets {
            return;
        }
        // What comes first on a connection was said on it.
        if heard.packets > 0 && now.saturating_sub(heard.at) > SILENCE {
            heard.after_silence = Some(now);
        }
        (heard.packets, heard.at) = (packets, now);
    }

    /// Whether what is heard at `now` may have been said long before.
    pub(super) fn was_silent_lately(&self, packets: u64, now: Duration) -> bool {
        self.note(packets, now);
        let silence = lock(&self.0).after_silence;
        silence.is_some_and(|end| now.saturating_sub(end) < REPETITION)
    }
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
    fn what_comes_behind_a_silence_may_be_old() {
        let hearing = Hearing::default();
        let at = |millis| Duration::from_secs(1000) + Duration::from_millis(millis);
        assert!(!hearing.was_silent_lately(1, at(0)), "a connection begins");
        let mut packets = 1;
        for millis in (0..3000).step_by(400) {
            packets += 1;
            hearing.note(packets, at(millis));
        }
        assert!(!hearing.was_silent_lately(packets, at(3000)));
        // 600 ms without a packet, as far as anybody knows; and the first one behind them.
        hearing.note(packets, at(3400));
        assert!(hearing.was_silent_lately(packets + 1, at(3500)));
        assert!(hearing.was_silent_lately(packets + 2, at(3950)));
        assert!(hearing.was_silent_lately(packets + 3, at(4400)));
        assert!(!hearing.was_silent_lately(packets + 4, at(4600)));
    }

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
