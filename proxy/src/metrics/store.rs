//! Figures of the page store, which keeps plain counters of its own.

use prometheus::{IntCounter, IntGauge, Registry};

use super::follow::FollowedCounter;
use super::registered;

/// The store's state and totals since start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreSample {
    /// Bytes of pages held.
    pub bytes: u64,
    /// Bytes that may be held.
    pub capacity_bytes: u64,
    /// Pages held.
    pub pages: u64,
    /// Look-ups that found the page.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Pages put in.
    pub insertions: u64,
    /// Pages thrown out for room.
    pub evictions: u64,
}

/// Gauges and counters of the store.
#[derive(Debug)]
pub struct StoreMetrics {
    bytes: IntGauge,
    capacity: IntGauge,
    pages: IntGauge,
    hits: FollowedCounter,
    misses: FollowedCounter,
    insertions: FollowedCounter,
    evictions: FollowedCounter,
}

impl StoreMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| registered(registry, IntGauge::new(name, help)?);
        let followed = |name: &str, help: &str| {
            registered(registry, IntCounter::new(name, help)?).map(FollowedCounter::new)
        };
        Ok(Self {
            bytes: gauge(
                "skyferry_store_bytes",
                "Bytes of guest pages held in the page store.",
            )?,
            capacity: gauge(
                "skyferry_store_capacity_bytes",
                "Bytes of guest pages that the page store may hold.",
            )?,
            pages: gauge(
                "skyferry_store_pages",
                "Guest pages held in the page store.",
            )?,
            hits: followed("skyferry_store_hits_total", "Look-ups that found the page.")?,
            misses: followed(
                "skyferry_store_misses_total",
                "Look-ups that did not find the page.",
            )?,
            insertions: followed("skyferry_store_insertions_total", "Pages put in the store.")?,
            evictions: followed(
                "skyferry_store_evictions_total",
                "Pages thrown out of the store to make room.",
            )?,
        })
    }

    /// Takes the store's present state.
    pub fn observe(&self, sample: &StoreSample) {
        let set = |gauge: &IntGauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.bytes, sample.bytes);
        set(&self.capacity, sample.capacity_bytes);
        set(&self.pages, sample.pages);
        self.hits.follow(sample.hits);
        self.misses.follow(sample.misses);
        self.insertions.follow(sample.insertions);
        self.evictions.follow(sample.evictions);
    }
}
