//! Measures the rate at which a path delivers, from what quinn reports of sending and
//! acknowledgement (after draft-cheng-iccrg-delivery-rate-estimation), batch by batch.
//!
//! Sans-IO; the controller in `delivery_rate.rs` decides what the samples mean.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Batches remembered: two RTTs' worth at the spacing that the controller asks for, 48 bytes each.
const LOG_ENTRIES: usize = 2048;

/// Measures the delivery rate (draft-cheng-iccrg-delivery-rate-estimation), by batch.
#[derive(Clone, Debug)]
pub(super) struct Sampler {
    /// Bytes acknowledged so far, and when the last were.
    pub(super) delivered: u64,
    delivered_at: Instant,
    /// When the first packet of the current flight was sent.
    flight_at: Instant,
    /// Bytes under way, corrected by quinn's own count at each acknowledgement.
    pub(super) in_flight: u64,
    /// When the last packet was sent.
    pub(super) sent_at: Instant,
    /// What is sent while `delivered` is not above this was sent by an application that had no
    /// more; `None` until that happens.
    app_limited_until: Option<u64>,
    /// The round ends when a packet sent after this many bytes were delivered is acknowledged.
    round_end: u64,
    log: VecDeque<Batch>,
    /// When the newest packet acknowledged in this batch of acknowledgements was sent.
    newest_acked: Option<Instant>,
}

/// What was known when a batch of packets was sent.
#[derive(Clone, Copy, Debug)]
struct Batch {
    sent: Instant,
    delivered: u64,
    delivered_at: Instant,
    flight_at: Instant,
    is_app_limited: bool,
}

/// What one batch of acknowledgements tells.
pub(super) struct Sample {
    pub(super) delivered: u64,
    pub(super) interval: Duration,
    pub(super) is_app_limited: bool,
    pub(super) rtt: Duration,
    pub(super) is_round_end: bool,
}

impl Sampler {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            delivered: 0,
            delivered_at: now,
            flight_at: now,
            in_flight: 0,
            sent_at: now,
            app_limited_until: None,
            round_end: 0,
            log: VecDeque::new(),
            newest_acked: None,
        }
    }

    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64, spacing: Duration) {
        if self.in_flight == 0 {
            self.flight_at = now;
            self.delivered_at = now;
        }
        self.in_flight += bytes;
        self.sent_at = now;
        let is_close = self
            .log
            .back()
            .is_some_and(|last| now.saturating_duration_since(last.sent) <= spacing);
        if is_close {
            return;
        }
        if self.log.len() == LOG_ENTRIES {
            self.log.pop_front();
        }
        self.log.push_back(Batch {
            sent: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            flight_at: self.flight_at,
            is_app_limited: self.app_limited_until >= Some(self.delivered),
        });
    }

    /// The application has nothing more to send, or had nothing until now.
    pub(super) fn on_application_limit(&mut self) {
        self.app_limited_until = Some(self.delivered + self.in_flight);
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.delivered_at = now;
        self.newest_acked = Some(self.newest_acked.map_or(sent, |newest| newest.max(sent)));
    }

    pub(super) fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
    ) -> Option<Sample> {
        self.in_flight = in_flight;
        if app_limited {
            self.on_application_limit();
        }
        let sent = self.newest_acked.take()?;
        let after = self.log.partition_point(|batch| batch.sent <= sent);
        let index = after.checked_sub(1)?;
        let batch = *self.log.get(index)?;
        let rtt = now.saturating_duration_since(sent);
        // Older batches serve only packets that are overtaken by more than an RTT.
        let oldest = sent.checked_sub(rtt).unwrap_or(sent);
        while self.log.front().is_some_and(|first| first.sent < oldest) {
            self.log.pop_front();
        }
        self.flight_at = sent;
        let sending = sent.saturating_duration_since(batch.flight_at);
        let receiving = now.saturating_duration_since(batch.delivered_at);
        let is_round_end = batch.delivered >= self.round_end;
        if is_round_end {
            self.restart_round();
        }
        Some(Sample {
            delivered: self.delivered - batch.delivered,
            interval: sending.max(receiving),
            is_app_limited: batch.is_app_limited,
            rtt,
            is_round_end,
        })
    }

    pub(super) fn restart_round(&mut self) {
        self.round_end = self.delivered;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Sends 10 kB per millisecond for 200 ms over a path of 50 ms and returns the last sample.
    fn steady_flow(sampler: &mut Sampler, start: Instant) -> Sample {
        let mut last = None;
        for tick in 0..200 {
            let now = start + MS * tick;
            if tick >= 50 {
                sampler.on_ack(now, now - MS * 50, 10_000);
                last = sampler.on_end_acks(now, 500_000, false);
            }
            sampler.on_sent(now, 10_000, Duration::ZERO);
        }
        last.unwrap()
    }

    #[test]
    fn a_steady_flow_is_measured_exactly() {
        let start = Instant::now();
        let sample = steady_flow(&mut Sampler::new(start), start);
        assert_eq!(sample.rtt, MS * 50);
        assert_eq!(sample.interval, MS * 50);
        assert_eq!(sample.delivered, 500_000);
        assert!(!sample.is_app_limited);
    }

    #[test]
    fn what_is_sent_after_a_pause_is_marked_until_it_is_acknowledged() {
        let start = Instant::now();
        let mut sampler = Sampler::new(start);
        steady_flow(&mut sampler, start);
        sampler.on_application_limit();
        let pause = start + MS * 300;
        sampler.on_ack(pause, start + MS * 199, 510_000);
        sampler.on_end_acks(pause, 0, false);
        sampler.on_sent(pause + MS, 10_000, Duration::ZERO);
        sampler.on_ack(pause + MS * 51, pause + MS, 10_000);
        let sample = sampler.on_end_acks(pause + MS * 51, 0, false).unwrap();
        assert!(sample.is_app_limited);
        sampler.on_sent(pause + MS * 52, 10_000, Duration::ZERO);
        sampler.on_ack(pause + MS * 102, pause + MS * 52, 10_000);
        let sample = sampler.on_end_acks(pause + MS * 102, 0, false).unwrap();
        assert!(!sample.is_app_limited);
    }

    #[test]
    fn the_log_is_bounded() {
        let start = Instant::now();
        let mut sampler = Sampler::new(start);
        for tick in 0..3 * LOG_ENTRIES as u32 {
            sampler.on_sent(start + MS * tick, 1200, Duration::ZERO);
        }
        assert_eq!(sampler.log.len(), LOG_ENTRIES);
        // An acknowledgement of what is no longer known is no sample, and no harm.
        sampler.on_ack(start + MS * 9000, start, 1200);
        assert!(sampler.on_end_acks(start + MS * 9000, 0, false).is_none());
    }
}
