//! Figures of migrations by peer and direction.

use std::time::Duration;

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

use super::registered;
use super::sent::{PeerSent, SentMetrics};
use crate::status::Direction;

/// Buckets of the blackout: the issue of a live migration is decided between 50 ms and some seconds.
const BLACKOUT_BUCKETS: &[f64] = &[
    0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0,
];

/// Buckets of the queue time, around the default delay budget of 100 ms plus one RTT.
const QUEUE_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 30.0,
];

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MigrationResult {
    /// The destination confirmed.
    Completed,
    /// It broke off before the commit byte was released.
    Failed,
    /// The source called it off.
    Cancelled,
    /// A gateway or the target refused it.
    Refused,
    /// It ended between commit and verdict.
    Unknown,
}

impl MigrationResult {
    const ALL: [Self; 5] = [
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Refused,
        Self::Unknown,
    ];

    /// The value of the label `result`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }
}

/// What a comparison of both gateways' digests gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CommitCheck {
    /// Digests agree and the near gateway has just been heard: released.
    Agreed,
    /// Digests differ, before the commit byte or behind any frame: the channels were reset.
    Mismatch,
    /// The near gateway could not be heard in time: the channels were reset.
    Stale,
    /// Digests agree, but the request may be old: the near gateway was asked for it once more.
    Asked,
}

impl CommitCheck {
    const ALL: [Self; 4] = [Self::Agreed, Self::Mismatch, Self::Stale, Self::Asked];

    /// The value of the label `result`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agreed => "agreed",
            Self::Mismatch => "mismatch",
            Self::Stale => "stale",
            Self::Asked => "asked",
        }
    }
}

/// Vectors by `peer` and `direction`.
#[derive(Debug, Clone)]
pub struct MigrationMetrics {
    guest_bytes: IntCounterVec,
    wire_bytes: IntCounterVec,
    pages: IntCounterVec,
    opaque_bytes: IntCounterVec,
    sent: SentMetrics,
    effort: IntGaugeVec,
    active: IntGaugeVec,
    finished: IntCounterVec,
    blackout: HistogramVec,
    queue: HistogramVec,
    in_flight: IntGaugeVec,
    page_misses: IntCounterVec,
    held_commits: IntGaugeVec,
    oldest_held_commit: GaugeVec,
    commit_checks: IntCounterVec,
}

impl MigrationMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let labels = ["peer", "direction"];
        let counter = |name: &str, help: &str| {
            registered(
                registry,
                IntCounterVec::new(Opts::new(name, help), &labels)?,
            )
        };
        let gauge = |name: &str, help: &str| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), &labels)?)
        };
        let counter_by = |name: &str, help: &str, extra: &str| {
            let labels = [labels[0], labels[1], extra];
            registered(
                registry,
                IntCounterVec::new(Opts::new(name, help), &labels)?,
            )
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            registered(registry, HistogramVec::new(opts, &labels)?)
        };
        Ok(Self {
            guest_bytes: counter(
                "skyferry_guest_bytes_total",
                "Bytes read from source VMs (out) or written to destination VMs (in).",
            )?,
            wire_bytes: counter(
                "skyferry_wire_bytes_total",
                "Bytes of migration frames sent (out) or received (in), without the overheads of QUIC, UDP \
                 and IP and what is sent again after losses; skyferry_link_sent_bytes_total and \
                 skyferry_link_received_bytes_total have what the link carries.",
            )?,
            pages: counter_by(
                "skyferry_pages_total",
                "Guest pages by how they were carried: zero, same as its place held, reference to a \
                 page the peer holds, delta from what its place held or from a similar page, or \
                 compressed in a batch.",
                "outcome",
            )?,
            opaque_bytes: counter(
                "skyferry_opaque_bytes_total",
                "Guest bytes carried outside the page structure: headers, device state, unknown \
                 streams.",
            )?,
            sent: SentMetrics::register(registry)?,
            effort: gauge(
                "skyferry_compression_effort",
                "Rung of the compression ladder that was last chosen, 0 (none) to 9 (out).",
            )?,
            active: gauge("skyferry_migrations_active", "Migrations running.")?,
            finished: counter_by(
                "skyferry_migrations_finished_total",
                "Migrations finished, by result.",
                "result",
            )?,
            blackout: histogram(
                "skyferry_blackout_seconds",
                "From the end of RAM seen in the stream to the destination's verdict.",
                BLACKOUT_BUCKETS,
            )?,
            queue: histogram(
                "skyferry_queue_seconds",
                "How long a byte accepted from the source VM waits until it is delivered.",
                QUEUE_BUCKETS,
            )?,
            in_flight: gauge(
                "skyferry_in_flight_bytes",
                "Guest bytes accepted and not yet known to be delivered.",
            )?,
            page_misses: counter(
                "skyferry_page_misses_total",
                "Pages referred to that the receiving side no longer held and asked for.",
            )?,
            held_commits: gauge(
                "skyferry_held_commits",
                "Migrations that await the destination's verdict: the commit was asked for (out) or \
                 released (in).",
            )?,
            oldest_held_commit: registered(
                registry,
                GaugeVec::new(
                    Opts::new(
                        "skyferry_oldest_held_commit_seconds",
                        "For how long the oldest of the held commits has awaited its verdict; 0 \
                         without any.",
                    ),
                    &labels,
                )?,
            )?,
            commit_checks: counter_by(
                "skyferry_commit_checks_total",
                "Comparisons of both gateways' digests: agreed, asked once more or stale before a commit \
                 byte, mismatch there or at any frame.",
                "result",
            )?,
        })
    }

    /// The handles for one peer and direction. Asking again gives the same counters.
    pub fn for_peer(&self, peer: &str, direction: Direction) -> PeerMetrics {
        let labels = [peer, direction.as_str()];
        let with = |vector: &IntCounterVec, last: &str| {
            vector.with_label_values(&[labels[0], labels[1], last])
        };
        PeerMetrics {
            guest_bytes: self.guest_bytes.with_label_values(&labels),
            wire_bytes: self.wire_bytes.with_label_values(&labels),
            pages_zero: with(&self.pages, "zero"),
            pages_same: with(&self.pages, "same"),
            pages_reference: with(&self.pages, "reference"),
            pages_delta: with(&self.pages, "delta"),
            pages_similar: with(&self.pages, "similar"),
            pages_batch: with(&self.pages, "batch"),
            opaque_bytes: self.opaque_bytes.with_label_values(&labels),
            sent: self.sent.for_peer(peer, direction),
            effort: self.effort.with_label_values(&labels),
            active: self.active.with_label_values(&labels),
            finished: MigrationResult::ALL.map(|result| with(&self.finished, result.as_str())),
            blackout: self.blackout.with_label_values(&labels),
            queue: self.queue.with_label_values(&labels),
            in_flight: self.in_flight.with_label_values(&labels),
            page_misses: self.page_misses.with_label_values(&labels),
            held_commits: self.held_commits.with_label_values(&labels),
            oldest_held_commit: self.oldest_held_commit.with_label_values(&labels),
            commit_checks: CommitCheck::ALL
                .map(|result| with(&self.commit_checks, result.as_str())),
        }
    }
}

