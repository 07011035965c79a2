//! A bounded set of ids, the index of the memory store and of the known pages.
//!
//! A hand goes round the slots and takes those that nobody used. What was used time and again is
//! protected and passed over, so that a scan of any length takes the slots of other scans only. Protected
//! slots are at most four fifths of all; they lose their uses with time, and where others want their
//! place.

use hashbrown::HashTable;

use crate::page::ShortId;

/// Upper bound of the bytes that a [`ClockIndex`] takes per id once it holds a few hundred.
///
/// A slot is 17 bytes, grown by an eighth (19.1); the table has 5 bytes per bucket and is 7/16 to 7/8
/// full (5.7 to 11.4). Freed slots that wait for reuse add 4 bytes, and only after removals.
pub(crate) const INDEX_BYTES_PER_ID: usize = 32;

/// The first growth of the slot array, in slots.
const MIN_GROWTH: usize = 64;

/// Uses are counted up to this.
const MAX_USES: u8 = 3;
/// As many make a slot protected: one may be that of a page that was just replaced by the next version of
/// it.
const PROTECTING_USES: u8 = 2;
/// After so many evictions for each slot there is, protected ones lose a use.
const AGE_AT: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Free,
    /// Evicted when the hand comes by and it has not been used.
    Probation {
        uses: u8,
    },
    /// Passed over by the hand.
    Protected {
        uses: u8,
    },
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    id: ShortId,
    state: State,
}

/// A [`SlotState`] in a byte.
#[derive(Debug, Clone, Copy)]
struct State(u8);

impl State {
    const FREE: u8 = 0xff;
    const PROTECTED: u8 = 0x80;

    const fn of(state: SlotState) -> Self {
        Self(match state {
            SlotState::Free => Self::FREE,
            SlotState::Probation { uses } => uses,
            SlotState::Protected { uses } => Self::PROTECTED | uses,
        })
    }

    const fn get(self) -> SlotState {
        match self.0 {
            Self::FREE => SlotState::Free,
            uses if uses < Self::PROTECTED => SlotState::Probation { uses },
            uses => SlotState::Protected {
                uses: uses & !Self::PROTECTED,
            },
        }
    }
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
    /// Number of protected slots.
    protected: u32,
    /// Uses that protected slots are to lose for others that found no room among them.
    wanting: u32,
    /// Evictions since protected slots last lost a use.
    since_aged: u64,
    /// On this turn of the hand they do.
    aging: bool,
}

impl ClockIndex {
    pub(crate) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            slots: Vec::new(),
            table: HashTable::new(),
            free: Vec::new(),
            hand: 0,
            protected: 0,
            wanting: 0,
            since_aged: 0,
            aging: false,
        }
    }

    /// Most protected slots: what is new needs room to prove itself.
    fn most_protected(&self) -> u32 {
        self.capacity - self.capacity.div_ceil(5)
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
        let state = &mut self.slots[slot as usize].state;
        let more = |uses: u8| (uses + 1).min(MAX_USES);
        *state = State::of(match state.get() {
            SlotState::Free => SlotState::Free,
            SlotState::Probation { uses } => SlotState::Probation { uses: more(uses) },
            SlotState::Protected { uses } => SlotState::Protected { uses: more(uses) },
        });
        Some(slot)
    }

    /// Adds `id`, in the place of an id not used lately when the set is full.
    pub(crate) fn insert(&mut self, id: &ShortId) -> Placed {
        if self.touch(id).is_some() {
            return Placed::Present;
        }
        let placed = self.vacate();
        if let Placed::Fresh(slot) | Placed::Evicted(slot) = placed {
            self.slots[slot as usize] = Slot {
                id: *id,
                state: State::of(SlotState::Probation { uses: 0 }),
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
        let state = &mut self.slots[slot as usize].state;
        if matches!(state.get(), SlotState::Protected { .. }) {
            self.protected -= 1;
        }
        *state = State::of(SlotState::Free);
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
                state: State::of(SlotState::Free),
            });
            return Placed::Fresh(used as u32);
        }
        // Not all slots are protected, and the others lose a use each time.
        loop {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.capacity;
            if slot == 0 {
                self.aging = self.since_aged >= AGE_AT * u64::from(self.capacity);
                self.since_aged = if self.aging { 0 } else { self.since_aged };
            }
            let entry = self.slots[slot as usize];
            let next = match entry.state.get() {
                SlotState::Protected { uses } => self.pass_protected(uses),
                SlotState::Probation { uses } if uses > 0 => self.pass_used(uses),
                SlotState::Probation { .. } | SlotState::Free => {
                    self.since_aged += 1;
                    self.unindex(&entry.id);
                    return Placed::Evicted(slot);
                }
            };
            self.slots[slot as usize].state = State::of(next);
        }
    }

    /// What a protected slot is after the hand has come by.
    fn pass_protected(&mut self, uses: u8) -> SlotState {
        if !self.aging {
            if self.wanting == 0 {
                return SlotState::Protected { uses };
            }
            self.wanting -= 1;
        }
        match uses {
            0 | 1 => {
                self.protected -= 1;
                SlotState::Probation { uses: 0 }
            }
            _ => SlotState::Protected { uses: uses - 1 },
        }
    }

    /// What another slot that was used is after the hand has come by.
    fn pass_used(&mut self, uses: u8) -> SlotState {
        if uses < PROTECTING_USES {
            return SlotState::Probation { uses: uses - 1 };
        }
        if self.protected < self.most_protected() {
            self.protected += 1;
            return SlotState::Protected { uses };
        }
        self.wanting = (self.wanting + 1).min(self.capacity);
        SlotState::Probation { uses: uses - 1 }
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

    /// How many of so many ids are left that were used, when others came by, once each.
    fn left(capacity: u32, shared: u32, uses: u32, scan: u32) -> usize {
        let mut index = ClockIndex::new(capacity);
        for n in 0..shared {
            index.insert(&id(n));
        }
        for _ in 0..uses {
            (0..shared).for_each(|n| assert!(index.touch(&id(n)).is_some()));
        }
        for n in 0..scan {
            index.insert(&id(1_000_000 + n));
        }
        (0..shared)
            .filter(|&n| index.find(&id(n)).is_some())
            .count()
    }

    #[test]
    fn what_many_share_survives_a_scan_of_ten_times_the_set() {
        assert_eq!(left(4000, 1000, 3, 40_000), 1000);
        // As much as may be protected; and most of it where more would be.
        assert_eq!(left(4000, 3200, 3, 40_000), 3200);
        assert!(left(4000, 4000, 3, 40_000) >= 2000);
        // What was used once is passed over once; what was not, not at all.
        assert_eq!(left(4000, 1000, 1, 3500), 1000);
        assert_eq!(left(4000, 1000, 1, 40_000), 0);
        assert_eq!(left(4000, 1000, 0, 4000), 0);
        // Nothing stays for ever.
        assert_eq!(left(4000, 1000, 3, 200_000), 0);
    }

    #[test]
    fn what_is_used_now_takes_the_place_of_what_was_used_once() {
        let mut index = ClockIndex::new(1000);
        for round in 0..20 {
            let ids = round * 800..(round + 1) * 800;
            for _ in 0..4 {
                ids.clone().for_each(|n| {
                    index.insert(&id(n));
                });
                // Others come between.
                (0..300).for_each(|n| {
                    index.insert(&id(1_000_000 + round * 1000 + n));
                });
            }
            let there = ids.filter(|&n| index.find(&id(n)).is_some()).count();
            assert!(there >= 500, "round {round}: {there}");
            assert!(index.protected <= index.most_protected());
        }
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
