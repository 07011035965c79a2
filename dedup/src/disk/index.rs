//! The index in memory: where the record of an id is.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;

use crate::page::ShortId;

/// Number of locks. Growing a table holds one of them, so it also bounds that pause.
const SHARDS: usize = 64;

/// Upper bound of the bytes that the index takes per page once it holds 100,000: an entry of 12 bytes
/// and a control byte in a table that is 3/8 to 7/8 full (14.9 to 34.7), and what a segment keeps per
/// record (2; 18 until it is sealed).
pub const INDEX_BYTES_PER_PAGE: usize = 40;

/// A smaller table is not worth the work of making it smaller still.
const MIN_BUCKETS: usize = 2048;

/// Where a record is: the slot of its segment and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    /// Below 2^24.
    pub(super) slot: u32,
    pub(super) record: u16,
}

/// Most segments at a time: slots have 24 bits in an entry.
pub(super) const MAX_SEGMENTS: usize = 1 << 24;

/// 7 bytes of the id and 5 of the location. Two ids of which these 7 bytes are equal (one pair in 2^27
/// pages has a chance of 1/8 to exist) share an entry; reading with the wrong one fails to authenticate.
#[derive(Clone, Copy)]
struct Entry([u8; 12]);

const PREFIX_BITS: u32 = 56;

impl Entry {
    fn new(prefix: u64, location: Location) -> Self {
        let mut entry = [0; 12];
        entry[..7].copy_from_slice(&prefix.to_le_bytes()[..7]);
        entry[7..10].copy_from_slice(&location.slot.to_le_bytes()[..3]);
        entry[10..].copy_from_slice(&location.record.to_le_bytes());
        Self(entry)
    }

    fn prefix(&self) -> u64 {
        let mut prefix = [0; 8];
        prefix[..7].copy_from_slice(&self.0[..7]);
        u64::from_le_bytes(prefix)
    }

    fn location(&self) -> Location {
        let [.., a, b, c, d, e] = self.0;
        Location {
            slot: u32::from_le_bytes([a, b, c, 0]),
            record: u16::from_le_bytes([d, e]),
        }
    }
}

fn prefix(id: &ShortId) -> u64 {
    id.table_hash() & ((1 << PREFIX_BITS) - 1)
}

/// Spreads a prefix over all bits: the table takes its buckets from the low ones and a filter from the
/// high ones, and a prefix has none there.
fn hash(prefix: u64) -> u64 {
    prefix.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn hash_of(entry: &Entry) -> u64 {
    hash(entry.prefix())
}

type Shard = HashTable<Entry>;

/// Makes room for one more entry.
///
/// Entries that are removed leave marks behind, which count as taken. A table that is left to itself
/// doubles when marks fill it while it is more than half full of entries, which a store that is always
/// full would have it do soon. Here it doubles only when entries fill it; else it is made anew, at most
/// once for every sixteenth of its entries.
fn make_room(shard: &mut Shard) {
    if shard.len() < shard.capacity() {
        return;
    }
    let full = shard.num_buckets() / 8 * 7;
    if shard.len() > full / 16 * 15 {
        return;
    }
    let mut anew = Shard::with_capacity(full);
    for entry in shard.drain() {
        anew.insert_unique(hash_of(&entry), entry, hash_of);
    }
    *shard = anew;
}

/// Halves a table of which less than 3/8 is used: it will be 3/4 full.
fn give_back(shard: &mut Shard) {
    let buckets = shard.num_buckets();
    if buckets > MIN_BUCKETS && shard.len() < buckets / 8 * 3 {
        shard.shrink_to(shard.len(), hash_of);
    }
}

/// Ids and where their records are.
pub(super) struct Index {
    shards: Box<[Mutex<Shard>]>,
}

impl Index {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::new())).collect(),
        }
    }

    /// Makes room for so many more ids, to insert them without growing step by step.
    pub(super) fn reserve(&self, ids: usize) {
        for shard in &self.shards {
            // Ids spread evenly, but not exactly so.
            lock(shard).reserve(ids / SHARDS, hash_of);
        }
    }

    fn shard(&self, id: &ShortId) -> MutexGuard<'_, Shard> {
        lock(&self.shards[(id.shard_hash() % SHARDS as u64) as usize])
    }

    pub(super) fn find(&self, id: &ShortId) -> Option<Location> {
        let prefix = prefix(id);
        let shard = self.shard(id);
        let found = shard.find(hash(prefix), |entry| entry.prefix() == prefix);
        found.map(Entry::location)
    }

    /// Sets the location of `id`; returns the one before.
    pub(super) fn insert(&self, id: &ShortId, location: Location) -> Option<Location> {
        let prefix = prefix(id);
        let mut shard = self.shard(id);
        if let Some(entry) = shard.find_mut(hash(prefix), |entry| entry.prefix() == prefix) {
            let before = entry.location();
            *entry = Entry::new(prefix, location);
            return Some(before);
        }
        make_room(&mut shard);
        let entry = Entry::new(prefix, location);
        shard.insert_unique(hash(prefix), entry, hash_of);
        None
    }

    /// Forgets `id`.
    pub(super) fn remove(&self, id: &ShortId) -> Option<Location> {
        self.remove_where(id, |_| true)
    }

    /// Forgets `id` if it is at `location`.
    pub(super) fn remove_at(&self, id: &ShortId, location: Location) -> bool {
        self.remove_where(id, |found| found == location).is_some()
    }

    fn remove_where(&self, id: &ShortId, wanted: impl Fn(Location) -> bool) -> Option<Location> {
        let prefix = prefix(id);
        let mut shard = self.shard(id);
        let found = shard.find_entry(hash(prefix), |entry| {
            entry.prefix() == prefix && wanted(entry.location())
        });
        let (entry, _) = found.ok()?.remove();
        give_back(&mut shard);
        Some(entry.location())
    }

    /// Forgets all records of a segment, by looking at every entry: for when its ids cannot be read.
    pub(super) fn remove_segment(&self, slot: u32) -> usize {
        let mut removed = 0;
        for shard in &self.shards {
            let mut shard = lock(shard);
            let before = shard.len();
            shard.retain(|entry| entry.location().slot != slot);
            removed += before - shard.len();
            give_back(&mut shard);
        }
        removed
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Bytes that the index takes now.
    pub(super) fn bytes(&self) -> usize {
        let tables = self
            .shards
            .iter()
            .map(|shard| lock(shard).allocation_size());
        tables.sum::<usize>() + self.shards.len() * size_of::<Mutex<Shard>>()
    }
}

