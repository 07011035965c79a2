//! The page store on disk.
//!
//! Pages are appended to *segments*, files of 64 MiB, one open segment for each domain. A segment is
//! written once, front to back, sealed, and later deleted as a whole. The index is in memory only.
//!
//! ```text
//! put → open segment's chunk in memory ─full→ writer thread: seal, write → … → footer → sealed
//!            │                                    │
//! get ← index (id → segment, record) → memory or file
//! ```
//!
//! What its reader may rely on:
//! - `put` copies into memory and never waits for the disk: when the disk cannot keep up, pages are
//!   dropped and counted. `get` reads at most one record.
//! - Contents come back only under the very id they were put under: the id is authenticated with the
//!   contents. That the id is right for the contents is known to who has the tenant's key; the codec
//!   checks it with every page.
//! - A crash loses what was not written, and nothing else. Order of writes on the disk does not matter.
//! - The folder never takes more than its capacity, and no error of the disk is returned to a migration:
//!   the store degrades, says why in its figures and tries again later.
//!
//! The files are described in `docs/store-format.md`, the choice in `docs/adr/0008-page-store.md`.

mod admin;
mod append;
mod crypt;
mod evict;
mod feed;
mod index;
mod live;
mod manifests;
mod open;
mod read;
mod scan;
mod segment;
mod superblock;
mod uses;
mod writer;

#[cfg(any(test, fuzzing))]
pub mod fuzz_entry;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use admin::{
    DamagedSegment, ManifestSummary, Purge, Purged, SegmentSummary, Summary, Verified, purge, stat,
    verify,
};
pub use crypt::{KeySource, MIN_SECRET, NoRandomness};
pub use feed::{DomainFeed, SegmentInfo};
pub use index::INDEX_BYTES_PER_PAGE;
pub use open::{OpenError, OpenErrorKind};
pub use superblock::FORMAT_VERSION;

use append::Appender;
pub(crate) use append::Put;
use crypt::StoreKey;
use feed::IdCache;
use index::Index;
use live::{Limits, OpenFiles, Segment};
use superblock::Superblock;
use writer::Queue;

use crate::announce::StoreId;
use crate::page::{DomainId, PAGE_SIZE, PageId, ShortId};
use crate::store::{DiskState, DiskStats, PageStore, StoreStats};

/// Seconds since 1970, as a store is to see them.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Smallest capacity of a store in bytes.
pub const MIN_CAPACITY: u64 = 1 << 20;

/// How a store on disk is opened. Fields have no limits of their own but are clamped to what works.
#[derive(Clone)]
pub struct DiskOptions {
    /// The folder that is the store's alone. It is made if it does not exist.
    pub folder: PathBuf,
    /// Bytes that the files may take, at least [`MIN_CAPACITY`].
    pub capacity_bytes: u64,
    /// A segment that was not used for so long is deleted. `None`: pages do not age.
    pub ttl: Option<Duration>,
    /// Size of a segment; at most a sixteenth of the capacity is used. Larger ones are deleted in larger
    /// steps, smaller ones take more files.
    pub segment_bytes: u64,
    /// Contents that are sealed and written with one write.
    pub chunk_bytes: usize,
    /// Contents that may wait in memory to be written, at most a quarter of a segment. More are
    /// dropped.
    pub pending_bytes: usize,
    /// Pause before a disk that failed is tried again.
    pub retry: Duration,
    /// The clock for ages.
    pub clock: Clock,
}

impl DiskOptions {
    /// The defaults for a store of `capacity_bytes` in `folder`.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>, capacity_bytes: u64) -> Self {
        Self {
            folder: folder.into(),
            capacity_bytes,
            ttl: None,
            segment_bytes: 64 << 20,
            chunk_bytes: 1 << 20,
            pending_bytes: 16 << 20,
            retry: Duration::from_secs(30),
            clock: Arc::new(|| {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                since.map_or(0, |since| since.as_secs())
            }),
        }
    }
}

impl fmt::Debug for DiskOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskOptions")
            .field("folder", &self.folder)
            .field("capacity_bytes", &self.capacity_bytes)
            .field("ttl", &self.ttl)
            .field("segment_bytes", &self.segment_bytes)
            .finish_non_exhaustive()
    }
}

/// A page store on disk. See the documentation of the module.
pub struct DiskStore {
    inner: Arc<Inner>,
    writer: Option<JoinHandle<()>>,
}

