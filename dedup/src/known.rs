//! What a peer is believed to hold.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::clock::ClockIndex;
use crate::page::ShortId;

/// Number of locks; migrations to one peer share the set.
const SHARDS: u64 = 16;

/// A bounded set of the pages that one peer is believed to hold.
///
/// It is a belief: the peer may have evicted or lost any of them, which costs a miss and no more.
/// The set takes at most 32 bytes per page and grows as it fills; the ids used least lately make
/// room for new ones. Give it about the capacity of the peer's store.
#[derive(Debug)]
pub struct KnownPages {
    shards: Vec<Mutex<ClockIndex>>,
}

impl KnownPages {
    /// An empty set of at most `capacity_pages` ids.
    #[must_use]
    pub fn new(capacity_pages: u64) -> Self {
        let per_shard = u32::try_from(capacity_pages.div_ceil(SHARDS)).unwrap_or(u32::MAX);
        Self {
            shards: (0..SHARDS)
                .map(|_| Mutex::new(ClockIndex::new(per_shard)))
                .collect(),
        }
    }

    fn shard(&self, id: &ShortId) -> MutexGuard<'_, ClockIndex> {
        lock(&self.shards[(id.shard_hash() % SHARDS) as usize])
    }

    /// The peer has got this page now.
    pub fn insert(&self, id: &ShortId) {
        self.shard(id).insert(id);
    }

    /// Whether the peer is believed to hold this page. Asking counts as using it.
    #[must_use]
    pub fn contains(&self, id: &ShortId) -> bool {
        self.shard(id).touch(id).is_some()
    }

    /// The peer has turned out not to hold this page.
    pub fn remove(&self, id: &ShortId) {
        self.shard(id).remove(id);
    }

    /// Nothing is known any more: the peer has restarted.
    pub fn clear(&self) {
        for shard in &self.shards {
            lock(shard).clear();
        }
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the set takes now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).bytes()).sum()
    }
}

/// A panic elsewhere leaves at worst a belief that is wrong, which is allowed.
fn lock(shard: &Mutex<ClockIndex>) -> MutexGuard<'_, ClockIndex> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{DomainKey, Hasher};

    fn id(n: u64) -> ShortId {
        Hasher::new(&DomainKey::from_bytes([1; 32]))
            .id(&n.to_le_bytes())
            .short()
    }

    #[test]
    fn pages_come_and_go() {
        let known = KnownPages::new(100);
        assert!(known.is_empty());
        known.insert(&id(1));
        known.insert(&id(2));
        assert!(known.contains(&id(1)));
        known.remove(&id(1));
        assert!(!known.contains(&id(1)));
        assert_eq!(known.len(), 1);
        known.clear();
        assert!(!known.contains(&id(2)));
    }

    #[test]
    fn the_set_is_bounded_in_pages_and_bytes() {
        let known = KnownPages::new(16_000);
        assert!(known.bytes() < 4096, "memory is taken as it is needed");
        for n in 0..100_000 {
            known.insert(&id(n));
        }
        assert_eq!(known.len(), 16_000);
        assert!(known.bytes() <= 16_000 * 32);
    }
}
