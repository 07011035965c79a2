//! Figures of the gateway as a whole.

use prometheus::{
    Counter, CounterVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::registered;
use crate::status::Direction;

/// Why a connection or a migration was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// The gateway is draining.
    Draining,
    /// A limit of `[limits]` is reached.
    Limit,
    /// The link to the peer is down.
    PeerDown,
    /// The peer's allow list does not hold the target.
    NotAllowed,
    /// The target refused, or did not answer in time.
    TargetDown,
    /// The source opens no return path.
    NoReturnPath,
    /// This gateway did not accept the peer's certificate.
    Certificate,
    /// The peer speaks another version of the protocol.
    Version,
    /// The connection closed before it said anything.
    Silent,
    /// The peer broke the protocol, or speaks another one.
    Protocol,
}

impl RefusalReason {
    /// What can be refused on a link to a known peer, so that each is exported from the start.
    const fn of_link(direction: Direction) -> &'static [Self] {
        match direction {
            Direction::Out => &[
                Self::Draining,
                Self::Limit,
                Self::PeerDown,
                Self::NoReturnPath,
                Self::Certificate,
                Self::Version,
                Self::Silent,
                Self::Protocol,
            ],
            Direction::In => &[
                Self::Draining,
                Self::Limit,
                Self::NotAllowed,
                Self::TargetDown,
                Self::Certificate,
                Self::Version,
                Self::Protocol,
            ],
        }
    }

    /// What can be refused before the peer has proved who it is.
    const OF_STRANGERS: [Self; 3] = [Self::Limit, Self::Certificate, Self::Protocol];

    /// The value of the label `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Limit => "limit",
            Self::PeerDown => "peer_down",
            Self::NotAllowed => "not_allowed",
            Self::TargetDown => "target_down",
            Self::NoReturnPath => "no_return_path",
            Self::Certificate => "certificate",
            Self::Version => "version",
            Self::Silent => "silent",
            Self::Protocol => "protocol",
        }
    }
}

/// Refusals, certificate, build.
#[derive(Debug, Clone)]
pub struct GatewayMetrics {
    refused: IntCounterVec,
    certificate_expiry: IntGauge,
    draining: IntGauge,
    dropped_log_lines: IntCounter,
    /// Manifests kept.
    pub manifests: IntGauge,
    /// Memory that they take.
    pub manifest_bytes: IntGauge,
    /// Main channels that went on with what a guest held before.
    pub manifests_adopted: IntCounter,
    /// Processor time spent encoding.
    pub encode_seconds: Counter,
    /// Processor time spent decoding.
    pub decode_seconds: Counter,
}

impl GatewayMetrics {
    /// Registers them; `protocol` is the version of our wire format.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry, protocol: u32) -> Result<Self, prometheus::Error> {
        let refused = registered(
            registry,
            IntCounterVec::new(
                Opts::new(
                    "skyferry_refused_connections_total",
                    "Connections and migrations turned away, by reason; peer is empty where a \
                     caller has not proved who it is.",
                ),
                &["peer", "direction", "reason"],
            )?,
        )?;
        let build = registered(
            registry,
            IntGaugeVec::new(
                Opts::new(
                    "skyferry_build_info",
                    "Always 1; the labels tell what is running.",
                ),
                &["version", "protocol"],
            )?,
        )?;
        build
            .with_label_values(&[env!("CARGO_PKG_VERSION"), &protocol.to_string()])
            .set(1);
        let stages = registered(
            registry,
            CounterVec::new(
                Opts::new(
                    "skyferry_stage_cpu_seconds_total",
                    "Processor time by stage: encode (parsing, hashing, compression), decode.",
                ),
                &["stage"],
            )?,
        )?;
        let metrics = Self {
            encode_seconds: stages.with_label_values(&["encode"]),
            decode_seconds: stages.with_label_values(&["decode"]),
            manifests: registered(
                registry,
                IntGauge::new(
                    "skyferry_manifests",
                    "Guests whose last contents are remembered by their ids, for their return.",
                )?,
            )?,
            manifest_bytes: registered(
                registry,
                IntGauge::new("skyferry_manifest_bytes", "Memory that this takes.")?,
            )?,
            manifests_adopted: registered(
                registry,
                IntCounter::new(
                    "skyferry_manifests_adopted_total",
                    "Outgoing migrations that built on what a guest held before.",
                )?,
            )?,
            refused,
            certificate_expiry: registered(
                registry,
                IntGauge::new(
                    "skyferry_certificate_expiry_timestamp_seconds",
                    "When this gateway's certificate or its CA's expires, whichever is sooner, as \
                     seconds since 1970.",
                )?,
            )?,
            dropped_log_lines: registered(
                registry,
                IntCounter::new(
                    "skyferry_log_lines_dropped_total",
                    "Log lines that were left out because nothing took those before them.",
                )?,
            )?,
            draining: registered(
                registry,
                IntGauge::new(
                    "skyferry_draining",
                    "1 while the gateway drains and takes no new migration.",
                )?,
            )?,
        };
        for reason in RefusalReason::OF_STRANGERS {
            metrics.refusals(reason, None, Direction::In).inc_by(0);
        }
        Ok(metrics)
    }

    /// Exports the refusals of a link from 0 on, so that the first one shows as an increase.
    pub fn expect_refusals(&self, peer: &str, direction: Direction) {
        for &reason in RefusalReason::of_link(direction) {
            self.refusals(reason, Some(peer), direction).inc_by(0);
        }
    }

    /// Counts one refusal; `peer` is `None` for a caller that has not proved who it is.
    pub fn refused(&self, reason: RefusalReason, peer: Option<&str>, direction: Direction) {
        self.refusals(reason, peer, direction).inc();
    }

    fn refusals(
        &self,
        reason: RefusalReason,
        peer: Option<&str>,
        direction: Direction,
    ) -> IntCounter {
        let peer = peer.unwrap_or_default();
        self.refused
            .with_label_values(&[peer, direction.as_str(), reason.as_str()])
    }

    /// Sets when the certificate expires, in seconds since 1970.
    pub fn set_certificate_expiry(&self, unix_seconds: i64) {
        self.certificate_expiry.set(unix_seconds);
    }

    /// Sets how many log lines were left out so far.
    pub fn set_dropped_log_lines(&self, lines: u64) {
        let known = self.dropped_log_lines.get();
        self.dropped_log_lines.inc_by(lines.saturating_sub(known));
    }

    /// Says whether the gateway drains.
    pub fn set_draining(&self, draining: bool) {
        self.draining.set(i64::from(draining));
    }
}
