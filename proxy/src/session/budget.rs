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
/// Guest bytes counted for a byte of the link's window, at most.
const MAX_WINDOW_RATIO: u64 = 16;
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
        }
    }

    /// Says that `guest` stream bytes, carried in `wire` bytes, were delivered by `now`.
    pub fn on_delivered(&mut self, now: Instant, rtt: Duration, guest: u64, wire: u64) {
        let start = *self.interval_start.get_or_insert(now);
        self.guest.total += guest;
        self.wire.total += wire;
        let elapsed = now.saturating_duration_since(start);
        if elapsed >= MIN_INTERVAL.max(rtt) {
            self.guest.close_interval(elapsed, self.limited);
            self.wire.close_interval(elapsed, self.limited);
            self.interval_start = Some(now);
            self.limited = false;
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
    /// What the link's own window has room for is on its way at once and makes no queue, so it is
    /// always allowed: while the link is still finding its rate, the rates measured here lag behind.
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
        (
            at(&self.guest).max(window * ratio).max(GUEST_FLOOR),
            at(&self.wire).max(window).max(WIRE_FLOOR),
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
        // (time of the ack, wire bytes) in order.
        let mut acks = std::collections::VecDeque::new();
        let mut link_free_at = 0.0_f64;
        let step = 0.001;
        while now < seconds {
            while acks.front().is_some_and(|(at, _)| *at <= now) {
                let (_, bytes): (f64, f64) = acks.pop_front().unwrap();
                acked += bytes;
                let at = start + Duration::from_secs_f64(now);
                budget.on_delivered(at, rtt, (bytes * ratio) as u64, bytes as u64);
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
                acks.push_back((link_free_at + rtt.as_secs_f64(), frame));
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
            );
        }
        let (before, _) = budget.allowance(rtt, 0);
        for i in 0..100_u32 {
            let now = start + Duration::from_secs(1) + Duration::from_millis(100) * i;
            budget.on_delivered(now, rtt, 100, 100);
        }
        assert_eq!(budget.allowance(rtt, 0).0, before);
    }
}
