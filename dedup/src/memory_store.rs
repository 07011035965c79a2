//! A page store in memory.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{Advice, MmapMut};

use crate::clock::{ClockIndex, INDEX_BYTES_PER_ID, Placed};
use crate::page::{DomainId, PAGE_SIZE, PageId, ShortId};
use crate::store::{PageStore, StoreStats};

/// Bytes that one value takes: a slot of a page, its length and the index.
const BYTES_PER_PAGE: u64 = (PAGE_SIZE + size_of::<u16>() + INDEX_BYTES_PER_ID) as u64;

/// Slots of one slab. A slab of 8 MiB comes from the kernel untouched, so it costs memory only as its
/// slots fill.
const SLAB_SLOTS: u32 = 2048;

/// Memory that the kernel is asked for at once while a slab fills. A fault for each page costs twice
/// the processor time; huge pages would cost the least where the memory is at hand, and by far the most
/// where a hypervisor has yet to provide it.
const POPULATED_AT_ONCE: usize = 256 << 10;

/// Number of locks in a store of some size.
const MAX_SHARDS: u32 = 16;

/// Below this many pages per lock a store has fewer locks.
const MIN_SHARD_PAGES: u64 = 1024;

/// A bounded page store in memory.
///
/// The bound holds for everything: 4096 bytes of contents and 34 bytes of index for each value (a
/// chunk shorter than a page takes the place of a page). Memory is taken as values arrive and given
/// back when the store is dropped. When it is full, a value that is not used makes room; those used time and again outlast scans.
pub struct MemoryStore {
    shards: Vec<Mutex<Shard>>,
    capacity_bytes: u64,
}

struct Shard {
    index: ClockIndex,
    /// `None` where the kernel had no memory when a slot of it was to be filled.
    slabs: Vec<Option<Slab>>,
    hits: u64,
    misses: u64,
    insertions: u64,
    evictions: u64,
    dropped_puts: u64,
}

struct Slab {
    contents: MmapMut,
    /// Bytes at the start of `contents` that the kernel was asked for.
    populated: usize,
    /// Length of each value, 1 to `PAGE_SIZE`.
    lengths: Box<[u16]>,
}

impl Slab {
    /// `None` when the kernel has no memory for it.
    fn new(slots: usize) -> Option<Self> {
        let contents = MmapMut::map_anon(slots * PAGE_SIZE).ok()?;
        // What guests held has no place in a core dump.
        let _ = contents.advise(Advice::DontDump);
        Some(Self {
            contents,
            populated: 0,
            lengths: vec![0; slots].into_boxed_slice(),
        })
    }

    /// Puts a value, 1 to `PAGE_SIZE` bytes, into a slot.
    fn fill(&mut self, slot: usize, value: &[u8]) {
        let at = slot * PAGE_SIZE;
        if at >= self.populated {
            let size = POPULATED_AT_ONCE.min(self.contents.len() - at);
            // Kernels before 5.14 cannot, and hand out page by page.
            let _ = self.contents.advise_range(Advice::PopulateWrite, at, size);
            self.populated = at + size;
        }
        self.contents[at..][..value.len()].copy_from_slice(value);
        self.lengths[slot] = value.len() as u16;
    }
}

impl MemoryStore {
    /// A store that takes at most `capacity_bytes`. With less than one page of room it keeps nothing.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let pages = capacity_bytes / BYTES_PER_PAGE;
        let shards = (pages / MIN_SHARD_PAGES).clamp(1, u64::from(MAX_SHARDS));
        // Slot numbers have 32 bits, so a shard ends at 16 TiB.
        let per_shard = u32::try_from(pages / shards).unwrap_or(u32::MAX);
        Self {
            shards: (0..shards)
                .map(|_| Mutex::new(Shard::new(per_shard)))
                .collect(),
            capacity_bytes,
        }
    }

    /// Keeps `contents` of any domain under `id`.
    pub(crate) fn keep(&self, id: &ShortId, contents: &[u8]) {
        self.shard(id).put(id, contents);
    }

    fn shard(&self, id: &ShortId) -> MutexGuard<'_, Shard> {
        lock(&self.shards[(id.shard_hash() % self.shards.len() as u64) as usize])
    }
}