/// A panic elsewhere leaves at worst an entry that leads to a record of another id.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> ShortId {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..16]);
        ShortId::from_bytes(bytes)
    }

    fn at(n: u32) -> Location {
        Location {
            slot: n % (1 << 24),
            record: (n >> 8) as u16,
        }
    }

    #[test]
    fn locations_come_back_as_they_were_set() {
        let index = Index::new();
        for n in [0, 1, 77, 0xff_ffff] {
            assert_eq!(index.find(&id(n)), None);
            assert_eq!(index.insert(&id(n), at(n)), None);
            assert_eq!(index.find(&id(n)), Some(at(n)));
        }
        assert_eq!(index.insert(&id(1), at(9)), Some(at(1)));
        assert!(!index.remove_at(&id(1), at(1)));
        assert!(index.remove_at(&id(1), at(9)));
        assert_eq!(index.remove(&id(1)), None);
        assert_eq!(index.remove(&id(77)), Some(at(77)));
        assert_eq!(index.len(), 2);
        assert_eq!(index.remove_segment(0), 1);
        assert_eq!(index.find(&id(0xff_ffff)), Some(at(0xff_ffff)));
    }

    #[test]
    fn the_index_keeps_to_its_bytes_per_page() {
        let index = Index::new();
        let budget = INDEX_BYTES_PER_PAGE - 4;
        for n in 0..600_000 {
            index.insert(&id(n), at(n));
            let len = n as usize + 1;
            if len >= 100_000 && len.is_multiple_of(1000) {
                assert!(index.bytes() <= len * budget, "{len} ids");
            }
        }
        for n in 0..599_000 {
            index.remove(&id(n));
            let len = 600_000 - n as usize - 1;
            if len >= 100_000 && len.is_multiple_of(1000) {
                assert!(index.bytes() <= len * budget, "{len} ids left");
            }
        }
        assert!(index.bytes() <= SHARDS * MIN_BUCKETS * 13 + 64 * 1024);
    }

    #[test]
    fn a_store_that_is_always_full_does_not_take_more_and_more() {
        // Full to different degrees: of 64 tables with 2^11 buckets, and 7/8 of these at most.
        for pages in [100_000, 105_000, 110_000, 114_000, 118_000] {
            let index = Index::new();
            (0..pages).for_each(|n| {
                index.insert(&id(n), at(n));
            });
            // A segment goes, a segment comes.
            for n in (0..6 * pages).step_by(2000) {
                (n..n + 2000).for_each(|n| {
                    index.remove(&id(n));
                });
                (n..n + 2000).for_each(|n| {
                    index.insert(&id(n + pages), at(n));
                });
                let most = pages as usize * (INDEX_BYTES_PER_PAGE - 4);
                assert!(index.bytes() <= most, "{} for {pages}", index.bytes());
            }
            assert_eq!(index.len(), pages as usize);
        }
    }
}
