//! Which pages of a guest are like one another.
//!
//! Much of a guest's memory is a copy with changes of another part: a file's page in the page cache
//! and in a program that has altered it, the pages of a forked process, a database's buffers. Such a
//! page is found by a few small blocks that it shares with another one at the same offsets, and then
//! goes as a delta from that (`docs/adr/0012-similar-pages.md`).
//!
//! Only the sender looks; the receiver is told the place of the other page.

use crate::page::PAGE_SIZE;
use crate::places::Place;

/// Where in a page the blocks are that are looked at. Not at its start or end, where many pages have
/// the same headers and the same zeroes.
const BLOCKS_AT: [usize; 4] = [448, 1472, 2496, 3520];
const BLOCK: usize = 64;
const WORD: usize = 8;

/// As many blocks in common make a page a candidate. One is often by chance: in a table that is full,
/// each slot names some page.
const IN_COMMON: usize = 2;

/// Slots for each page of RAM: most guests have many pages that are zero or that occur twice.
const SLOTS_PER_PAGE: u64 = 2;
const SLOT_BYTES: u64 = 4;
/// 256 KiB: enough for any guest of 128 MiB.
const MIN_SLOTS: u64 = 1 << 16;

/// Multipliers of the hash: odd, with about as many ones as zeroes.
const MIX: u64 = 0xff51_afd7_ed55_8ccd;
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// What is looked up of a page: a hash of each block, none for a block that repeats one word.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Features([Option<u64>; BLOCKS_AT.len()]);

impl Features {
    /// Those of the contents of a place. Pages of different blocks of RAM have nothing in common.
    pub(crate) fn of(place: Place, page: &[u8; PAGE_SIZE]) -> Self {
        let mut number = u64::from(place.block) * BLOCKS_AT.len() as u64;
        Self(BLOCKS_AT.map(|at| {
            number += 1;
            hash(&page[at..at + BLOCK], number)
        }))
    }
}

/// `None` when all words are the same.
fn hash(block: &[u8], number: u64) -> Option<u64> {
    let words = block.as_chunks::<WORD>().0;
    let mut hash = number;
    let mut differ = 0;
    for word in words {
        let value = u64::from_le_bytes(*word);
        differ |= value ^ u64::from_le_bytes(words[0]);
        hash = (hash ^ value).wrapping_mul(MIX);
        hash ^= hash >> 32;
    }
    (differ != 0).then_some(hash.wrapping_mul(SPREAD))
}

/// A table from features to the page that had each last, 4 bytes a slot.
#[derive(Debug)]
pub(crate) struct SimilarPages {
    /// Page numbers, plus one; 0 for none. Empty before the first page, and where there is no room.
    slots: Vec<u32>,
    /// Those of the frame being made: the peer has them when that is done, and till then what is in
    /// their slots is of more use.
    waiting: Vec<(Features, u32)>,
    max_bytes: u64,
}

impl SimilarPages {
    /// A table of at most `max_bytes`.
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self {
            slots: Vec::new(),
            waiting: Vec::new(),
            max_bytes,
        }
    }

    /// Makes the table, for a guest with so many bytes of RAM, if there is none.
    pub(crate) fn prepare(&mut self, ram_bytes: u64) {
        let most = self.max_bytes / SLOT_BYTES;
        if !self.slots.is_empty() || most < MIN_SLOTS {
            return;
        }
        let wanted = ram_bytes / PAGE_SIZE as u64 * SLOTS_PER_PAGE;
        let wanted = wanted.clamp(MIN_SLOTS, most).next_power_of_two();
        let slots = if wanted > most { wanted / 2 } else { wanted };
        self.slots = vec![0; slots as usize];
    }

    fn slot(&self, hash: u64) -> usize {
        // A power of two, and at least two.
        (hash >> (u64::BITS - self.slots.len().trailing_zeros())) as usize
    }

    /// The page of the same block of RAM that had enough of these features.
    pub(crate) fn find(&self, features: &Features) -> Option<u64> {
        if self.slots.is_empty() {
            return None;
        }
        let found = features
            .0
            .map(|hash| hash.map_or(0, |hash| self.slots[self.slot(hash)]));
        let votes = |page: u32| found.iter().filter(|&&other| other == page).count();
        let best = found
            .into_iter()
            .max_by_key(|&page| (page != 0, votes(page)))?;
        (best != 0 && votes(best) >= IN_COMMON).then(|| u64::from(best) - 1)
    }

    /// The place has these features, to be found once they have been [entered](Self::enter).
    pub(crate) fn note(&mut self, features: &Features, place: Place) {
        let Some(page) = u32::try_from(place.page)
            .ok()
            .and_then(|page| page.checked_add(1))
        else {
            return;
        };
        if !self.slots.is_empty() {
            self.waiting.push((*features, page));
        }
    }

    /// The frame is made.
    pub(crate) fn enter(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        for (features, page) in waiting.drain(..) {
            for hash in features.0.into_iter().flatten() {
                let slot = self.slot(hash);
                self.slots[slot] = page;
            }
        }
        self.waiting = waiting;
    }
}

