//! The listening side: where in the peer's store a page lies.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hashbrown::HashTable;

use super::message::{self, Item};
use super::{
    AnnounceError, MAX_ANNOUNCEMENT, MAX_SEGMENTS, PREFIX_SIZE, SegmentState, StoreId, prefix,
};
use crate::page::ShortId;

/// Number of locks; all encoders look pages up in the one table of their peer.
const SHARDS: u64 = 16;

/// Segments that are gone before their entries are swept out.
const SWEEP_AT: usize = 32;

/// Upper bound of the bytes per entry once there are some thousand: 12 bytes and one of the table's
/// at a load between 7/16 and 7/8.
const BYTES_PER_ENTRY: usize = 30;

/// Where a page lies in the peer's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnnouncedPlace {
    /// Number of the segment.
    pub segment: u32,
    /// Number of the record in it.
    pub record: u32,
}

/// Twelve bytes, to be had by the million.
#[derive(Clone, Copy)]
struct Entry {
    prefix: [u8; PREFIX_SIZE],
    record: [u8; 3],
    segment: u32,
}

impl Entry {
    fn key(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes[..PREFIX_SIZE].copy_from_slice(&self.prefix);
        u64::from_le_bytes(bytes)
    }

    fn place(&self) -> AnnouncedPlace {
        let [a, b, c] = self.record;
        AnnouncedPlace {
            segment: self.segment,
            record: u32::from_le_bytes([a, b, c, 0]),
        }
    }
}

#[derive(Default)]
struct Shard {
    table: HashTable<Entry>,
    /// Segments that are gone and whose entries are still in the table.
    gone: Vec<u32>,
}

#[derive(Default)]
struct Told {
    store: Option<StoreId>,
    /// Records announced, by segment.
    segments: BTreeMap<u32, u32>,
    /// Segments that are gone and not swept out yet, and the records they had.
    gone: BTreeMap<u32, u32>,
}

/// A bounded table of the pages that a peer has announced.
///
/// It is a belief like [`KnownPages`](crate::KnownPages): a page that is gone by the time it is
/// referred to costs a miss. One task applies announcements, any number look pages up.
pub struct Announced {
    shards: Vec<RwLock<Shard>>,
    told: Mutex<Told>,
    entries_per_shard: usize,
}

