//! What time it is at a peer, so that the age of what it says is known.
//!
//! No two clocks need to agree. A peer that is asked for its clock reads it after it was asked; so whatever it
//! stamps later with that clock was said no earlier than the time of the question, plus what its clock has gone
//! on by in between. A packet that was lost and sent again, a queue, a process that stood still or a machine that was
//! suspended on either side only make that bound older than the truth, never younger.

use std::{collections::VecDeque, time::Duration};

use rustix::time::{ClockId, clock_gettime};

/// How often a peer is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a reading is used: clocks are a few parts in ten thousand apart at most, so a few milliseconds.
const VALID: Duration = Duration::from_secs(10);
/// Questions that may be without an answer; later ones are not asked.
const MAX_ASKED: usize = 16;
/// What is later than now by more than this shows that this machine's clock stood still, as that of a virtual
/// machine does while it is paused: no reading holds any more.
const AHEAD: Duration = Duration::from_millis(100);

/// Time that goes on while the machine is suspended, which [`std::time::Instant`] does not.
pub(super) fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// The same in microseconds, as it is told to peers.
pub(super) fn stamp() -> u64 {
    u64::try_from(now().as_micros()).unwrap_or(u64::MAX)
}

/// The clock of the peer at the other end of one connection.
#[derive(Debug, Default)]
pub(super) struct PeerClock {
    /// Questions without an answer: their nonces, and when they were asked.
    asked: VecDeque<(u64, Duration)>,
    last_asked: Option<Duration>,
    reading: Option<Reading>,
}

/// The peer's clock said `theirs` at our `asked` or later.
#[derive(Debug, Clone, Copy)]
struct Reading {
    asked: Duration,
    theirs: Duration,
}

impl PeerClock {
    /// Whether it is time for a question.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        self.asked.len() < MAX_ASKED
            && self
                .last_asked
                .is_none_or(|last| now.saturating_sub(last) >= INTERVAL)
    }

    /// A question is about to be sent.
    pub(super) fn on_asked(&mut self, nonce: u64, now: Duration) {
        if self.asked.len() == MAX_ASKED {
            self.asked.pop_front();
        }
        self.asked.push_back((nonce, now));
        self.last_asked = Some(now);
    }

    /// An answer: the peer's clock, read after it got the question. Answers to what was not asked count for
    /// nothing.
    pub(super) fn on_answer(&mut self, nonce: u64, theirs: Duration) {
        while let Some(&(first, asked)) = self.asked.front()
            && first <= nonce
        {
            self.asked.pop_front();
            if first == nonce {
                self.reading = Some(Reading { asked, theirs });
            }
        }
    }

    /// How old at most something is that the peer stamped `theirs`. `None`: that can't be told just now.
    pub(super) fn age(&self, theirs: Duration, now: Duration) -> Option<Duration> {
        let reading = self.reading?;
        let since = now.checked_sub(reading.asked)?;
        if since > VALID {
            return None;
        }
        // At this time or later, by our clock.
        let stamped = if theirs >= reading.theirs {
            reading.asked.checked_add(theirs - reading.theirs)?
        } else {
            reading.asked.saturating_sub(reading.theirs - theirs)
        };
        if stamped > now + AHEAD {
            return None;
        }
        Some(now.saturating_sub(stamped))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn without_an_answer_nothing_is_known() {
        let mut clock = PeerClock::default();
        assert!(clock.is_due(ms(50)));
        assert_eq!(clock.age(ms(5000), ms(100)), None);
        clock.on_asked(7, ms(100));
        assert!(!clock.is_due(ms(1000)) && clock.is_due(ms(1100)));
        assert_eq!(clock.age(ms(5000), ms(150)), None, "asked only");
        clock.on_answer(8, ms(5000));
        assert_eq!(clock.age(ms(5000), ms(150)), None, "never asked");
    }

    #[test]
    fn an_answer_serves_for_a_while() {
        let mut clock = PeerClock::default();
        clock.on_asked(1, ms(100));
        clock.on_asked(2, ms(1100));
        clock.on_answer(1, ms(90_030));
        // Stamped a second behind the answer.
        assert_eq!(clock.age(ms(91_030), ms(1150)), Some(ms(50)));
        assert_eq!(clock.age(ms(90_030), ms(1150)), Some(ms(1050)));
        assert_eq!(clock.age(ms(0), ms(1150)), Some(ms(1150)));
        clock.on_answer(2, ms(91_030));
        assert_eq!(clock.age(ms(91_050), ms(1150)), Some(ms(30)));
        assert_eq!(clock.age(ms(101_000), ms(11_150)), None, "too long ago");
    }

    #[test]
    fn a_clock_that_stood_still_here_is_noticed() {
        let mut clock = PeerClock::default();
        clock.on_asked(1, ms(100));
        clock.on_answer(1, ms(90_000));
        // Five seconds later at the peer, and not here.
        assert_eq!(clock.age(ms(95_000), ms(200)), None);
        assert_eq!(clock.age(ms(90_150), ms(200)), Some(Duration::ZERO));
    }

    #[test]
    fn a_peer_that_never_answers_costs_little() {
        let mut clock = PeerClock::default();
        for nonce in 0..100 {
            clock.on_asked(nonce, ms(nonce * 1000));
        }
        assert!(clock.asked.len() <= MAX_ASKED && !clock.is_due(ms(1_000_000)));
    }

    proptest! {
        /// Whatever the delays are, and whatever the clocks show: what is stamped is never taken to be younger
        /// than it is, but for how far the clocks drift apart in the life of a reading.
        #[test]
        fn nothing_is_younger_than_it_looks(
            offset in 0_u64..1_000_000_000,
            drift_ppm in -500_i64..500,
            questions in prop::collection::vec((0_u64..2000, 0_u64..1500, 0_u64..1500), 1..20),
            pause in 0_u64..12_000,
            transit in 0_u64..5000,
        ) {
            let theirs = |at: u64| {
                let drifted = i128::from(at) * (1_000_000 + i128::from(drift_ppm)) / 1000;
                Duration::from_micros(offset * 1000 + u64::try_from(drifted).unwrap())
            };
            let mut clock = PeerClock::default();
            let mut at = 0;
            for (nonce, &(wait, there, back)) in questions.iter().enumerate() {
                at += wait;
                clock.on_asked(nonce as u64, ms(at));
                let read = at + there;
                at = read + back;
                clock.on_answer(nonce as u64, theirs(read));
            }
            let stamped = at + pause;
            let now = stamped + transit;
            if let Some(age) = clock.age(theirs(stamped), ms(now)) {
                prop_assert!(age + ms(7) >= ms(transit), "{age:?} of {transit}");
            }
        }
    }
}
