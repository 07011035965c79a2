//! A bounded set of ids with CLOCK eviction, the index of the memory store and of the known pages.

use hashbrown::HashTable;

use crate::page::ShortId;

/// Upper bound of the bytes that a [`ClockIndex`] takes per id once it holds a few hundred.
///
/// A slot is 17 bytes, grown by an eighth (19.1); the table has 5 bytes per bucket and is 7/16 to 7/8
/// full (5.7 to 11.4). Freed slots that wait for reuse add 4 bytes, and only after removals.
pub(crate) const INDEX_BYTES_PER_ID: usize = 32;

/// The first growth of the slot array, in slots.
const MIN_GROWTH: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Free,
    /// Evicted when the hand comes by.
    Cold,
    /// Used since the hand last came by: passed over once.
    Hot,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    id: ShortId,
    state: SlotState,
}

/// Where an inserted id went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placed {
    /// The id was there already.
    Present,
    /// The id took a slot that nobody used.
    Fresh(u32),
    /// The id took the slot of another, which is forgotten.
    Evicted(u32),
    /// The set has no room at all.
    Refused,
}

/// Ids in numbered slots; slot numbers are dense from 0 and below the capacity.
#[derive(Debug)]
pub(crate) struct ClockIndex {
    capacity: u32,
    slots: Vec<Slot>,
    /// Slot numbers by id.
    table: HashTable<u32>,
    /// Slots emptied by `remove`.
    free: Vec<u32>,
    hand: u32,
}

impl ClockIndex {
    pub(crate) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            slots: Vec::new(),
            table: HashTable::new(),
            free: Vec::new(),
            hand: 0,
        }
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// The slot of `id`.
    pub(crate) fn find(&self, id: &ShortId) -> Option<u32> {
        self.table
            .find(id.table_hash(), |&slot| self.slots[slot as usize].id == *id)
            .copied()
    }

    /// The slot of `id`, which counts as used now.
    pub(crate) fn touch(&mut self, id: &ShortId) -> Option<u32> {
        let slot = self.find(id)?;
        self.slots[slot as usize].state = SlotState::Hot;
        Some(slot)
    }

    /// Adds `id`, in the place of an id not used lately when the set is full.
    pub(crate) fn insert(&mut self, id: &ShortId) -> Placed {
        if self.touch(id).is_some() {
            return Placed::Present;
        }
        let placed = self.vacate();
        if let Placed::Fresh(slot) | Placed::Evicted(slot) = placed {
            // New ids start cold: what is used once does not displace what is used often.
            self.slots[slot as usize] = Slot {
                id: *id,
                state: SlotState::Cold,
            };
            let slots = &self.slots;
            let hash = |&slot: &u32| slots[slot as usize].id.table_hash();
            self.table.insert_unique(id.table_hash(), slot, hash);
        }
        placed
    }

    /// Forgets `id` and returns the slot that it had.
    pub(crate) fn remove(&mut self, id: &ShortId) -> Option<u32> {
        let slot = self.unindex(id)?;
        self.slots[slot as usize].state = SlotState::Free;
        self.free.push(slot);
        Some(slot)
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.capacity);
    }

    fn unindex(&mut self, id: &ShortId) -> Option<u32> {
        let slots = &self.slots;
        let found = self
            .table
            .find_entry(id.table_hash(), |&slot| slots[slot as usize].id == *id);
        Some(found.ok()?.remove().0)
    }

    /// Finds a slot for a new id.
    fn vacate(&mut self) -> Placed {
        if self.capacity == 0 {
            return Placed::Refused;
        }
        if let Some(slot) = self.free.pop() {
            return Placed::Fresh(slot);
        }
        let used = self.slots.len();
        if used < self.capacity as usize {
            if used == self.slots.capacity() {
                // Doubling would leave up to half of the array unused.
                let growth = (used / 8)
                    .max(MIN_GROWTH)
                    .min(self.capacity as usize - used);
                self.slots.reserve_exact(growth);
            }
            self.slots.push(Slot {
                id: ShortId::from_bytes([0; 16]),
                state: SlotState::Free,
            });
            return Placed::Fresh(used as u32);
        }
        // Every slot is cold after at most one turn, so the second one ends the loop.
        loop {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.capacity;
            let entry = &mut self.slots[slot as usize];
            if entry.state == SlotState::Hot {
                entry.state = SlotState::Cold;
                continue;
            }
            let id = entry.id;
            self.unindex(&id);
            return Placed::Evicted(slot);
        }
    }

    /// Bytes that the index takes now.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
            + self.table.allocation_size()
            + self.free.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> ShortId {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..16]);
        ShortId::from_bytes(bytes)
    }

    #[test]
    fn what_was_used_outlives_what_was_not() {
        let mut index = ClockIndex::new(3);
        for n in 0..3 {
            assert_eq!(index.insert(&id(n)), Placed::Fresh(n));
        }
        assert_eq!(index.touch(&id(0)), Some(0));
        assert_eq!(index.insert(&id(3)), Placed::Evicted(1));
        assert_eq!(index.insert(&id(4)), Placed::Evicted(2));
        // The chance that slot 0 got was its second and last.
        assert_eq!(index.insert(&id(5)), Placed::Evicted(0));
        assert_eq!(index.find(&id(0)), None);
        assert_eq!(index.len(), 3);
    }

    #[test]
    fn removed_slots_are_used_again() {
        let mut index = ClockIndex::new(2);
        index.insert(&id(0));
        index.insert(&id(1));
        assert_eq!(index.remove(&id(0)), Some(0));
        assert_eq!(index.remove(&id(0)), None);
        assert_eq!(index.insert(&id(2)), Placed::Fresh(0));
        assert_eq!(index.insert(&id(2)), Placed::Present);
        index.clear();
        assert_eq!(index.len(), 0);
        assert_eq!(index.find(&id(2)), None);
    }

    #[test]
    fn a_set_without_room_refuses() {
        assert_eq!(ClockIndex::new(0).insert(&id(0)), Placed::Refused);
    }

    #[test]
    fn the_index_keeps_to_its_bytes_per_id() {
        assert_eq!(size_of::<Slot>(), 17);
        let mut index = ClockIndex::new(100_000);
        for n in 0..200_000 {
            index.insert(&id(n));
            let len = index.len();
            assert!(
                len < 1000 || index.bytes() <= len * INDEX_BYTES_PER_ID,
                "{len} ids"
            );
        }
        assert_eq!(index.len(), 100_000);
    }
}
