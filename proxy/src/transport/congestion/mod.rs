//! Congestion control: how many bytes may be under way.
//!
//! [`factory`] turns the configured choice into what quinn asks for; [`estimate`] asks a running
//! connection what it has learnt about its path.

mod delivery_rate;
mod fixed;
mod sampler;

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{self, ControllerFactory};

pub use delivery_rate::{DeliveryRate, DeliveryRateConfig, Phase};
pub use fixed::{Fixed, FixedConfig};

use crate::config::Congestion;

/// The factory that quinn calls for each new path. `ceiling_bytes_per_sec` bounds the average rate
/// of UDP payload of each connection; quinn's own controllers know no such bound and ignore it.
#[must_use]
pub fn factory(
    choice: Congestion,
    ceiling_bytes_per_sec: Option<u64>,
) -> Arc<dyn ControllerFactory + Send + Sync> {
    match choice {
        Congestion::Auto => Arc::new(DeliveryRateConfig {
            ceiling_bytes_per_sec,
        }),
        Congestion::Fixed { bits_per_sec } => {
            let rate = bits_per_sec / 8;
            Arc::new(FixedConfig {
                bytes_per_sec: ceiling_bytes_per_sec.map_or(rate, |ceiling| rate.min(ceiling)),
            })
        }
        Congestion::Bbr => Arc::new(congestion::BbrConfig::default()),
        Congestion::Cubic => Arc::new(congestion::CubicConfig::default()),
        Congestion::NewReno => Arc::new(congestion::NewRenoConfig::default()),
    }
}

/// What is known about the path of a connection; for scheduling and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkEstimate {
    /// The rate that the path is believed to carry, in bytes of UDP payload per second.
    pub rate_bytes_per_sec: u64,
    /// The path was full at that rate once: it is not just what has been asked of it so far. `None` with
    /// quinn's own controllers, which do not say.
    pub is_known: Option<bool>,
    /// The smallest round-trip time seen lately: the path without queues.
    pub min_rtt: Duration,
    /// The smoothed round-trip time, queues and acknowledgement delay included.
    pub rtt: Duration,
    /// Bytes that may be under way.
    pub cwnd: u64,
    /// What arrived so far; `None` with quinn's own controllers, which do not count it.
    pub arrived: Option<Arrived>,
}

/// Bytes of a connection that have been acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// All of them.
    pub bytes: u64,
    /// Those at whose acknowledgement more was waiting to be sent: the path was the limit, not we.
    pub with_more_waiting: u64,
}

/// What `connection` has learnt about its path.
///
/// With quinn's own controllers, which estimate no rate, it is window / RTT. Copies the
/// controller's state (up to about 100 KiB) under the connection's lock: ask some ten times a
/// second, not per frame.
#[must_use]
pub fn estimate(connection: &quinn::Connection) -> LinkEstimate {
    match connection
        .congestion_state()
        .into_any()
        .downcast::<DeliveryRate>()
    {
        Ok(controller) => controller.estimate(),
        Err(_) => {
            let path = connection.stats().path;
            LinkEstimate {
                rate_bytes_per_sec: rate_over(path.cwnd, path.rtt),
                is_known: None,
                min_rtt: connection.min_rtt(),
                rtt: path.rtt,
                cwnd: path.cwnd,
                arrived: None,
            }
        }
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

/// Bytes that pass in `time` at `rate` bytes per second.
fn bytes_in(rate: u64, time: Duration) -> u64 {
    let bytes = u128::from(rate) * time.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