/// A panic elsewhere leaves at worst a value that does not match its id, which readers check.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PageStore for MemoryStore {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        self.shard(id).get(id, out)
    }

    fn put(&self, _domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.keep(&id.short(), contents);
    }

    fn contains(&self, id: &ShortId) -> bool {
        self.shard(id).index.find(id).is_some()
    }

    fn remove(&self, id: &ShortId) -> bool {
        self.shard(id).index.remove(id).is_some()
    }

    fn stats(&self) -> StoreStats {
        let mut stats = StoreStats {
            capacity_bytes: self.capacity_bytes,
            ..StoreStats::default()
        };
        for shard in &self.shards {
            let shard = lock(shard);
            stats.pages += shard.index.len() as u64;
            stats.hits += shard.hits;
            stats.misses += shard.misses;
            stats.insertions += shard.insertions;
            stats.evictions += shard.evictions;
            stats.dropped_puts += shard.dropped_puts;
        }
        stats.bytes = stats.pages * BYTES_PER_PAGE;
        stats
    }

    fn capacity_pages(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| u64::from(lock(shard).index.capacity()))
            .sum()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Contents are secret.
        f.debug_struct("MemoryStore")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Shard {
    fn new(capacity: u32) -> Self {
        Self {
            index: ClockIndex::new(capacity),
            slabs: Vec::new(),
            hits: 0,
            misses: 0,
            insertions: 0,
            evictions: 0,
            dropped_puts: 0,
        }
    }

    fn get(&mut self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        let Some(slot) = self.index.touch(id) else {
            self.misses += 1;
            return None;
        };
        let Some(Some(slab)) = self.slabs.get((slot / SLAB_SLOTS) as usize) else {
            self.misses += 1;
            return None;
        };
        self.hits += 1;
        let slot = (slot % SLAB_SLOTS) as usize;
        let length = usize::from(slab.lengths[slot]);
        out[..length].copy_from_slice(&slab.contents[slot * PAGE_SIZE..][..length]);
        Some(length)
    }

    fn put(&mut self, id: &ShortId, contents: &[u8]) {
        if contents.is_empty() || contents.len() > PAGE_SIZE {
            return;
        }
        let (slot, evicted) = match self.index.insert(id) {
            Placed::Present | Placed::Refused => return,
            Placed::Fresh(slot) => (slot, false),
            Placed::Evicted(slot) => (slot, true),
        };
        self.evictions += u64::from(evicted);
        let Some(slab) = self.slab(slot) else {
            self.index.remove(id);
            self.dropped_puts += 1;
            return;
        };
        slab.fill((slot % SLAB_SLOTS) as usize, contents);
        self.insertions += 1;
    }

    /// The slab of a slot, made when it is missing.
    fn slab(&mut self, slot: u32) -> Option<&mut Slab> {
        let number = slot / SLAB_SLOTS;
        if self.slabs.len() <= number as usize {
            self.slabs.resize_with(number as usize + 1, || None);
        }
        let slab = &mut self.slabs[number as usize];
        if slab.is_none() {
            let slots = (self.index.capacity() - number * SLAB_SLOTS).min(SLAB_SLOTS);
            *slab = Slab::new(slots as usize);
        }
        slab.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::page::{DomainKey, Hasher};

    fn hasher() -> Hasher {
        Hasher::new(&DomainKey::from_bytes([5; 32]))
    }

    fn value(n: u16) -> Vec<u8> {
        let length = if n.is_multiple_of(3) {
            PAGE_SIZE
        } else {
            1 + usize::from(n) % PAGE_SIZE
        };
        (0..length).map(|at| (at as u16 ^ n) as u8).collect()
    }

    #[test]
    fn values_of_every_allowed_length_come_back() {
        let store = MemoryStore::new(1 << 20);
        let mut out = [0; PAGE_SIZE];
        for length in [1, 2, 1000, PAGE_SIZE - 1, PAGE_SIZE] {
            let contents = vec![length as u8 | 1; length];
            let id = hasher().id(&contents);
            assert_eq!(store.get(&id.short(), &mut out), None);
            store.put(hasher().domain(), &id, &contents);
            assert_eq!(store.get(&id.short(), &mut out), Some(length));
            assert_eq!(out[..length], contents);
        }
        for refused in [vec![], vec![1; PAGE_SIZE + 1]] {
            let id = hasher().id(&refused);
            store.put(hasher().domain(), &id, &refused);
            assert!(!store.contains(&id.short()));
        }
        let stats = store.stats();
        assert_eq!(
            (stats.pages, stats.hits, stats.misses, stats.insertions),
            (5, 5, 5, 5)
        );
    }

    #[test]
    fn a_store_without_room_keeps_nothing() {
        let store = MemoryStore::new(BYTES_PER_PAGE - 1);
        let id = hasher().id(&[1]);
        store.put(hasher().domain(), &id, &[1]);
        assert!(!store.contains(&id.short()));
        assert_eq!((store.capacity_pages(), store.stats().pages), (0, 0));
    }

    #[test]
    fn size_stays_within_the_bound_when_full() {
        let capacity = 10 << 20;
        let store = MemoryStore::new(capacity);
        for n in 0..6000_u32 {
            let mut page = [0; PAGE_SIZE];
            page[..4].copy_from_slice(&n.to_le_bytes());
            store.put(hasher().domain(), &hasher().id(&page), &page);
        }
        let stats = store.stats();
        assert!(stats.bytes <= capacity);
        assert!(stats.pages >= capacity / BYTES_PER_PAGE - u64::from(MAX_SHARDS));
        assert_eq!(stats.insertions - stats.evictions, stats.pages);
        let taken: usize = store
            .shards
            .iter()
            .map(lock)
            .map(|shard| {
                let slabs = shard.slabs.iter().flatten();
                let slabs = slabs.map(|slab| slab.contents.len() + 2 * slab.lengths.len());
                shard.index.bytes() + slabs.sum::<usize>()
            })
            .sum();
        assert!(taken as u64 <= capacity, "{taken} bytes taken");
    }

    proptest! {
        /// The store is a map that may forget, and forgets only when it is full.
        #[test]
        fn behaves_like_a_map(
            operations in prop::collection::vec((0..4_u8, 0..60_u16), 1..400),
            room in 1..80_u64,
        ) {
            let store = MemoryStore::new(room * BYTES_PER_PAGE);
            let mut model: HashMap<u16, Vec<u8>> = HashMap::new();
            let mut out = [0; PAGE_SIZE];
            for (operation, n) in operations {
                let contents = value(n);
                let id = hasher().id(&contents);
                match operation {
                    0 | 1 => {
                        store.put(hasher().domain(), &id, &contents);
                        model.insert(n, contents);
                        prop_assert!(store.contains(&id.short()));
                    }
                    2 => {
                        let found = store.get(&id.short(), &mut out);
                        prop_assert_eq!(found.is_some(), store.contains(&id.short()));
                        if let Some(length) = found {
                            prop_assert_eq!(Some(&out[..length]), model.get(&n).map(|v| &v[..]));
                        } else if store.stats().evictions == 0 {
                            prop_assert!(!model.contains_key(&n));
                        }
                    }
                    _ => {
                        let was_there = store.remove(&id.short());
                        prop_assert!(!was_there || model.contains_key(&n));
                        model.remove(&n);
                        prop_assert!(!store.contains(&id.short()));
                    }
                }
                prop_assert!(store.stats().pages <= room);
            }
        }
    }
}
