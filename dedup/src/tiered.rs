//! A store in memory in front of a store on disk.

use crate::disk::DiskStore;
use crate::memory_store::MemoryStore;
use crate::page::{DomainId, PAGE_SIZE, PageId, ShortId};
use crate::store::{PageStore, StoreStats};

/// Both tiers take every value; what memory has forgotten is read from the disk and kept in memory
/// again.
#[derive(Debug)]
pub struct TieredStore {
    memory: MemoryStore,
    disk: DiskStore,
}

impl TieredStore {
    /// A store of two tiers.
    #[must_use]
    pub fn new(memory: MemoryStore, disk: DiskStore) -> Self {
        Self { memory, disk }
    }

    /// The tier on disk.
    #[must_use]
    pub fn disk(&self) -> &DiskStore {
        &self.disk
    }
}

impl PageStore for TieredStore {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        if let Some(length) = self.memory.get(id, out) {
            // The disk does not see this use otherwise, and would let go what is used most.
            self.disk.touch(id);
            return Some(length);
        }
        let length = self.disk.get(id, out)?;
        self.memory.keep(id, &out[..length]);
        Some(length)
    }

    fn get_at_once(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        let length = self.memory.get(id, out)?;
        self.disk.touch(id);
        Some(length)
    }

    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.memory.put(domain, id, contents);
        self.disk.put(domain, id, contents);
    }

    fn prefetch(&self, ids: &[ShortId]) {
        let on_disk_only = ids.iter().filter(|id| !self.memory.contains(id));
        self.disk.prefetch_those(on_disk_only);
    }

    fn records(
        &self,
        domain: &DomainId,
        segment: u32,
        first: u32,
        count: u32,
        out: &mut Vec<ShortId>,
    ) {
        self.disk.records(domain, segment, first, count, out);
    }

    fn contains(&self, id: &ShortId) -> bool {
        self.memory.contains(id) || self.disk.contains(id)
    }

    fn remove(&self, id: &ShortId) -> bool {
        let from_memory = self.memory.remove(id);
        self.disk.remove(id) || from_memory
    }

    fn stats(&self) -> StoreStats {
        StoreStats {
            disk: Some(self.disk.disk_stats()),
            ..self.memory.stats()
        }
    }

    fn capacity_pages(&self) -> u64 {
        // The disk has what memory has.
        self.memory.capacity_pages().max(self.disk.capacity_pages())
    }
}
