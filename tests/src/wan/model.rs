//! The model of one direction of a link: pure arithmetic on sizes and times.
//!
//! A packet offered at time `t` may be lost at random, or find the queue full (tail drop); else it
//! leaves the queue when the rate has let everything before it through, and arrives `delay` later.
//! A cut loses what is offered and what would arrive meanwhile. Packets never overtake each other,
//! also when the shape changes while they are under way.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::random::Random;

/// What one direction of a link is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// One-way delay.
    pub delay: Duration,
    /// Rate in bits per second.
    pub bits_per_sec: u64,
    /// Bytes that may wait for the rate; what comes on top is dropped.
    pub queue_bytes: usize,
    /// Probability that a packet is lost, 0 to 1.
    pub loss: f64,
    /// Seed of the loss, so that a run can be repeated.
    pub seed: u64,
}

impl Shape {
    /// A link of `megabits` per second and `rtt_ms` round trip, no loss, and a queue of one
    /// bandwidth-delay product (at least 64 KiB), as routers on long links are set up.
    #[must_use]
    pub fn wan(megabits: u64, rtt_ms: u64) -> Self {
        let bits_per_sec = megabits * 1_000_000;
        let bdp_bytes = usize::try_from(bits_per_sec * rtt_ms / 8000).unwrap_or(usize::MAX);
        Self {
            delay: Duration::from_micros(rtt_ms * 500),
            bits_per_sec,
            queue_bytes: bdp_bytes.max(64 << 10),
            loss: 0.0,
            seed: 1,
        }
    }

    /// The same link losing this share of packets at random.
    #[must_use]
    pub fn with_loss(self, loss: f64) -> Self {
        Self { loss, ..self }
    }

