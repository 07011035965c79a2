//! Figures of the gateway as a whole.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::registered;

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
    /// The peer's certificate was not accepted.
    Certificate,
    /// The peer speaks another version of the protocol.
    Version,
    /// The connection closed before it said anything.
    Silent,
    /// The peer broke the protocol.
    Protocol,
}

impl RefusalReason {
    /// Every reason, so that each is exported from the start.
    const ALL: [Self; 10] = [
        Self::Draining,
        Self::Limit,
        Self::PeerDown,
        Self::NotAllowed,
        Self::TargetDown,
        Self::NoReturnPath,
        Self::Certificate,
        Self::Version,
        Self::Silent,
        Self::Protocol,
    ];

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
                    "Connections and migrations turned away, by reason.",
                ),
                &["reason"],
            )?,
        )?;
        for reason in RefusalReason::ALL {
            refused.with_label_values(&[reason.as_str()]).inc_by(0);
        }
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
        Ok(Self {
            refused,
            certificate_expiry: registered(
                registry,
                IntGauge::new(
                    "skyferry_certificate_expiry_timestamp_seconds",
                    "When this gateway's certificate or its CA's expires, whichever is sooner, as \
                     seconds since 1970.",
                )?,
            )?,
            draining: registered(
                registry,
                IntGauge::new(
                    "skyferry_draining",
                    "1 while the gateway drains and takes no new migration.",
                )?,
            )?,
        })
    }

    /// Counts one refusal.
    pub fn refused(&self, reason: RefusalReason) {
        self.refused.with_label_values(&[reason.as_str()]).inc();
    }

    /// Sets when the certificate expires, in seconds since 1970.
    pub fn set_certificate_expiry(&self, unix_seconds: i64) {
        self.certificate_expiry.set(unix_seconds);
    }

    /// Says whether the gateway drains.
    pub fn set_draining(&self, draining: bool) {
        self.draining.set(i64::from(draining));
    }
}
