//! Congestion control: how many bytes may be under way.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{self, ControllerFactory};

/// Which congestion controller a connection uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Congestion {
    /// Our own rate-based controller; tolerates random loss of several percent.
    #[default]
    Auto,
    /// quinn's BBR version 1.
    Bbr,
    /// CUBIC (RFC 9438): takes every loss for congestion.
    Cubic,
    /// NewReno (RFC 9002): takes every loss for congestion.
    NewReno,
    /// A constant rate that does not react to congestion: for dedicated capacity only.
    Fixed {
        /// The rate of UDP payload, in bits per second.
        bits_per_sec: u64,
    },
}

/// The factory that quinn calls for each new path.
#[must_use]
pub fn factory(choice: Congestion) -> Arc<dyn ControllerFactory + Send + Sync> {
    match choice {
        Congestion::Auto | Congestion::Bbr | Congestion::Fixed { .. } => {
            Arc::new(congestion::BbrConfig::default())
        }
        Congestion::Cubic => Arc::new(congestion::CubicConfig::default()),
        Congestion::NewReno => Arc::new(congestion::NewRenoConfig::default()),
    }
}

/// What is known about the path of a connection; for scheduling and metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkEstimate {
    /// The rate that the path is believed to carry, in bytes of UDP payload per second.
    pub rate_bytes_per_sec: u64,
    /// The smallest round-trip time seen lately: the path without queues.
    pub min_rtt: Duration,
    /// The smoothed round-trip time, queues and acknowledgement delay included.
    pub rtt: Duration,
    /// Bytes that may be under way.
    pub cwnd: u64,
}

/// The link estimate of `connection`.
#[must_use]
pub fn estimate(connection: &quinn::Connection) -> LinkEstimate {
    let path = connection.stats().path;
    let min_rtt = connection.min_rtt();
    let rtt = path.rtt;
    LinkEstimate {
        rate_bytes_per_sec: rate_over(path.cwnd, rtt),
        min_rtt,
        rtt,
        cwnd: path.cwnd,
    }
}

/// Bytes per second when `bytes` pass in `time`; 0 for no time.
fn rate_over(bytes: u64, time: Duration) -> u64 {
    if time.is_zero() {
        return 0;
    }
    let rate = u128::from(bytes) * 1_000_000_000 / time.as_nanos();
    u64::try_from(rate).unwrap_or(u64::MAX)
}