    fn transmission(&self, bytes: usize) -> Duration {
        let nanos = bytes as u128 * 8_000_000_000 / u128::from(self.bits_per_sec.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Packets and bytes of one direction, headers from IP upwards included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets the sending side put on the link.
    pub offered_packets: u64,
    /// Their bytes.
    pub offered_bytes: u64,
    /// Bytes that passed the queue, those lost at random or by a cut included.
    pub carried_bytes: u64,
    /// Packets that came out.
    pub delivered_packets: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
    /// Packets lost at random.
    pub lost_packets: u64,
    /// Packets dropped as the queue was full.
    pub overflow_packets: u64,
    /// Packets that a cut swallowed.
    pub cut_packets: u64,
}

/// One direction of a link with the packets under way on it; `T` is a packet (or its place).
#[derive(Debug)]
pub struct Direction<T> {
    shape: Shape,
    cut: bool,
    /// When the last packet accepted will have left the queue.
    busy_until: Option<Instant>,
    random: Random,
    under_way: VecDeque<UnderWay<T>>,
    counters: Counters,
}

#[derive(Debug)]
struct UnderWay<T> {
    arrival: Instant,
    bytes: usize,
    packet: T,
}

impl<T> Direction<T> {
    /// An idle link.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            cut: false,
            busy_until: None,
            random: Random::new(shape.seed),
            under_way: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// Changes the shape for packets offered from now on.
    pub fn set_shape(&mut self, shape: Shape) {
        if shape.seed != self.shape.seed {
            self.random = Random::new(shape.seed);
        }
        self.shape = shape;
    }

    /// Cuts or mends the link.
    pub fn set_cut(&mut self, cut: bool) {
        self.cut = cut;
    }

    /// What has been carried and dropped.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// A packet of `bytes` enters at `now`; `make` is called if the link takes it.
    pub fn offer(&mut self, now: Instant, bytes: usize, make: impl FnOnce() -> T) {
        self.counters.offered_packets += 1;
        self.counters.offered_bytes += bytes as u64;
        if self.cut {
            self.counters.cut_packets += 1;
            return;
        }
        let lost = self.shape.loss > 0.0 && self.random.unit() < self.shape.loss;
        let start = self.busy_until.map_or(now, |busy| busy.max(now));
        let waiting = start - now;
        if waiting + self.shape.transmission(bytes)
            > self.shape.transmission(self.shape.queue_bytes)
        {
            self.counters.overflow_packets += 1;
            return;
        }
        let leaves = start + self.shape.transmission(bytes);
        self.busy_until = Some(leaves);
        self.counters.carried_bytes += bytes as u64;
        if lost {
            // Lost behind the queue: it has taken its time on the link.
            self.counters.lost_packets += 1;
            return;
        }
        let mut arrival = leaves + self.shape.delay;
        if let Some(last) = self.under_way.back() {
            arrival = arrival.max(last.arrival);
        }
        self.under_way.push_back(UnderWay {
            arrival,
            bytes,
            packet: make(),
        });
    }

    /// The next packet that has arrived by `now`.
    pub fn poll(&mut self, now: Instant) -> Option<T> {
        loop {
            if self.under_way.front()?.arrival > now {
                return None;
            }
            let UnderWay { bytes, packet, .. } = self.under_way.pop_front()?;
            if self.cut {
                self.counters.cut_packets += 1;
                continue;
            }
            self.counters.delivered_packets += 1;
            self.counters.delivered_bytes += bytes as u64;
            return Some(packet);
        }
    }

    /// When [`Self::poll`] will have something next.
    #[must_use]
    pub fn next_arrival(&self) -> Option<Instant> {
        self.under_way.front().map(|front| front.arrival)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// 1000 bytes take 1 ms; four packets fit into the queue.
    fn shape() -> Shape {
        Shape {
            delay: 10 * MS,
            bits_per_sec: 8_000_000,
            queue_bytes: 4000,
            loss: 0.0,
            seed: 7,
        }
    }

    fn arrivals(link: &mut Direction<u32>, start: Instant, until_ms: u32) -> Vec<(u32, u32)> {
        let mut seen = Vec::new();
        for ms in 0..until_ms {
            while let Some(packet) = link.poll(start + ms * MS) {
                seen.push((packet, ms));
            }
        }
        seen
    }

    #[test]
    fn rate_and_delay_add_up() {
        let start = Instant::now();
        let mut link = Direction::new(shape());
        for packet in 0..3 {
            link.offer(start, 1000, || packet);
        }
        assert_eq!(link.next_arrival(), Some(start + 11 * MS));
        assert_eq!(arrivals(&mut link, start, 20), [(0, 11), (1, 12), (2, 13)]);
        assert_eq!(link.counters().delivered_bytes, 3000);
    }

    #[test]
    fn the_tail_is_dropped_when_the_queue_is_full() {
        let start = Instant::now();
        let mut link = Direction::new(shape());
        for packet in 0..6 {
            link.offer(start, 1000, || packet);
        }
        // After 1 ms one packet has left the queue, so there is room for one.
        link.offer(start + MS, 1000, || 6);
        link.offer(start + MS, 1000, || 7);
        let order: Vec<u32> = arrivals(&mut link, start, 30)
            .iter()
            .map(|seen| seen.0)
            .collect();
        assert_eq!(order, [0, 1, 2, 3, 6]);
        assert_eq!(link.counters().overflow_packets, 3);
        assert_eq!(link.counters().offered_packets, 8);
    }

    #[test]
    fn loss_is_as_frequent_as_asked_and_repeats_with_the_seed() {
        let run = |seed| {
            let start = Instant::now();
            let mut link = Direction::new(Shape {
                loss: 0.05,
                seed,
                ..shape()
            });
            let mut seen = Vec::new();
            for packet in 0..20_000u32 {
                let now = start + packet * MS;
                link.offer(now, 1000, || packet);
                seen.extend(std::iter::from_fn(|| link.poll(now)));
            }
            (link.counters().lost_packets, seen)
        };
        let (lost, seen) = run(3);
        assert!((800..1200).contains(&lost), "{lost} of 20000 lost");
        assert_eq!(run(3), (lost, seen.clone()));
        assert_ne!(run(4).1, seen);
    }

    #[test]
    fn a_cut_swallows_what_enters_and_what_is_under_way() {
        let start = Instant::now();
        let mut link = Direction::new(shape());
        link.offer(start, 1000, || 0);
        link.set_cut(true);
        link.offer(start + MS, 1000, || 1);
        assert_eq!(link.poll(start + 11 * MS), None);
        link.set_cut(false);
        link.offer(start + 12 * MS, 1000, || 2);
        assert_eq!(arrivals(&mut link, start, 40), [(2, 23)]);
        assert_eq!(link.counters().cut_packets, 2);
    }

    #[test]
    fn a_shorter_delay_does_not_reorder() {
        let start = Instant::now();
        let mut link = Direction::new(shape());
        link.offer(start, 1000, || 0);
        link.set_shape(Shape {
            delay: MS,
            ..shape()
        });
        link.offer(start + MS, 1000, || 1);
        assert_eq!(arrivals(&mut link, start, 40), [(0, 11), (1, 11)]);
    }
}