/// Handles for one peer and direction; cheap to clone and to update.
#[derive(Debug, Clone)]
pub struct PeerMetrics {
    /// Bytes read from the source VM (out) or written to the destination VM (in).
    pub guest_bytes: IntCounter,
    /// Bytes of frames.
    pub wire_bytes: IntCounter,
    /// Zero pages.
    pub pages_zero: IntCounter,
    /// Pages that their place held already.
    pub pages_same: IntCounter,
    /// Pages carried as a reference.
    pub pages_reference: IntCounter,
    /// Pages carried as a delta from what their place held.
    pub pages_delta: IntCounter,
    /// Pages carried as a delta from what another place held.
    pub pages_similar: IntCounter,
    /// Pages carried in a compressed batch.
    pub pages_batch: IntCounter,
    /// Guest bytes outside the page structure.
    pub opaque_bytes: IntCounter,
    /// What frames consist of, and what they save.
    pub sent: PeerSent,
    /// Rung of the compression ladder in use.
    pub effort: IntGauge,
    /// Migrations running.
    pub active: IntGauge,
    finished: [IntCounter; MigrationResult::ALL.len()],
    /// Blackouts in seconds.
    pub blackout: Histogram,
    /// Queue times in seconds.
    pub queue: Histogram,
    /// Guest bytes accepted and not yet delivered.
    pub in_flight: IntGauge,
    /// Pages asked for again.
    pub page_misses: IntCounter,
    held_commits: IntGauge,
    oldest_held_commit: Gauge,
    commit_checks: [IntCounter; CommitCheck::ALL.len()],
}

impl PeerMetrics {
    /// Counts a finished migration.
    pub fn finished(&self, result: MigrationResult) {
        self.finished[result as usize].inc();
    }

    /// Takes for how long each migration that awaits its verdict has done so.
    pub fn observe_held_commits(&self, ages: impl Iterator<Item = Duration>) {
        let (mut count, mut oldest) = (0, Duration::ZERO);
        for age in ages {
            count += 1;
            oldest = oldest.max(age);
        }
        self.held_commits.set(count);
        self.oldest_held_commit.set(oldest.as_secs_f64());
    }

    /// Counts a comparison before a commit byte.
    pub fn commit_check(&self, result: CommitCheck) {
        self.commit_checks[result as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_under_their_own_label() {
        let registry = Registry::new();
        let metrics = MigrationMetrics::register(&registry).unwrap();
        let peer = metrics.for_peer("edge-b", Direction::Out);
        for (count, result) in MigrationResult::ALL.into_iter().enumerate() {
            (0..=count).for_each(|_| peer.finished(result));
        }
        for (count, result) in CommitCheck::ALL.into_iter().enumerate() {
            (0..=count).for_each(|_| peer.commit_check(result));
        }
        let text = super::super::render(&registry).unwrap();
        for (count, result) in MigrationResult::ALL.into_iter().enumerate() {
            let line = format!(
                "skyferry_migrations_finished_total{{direction=\"out\",peer=\"edge-b\",result=\"{}\"}} {}",
                result.as_str(),
                count + 1
            );
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        assert!(text.contains("result=\"stale\"} 3"), "{text}");
    }
}
