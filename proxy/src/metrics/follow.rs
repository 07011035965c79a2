//! A counter that follows a total kept elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::IntCounter;

/// Carries a total that another component keeps (the page store, a QUIC connection) into a counter.
///
/// A total that falls has been started anew (a new connection): it then counts from zero, so the
/// exported counter never falls.
#[derive(Debug)]
pub struct FollowedCounter {
    counter: IntCounter,
    last: AtomicU64,
}

impl FollowedCounter {
    /// Follows a total that starts at 0.
    pub fn new(counter: IntCounter) -> Self {
        Self {
            counter,
            last: AtomicU64::new(0),
        }
    }

    /// Takes the total's present value.
    pub fn follow(&self, total: u64) {
        let last = self.last.swap(total, Ordering::Relaxed);
        self.counter
            .inc_by(total.checked_sub(last).unwrap_or(total));
    }

    /// The total is another one from here on and starts at 0, whatever it is when it is next taken.
    pub fn restart(&self) {
        self.last.store(0, Ordering::Relaxed);
    }

    /// What has been counted, over all restarts of the total.
    pub fn value(&self) -> u64 {
        self.counter.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_total_adds_up() {
        let followed = FollowedCounter::new(IntCounter::new("x_total", "x").unwrap());
        for total in [5, 7, 7, 3, 4] {
            followed.follow(total);
        }
        assert_eq!(followed.value(), 7 + 4);
        // One that has overtaken the one before it.
        followed.restart();
        followed.follow(9);
        assert_eq!(followed.value(), 7 + 4 + 9);
    }
}
