//! What time it is at a peer, so that the age of what it says is known.
//!
//! No two clocks need to agree. A peer that is asked for its clock reads it after it was asked; so whatever it
//! stamps later with that clock was said no earlier than the time of the question, plus what its clock has gone
//! on by in between. A packet that was lost and sent again, a queue, a process that stood still or a machine that was
//! suspended on either side only make that bound older than the truth, never younger. What it cannot see is a pause of
//! this machine in which its own clock stands still, as that of a virtual machine may: only what was stamped behind
//! the pause shows it.

use std::{collections::VecDeque, time::Duration};

use rustix::time::{ClockId, clock_gettime};

/// How often a peer is asked, and how often while little is known of it.
const INTERVAL: Duration = Duration::from_secs(1);
const FIRST_INTERVAL: Duration = Duration::from_millis(250);
/// How long a reading is used.
const VALID: Duration = Duration::from_secs(10);
/// Without so many readings nothing is said: one may have been made while everything stood still.
const ENOUGH: usize = 2;
/// What two clocks may be apart in the time since a reading, as its part: NTP clients set them right by up to a
/// tenth.
const DRIFT: u32 = 10;
/// Questions that may be without an answer, and readings kept.
const MAX_ASKED: usize = 16;
/// What is later than now by more than this shows that this machine's clock stood still: that reading does not hold
/// any more.
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
    /// The newest last.
    readings: VecDeque<Reading>,
}

/// The peer's clock said `theirs` at our `asked` or later.
#[derive(Debug, Clone, Copy)]
struct Reading {
    asked: Duration,
    theirs: Duration,
    /// Until the answer came.
    took: Duration,
}

impl Reading {
    fn is_valid(&self, now: Duration) -> bool {
        now.saturating_sub(self.asked) <= VALID
    }

    /// How old at most something is that the peer stamped `theirs`.
    fn age(&self, theirs: Duration, now: Duration) -> Option<Duration> {
        // At this time or later, by our clock.
        let stamped = if theirs >= self.theirs {
            self.asked.checked_add(theirs - self.theirs)?
        } else {
            self.asked.saturating_sub(self.theirs - theirs)
        };
        let drift = now.saturating_sub(self.asked) / DRIFT;
        (stamped <= now + AHEAD + drift).then(|| now.saturating_sub(stamped) + drift)
    }
}

