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
/// Without so many readings nothing is said: one may have been made while everything stood still. A question is asked
/// when the one before has been answered, so that one standstill is in one reading.
const ENOUGH: usize = 2;
/// What two clocks may be apart in the time since a reading, as its part: NTP clients set them right by up to a
/// tenth.
const DRIFT: u32 = 10;
/// Readings kept.
const MAX_READINGS: usize = 16;
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
    /// The question without an answer: its nonce, and when it was asked.
    asked: Option<(u64, Duration)>,
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
    /// Whether a question may be asked.
    pub(super) fn is_answered(&self) -> bool {
        self.asked.is_none()
    }

    /// Whether it is time for one.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        let interval = if self.valid(now).nth(ENOUGH - 1).is_some() {
            INTERVAL
        } else {
            FIRST_INTERVAL
        };
        let last = self.last_asked;
        self.is_answered() && last.is_none_or(|last| now.saturating_sub(last) >= interval)
    }

    /// A question is about to be sent.
    pub(super) fn on_asked(&mut self, nonce: u64, now: Duration) {
        self.asked = Some((nonce, now));
        self.last_asked = Some(now);
    }

    /// An answer: the peer's clock, read after it got the question. Answers to what was not asked count for
    /// nothing.
    pub(super) fn on_answer(&mut self, nonce: u64, theirs: Duration, now: Duration) {
        let Some((_, asked)) = self.asked.take_if(|(asked, _)| *asked == nonce) else {
            return;
        };
        if self.readings.len() == MAX_READINGS {
            self.readings.pop_front();
        }
        let took = now.saturating_sub(asked);
        self.readings.push_back(Reading {
            asked,
            theirs,
            took,
        });
    }

    /// How old at most something is that the peer stamped `theirs`. `None`: that can't be told just now.
    pub(super) fn age(&self, theirs: Duration, now: Duration) -> Option<Duration> {
        self.round_trip(now)?;
        let ages = self
            .valid(now)
            .filter_map(|reading| reading.age(theirs, now));
        ages.min()
    }

    /// How long an answer takes: the shorter of the last two. None of what makes a stamp old makes that longer,
    /// unless it lasts.
    pub(super) fn round_trip(&self, now: Duration) -> Option<Duration> {
        let took = |reading: &Reading| reading.took + reading.took / DRIFT;
        let mut last = self.valid(now).rev().map(took);
        let (one, other) = (last.next()?, last.next()?);
        Some(one.min(other))
    }

    fn valid(&self, now: Duration) -> impl DoubleEndedIterator<Item = &Reading> {
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
        assert!(!clock.is_due(ms(350)), "not answered");
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
        assert_eq!(clock.round_trip(ms(1200)), Some(ms(66)));
        assert_eq!(clock.age(ms(101_000), ms(11_150)), None, "one is too old");
    }

    /// However long it lasts, and whatever was asked in it.
    #[test]
    fn a_standstill_makes_no_round_trip_longer() {
        let mut clock = PeerClock::default();
        let mut asked = 0;
        // Nothing comes back for eight seconds, from the first question on.
        for at in (100..8100).step_by(250) {
            if clock.is_due(ms(at)) {
                asked += 1;
                clock.on_asked(asked, ms(at));
            }
        }
        for nonce in 0..=asked {
            clock.on_answer(nonce, ms(90_130), ms(8100));
        }
        assert_eq!(clock.age(ms(94_000), ms(8110)), None, "one reading only");
        clock.on_asked(asked + 1, ms(8110));
        clock.on_answer(asked + 1, ms(98_140), ms(8170));
        assert_eq!(clock.round_trip(ms(8200)), Some(ms(66)));
        assert!(clock.age(ms(94_000), ms(8200)) > Some(ms(4000)));
        // Another one.
        clock.on_asked(90, ms(9000));
        clock.on_answer(90, ms(99_030), ms(11_000));
        assert_eq!(clock.round_trip(ms(11_000)), Some(ms(66)));
        // A way that has become longer is taken for what it is when that is seen twice.
        clock.on_asked(91, ms(11_000));
        clock.on_answer(91, ms(101_030), ms(13_000));
        assert_eq!(clock.round_trip(ms(13_000)), Some(ms(2200)));
    }

    #[test]
    fn a_clock_that_stood_still_here_is_noticed() {
        let clock = asked_at(&[100, 400]);
        // Five seconds later at the peer, and not here.
        assert_eq!(clock.age(ms(95_400), ms(500)), None);
        assert!(clock.age(ms(90_540), ms(500)).is_some());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut clock = PeerClock::default();
        clock.on_asked(1, ms(100));
        assert!(!clock.is_due(ms(1_000_000)), "it is not answered");
        let clock = asked_at(&(0..100).map(|n| n * 100).collect::<Vec<_>>());
        assert!(clock.readings.len() <= MAX_READINGS);
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
