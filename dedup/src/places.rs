//! What the pages of a guest's RAM last held, place by place.
//!
//! Encoder and decoder of a QEMU main channel each keep such a table and change it by the same
//! operations in the same order, so that "what this place held" means the same on both sides with no
//! id on the wire (`docs/protocol.md`, "Places").

use hashbrown::HashMap;

use crate::manifest::{Manifest, number_of};
use crate::page::{PAGE_SIZE, ShortId};
use crate::program::Cursor;

/// Pages of one chunk of the table: 2 MiB of guest RAM for 8 KiB of table.
pub(crate) const CHUNK_PAGES: u64 = 512;

/// Page numbers are byte offsets of 64 bits without the 12 bits inside a page; they may wrap.
const PAGE_MASK: u64 = u64::MAX / PAGE_SIZE as u64;

/// Places of a channel unless told otherwise: 64 GiB of guest RAM, 256 MiB of table when full.
pub(crate) const DEFAULT_MAX_PLACES: u64 = 16 << 20;

/// A place that holds nothing. No page has this id but by a chance of 2^-128, and then the place
/// counts as empty on both sides.
pub(crate) const NOTHING: [u8; ShortId::SIZE] = [0; ShortId::SIZE];

/// A page of a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) block: u32,
    pub(crate) page: u64,
}

impl From<Cursor> for Place {
    fn from(cursor: Cursor) -> Self {
        Self {
            block: cursor.block,
            page: cursor.offset / PAGE_SIZE as u64,
        }
    }
}

impl Place {
    /// Which chunk, and where in it.
    fn split(self) -> ((u32, u64), usize) {
        let (index, at) = Self::split_page(self.page);
        ((self.block, index), at)
    }

    /// The place so many pages further on in its block, or back.
    pub(crate) fn ahead(self, pages: i64) -> Self {
        Self {
            page: self.page.wrapping_add_signed(pages) & PAGE_MASK,
            ..self
        }
    }

    /// Which chunk of its block a page is in, and where in it.
    pub(crate) fn split_page(page: u64) -> (u64, usize) {
        (page / CHUNK_PAGES, (page % CHUNK_PAGES) as usize)
    }
}

/// What the places of one chunk hold.
pub(crate) type Chunk = Box<[ShortId; CHUNK_PAGES as usize]>;

/// Memory of a chunk.
pub(crate) const CHUNK_BYTES: usize = size_of::<[ShortId; CHUNK_PAGES as usize]>();

/// A table from places to the ids of their contents, 16 bytes a place: 4 MiB for each GiB of guest
/// RAM that is not zero.
///
/// Chunks are made when the first of their places is set and stay. When another one would exceed the
/// limit, the place is not entered, which is no error: it just holds nothing.
pub(crate) struct Places {
    max_chunks: usize,
    index: HashMap<(u32, u64), u32>,
    chunks: Vec<Chunk>,
    /// The chunk used last: records come in address order.
    last: Option<((u32, u64), u32)>,
}

impl Places {
    pub(crate) fn new(max_places: u64) -> Self {
        let max_chunks = (max_places / CHUNK_PAGES).min(u64::from(u32::MAX));
        Self {
            max_chunks: max_chunks as usize,
            index: HashMap::new(),
            chunks: Vec::new(),
            last: None,
        }
    }

    /// Number of an existing chunk.
    fn chunk(&mut self, key: (u32, u64)) -> Option<usize> {
        if let Some((last, number)) = self.last
            && last == key
        {
            return Some(number as usize);
        }
        let number = *self.index.get(&key)?;
        self.last = Some((key, number));
        Some(number as usize)
    }

    /// What the place holds.
    pub(crate) fn get(&mut self, place: Place) -> Option<ShortId> {
        let (key, at) = place.split();
        let number = self.chunk(key)?;
        let id = self.chunks[number][at];
        (*id.as_bytes() != NOTHING).then_some(id)
    }

    /// The place holds this now. False where there is no room for it, so that it holds nothing.
    pub(crate) fn set(&mut self, place: Place, id: ShortId) -> bool {
        let (key, at) = place.split();
        let number = self.chunk_to_set(key);
        if let Some(number) = number {
            self.chunks[number][at] = id;
        }
        number.is_some()
    }

    /// Number of a chunk, which is made if there is none. `None` when there is no room for it.
    fn chunk_to_set(&mut self, key: (u32, u64)) -> Option<usize> {
        if let Some(number) = self.chunk(key) {
            return Some(number);
        }
        let empty = [ShortId::from_bytes(NOTHING); CHUNK_PAGES as usize];
        self.add_chunk(key, Box::new(empty))
    }

    fn add_chunk(&mut self, key: (u32, u64), chunk: Chunk) -> Option<usize> {
        let number = self.chunks.len();
        if number >= self.max_chunks {
            return None;
        }
        self.chunks.push(chunk);
        self.index.insert(key, number as u32);
        self.last = Some((key, number as u32));
        Some(number)
    }

