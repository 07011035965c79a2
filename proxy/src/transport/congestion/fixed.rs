//! A constant rate, whatever happens to the packets.
//!
//! For capacity that is ours alone (a leased wave, a guaranteed class). On a shared link it takes
//! what it was told to take and never yields.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use super::bytes_in;

/// RTT assumed before the first measurement. Too high only makes the first flight larger.
const INITIAL_RTT: Duration = Duration::from_millis(50);

/// Smallest window in packets: quinn sends in bursts of ten.
const MIN_WINDOW_PACKETS: u64 = 12;

/// Builds a [`Fixed`] per path.
#[derive(Clone, Copy, Debug)]
pub struct FixedConfig {
    /// UDP payload per second, in bytes.
    pub bytes_per_sec: u64,
}

impl ControllerFactory for FixedConfig {
    fn build(self: Arc<Self>, _: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Fixed {
            bytes_per_sec: self.bytes_per_sec,
            rtt: INITIAL_RTT,
            mtu: u64::from(current_mtu),
        })
    }
}

/// Keeps as many bytes under way as the rate needs at the RTT of the moment.
#[derive(Clone, Debug)]
pub struct Fixed {
    bytes_per_sec: u64,
    rtt: Duration,
    mtu: u64,
}

impl Controller for Fixed {
    fn on_ack(&mut self, _: Instant, _: Instant, _: u64, _: bool, rtt: &RttEstimator) {
        self.rtt = rtt.get();
    }

    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = u64::from(new_mtu);
    }

    fn window(&self) -> u64 {
        bytes_in(self.bytes_per_sec, self.rtt).max(MIN_WINDOW_PACKETS * self.mtu)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
