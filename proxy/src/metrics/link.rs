//! Figures of each link, sampled from QUIC before a scrape.
//!
//! There may be two links to a peer: the one that this gateway dials carries migrations `out`, the
//! one that the peer dials carries them `in`.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::{Gauge, GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::follow::FollowedCounter;
use super::registered;
use crate::status::Direction;

/// Vectors by `peer` and `direction`.
#[derive(Debug, Clone)]
pub struct LinkMetrics {
    up: IntGaugeVec,
    rtt: GaugeVec,
    congestion_window: IntGaugeVec,
    packets_lost: IntCounterVec,
    packets_sent: IntCounterVec,
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
    announced: IntGaugeVec,
}

impl LinkMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let labels = &["peer", "direction"];
        let int_gauge = |name: &str, help: &str| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
        };
        let counter = |name: &str, help: &str| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        Ok(Self {
            up: int_gauge(
                "skyferry_link_up",
                "1 while the connection stands: to the peer (out), or from the peer (in).",
            )?,
            rtt: registered(
                registry,
                GaugeVec::new(
                    Opts::new(
                        "skyferry_link_rtt_seconds",
                        "Smoothed round-trip time to the peer; 0 while down.",
                    ),
                    labels,
                )?,
            )?,
            congestion_window: int_gauge(
                "skyferry_link_congestion_window_bytes",
                "Bytes that may be on the way to the peer; 0 while down.",
            )?,
            packets_lost: counter(
                "skyferry_link_packets_lost_total",
                "Packets to the peer taken for lost.",
            )?,
            packets_sent: counter(
                "skyferry_link_packets_sent_total",
                "Packets sent to the peer.",
            )?,
            sent_bytes: counter(
                "skyferry_link_sent_bytes_total",
                "UDP payload sent to the peer, all overheads of QUIC included, without the headers of UDP and IP.",
            )?,
            received_bytes: counter(
                "skyferry_link_received_bytes_total",
                "UDP payload received from the peer, all overheads of QUIC included, without the headers of UDP and IP.",
            )?,
            announced: int_gauge(
                "skyferry_link_announced_pages",
                "Pages that the peer has announced of its store on disk (out only).",
            )?,
        })
    }

    /// The handles for one link. Make them once and keep them: totals are followed from here on.
    pub fn for_peer(&self, peer: &str, direction: Direction) -> PeerLinkMetrics {
        let labels = &[peer, direction.as_str()];
        let followed =
            |vector: &IntCounterVec| FollowedCounter::new(vector.with_label_values(labels));
        PeerLinkMetrics {
            connection: AtomicU64::new(0),
            up: self.up.with_label_values(labels),
            rtt: self.rtt.with_label_values(labels),
            congestion_window: self.congestion_window.with_label_values(labels),
            packets_lost: followed(&self.packets_lost),
            packets_sent: followed(&self.packets_sent),
            sent_bytes: followed(&self.sent_bytes),
            received_bytes: followed(&self.received_bytes),
            announced: self.announced.with_label_values(labels),
        }
    }
}

/// One connection's state; totals count from the connection's start.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkSample {
    /// Number of the connection inside its link, from 1.
    pub connection: u64,
    /// Smoothed round-trip time.
    pub rtt_seconds: f64,
    /// Congestion window.
    pub congestion_window_bytes: u64,
    /// Packets taken for lost.
    pub packets_lost: u64,
    /// Packets sent.
    pub packets_sent: u64,
    /// UDP payload sent.
    pub sent_bytes: u64,
    /// UDP payload received.
    pub received_bytes: u64,
    /// Pages that the peer has announced.
    pub announced_pages: u64,
}

/// Handles for one link.
#[derive(Debug)]
pub struct PeerLinkMetrics {
    /// The connection sampled last; 0 before the first.
    connection: AtomicU64,
    up: IntGauge,
    rtt: Gauge,
    congestion_window: IntGauge,
    packets_lost: FollowedCounter,
    packets_sent: FollowedCounter,
    sent_bytes: FollowedCounter,
    received_bytes: FollowedCounter,
    announced: IntGauge,
}

impl PeerLinkMetrics {
    /// Takes a sample of the standing connection, or `None` while there is none. Totals of a new
    /// connection are added to those of the ones before.
    pub fn observe(&self, sample: Option<&LinkSample>) {
        self.up.set(i64::from(sample.is_some()));
        let Some(sample) = sample else {
            self.rtt.set(0.0);
            self.congestion_window.set(0);
            return;
        };
        self.rtt.set(sample.rtt_seconds);
        self.congestion_window
            .set(i64::try_from(sample.congestion_window_bytes).unwrap_or(i64::MAX));
        self.announced
            .set(i64::try_from(sample.announced_pages).unwrap_or(i64::MAX));
        let before = self.connection.swap(sample.connection, Ordering::Relaxed);
        if before != sample.connection {
            for total in self.totals() {
                total.restart();
            }
        }
        self.packets_lost.follow(sample.packets_lost);
        self.packets_sent.follow(sample.packets_sent);
        self.sent_bytes.follow(sample.sent_bytes);
        self.received_bytes.follow(sample.received_bytes);
    }

    fn totals(&self) -> [&FollowedCounter; 4] {
        [
            &self.packets_lost,
            &self.packets_sent,
            &self.sent_bytes,
            &self.received_bytes,
        ]
    }

    /// UDP payload sent to the peer so far, over all connections.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.value()
    }

    /// UDP payload received from the peer so far, over all connections.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_add_up_and_links_are_apart() {
        let metrics = LinkMetrics::register(&Registry::new()).unwrap();
        let out = metrics.for_peer("edge-b", Direction::Out);
        let other = metrics.for_peer("edge-b", Direction::In);
        let sample = |connection, sent_bytes| LinkSample {
            connection,
            sent_bytes,
            ..LinkSample::default()
        };
        out.observe(Some(&sample(1, 100)));
        out.observe(None);
        // The second connection has sent more by now than the first had when it was last seen.
        out.observe(Some(&sample(2, 150)));
        out.observe(Some(&sample(2, 160)));
        assert_eq!(out.sent_bytes(), 260);
        assert_eq!(other.sent_bytes(), 0);
    }
}