impl Announced {
    /// An empty table that takes at most `capacity_bytes`. Announcements beyond that are let pass.
    #[must_use]
    pub fn new(capacity_bytes: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            told: Mutex::default(),
            entries_per_shard: capacity_bytes / BYTES_PER_ENTRY / SHARDS as usize,
        }
    }

    /// What the peer has announced so far, for it to go on from on a new connection. No store has the
    /// id of zeroes.
    #[must_use]
    pub fn position(&self) -> (StoreId, Vec<SegmentState>) {
        let told = lock(&self.told);
        let segments = told.segments.iter();
        let states = segments.map(|(&segment, &records)| SegmentState { segment, records });
        (told.store.unwrap_or(StoreId([0; 16])), states.collect())
    }

    /// Forgets all that was announced, for the peer to begin anew.
    pub fn clear(&self) {
        let mut told = lock(&self.told);
        *told = Told::default();
        self.shards
            .iter()
            .for_each(|shard| *write(shard) = Shard::default());
    }

    /// Takes a message of the peer in.
    ///
    /// # Errors
    /// When the peer broke the format, or its messages do not fit together.
    pub fn apply(&self, mut message: &[u8]) -> Result<(), AnnounceError> {
        if message.len() > MAX_ANNOUNCEMENT {
            return Err(AnnounceError::TooLong);
        }
        let mut told = lock(&self.told);
        while !message.is_empty() {
            match message::read(&mut message)? {
                Item::Store(store) => {
                    if told.store != Some(store) {
                        *told = Told {
                            store: Some(store),
                            ..Told::default()
                        };
                        self.shards
                            .iter()
                            .for_each(|shard| *write(shard) = Shard::default());
                    }
                }
                Item::Pages {
                    segment,
                    first,
                    prefixes,
                } => {
                    let full = told.segments.len() >= MAX_SEGMENTS;
                    let known = told.segments.get(&segment).copied();
                    if told.store.is_none() || known.unwrap_or(0) != first {
                        return Err(AnnounceError::OutOfOrder);
                    }
                    if known.is_none() && full {
                        return Err(AnnounceError::TooManySegments);
                    }
                    let count = (prefixes.len() / PREFIX_SIZE) as u32;
                    told.segments.insert(segment, first + count);
                    // There was no room for it for a while. What a segment holds never changes, so the
                    // entries of old are as good as those that come now.
                    if told.gone.remove(&segment).is_some() {
                        for shard in &self.shards {
                            write(shard).gone.retain(|&gone| gone != segment);
                        }
                    }
                    self.insert(segment, first, prefixes);
                }
                Item::Dropped { segment } => {
                    let Some(records) = told.segments.remove(&segment) else {
                        return Err(AnnounceError::OutOfOrder);
                    };
                    told.gone.insert(segment, records);
                    self.shards
                        .iter()
                        .for_each(|shard| write(shard).gone.push(segment));
                    let records = told.gone.values().copied().map(u64::from).sum();
                    let worth_it = self.worth_a_sweep(records) && self.is_full();
                    if told.gone.len() >= SWEEP_AT || worth_it {
                        self.sweep(&mut told);
                    }
                }
            }
        }
        Ok(())
    }

    fn insert(&self, segment: u32, first: u32, prefixes: &[u8]) {
        let (prefixes, _) = prefixes.as_chunks::<PREFIX_SIZE>();
        for (record, &prefix) in (first..).zip(prefixes) {
            let [a, b, c, _] = record.to_le_bytes();
            let entry = Entry {
                prefix,
                record: [a, b, c],
                segment,
            };
            let key = entry.key();
            let mut shard = write(self.shard(key));
            if let Some(found) = shard.table.find_mut(hash(key), |other| other.key() == key) {
                *found = entry;
            } else if shard.table.len() < self.entries_per_shard {
                shard
                    .table
                    .insert_unique(hash(key), entry, |entry| hash(entry.key()));
            }
        }
    }

    /// Whether so many records are at least a sixteenth of the table.
    fn worth_a_sweep(&self, records: u64) -> bool {
        records * 16 >= self.entries_per_shard as u64 * SHARDS
    }

    fn is_full(&self) -> bool {
        let most = self.entries_per_shard;
        self.shards
            .iter()
            .any(|shard| read(shard).table.len() >= most)
    }

    /// Takes the entries of segments that are gone out of the table.
    fn sweep(&self, told: &mut Told) {
        for shard in &self.shards {
            let mut shard = write(shard);
            shard
                .table
                .retain(|entry| !told.gone.contains_key(&entry.segment));
            shard.gone.clear();
        }
        told.gone.clear();
    }

    /// Where the peer holds this page, as far as announced.
    #[must_use]
    pub fn find(&self, id: &ShortId) -> Option<AnnouncedPlace> {
        let key = prefix(id);
        let shard = read(self.shard(key));
        let entry = shard.table.find(hash(key), |entry| entry.key() == key)?;
        (!shard.gone.contains(&entry.segment)).then(|| entry.place())
    }

    /// The peer has turned out not to hold this page.
    pub fn remove(&self, id: &ShortId) {
        let key = prefix(id);
        let mut shard = write(self.shard(key));
        if let Ok(entry) = shard
            .table
            .find_entry(hash(key), |entry| entry.key() == key)
        {
            entry.remove();
        }
    }

    /// Number of pages in the table, those of segments not yet swept out included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| read(shard).table.len())
            .sum()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the table takes now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let tables = self
            .shards
            .iter()
            .map(|shard| read(shard).table.allocation_size());
        tables.sum()
    }

    fn shard(&self, key: u64) -> &RwLock<Shard> {
        &self.shards[(key % SHARDS) as usize]
    }
}

impl std::fmt::Debug for Announced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Announced({} pages)", self.len())
    }
}

/// Spreads the 40 bits of a prefix over the bits that a hash table looks at.
fn hash(key: u64) -> u64 {
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}

/// A panic elsewhere leaves at worst a belief that is wrong, which is allowed.
fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(shard: &RwLock<Shard>) -> RwLockReadGuard<'_, Shard> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(shard: &RwLock<Shard>) -> RwLockWriteGuard<'_, Shard> {
    shard.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_takes_twelve_bytes() {
        assert_eq!(size_of::<Entry>(), 12);
    }

    #[test]
    fn messages_that_do_not_fit_together_are_refused() {
        let announced = Announced::new(1 << 20);
        let pages = |first| {
            let mut message = Vec::new();
            message::write_pages_head(1, first, 1, &mut message);
            message.extend([7; PREFIX_SIZE]);
            message
        };
        // No store, a gap, a repetition, a segment that was never there.
        assert_eq!(announced.apply(&pages(0)), Err(AnnounceError::OutOfOrder));
        let mut message = Vec::new();
        message::write_store(StoreId([1; 16]), &mut message);
        announced.apply(&message).unwrap();
        assert_eq!(announced.apply(&pages(1)), Err(AnnounceError::OutOfOrder));
        announced.apply(&pages(0)).unwrap();
        assert_eq!(announced.apply(&pages(0)), Err(AnnounceError::OutOfOrder));
        announced.apply(&pages(1)).unwrap();
        let mut dropped = Vec::new();
        message::write_dropped(2, &mut dropped);
        assert_eq!(announced.apply(&dropped), Err(AnnounceError::OutOfOrder));
        let long = vec![0; MAX_ANNOUNCEMENT + 1];
        assert_eq!(announced.apply(&long), Err(AnnounceError::TooLong));
    }
}
