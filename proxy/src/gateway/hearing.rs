//! Notices when a peer was not heard for a while.
//!
//! What is heard right after that may have been said before.

use std::{sync::Mutex, time::Duration};

use super::link::lock;

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
}