/// What the callers' threads and the writer share.
///
/// Locks are taken in the order: appender, segments, a segment's own, queue; the shards of the index
/// and the health are last and alone.
struct Inner {
    options: DiskOptions,
    key: StoreKey,
    /// As it was when the store was opened.
    superblock: Superblock,
    limits: Limits,
    index: Index,
    segments: RwLock<Segments>,
    appender: Mutex<Appender>,
    queue: Mutex<Queue>,
    /// Tells the writer of work.
    wake: Condvar,
    /// Tells those who wait of work done.
    done: Condvar,
    files: OpenFiles,
    ids: Mutex<IdCache>,
    /// Bytes of contents that wait to be written.
    pending: AtomicUsize,
    health: Mutex<Health>,
    /// A copy of the health for the hot path.
    degraded: AtomicBool,
    /// Seconds since 1970, to the second or so.
    now: AtomicU64,
    /// Grows whenever segments change.
    changes: AtomicU64,
    counters: Counters,
    /// Held as long as the store is open.
    _lock: std::fs::File,
}

/// Segments by slot and by number.
#[derive(Default)]
struct Segments {
    slots: Vec<Option<Arc<Segment>>>,
    free: Vec<u32>,
    by_number: std::collections::BTreeMap<u32, u32>,
}

impl Segments {
    /// The slot that [`insert`](Self::insert) has to be called with next.
    fn vacant(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.slots.len() as u32)
    }

    fn insert(&mut self, segment: Arc<Segment>) {
        let slot = segment.slot as usize;
        self.by_number.insert(segment.number, segment.slot);
        if slot == self.slots.len() {
            self.slots.push(Some(segment));
        } else {
            self.free.pop();
            self.slots[slot] = Some(segment);
        }
    }

    fn remove(&mut self, segment: &Segment) {
        if self.by_number.remove(&segment.number).is_some() {
            self.slots[segment.slot as usize] = None;
            self.free.push(segment.slot);
        }
    }

    fn at(&self, slot: u32) -> Option<&Arc<Segment>> {
        self.slots.get(slot as usize)?.as_ref()
    }

    fn numbered(&self, number: u32) -> Option<&Arc<Segment>> {
        self.at(*self.by_number.get(&number)?)
    }

    /// In the order of their numbers.
    fn iter(&self) -> impl Iterator<Item = &Arc<Segment>> {
        self.by_number.values().filter_map(|&slot| self.at(slot))
    }
}

#[derive(Default)]
struct Health {
    /// Why the disk is not written to.
    reason: Option<String>,
    retry_at: Option<Instant>,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    insertions: AtomicU64,
    evictions: AtomicU64,
    copied: AtomicU64,
    expired: AtomicU64,
    dropped_puts: AtomicU64,
    write_errors: AtomicU64,
    read_errors: AtomicU64,
    put_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// A panic elsewhere leaves at worst a record that is not found or does not authenticate.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn segments(&self) -> std::sync::RwLockReadGuard<'_, Segments> {
        self.segments.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn segments_mut(&self) -> std::sync::RwLockWriteGuard<'_, Segments> {
        self.segments
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn segment(&self, slot: u32) -> Option<Arc<Segment>> {
        self.segments().at(slot).cloned()
    }

    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// The disk refused `what`: it is left alone for a while.
    fn degrade(&self, what: &str, error: &std::io::Error) {
        count(&self.counters.write_errors, 1);
        let mut health = lock(&self.health);
        health.reason = Some(format!("{what}: {error}"));
        health.retry_at = Some(Instant::now() + self.options.retry);
        self.degraded.store(true, Ordering::Relaxed);
    }

    /// Ends the pause after a failure when it is over.
    fn recover(&self) {
        let mut health = lock(&self.health);
        if health.retry_at.is_some_and(|at| at <= Instant::now()) {
            // The reason stays until a write succeeds.
            health.retry_at = None;
            self.degraded.store(false, Ordering::Relaxed);
        }
    }

    /// The disk took a write.
    fn wrote(&self, bytes: u64) {
        count(&self.counters.written_bytes, bytes);
        let mut health = lock(&self.health);
        if health.retry_at.is_none() {
            health.reason = None;
        }
    }

