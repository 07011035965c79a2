//! Filling a store with pages that were not sent by anybody: those of disk images and files.
//!
//! Unlike a migration, a seeder waits for the disk. It leaves half of the memory for pages that wait to
//! be written to others, and puts nothing into the tier in memory, which it would wash out.

use std::ops::AddAssign;
use std::time::Duration;

use crate::disk::{DiskStore, Put};
use crate::page::{DomainKey, Hasher, PAGE_SIZE};
use crate::store::DiskState;

/// How long the disk may take for what was put before. A disk that takes longer for some MiB has failed,
/// near enough.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// Pages between two looks at how much waits to be written: few enough that they fit into the half of the
/// memory that is free then, in the smallest of stores.
const PAGES_AT_ONCE: usize = 64;

/// What became of pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SeedCounts {
    /// The store had them.
    pub known: u64,
    /// They were added.
    pub new: u64,
    /// They were zero, and no store keeps such.
    pub zero: u64,
}

impl SeedCounts {
    /// All of them.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.known + self.new + self.zero
    }
}

impl AddAssign for SeedCounts {
    fn add_assign(&mut self, more: Self) {
        self.known += more.known;
        self.new += more.new;
        self.zero += more.zero;
    }
}

/// Why a store took no more pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeedError {
    /// The disk refused a write, for this reason.
    #[error("the disk of the page store takes no pages: {0}")]
    Failing(String),
    /// The disk did not take what waited within a minute.
    #[error("the disk of the page store is stuck: it took nothing for {} s", DISK_PATIENCE.as_secs())]
    Stuck,
}

/// Puts pages of one domain into a store.
#[derive(Debug)]
pub struct Seeder {
    hasher: Hasher,
    patience: Duration,
}

impl Seeder {
    /// A seeder for the domain of `key`.
    #[must_use]
    pub fn new(key: &DomainKey) -> Self {
        Self {
            hasher: Hasher::new(key),
            patience: DISK_PATIENCE,
        }
    }

    /// Puts all `pages`, in order, and waits for the disk as long as need be. A last page that is not
    /// whole is filled up with zeroes, as page caches hold it.
    ///
    /// # Errors
    /// When the disk fails or takes nothing for a minute; pages before that were put, and putting the same
    /// pages again does no harm.
    pub fn put(&self, store: &DiskStore, pages: &[u8]) -> Result<SeedCounts, SeedError> {
        let mut counts = SeedCounts::default();
        for some in pages.chunks(PAGES_AT_ONCE * PAGE_SIZE) {
            if !store.wait_for_room(self.patience) {
                return Err(SeedError::Stuck);
            }
            let (whole, rest) = some.as_chunks::<PAGE_SIZE>();
            for page in whole {
                self.put_page(store, page, &mut counts)?;
            }
            if !rest.is_empty() {
                let mut page = [0; PAGE_SIZE];
                page[..rest.len()].copy_from_slice(rest);
                self.put_page(store, &page, &mut counts)?;
            }
        }
        Ok(counts)
    }

    /// Has all that was put written.
    ///
    /// # Errors
    /// When the disk refuses it: some of the pages put last are lost then.
    pub fn settle(&self, store: &DiskStore) -> Result<(), SeedError> {
        store.flush();
        match store.disk_stats().state {
            DiskState::Working => Ok(()),
            DiskState::Degraded(reason) => Err(SeedError::Failing(reason)),
        }
    }

    fn put_page(
        &self,
        store: &DiskStore,
        page: &[u8; PAGE_SIZE],
        counts: &mut SeedCounts,
    ) -> Result<(), SeedError> {
        if self.hasher.is_zero(page) {
            counts.zero += 1;
            return Ok(());
        }
        let (domain, id) = (self.hasher.domain(), self.hasher.id(page));
        match store.put_waiting(domain, &id, page, self.patience) {
            Put::Known => counts.known += 1,
            Put::New => counts.new += 1,
            Put::NoRoom => return Err(SeedError::Stuck),
            Put::Failing => return Err(failing(store)),
        }
        Ok(())
    }
}

/// Why the disk of a store refuses pages.
fn failing(store: &DiskStore) -> SeedError {
    SeedError::Failing(match store.disk_stats().state {
        DiskState::Degraded(reason) => reason,
        // It has just recovered.
        DiskState::Working => "it failed a moment ago".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{DiskOptions, KeySource};
    use crate::page::ShortId;
    use crate::store::PageStore;

    fn pages(from: u32, count: u32) -> Vec<u8> {
        let page = |n: u32| {
            let mut page = [0x5a; PAGE_SIZE];
            page[..4].copy_from_slice(&n.to_le_bytes());
            page
        };
        (from..from + count).flat_map(page).collect()
    }

    fn store(folder: &std::path::Path, capacity: u64) -> DiskStore {
        let key = KeySource::secret(&[7; 32]).unwrap();
        DiskStore::open(DiskOptions::new(folder, capacity), &key).unwrap()
    }

    #[test]
    fn pages_are_found_in_the_order_in_which_they_were_put() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), 64 << 20);
        let key = DomainKey::from_bytes([3; 32]);
        let seeder = Seeder::new(&key);
        let mut contents = pages(0, 300);
        contents.extend([0; PAGE_SIZE]);
        contents.extend(b"the end of a file");
        let counts = seeder.put(&store, &contents).unwrap();
        assert_eq!((counts.new, counts.known, counts.zero), (301, 0, 1));
        let again = seeder.put(&store, &contents).unwrap();
        assert_eq!((again.new, again.known, again.zero), (0, 301, 1));
        seeder.settle(&store).unwrap();

        let hasher = Hasher::new(&key);
        let mut last = [0; PAGE_SIZE];
        last[..17].copy_from_slice(b"the end of a file");
        let expected: Vec<ShortId> = pages(0, 300)
            .chunks(PAGE_SIZE)
            .chain([&last[..]])
            .map(|page| hasher.id(page).short())
            .collect();
        let segments = store.segments(hasher.domain());
        let mut ids = Vec::new();
        for segment in segments {
            store.segment_ids(segment.number, 0, 1000, &mut ids);
        }
        assert_eq!(ids, expected);
    }

    #[test]
    fn nothing_is_dropped_though_more_comes_than_waits_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let capacity = 32 << 20;
        let store = store(dir.path(), capacity);
        let seeder = Seeder::new(&DomainKey::from_bytes([3; 32]));
        // Five times what fits: room is made on the way.
        let mut counts = SeedCounts::default();
        for part in 0..40 {
            counts += seeder.put(&store, &pages(part * 1000, 1000)).unwrap();
        }
        seeder.settle(&store).unwrap();
        assert_eq!((counts.new, counts.known), (40_000, 0));
        let stats = store.disk_stats();
        assert_eq!(stats.dropped_puts, 0);
        assert_eq!(stats.insertions, 40_000);
        assert!(stats.bytes <= capacity, "{}", stats.bytes);
        // What came last is there.
        assert!(stats.pages > 4000, "{}", stats.pages);
        assert!(store.capacity_pages() >= stats.pages);
    }
}