impl PeerClock {
    /// Whether it is time for a question.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        let interval = if self.valid(now).nth(ENOUGH - 1).is_some() {
            INTERVAL
        } else {
            FIRST_INTERVAL
        };
        self.asked.len() < MAX_ASKED
            && self
                .last_asked
                .is_none_or(|last| now.saturating_sub(last) >= interval)
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
    pub(super) fn on_answer(&mut self, nonce: u64, theirs: Duration, now: Duration) {
        while let Some(&(first, asked)) = self.asked.front()
            && first <= nonce
        {
            self.asked.pop_front();
            if first == nonce {
                if self.readings.len() == MAX_ASKED {
                    self.readings.pop_front();
                }
                let took = now.saturating_sub(asked);
                self.readings.push_back(Reading {
                    asked,
                    theirs,
                    took,
                });
            }
        }
    }

    /// How old at most something is that the peer stamped `theirs`. `None`: that can't be told just now.
    pub(super) fn age(&self, theirs: Duration, now: Duration) -> Option<Duration> {
        self.round_trip(now)?;
        let ages = self
            .valid(now)
            .filter_map(|reading| reading.age(theirs, now));
        ages.min()
    }

    /// The shortest time that an answer took lately. None of what makes a stamp old makes that longer, unless it
    /// lasts.
    pub(super) fn round_trip(&self, now: Duration) -> Option<Duration> {
        self.valid(now).nth(ENOUGH - 1)?;
        self.valid(now).map(|reading| reading.took).min()
    }

    fn valid(&self, now: Duration) -> impl Iterator<Item = &Reading> {
        self.readings
            .iter()
            .filter(move |reading| reading.is_valid(now))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Asked at these times, and answered 60 ms later by a clock that is 90 s ahead.
    fn asked_at(times: &[u64]) -> PeerClock {
        let mut clock = PeerClock::default();
        for (nonce, &at) in times.iter().enumerate() {
            let nonce = nonce as u64;
            clock.on_asked(nonce, ms(at));
            clock.on_answer(nonce, ms(at + 90_030), ms(at + 60));
        }
        clock
    }

    #[test]
    fn without_answers_nothing_is_known() {
        let mut clock = PeerClock::default();
        assert!(clock.is_due(ms(50)));
        clock.on_asked(7, ms(100));
        assert!(!clock.is_due(ms(300)) && clock.is_due(ms(350)));
        clock.on_answer(8, ms(5000), ms(150));
        assert_eq!(clock.age(ms(5000), ms(150)), None, "never asked");
        assert_eq!(asked_at(&[100]).age(ms(90_130), ms(200)), None, "one");
        assert!(asked_at(&[100, 400]).age(ms(90_430), ms(500)).is_some());
        assert!(!asked_at(&[100, 400]).is_due(ms(1390)));
    }

    #[test]
    fn an_answer_serves_for_a_while() {
        let clock = asked_at(&[100, 1100]);
        // Stamped when the clock was read, 30 ms behind the question, and a tenth of 100 ms for drift.
        assert_eq!(clock.age(ms(91_130), ms(1200)), Some(ms(110)));
        assert_eq!(clock.age(ms(91_230), ms(1300)), Some(ms(120)));
        assert_eq!(clock.age(ms(0), ms(1200)), Some(ms(1210)));
        assert_eq!(clock.round_trip(ms(1200)), Some(ms(60)));
        assert_eq!(clock.age(ms(101_000), ms(11_150)), None, "one is too old");
    }

    /// Answers that waited in a standstill say that the way is long, and others that it is not.
    #[test]
    fn a_standstill_makes_no_round_trip_longer() {
        let mut clock = asked_at(&[100, 1100]);
        for nonce in 10..16 {
            clock.on_asked(nonce, ms(2000 + nonce));
        }
        for nonce in 10..16 {
            clock.on_answer(nonce, ms(92_030 + nonce), ms(4000));
        }
        assert_eq!(clock.round_trip(ms(4000)), Some(ms(60)));
        assert!(clock.age(ms(92_100), ms(4000)) > Some(ms(1900)));
        // A way that has become longer is taken for what it is once the others are forgotten.
        assert!(clock.round_trip(ms(11_500)) > Some(ms(1900)));
    }

    #[test]
    fn a_clock_that_stood_still_here_is_noticed() {
        let clock = asked_at(&[100, 400]);
        // Five seconds later at the peer, and not here.
        assert_eq!(clock.age(ms(95_400), ms(500)), None);
        assert!(clock.age(ms(90_540), ms(500)).is_some());
    }

    #[test]
    fn a_peer_that_never_answers_costs_little() {
        let mut clock = PeerClock::default();
        for nonce in 0..100 {
            clock.on_asked(nonce, ms(nonce * 1000));
        }
        assert!(clock.asked.len() <= MAX_ASKED && !clock.is_due(ms(1_000_000)));
        let clock = asked_at(&(0..100).map(|n| n * 100).collect::<Vec<_>>());
        assert!(clock.readings.len() <= MAX_ASKED);
    }

    proptest! {
        /// Whatever the delays are, and whatever the clocks show: what is stamped is never taken to be younger
        /// than it is.
        #[test]
        fn nothing_is_younger_than_it_looks(
            offset in 0_u64..1_000_000_000,
            drift_ppm in -90_000_i64..90_000,
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
                clock.on_answer(nonce as u64, theirs(read), ms(at));
            }
            let stamped = at + pause;
            let now = stamped + transit;
            if let Some(age) = clock.age(theirs(stamped), ms(now)) {
                prop_assert!(age + ms(1) >= ms(transit), "{age:?} of {transit}");
            }
        }
    }
}
