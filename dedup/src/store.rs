//! The page store as the codec sees it.

use crate::page::{DomainId, PAGE_SIZE, PageId, ShortId};

/// Holds contents by id, for as long as it likes.
///
/// A value is a page or a shorter chunk: 1 to [`PAGE_SIZE`] bytes. A store may forget anything at any
/// time, and what it returns is checked against the id before it is used, so neither loss nor
/// corruption in a store harms a migration. All methods may be called from any thread; they are
/// expected to return within microseconds.
pub trait PageStore: Send + Sync {
    /// Copies the value called `id` to the start of `out` and returns its length; `None` on a miss.
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize>;

    /// Like [`get`](Self::get), but not from a slow medium: for what is worth some bytes on the wire and
    /// no wait.
    fn get_at_once(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        self.get(id, out)
    }

    /// Keeps `contents` of `domain`, whose id is `id`. Contents that are empty or longer than a page are
    /// not kept.
    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]);

    /// Says that [`get`](Self::get) will soon be called for `ids`: a store on a slow medium may begin
    /// to read them all at once.
    fn prefetch(&self, _ids: &[ShortId]) {}

    /// Appends the ids of at most `count` records of a segment of `domain`, from record `first` on, in
    /// order, for a peer to which the segments were announced; none if there is no such segment, or it
    /// belongs to another domain.
    fn records(
        &self,
        _domain: &DomainId,
        _segment: u32,
        _first: u32,
        _count: u32,
        _out: &mut Vec<ShortId>,
    ) {
    }

    /// Whether [`get`](Self::get) would find `id` now. Counts neither as a hit nor as a miss.
    fn contains(&self, id: &ShortId) -> bool;

    /// Forgets `id`; returns whether it was there.
    fn remove(&self, id: &ShortId) -> bool;

    /// Counters since the store was made, and its present size.
    fn stats(&self) -> StoreStats;

    /// The number of pages that fit.
    fn capacity_pages(&self) -> u64;
}

/// What a store holds and how it has fared. The figures are those of the tier in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Values held now.
    pub pages: u64,
    /// Bytes that these take, index included.
    pub bytes: u64,
    /// Bytes that the store may take, index included.
    pub capacity_bytes: u64,
    /// Lookups that found their value.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Values that were put in and were not there before.
    pub insertions: u64,
    /// Values that made room for others.
    pub evictions: u64,
    /// Values that were not kept: the system had no memory for them.
    pub dropped_puts: u64,
    /// The tier on disk, if there is one. What the tier in memory misses is looked up there.
    pub disk: Option<DiskStats>,
}

/// What a store on disk holds and how it has fared since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Values held now.
    pub pages: u64,
    /// Bytes that the files take, or will take when what waits in memory is written.
    pub bytes: u64,
    /// Bytes that the files may take.
    pub capacity_bytes: u64,
    /// Bytes of memory that the index takes.
    pub index_bytes: u64,
    /// Bytes of memory that values take which are not written yet.
    pub pending_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Domains that have segments.
    pub domains: u64,
    /// Lookups that found their value.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Values that were put in and were not there before.
    pub insertions: u64,
    /// Values that were deleted with their segments.
    pub evictions: u64,
    /// Records deleted because nobody used their segments for longer than the time to live.
    pub expired: u64,
    /// Values that were copied out of segments before these were deleted.
    pub copied: u64,
    /// Values that were not kept: the disk was too slow, full, or failing.
    pub dropped_puts: u64,
    /// Times that the disk refused to be written to.
    pub write_errors: u64,
    /// Records that could not be read, or were not what they should be, and segments that were deleted for
    /// that when the store was opened.
    pub read_errors: u64,
    /// Bytes of the values that were put in.
    pub put_bytes: u64,
    /// Bytes written to files. Divided by `put_bytes` they give the write amplification.
    pub written_bytes: u64,
    /// Whether the disk does its work.
    pub state: DiskState,
}

/// Whether a disk does its work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DiskState {
    /// It does.
    #[default]
    Working,
    /// It refused a write, for this reason. Nothing is written for a while, then it is tried again;
    /// what it holds is served.
    Degraded(String),
}
