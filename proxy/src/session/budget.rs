//! How much may be accepted from a hypervisor that is not delivered yet.
//!
//! QEMU stops the guest when what is left fits into its downtime limit at the rate at which its
//! socket drains, so a gateway that swallows data causes downtime. What is in flight is held to
//! `rate × (RTT + budget)`, where `rate` is the delivery rate really achieved, in two currencies at
//! once: wire bytes (when the link is the limit) and guest bytes (when the destination is, or when
//! nearly everything is known to the peer and the wire says little).

use std::time::{Duration, Instant};

/// Guest bytes that may always be in flight: one full frame and its successor.
const GUEST_FLOOR: u64 = 768 << 10;
/// Wire bytes that may always be in flight.
const WIRE_FLOOR: u64 = 256 << 10;
/// Share of the budget by which what is accepted may be late before the link's window counts for less:
/// the link is not what it waits for.
const LATE: f64 = 1.5;
/// Guest bytes counted for a byte of the link's window, at most.
const MAX_WINDOW_RATIO: u64 = 6;
/// The same as long as that makes no more than [`FIRST_GUEST`] in all: what a guest's memory begins with is
/// often next to nothing on the link, which does not get to know its rate from that.
const FIRST_WINDOW_RATIO: u64 = 32;
const FIRST_GUEST: u64 = 8 << 20;
/// Shortest interval over which a rate is measured.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Rates older than this many intervals are forgotten.
const INTERVALS: usize = 8;

/// A windowed maximum of a delivery rate.
#[derive(Debug)]
struct RateMeter {
    total: u64,
    interval_total: u64,
    recent: [f64; INTERVALS],
    slot: usize,
    best: f64,
}

impl RateMeter {
    const fn new() -> Self {
        Self {
            total: 0,
            interval_total: 0,
            recent: [0.0; INTERVALS],
            slot: 0,
            best: 0.0,
        }
    }

    /// Ends a measuring interval of `elapsed`. A sample taken while the source had nothing to send
    /// (`limited` false) never lowers the estimate.
    fn close_interval(&mut self, elapsed: Duration, limited: bool) {
        let bytes = self.total - self.interval_total;
        self.interval_total = self.total;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-6);
        if limited || rate >= self.best {
            self.slot = (self.slot + 1) % INTERVALS;
            self.recent[self.slot] = rate;
            self.best = self.recent.iter().copied().fold(0.0, f64::max);
        }
    }
}

/// The budget of one direction of a channel.
#[derive(Debug)]
pub struct DeliveryBudget {
    budget: Duration,
    guest: RateMeter,
    wire: RateMeter,
    interval_start: Option<Instant>,
    limited: bool,
    /// Guest bytes that the link's window may count for, at most.
    window_limit: u64,
    /// The longest that anything took in this interval, from its acceptance to its delivery.
    slowest: Duration,
}

impl DeliveryBudget {
    /// A budget of `budget` on top of the round-trip time.
    #[must_use]
    pub const fn new(budget: Duration) -> Self {
        Self {
            budget,
            guest: RateMeter::new(),
            wire: RateMeter::new(),
            interval_start: None,
            limited: false,
            window_limit: GUEST_FLOOR,
            slowest: Duration::ZERO,
        }
    }

    /// Says that `guest` stream bytes, carried in `wire` bytes, were delivered by `now`, the oldest of
    /// them `took` after they were accepted.
    pub fn on_delivered(
        &mut self,
        now: Instant,
        rtt: Duration,
        guest: u64,
        wire: u64,
        took: Duration,
    ) {
        self.slowest = self.slowest.max(took);
        // What waits longer than the window can explain waits for the destination.
        let in_time = rtt + self.budget.mul_f64(LATE);
        if took <= in_time {
            // Doubles with every round trip, as the link's own window does.
            self.window_limit = self.window_limit.saturating_add(guest);
        }
        let start = *self.interval_start.get_or_insert(now);
        self.guest.total += guest;
        self.wire.total += wire;
        let elapsed = now.saturating_duration_since(start);
        if elapsed >= MIN_INTERVAL.max(rtt) {
            self.guest.close_interval(elapsed, self.limited);
            self.wire.close_interval(elapsed, self.limited);
            self.interval_start = Some(now);
            self.limited = false;
            if self.slowest > in_time {
                self.window_limit = (self.window_limit / 2).max(GUEST_FLOOR);
            }
            self.slowest = Duration::ZERO;
        }
    }