    fn stats(&self) -> DiskStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let (mut segments, mut domains) = (0, std::collections::HashSet::new());
        let mut memory = self.index.bytes();
        for segment in self.segments().iter() {
            segments += 1;
            domains.insert(segment.domain);
            memory += segment.memory_bytes();
        }
        let state = match &lock(&self.health).reason {
            Some(reason) => DiskState::Degraded(reason.clone()),
            None => DiskState::Working,
        };
        DiskStats {
            pages: self.index.len() as u64,
            bytes: lock(&self.appender).bytes_on_disk(),
            capacity_bytes: self.options.capacity_bytes,
            index_bytes: memory as u64,
            pending_bytes: self.pending.load(Ordering::Relaxed) as u64,
            segments,
            domains: domains.len() as u64,
            hits: load(&counters.hits),
            misses: load(&counters.misses),
            insertions: load(&counters.insertions),
            evictions: load(&counters.evictions),
            expired: load(&counters.expired),
            copied: load(&counters.copied),
            dropped_puts: load(&counters.dropped_puts),
            write_errors: load(&counters.write_errors),
            read_errors: load(&counters.read_errors),
            put_bytes: load(&counters.put_bytes),
            written_bytes: load(&counters.written_bytes),
            state,
        }
    }
}

impl DiskStore {
    /// Random identity of the store, made when it was created: another one, or one that was emptied,
    /// has another.
    #[must_use]
    pub fn id(&self) -> StoreId {
        StoreId(self.inner.superblock.id)
    }

    /// When the store was created, in seconds since 1970.
    #[must_use]
    pub fn created(&self) -> u64 {
        self.inner.superblock.created
    }

    /// [`prefetch`](PageStore::prefetch), of an iterator.
    pub(crate) fn prefetch_those<'a>(&self, ids: impl Iterator<Item = &'a ShortId>) {
        self.inner.prefetch(ids);
    }

    /// Figures of the store.
    #[must_use]
    pub fn disk_stats(&self) -> DiskStats {
        self.inner.stats()
    }

    /// Counts a use of `id` that another tier served.
    pub fn touch(&self, id: &ShortId) {
        self.inner.touch(id);
    }

    /// Waits until everything that was put is written and the store has tidied up.
    pub fn flush(&self) {
        self.inner.flush();
    }

    /// Waits until half of the memory for pages that wait to be written is free and the files have room
    /// for as many, for at most `limit`: for callers that would rather wait than have pages dropped.
    /// Returns whether it is so.
    #[must_use]
    pub fn wait_for_room(&self, limit: Duration) -> bool {
        self.inner.wait_for_room(limit)
    }

    /// Puts a page and waits for the disk for at most `limit`, where [`PageStore::put`] would drop it.
    pub(crate) fn put_waiting(
        &self,
        domain: &DomainId,
        id: &PageId,
        page: &[u8; PAGE_SIZE],
        limit: Duration,
    ) -> Put {
        self.inner.put_waiting(domain, &id.short(), page, limit)
    }
}

impl PageStore for DiskStore {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        self.inner.get(id, out)
    }

    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.inner.put(domain, &id.short(), contents);
    }

    fn prefetch(&self, ids: &[ShortId]) {
        self.prefetch_those(ids.iter());
    }

    fn records(
        &self,
        domain: &DomainId,
        segment: u32,
        first: u32,
        count: u32,
        out: &mut Vec<ShortId>,
    ) {
        let of_domain = {
            let segments = self.inner.segments();
            let segment = segments.numbered(segment);
            segment.is_some_and(|segment| segment.domain == *domain)
        };
        // Numbers are never used twice, so it is still of this domain.
        if of_domain {
            self.segment_ids(segment, first, count as usize, out);
        }
    }

    fn contains(&self, id: &ShortId) -> bool {
        self.inner.index.find(id).is_some()
    }

    fn remove(&self, id: &ShortId) -> bool {
        self.inner.remove(id)
    }

    fn stats(&self) -> StoreStats {
        StoreStats {
            disk: Some(self.inner.stats()),
            ..StoreStats::default()
        }
    }

    fn capacity_pages(&self) -> u64 {
        let page = PAGE_SIZE + segment::RECORD_OVERHEAD;
        self.inner.options.capacity_bytes / page as u64
    }
}

impl Drop for DiskStore {
    fn drop(&mut self) {
        self.inner.stop();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            // Its panic was printed; the files are good up to their last whole chunk.
        }
    }
}

impl fmt::Debug for DiskStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Contents are secret.
        f.debug_struct("DiskStore")
            .field("folder", &self.inner.options.folder)
            .field("stats", &self.inner.stats())
            .finish_non_exhaustive()
    }
}
