//! Figures of the page store, which keeps plain counters of its own.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use skyferry_dedup::{DiskState, DiskStats, SeedCounts, StoreStats};

use super::follow::FollowedCounter;
use super::registered;

/// Gauges and counters of the store. Series of the tier on disk appear with the first sample of a store
/// that has one.
#[derive(Debug)]
pub struct StoreMetrics {
    bytes: IntGaugeVec,
    capacity: IntGaugeVec,
    pages: IntGaugeVec,
    memory: TierCounters,
    families: Families,
    disk: std::sync::OnceLock<DiskMetrics>,
    seeded: IntCounterVec,
}

/// Counters that both tiers have.
#[derive(Debug)]
struct TierCounters {
    hits: FollowedCounter,
    misses: FollowedCounter,
    insertions: FollowedCounter,
    evictions: FollowedCounter,
    dropped_puts: FollowedCounter,
}

/// What the disk's series are made from when there is a disk.
#[derive(Debug)]
struct Families {
    tiered: [IntCounterVec; 5],
    disk: [(IntCounterVec, Total); 5],
    degraded: IntGaugeVec,
    index: IntGaugeVec,
}

#[derive(Debug)]
struct DiskMetrics {
    tier: TierCounters,
    counters: Vec<(FollowedCounter, Total)>,
    degraded: IntGauge,
    index: IntGauge,
}

/// Reads one of the disk's totals.
type Total = fn(&DiskStats) -> u64;

const TIER: &str = "tier";
const MEMORY: &str = "memory";
const DISK: &str = "disk";

impl StoreMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), &[TIER])?)
        };
        let counter = |name: &str, help: &str| {
            registered(
                registry,
                IntCounterVec::new(Opts::new(name, help), &[TIER])?,
            )
        };
        let tiered = [
            counter("skyferry_store_hits_total", "Look-ups that found the page.")?,
            counter(
                "skyferry_store_misses_total",
                "Look-ups that did not find the page; those of the disk come after those of memory.",
            )?,
            counter("skyferry_store_insertions_total", "Pages put in the store.")?,
            counter(
                "skyferry_store_evictions_total",
                "Pages thrown out of the store to make room.",
            )?,
            counter(
                "skyferry_store_dropped_puts_total",
                "Pages not kept: the disk was too slow, full or failing, the system without memory.",
            )?,
        ];
        let disk: [(IntCounterVec, Total); 5] = [
            (
                counter(
                    "skyferry_store_write_errors_total",
                    "Writes that the disk refused.",
                )?,
                |disk| disk.write_errors,
            ),
            (
                counter(
                    "skyferry_store_read_errors_total",
                    "Records that could not be read, or were damaged.",
                )?,
                |disk| disk.read_errors,
            ),
            (
                counter(
                    "skyferry_store_put_bytes_total",
                    "Bytes of the pages put in the store.",
                )?,
                |disk| disk.put_bytes,
            ),
            (
                counter(
                    "skyferry_store_written_bytes_total",
                    "Bytes written to files; divided by those put in: the write amplification.",
                )?,
                |disk| disk.written_bytes,
            ),
            (
                counter(
                    "skyferry_store_expired_total",
                    "Pages deleted because nobody used them for longer than store.ttl.",
                )?,
                |disk| disk.expired,
            ),
        ];
        Ok(Self {
            bytes: gauge(
                "skyferry_store_bytes",
                "Bytes that the page store takes, in memory or in files.",
            )?,
            capacity: gauge(
                "skyferry_store_capacity_bytes",
                "Bytes that the page store may take.",
            )?,
            pages: gauge(
                "skyferry_store_pages",
                "Guest pages held in the page store.",
            )?,
            memory: TierCounters::new(&tiered, MEMORY),
            families: Families {
                tiered,
                disk,
                degraded: gauge(
                    "skyferry_store_degraded",
                    "1 while the disk refuses to be written to; the log has the reason.",
                )?,
                index: gauge(
                    "skyferry_store_index_bytes",
                    "Memory that the index of the pages on disk takes.",
                )?,
            },
            disk: std::sync::OnceLock::new(),
            seeded: register_seeded(registry)?,
        })
    }

    /// Counts pages that `skyferry seed` has brought.
    pub fn observe_seeded(&self, counts: &SeedCounts) {
        let outcomes = [
            ("new", counts.new),
            ("known", counts.known),
            ("zero", counts.zero),
        ];
        for (outcome, pages) in outcomes {
            self.seeded.with_label_values(&[outcome]).inc_by(pages);
        }
    }

    /// Takes the store's present state.
    pub fn observe(&self, stats: &StoreStats) {
        self.observe_size(MEMORY, stats.bytes, stats.capacity_bytes, stats.pages);
        self.memory.follow([
            stats.hits,
            stats.misses,
            stats.insertions,
            stats.evictions,
            stats.dropped_puts,
        ]);
        let Some(stats) = &stats.disk else { return };
        self.observe_size(DISK, stats.bytes, stats.capacity_bytes, stats.pages);
        let disk = self.disk.get_or_init(|| {
            // Seen as 0 from the start.
            self.observe_seeded(&SeedCounts::default());
            self.families.disk()
        });
        disk.tier.follow([
            stats.hits,
            stats.misses,
            stats.insertions,
            stats.evictions,
            stats.dropped_puts,
        ]);
        for (counter, total) in &disk.counters {
            counter.follow(total(stats));
        }
        disk.degraded
            .set(i64::from(stats.state != DiskState::Working));
        set(&disk.index, stats.index_bytes);
    }

    fn observe_size(&self, tier: &str, bytes: u64, capacity: u64, pages: u64) {
        set(&self.bytes.with_label_values(&[tier]), bytes);
        set(&self.capacity.with_label_values(&[tier]), capacity);
        set(&self.pages.with_label_values(&[tier]), pages);
    }
}

fn register_seeded(registry: &Registry) -> Result<IntCounterVec, prometheus::Error> {
    let help = "Pages that `skyferry seed` handed to this gateway, by what became of them.";
    let counter = Opts::new("skyferry_seeded_pages_total", help);
    registered(registry, IntCounterVec::new(counter, &["outcome"])?)
}

fn set(gauge: &IntGauge, value: u64) {
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
}

impl TierCounters {
    fn new(families: &[IntCounterVec; 5], tier: &str) -> Self {
        let [hits, misses, insertions, evictions, dropped_puts] = families
            .each_ref()
            .map(|family| FollowedCounter::new(family.with_label_values(&[tier])));
        Self {
            hits,
            misses,
            insertions,
            evictions,
            dropped_puts,
        }
    }

    fn follow(&self, [hits, misses, insertions, evictions, dropped_puts]: [u64; 5]) {
        self.hits.follow(hits);
        self.misses.follow(misses);
        self.insertions.follow(insertions);
        self.evictions.follow(evictions);
        self.dropped_puts.follow(dropped_puts);
    }
}

impl Families {
    fn disk(&self) -> DiskMetrics {
        let counters = self.disk.iter().map(|(family, total)| {
            let counter: IntCounter = family.with_label_values(&[DISK]);
            (FollowedCounter::new(counter), *total)
        });
        DiskMetrics {
            tier: TierCounters::new(&self.tiered, DISK),
            counters: counters.collect(),
            degraded: self.degraded.with_label_values(&[DISK]),
            index: self.index.with_label_values(&[DISK]),
        }
    }
}