    /// Places that hold nothing hold from now on what the manifest says, as far as there is room.
    /// `names` are the blocks' by number.
    pub(crate) fn fill(&mut self, manifest: &Manifest, names: &[Box<[u8]>]) {
        for (block, index, chunk) in manifest.chunks(|name| number_of(names, name)) {
            let Some(number) = self.chunk((block, index)) else {
                self.add_chunk((block, index), chunk.clone());
                continue;
            };
            for (own, old) in self.chunks[number].iter_mut().zip(chunk.iter()) {
                if *own.as_bytes() == NOTHING {
                    *own = *old;
                }
            }
        }
    }

    /// Takes the table as it is out, and leaves an empty one.
    pub(crate) fn take(&mut self) -> Self {
        let empty = Self {
            max_chunks: self.max_chunks,
            index: HashMap::new(),
            chunks: Vec::new(),
            last: None,
        };
        std::mem::replace(self, empty)
    }

    /// The chunks in which any place holds something, with their blocks and numbers, in that order.
    pub(crate) fn into_chunks(self) -> Vec<(u32, u64, Chunk)> {
        let mut keys = vec![(0, 0); self.chunks.len()];
        for (key, number) in self.index {
            keys[number as usize] = key;
        }
        let chunks = keys.into_iter().zip(self.chunks);
        let mut chunks: Vec<_> = chunks
            .filter(|(_, chunk)| chunk.iter().any(|id| *id.as_bytes() != NOTHING))
            .map(|((block, index), chunk)| (block, index, chunk))
            .collect();
        chunks.sort_unstable_by_key(|(block, index, _)| (*block, *index));
        chunks
    }

    /// These places, `count` in a row, hold nothing any more.
    pub(crate) fn clear(&mut self, first: Place, count: u64) {
        let mut place = first;
        let mut left = count;
        while left > 0 {
            let (key, at) = place.split();
            let here = left.min(CHUNK_PAGES - at as u64);
            if let Some(number) = self.chunk(key) {
                self.chunks[number][at..at + here as usize].fill(ShortId::from_bytes(NOTHING));
            }
            place.page = place.page.wrapping_add(here) & PAGE_MASK;
            left -= here;
        }
    }
}

/// The receiver's table. A place may hold a page that is not known yet: a delta whose old page has
/// still to be fetched, in a frame that is not finished.
pub(crate) struct ReceiverPlaces {
    table: Places,
    /// Places of such pages, with a number of each. Empty but after a miss, and never larger than the
    /// frames that wait.
    awaited: HashMap<Place, u64>,
    next: u64,
}

/// What a place of the receiver holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    Known(ShortId),
    /// The contents of a page in an earlier frame (or earlier in this one) that is not known yet.
    Awaited,
}

/// A page whose id the table is still to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Awaited {
    pub(crate) place: Place,
    number: u64,
}

impl ReceiverPlaces {
    pub(crate) fn new(max_places: u64) -> Self {
        Self {
            table: Places::new(max_places),
            awaited: HashMap::new(),
            next: 0,
        }
    }

    pub(crate) fn get(&mut self, place: Place) -> Option<Held> {
        if !self.awaited.is_empty() && self.awaited.contains_key(&place) {
            return Some(Held::Awaited);
        }
        self.table.get(place).map(Held::Known)
    }

    pub(crate) fn set(&mut self, place: Place, id: ShortId) {
        if !self.awaited.is_empty() {
            self.awaited.remove(&place);
        }
        self.table.set(place, id);
    }

    pub(crate) fn clear(&mut self, first: Place, count: u64) {
        if count < self.awaited.len() as u64 {
            for ahead in 0..count {
                let page = first.page.wrapping_add(ahead) & PAGE_MASK;
                self.awaited.remove(&Place { page, ..first });
            }
        } else {
            self.awaited.retain(|place, _| {
                let ahead = place.page.wrapping_sub(first.page) & PAGE_MASK;
                place.block != first.block || ahead >= count
            });
        }
        self.table.clear(first, count);
    }

    /// The place holds a page that is not known yet: give its id to [`resolve`](Self::resolve).
    pub(crate) fn set_awaited(&mut self, place: Place) -> Awaited {
        // The sender's table has a chunk for it now, so another may not fit in there later.
        self.table.chunk_to_set(place.split().0);
        let number = self.next;
        self.next += 1;
        self.awaited.insert(place, number);
        Awaited { place, number }
    }

    /// See [`Places::fill`]. A place of an awaited page holds that.
    pub(crate) fn fill(&mut self, manifest: &Manifest, names: &[Box<[u8]>]) {
        self.table.fill(manifest, names);
    }

    /// See [`Places::take`].
    pub(crate) fn take(&mut self) -> Places {
        self.table.take()
    }

