//! Figures of the link to each peer, sampled from QUIC before a scrape.

use prometheus::{Gauge, GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::follow::FollowedCounter;
use super::registered;

/// Vectors by `peer`.
#[derive(Debug, Clone)]
pub struct LinkMetrics {
    up: IntGaugeVec,
    rtt: GaugeVec,
    congestion_window: IntGaugeVec,
    packets_lost: IntCounterVec,
    packets_sent: IntCounterVec,
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
}

impl LinkMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let label = &["peer"];
        let int_gauge = |name: &str, help: &str| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), label)?)
        };
        let counter = |name: &str, help: &str| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), label)?)
        };
        Ok(Self {
            up: int_gauge(
                "skyferry_link_up",
                "1 while a connection to the peer stands.",
            )?,
            rtt: registered(
                registry,
                GaugeVec::new(
                    Opts::new(
                        "skyferry_link_rtt_seconds",
                        "Smoothed round-trip time to the peer; 0 while down.",
                    ),
                    label,
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
                "UDP payload sent to the peer, all overheads of QUIC included.",
            )?,
            received_bytes: counter(
                "skyferry_link_received_bytes_total",
                "UDP payload received from the peer.",
            )?,
        })
    }

    /// The handles for one peer. Make one per peer and keep it: totals are followed from here on.
    pub fn for_peer(&self, peer: &str) -> PeerLinkMetrics {
        let label = &[peer];
        let followed =
            |vector: &IntCounterVec| FollowedCounter::new(vector.with_label_values(label));
        PeerLinkMetrics {
            up: self.up.with_label_values(label),
            rtt: self.rtt.with_label_values(label),
            congestion_window: self.congestion_window.with_label_values(label),
            packets_lost: followed(&self.packets_lost),
            packets_sent: followed(&self.packets_sent),
            sent_bytes: followed(&self.sent_bytes),
            received_bytes: followed(&self.received_bytes),
        }
    }
}

/// One connection's state; totals count from the connection's start.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkSample {
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
}

/// Handles for one peer.
#[derive(Debug)]
pub struct PeerLinkMetrics {
    up: IntGauge,
    rtt: Gauge,
    congestion_window: IntGauge,
    packets_lost: FollowedCounter,
    packets_sent: FollowedCounter,
    sent_bytes: FollowedCounter,
    received_bytes: FollowedCounter,
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
        self.packets_lost.follow(sample.packets_lost);
        self.packets_sent.follow(sample.packets_sent);
        self.sent_bytes.follow(sample.sent_bytes);
        self.received_bytes.follow(sample.received_bytes);
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