/// One old page in so many may be forgotten, or a few in all: one that the peer has to ask for costs about
/// as much as three similar pages save.
const MOST_FORGOTTEN: u64 = 8;
const FEW_FORGOTTEN: u64 = 64;
/// New pages after which half of what was is left out of account: what a peer forgot a while ago says
/// little of what it forgets now.
const HALF_LIFE: u32 = 1 << 15;

/// Whether the peer still has what similar pages are built on.
#[derive(Debug, Default)]
pub(crate) struct Reliance {
    /// Pages sent as similar to others, and the old ones that the peer turned out to have forgotten.
    sent: u64,
    forgotten: u64,
    /// How many those were in all, when last heard.
    heard: u64,
    new_pages: u32,
}

impl Reliance {
    /// Whether another page may go so.
    pub(crate) fn is_justified(&self) -> bool {
        self.forgotten <= FEW_FORGOTTEN.max(self.sent / MOST_FORGOTTEN)
    }

    pub(crate) fn on_sent(&mut self) {
        self.sent += 1;
    }

    /// So many were forgotten, in all.
    pub(crate) fn on_forgotten(&mut self, in_all: u64) {
        self.forgotten += in_all.saturating_sub(self.heard);
        self.heard = in_all;
    }

    /// A page that the peer does not hold, however it goes.
    pub(crate) fn on_new_page(&mut self) {
        self.new_pages += 1;
        if self.new_pages == HALF_LIFE {
            *self = Self {
                sent: self.sent / 2,
                forgotten: self.forgotten / 2,
                new_pages: 0,
                ..*self
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(block: u32, page: u64) -> Place {
        Place { block, page }
    }

    /// A page in which every word is another.
    fn page(seed: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        for (n, word) in page.as_chunks_mut::<WORD>().0.iter_mut().enumerate() {
            *word = (seed << 32 | n as u64).wrapping_mul(SPREAD).to_le_bytes();
        }
        page
    }

    fn table() -> SimilarPages {
        let mut table = SimilarPages::new(1 << 20);
        table.prepare(64 << 20);
        table
    }

    fn note(table: &mut SimilarPages, place: Place, page: &[u8; PAGE_SIZE]) {
        table.note(&Features::of(place, page), place);
        table.enter();
    }

    #[test]
    fn a_page_with_changes_is_found_and_a_stranger_is_not() {
        let mut table = table();
        note(&mut table, at(0, 7), &page(1));
        let find = |page: &[u8; PAGE_SIZE]| table.find(&Features::of(at(0, 9), page));
        assert_eq!(find(&page(1)), Some(7));
        let mut changed = page(1);
        changed[..1500].fill(1);
        assert_eq!(find(&changed), Some(7));
        // Two blocks differ, then three.
        changed[2500] ^= 1;
        assert_eq!(find(&changed), None);
        assert_eq!(find(&page(2)), None);
        assert_eq!(table.find(&Features::of(at(1, 9), &page(1))), None);
    }

    #[test]
    fn the_page_that_has_most_in_common_is_taken() {
        let mut table = table();
        note(&mut table, at(0, 1), &page(1));
        let mut mixed = page(1);
        mixed[2000..].copy_from_slice(&page(2)[2000..]);
        note(&mut table, at(0, 2), &mixed);
        let find = |page: &[u8; PAGE_SIZE]| table.find(&Features::of(at(0, 9), page));
        assert_eq!(find(&page(2)), Some(2));
        assert_eq!(find(&mixed), Some(2));
        // The other one's blocks, which the mixed page has not taken over, are too few.
        let mut one = page(3);
        one[..3000].copy_from_slice(&page(1)[..3000]);
        assert_eq!(find(&one), Some(2));
    }

    #[test]
    fn pages_of_the_frame_being_made_hide_none() {
        let mut table = table();
        note(&mut table, at(0, 1), &page(1));
        let features = Features::of(at(0, 2), &page(1));
        table.note(&features, at(0, 2));
        assert_eq!(table.find(&features), Some(1));
        table.enter();
        assert_eq!(table.find(&features), Some(2));
    }

    #[test]
    fn a_peer_that_forgot_is_relied_on_again_after_a_while() {
        let mut reliance = Reliance::default();
        reliance.on_forgotten(FEW_FORGOTTEN);
        assert!(reliance.is_justified());
        reliance.on_forgotten(FEW_FORGOTTEN + 1);
        assert!(!reliance.is_justified());
        // One in eight is as good as it gets, however many they are.
        (0..MOST_FORGOTTEN * 1000).for_each(|_| reliance.on_sent());
        reliance.on_forgotten(1000);
        assert!(reliance.is_justified());
        reliance.on_forgotten(1001);
        assert!(!reliance.is_justified());
        (0..HALF_LIFE * 5).for_each(|_| reliance.on_new_page());
        assert!(reliance.is_justified());
    }

    #[test]
    fn blocks_of_one_word_say_nothing() {
        let mut table = table();
        let mut sparse = [0; PAGE_SIZE];
        sparse[0] = 1;
        note(&mut table, at(0, 1), &sparse);
        note(&mut table, at(0, 2), &[0x55; PAGE_SIZE]);
        assert!(table.slots.iter().all(|&slot| slot == 0));
        sparse[0] = 2;
        assert_eq!(table.find(&Features::of(at(0, 3), &sparse)), None);
    }

    #[test]
    fn the_table_is_as_large_as_the_guest_and_never_larger_than_allowed() {
        let slots = |max_bytes, ram| {
            let mut table = SimilarPages::new(max_bytes);
            table.prepare(ram);
            table.slots.len()
        };
        assert_eq!(slots(8 << 20, 1 << 30), 1 << 19);
        assert_eq!(slots(8 << 20, 3 << 29), 1 << 20);
        assert_eq!(slots(8 << 20, u64::MAX), 1 << 21);
        assert_eq!(slots((8 << 20) - 1, u64::MAX), 1 << 20);
        assert_eq!(slots(8 << 20, 0), 1 << 16);
        assert_eq!(slots((1 << 18) - 1, 1 << 30), 0);
        // Without a table nothing is found, and nothing is wrong.
        let mut none = SimilarPages::new(0);
        none.prepare(1 << 30);
        note(&mut none, at(0, 1), &page(1));
        assert_eq!(none.find(&Features::of(at(0, 2), &page(1))), None);
    }

    #[test]
    fn page_numbers_beyond_32_bits_are_left_out() {
        let mut table = table();
        for beyond in [u64::from(u32::MAX), 1 << 40] {
            note(&mut table, at(0, beyond), &page(1));
        }
        assert_eq!(table.find(&Features::of(at(0, 9), &page(1))), None);
        let last = u64::from(u32::MAX) - 1;
        note(&mut table, at(0, last), &page(1));
        assert_eq!(table.find(&Features::of(at(0, 9), &page(1))), Some(last));
    }
}