    /// An awaited page is known; its place gets the id unless it holds something else by now.
    pub(crate) fn resolve(&mut self, awaited: Awaited, id: ShortId) {
        if self.awaited.get(&awaited.place) == Some(&awaited.number) {
            self.awaited.remove(&awaited.place);
            self.table.set(awaited.place, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap as Model;

    use proptest::prelude::*;

    use super::*;

    fn id(n: u64) -> ShortId {
        let mut bytes = [0x55; ShortId::SIZE];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        ShortId::from_bytes(bytes)
    }

    fn at(block: u32, page: u64) -> Place {
        Place { block, page }
    }

    #[test]
    fn places_over_the_limit_hold_nothing() {
        let mut places = Places::new(2 * CHUNK_PAGES);
        places.set(at(0, 5), id(1));
        places.set(at(1, 5), id(2));
        places.set(at(0, 5 + CHUNK_PAGES), id(3));
        assert_eq!(places.get(at(0, 5)), Some(id(1)));
        assert_eq!(places.get(at(1, 5)), Some(id(2)));
        assert_eq!(places.get(at(0, 5 + CHUNK_PAGES)), None);
        // A chunk that exists takes all of its places.
        places.set(at(0, 6), id(4));
        assert_eq!(places.get(at(0, 6)), Some(id(4)));
        assert_eq!(places.chunks.len(), 2);
    }

    #[test]
    fn zero_pages_take_no_memory_and_page_numbers_wrap() {
        let mut places = Places::new(DEFAULT_MAX_PLACES);
        places.clear(at(0, 3), 1 << 22);
        assert!(places.chunks.is_empty());
        places.set(at(0, PAGE_MASK), id(1));
        places.set(at(0, 0), id(2));
        places.set(at(0, 1), id(3));
        places.clear(at(0, PAGE_MASK), 2);
        assert_eq!(places.get(at(0, PAGE_MASK)), None);
        assert_eq!(places.get(at(0, 0)), None);
        assert_eq!(places.get(at(0, 1)), Some(id(3)));
    }

    #[test]
    fn the_table_takes_four_mebibytes_per_gibibyte_of_guest() {
        let pages = (1_u64 << 30) / PAGE_SIZE as u64;
        let mut places = Places::new(DEFAULT_MAX_PLACES);
        for page in 0..pages {
            places.set(at(0, page), id(page));
        }
        let bytes = places.chunks.len() * size_of::<[ShortId; CHUNK_PAGES as usize]>();
        assert_eq!(bytes, 4 << 20);
    }

    #[test]
    fn an_awaited_page_is_entered_when_it_is_known_and_still_there() {
        let mut places = ReceiverPlaces::new(DEFAULT_MAX_PLACES);
        places.set(at(0, 1), id(1));
        let first = places.set_awaited(at(0, 1));
        assert_eq!(places.get(at(0, 1)), Some(Held::Awaited));
        let second = places.set_awaited(at(0, 1));
        places.resolve(first, id(2));
        assert_eq!(places.get(at(0, 1)), Some(Held::Awaited));
        places.resolve(second, id(3));
        assert_eq!(places.get(at(0, 1)), Some(Held::Known(id(3))));
        let third = places.set_awaited(at(0, 1));
        places.set(at(0, 1), id(4));
        places.resolve(third, id(5));
        assert_eq!(places.get(at(0, 1)), Some(Held::Known(id(4))));
        let fourth = places.set_awaited(at(0, 1));
        places.clear(at(0, 0), 2);
        places.resolve(fourth, id(6));
        assert_eq!(places.get(at(0, 1)), None);
    }

    #[test]
    fn awaited_pages_are_cleared_in_runs_of_any_length() {
        for count in [1, 3, 100] {
            let mut places = ReceiverPlaces::new(DEFAULT_MAX_PLACES);
            for page in 0..10 {
                places.set_awaited(at(0, page));
            }
            places.clear(at(1, 0), 100);
            places.clear(at(0, 4), count);
            for page in 0..10 {
                let cleared = (4..4 + count).contains(&page);
                assert_eq!(places.get(at(0, page)).is_none(), cleared, "{page}");
            }
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(
            operations in prop::collection::vec((0..3_u8, 0..2_u32, 0..2000_u64, 1..1500_u64), 1..100),
        ) {
            let mut places = Places::new(DEFAULT_MAX_PLACES);
            let mut model = Model::new();
            for (operation, block, page, n) in operations {
                match operation {
                    0 => {
                        places.set(at(block, page), id(n));
                        model.insert((block, page), n);
                    }
                    1 => {
                        places.clear(at(block, page), n);
                        model.retain(|key, _| key.0 != block || key.1 < page || key.1 >= page + n);
                    }
                    _ => {
                        let held = model.get(&(block, page)).map(|n| id(*n));
                        prop_assert_eq!(places.get(at(block, page)), held);
                    }
                }
            }
        }
    }
}