    /// Whether more may be accepted with this much in flight; `window` is this direction's share
    /// of what the link has room for, in bytes. A refusal is remembered: it makes the current
    /// interval count as limited by the budget.
    pub fn may_accept(
        &mut self,
        rtt: Duration,
        window: u64,
        guest_in_flight: u64,
        wire_in_flight: u64,
    ) -> bool {
        let (guest, wire) = self.allowance(rtt, window);
        let accept = guest_in_flight < guest && wire_in_flight < wire;
        self.limited |= !accept;
        accept
    }

    /// Guest and wire bytes that may be in flight.
    ///
    /// What the link's own window has room for is on its way at once and makes no queue on the link:
    /// while that is still finding its rate, the rates measured here lag behind. It may make a queue at
    /// the destination, so it is allowed by degrees, and as long as everything arrives in time.
    #[must_use]
    pub fn allowance(&self, rtt: Duration, window: u64) -> (u64, u64) {
        let seconds = (rtt + self.budget).as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate, never negative; the conversion saturates"
        )]
        let at = |meter: &RateMeter| (meter.best * seconds) as u64;
        let ratio = (self.guest.total / self.wire.total.max(1)).clamp(1, MAX_WINDOW_RATIO);
        let first = (window * FIRST_WINDOW_RATIO).min(FIRST_GUEST);
        (
            at(&self.guest)
                .max((window * ratio).max(first).min(self.window_limit))
                .max(GUEST_FLOOR),
            at(&self.wire)
                .max(window.min(self.window_limit))
                .max(WIRE_FLOOR),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of `rate` wire bytes per second and `rtt`, a source that always has data of which
    /// `ratio` guest bytes fit in a wire byte. Returns the in-flight time at the end, and the share of
    /// the link that the second half of the time used.
    fn run(rate: f64, rtt: Duration, ratio: f64, seconds: f64) -> (f64, f64) {
        let mut budget = DeliveryBudget::new(Duration::from_millis(100));
        let start = Instant::now();
        let (mut now, mut sent, mut acked) = (0.0_f64, 0.0_f64, 0.0_f64);
        let mut acked_halfway = 0.0;
        // (time of the ack, wire bytes, when they were sent) in order.
        let mut acks = std::collections::VecDeque::<(f64, f64, f64)>::new();
        let mut link_free_at = 0.0_f64;
        let step = 0.001;
        while now < seconds {
            while acks.front().is_some_and(|(at, ..)| *at <= now) {
                let (_, bytes, sent_at) = acks.pop_front().unwrap();
                acked += bytes;
                let at = start + Duration::from_secs_f64(now);
                let took = Duration::from_secs_f64(now - sent_at);
                budget.on_delivered(at, rtt, (bytes * ratio) as u64, bytes as u64, took);
            }
            if now < seconds / 2.0 {
                acked_halfway = acked;
            }
            let in_flight = sent - acked;
            // The link starts slowly and doubles its window with every round trip.
            let doublings = (now / rtt.as_secs_f64()).min(40.0);
            let window = (16e3 * doublings.exp2()).min(rate * rtt.as_secs_f64());
            if budget.may_accept(
                rtt,
                window as u64,
                (in_flight * ratio) as u64,
                in_flight as u64,
            ) {
                let frame = 100_000.0;
                sent += frame;
                link_free_at = link_free_at.max(now) + frame / rate;
                acks.push_back((link_free_at + rtt.as_secs_f64(), frame, now));
            } else {
                now += step;
            }
        }
        (
            (sent - acked) / rate,
            (acked - acked_halfway) / (seconds / 2.0) / rate,
        )
    }

    #[test]
    fn fills_the_link_and_keeps_the_queue_short() {
        for rtt_ms in [1, 20, 60, 150, 300] {
            for rate in [2.5e6, 25e6, 125e6] {
                for ratio in [1.0, 3.0, 50.0] {
                    let rtt = Duration::from_millis(rtt_ms);
                    let (in_flight, utilisation) = run(rate, rtt, ratio, 20.0);
                    let limit = rtt.as_secs_f64() + 0.1 + 1.3 * 512e3 / rate;
                    assert!(
                        in_flight <= limit,
                        "{rtt_ms} ms {rate} {ratio}: {in_flight} s"
                    );
                    assert!(
                        utilisation > 0.85,
                        "{rtt_ms} ms {rate} {ratio}: {utilisation}"
                    );
                }
            }
        }
    }

    /// 1 Gbit/s and 60 ms, from the first byte on: the link's window doubles with every round trip.
    #[test]
    fn a_link_that_has_just_begun_is_not_held_back() {
        let (_, utilisation) = run(125e6, Duration::from_millis(60), 3.5, 0.8);
        assert!(utilisation > 0.7, "{utilisation}");
    }

    /// The same at 200 Mbit/s, with a guest whose memory begins with what is next to nothing on the link.
    #[test]
    fn what_compresses_well_fills_a_link_that_has_just_begun() {
        let (_, utilisation) = run(25e6, Duration::from_millis(60), 20.0, 0.6);
        assert!(utilisation > 0.7, "{utilisation}");
    }

    /// A link of 300 Mbit/s and 100 ms whose window stands open, behind it a destination that takes 50 MB/s
    /// for `good` seconds, and then `slow` bytes per second. Returns the most that was in flight once the
    /// destination had become slow, and for how many seconds more was accepted than it takes in time.
    fn run_to_slow_destination(good: f64, slow: f64) -> (u64, f64) {
        let rtt = Duration::from_millis(100);
        let window = 3_750_000;
        let mut budget = DeliveryBudget::new(Duration::from_millis(100));
        let start = Instant::now();
        let (mut now, mut in_flight) = (0.0_f64, 0_u64);
        let mut sent = std::collections::VecDeque::<(f64, f64)>::new();
        let mut destination_free_at = 0.0_f64;
        let (mut most, mut in_time_at) = (0, None);
        while now < good + 10.0 {
            while sent.front().is_some_and(|&(at, _)| at <= now) {
                let (_, sent_at) = sent.pop_front().unwrap();
                in_flight -= 100_000;
                let took = Duration::from_secs_f64(now - sent_at);
                let at = start + Duration::from_secs_f64(now);
                budget.on_delivered(at, rtt, 100_000, 25_000, took);
            }
            if budget.may_accept(rtt, window, in_flight, in_flight / 4) {
                in_flight += 100_000;
                let rate = if now < good { 50e6 } else { slow };
                destination_free_at = destination_free_at.max(now + 0.1) + 1e5 / rate;
                sent.push_back((destination_free_at, now));
                if now >= good {
                    most = most.max(in_flight);
                }
            } else {
                now += 0.001;
                let late = rtt.as_secs_f64() + 0.1 * LATE;
                if now > good && in_time_at.is_none() && in_flight as f64 <= slow * late {
                    in_time_at = Some(now);
                }
            }
        }
        (most, in_time_at.unwrap_or(now) - good)
    }

    #[test]
    fn a_slow_destination_is_not_hidden_by_a_wide_link() {
        let (most, _) = run_to_slow_destination(0.0, 2e6);
        // The first interval is too short to tell.
        assert!(most <= 2 * GUEST_FLOOR + 100_000, "{most} bytes");
    }

    /// However long it was in time before.
    #[test]
    fn a_destination_that_becomes_slow_is_noticed_soon() {
        for good in [1.0, 5.0, 60.0, 3600.0] {
            for slow in [5e6, 10e6, 20e6, 30e6] {
                let (most, seconds) = run_to_slow_destination(good, slow);
                // What was accepted before is one part, the memory of the rate the other.
                assert!(
                    seconds <= most as f64 / slow + 1.0,
                    "{good} s, {slow} B/s: {seconds} s"
                );
            }
        }
    }

    #[test]
    fn idle_source_does_not_lower_the_estimate() {
        let mut budget = DeliveryBudget::new(Duration::from_millis(100));
        let rtt = Duration::from_millis(50);
        let start = Instant::now();
        for i in 0..50_u32 {
            budget.may_accept(rtt, 0, u64::MAX, u64::MAX);
            budget.on_delivered(
                start + Duration::from_millis(10) * i,
                rtt,
                1_000_000,
                250_000,
                rtt,
            );
        }
        let (before, _) = budget.allowance(rtt, 0);
        for i in 0..100_u32 {
            let now = start + Duration::from_secs(1) + Duration::from_millis(100) * i;
            budget.on_delivered(now, rtt, 100, 100, rtt);
        }
        assert_eq!(budget.allowance(rtt, 0).0, before);
    }
}
