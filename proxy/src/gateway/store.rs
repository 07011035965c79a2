//! The gateway's page store: opened at start, watched while it runs, closed at the end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use skyferry_dedup::{
    DiskState, MemoryStore, PageStore, StoreStats, TieredStore,
    disk::{DiskOptions, DiskStore, OpenError},
};
use tracing::{info, warn};

use super::Gateway;
use crate::config::StoreConfig;

/// How often the log looks at the disk's state.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often it tells of pages that could not be read.
const READ_ERRORS_INTERVAL: Duration = Duration::from_secs(60);

/// The store, and its tier on disk by itself.
pub(super) struct Store {
    pub(super) pages: Arc<dyn PageStore>,
    pub(super) tiers: Option<Arc<TieredStore>>,
}

/// Opens the store that the configuration describes.
pub(super) fn open(config: &StoreConfig) -> Result<Store, OpenError> {
    let memory = MemoryStore::new(config.memory_bytes);
    let Some(disk) = &config.disk else {
        return Ok(Store {
            pages: Arc::new(memory),
            tiers: None,
        });
    };
    let options = DiskOptions {
        ttl: Some(disk.ttl),
        ..DiskOptions::new(&disk.path, disk.size_bytes)
    };
    let opened = DiskStore::open(options, &disk.key)?;
    let stats = opened.disk_stats();
    info!(
        folder = %disk.path.display(),
        pages = stats.pages,
        bytes = stats.bytes,
        capacity = stats.capacity_bytes,
        "page store open"
    );
    if stats.read_errors > 0 {
        warn!(
            segments = stats.read_errors,
            "segments of the page store could not be used and were deleted"
        );
    }
    let tiers = Arc::new(TieredStore::new(memory, opened));
    Ok(Store {
        pages: tiers.clone(),
        tiers: Some(tiers),
    })
}

/// Logs when the disk stops taking pages, when it takes them again, and what it could not read.
pub(super) async fn watch(gateway: Arc<Gateway>) {
    let mut ticks = tokio::time::interval(WATCH_INTERVAL);
    let mut last = DiskState::Working;
    let at_start = gateway.store.stats().disk;
    let mut unread = ReadErrors {
        told: at_start.map_or(0, |disk| disk.read_errors),
        at: None,
    };
    loop {
        ticks.tick().await;
        let StoreStats { disk, .. } = gateway.store.stats();
        let Some(disk) = disk else { return };
        unread.report(disk.read_errors);
        match &disk.state {
            state if *state == last => {}
            DiskState::Working => info!("the page store on disk takes pages again"),
            DiskState::Degraded(reason) => warn!(
                reason,
                "the page store on disk takes no pages; migrations go on without"
            ),
        }
        last = disk.state;
    }
}

/// What was said of pages that could not be read.
struct ReadErrors {
    told: u64,
    at: Option<Instant>,
}

impl ReadErrors {
    fn report(&mut self, errors: u64) {
        let is_due = self
            .at
            .is_none_or(|at| at.elapsed() >= READ_ERRORS_INTERVAL);
        if errors > self.told && is_due {
            warn!(
                pages = errors - self.told,
                "the page store on disk could not read pages; they cross the link again. Check the \
                 disk, and the store with `skyferry store verify`"
            );
            *self = Self {
                told: errors,
                at: Some(Instant::now()),
            };
        }
    }
}

/// Writes what waits in memory, at the end.
pub(super) async fn close(gateway: &Gateway) {
    if let Some(tiers) = gateway.tiers.clone() {
        let flushed = tokio::task::spawn_blocking(move || tiers.disk().flush());
        if tokio::time::timeout(FLUSH_WAIT, flushed).await.is_err() {
            warn!("the page store on disk does not take its last pages in time");
        }
    }
}

/// How long the last pages may take to be written.
const FLUSH_WAIT: Duration = Duration::from_secs(10);
