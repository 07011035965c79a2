//! RAM blocks of a channel: the setup list, and the numbers given to the blocks that pages name.

use std::collections::HashMap;

use crate::piece::BlockId;

/// Most RAM blocks of one channel; a guest with hundreds of devices has a few hundred.
///
/// Names are at most 255 bytes long, so all of them stay below 1 MiB.
pub const MAX_BLOCKS: usize = 4096;

/// Place of a block in the setup list.
///
/// QEMU walks the blocks in list order, so a smaller place after a larger one begins a new round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place(u32);

#[derive(Debug)]
struct Block {
    name: Box<[u8]>,
    /// Bytes of guest memory in the block.
    used_length: u64,
    /// Number given at the first page record; `None` until then.
    id: Option<BlockId>,
}

/// All blocks that the setup list named.
#[derive(Debug, Default)]
pub(super) struct BlockTable {
    listed: Vec<Block>,
    by_name: HashMap<Box<[u8]>, Place>,
    /// The block of each id.
    numbered: Vec<Place>,
    /// Length of the largest block.
    largest: u64,
}

impl BlockTable {
    /// Adds a block of the setup list. False when the table is full.
    ///
    /// A name may come again (the list is sent anew when the layout changes); then its length does.
    pub(super) fn list(&mut self, name: &[u8], used_length: u64) -> bool {
        self.largest = self.largest.max(used_length);
        if let Some(place) = self.find(name) {
            if let Some(block) = self.listed.get_mut(place.0 as usize) {
                block.used_length = used_length;
            }
            return true;
        }
        if self.listed.len() >= MAX_BLOCKS {
            return false;
        }
        let Ok(place) = u32::try_from(self.listed.len()) else {
            return false;
        };
        self.listed.push(Block {
            name: name.into(),
            used_length,
            id: None,
        });
        self.by_name.insert(name.into(), Place(place));
        true
    }

    pub(super) fn find(&self, name: &[u8]) -> Option<Place> {
        self.by_name.get(name).copied()
    }

    /// Whether a page of `page_size` bytes at `offset` lies inside the block, or, where the block is
    /// not known, inside the largest one.
    pub(super) fn contains(&self, place: Option<Place>, offset: u64, page_size: u64) -> bool {
        let used = place.map_or(self.largest, |place| self.used_length(place));
        offset.checked_add(page_size).is_some_and(|end| end <= used)
    }

    /// Bytes of guest memory in a block.
    pub(super) fn used_length(&self, place: Place) -> u64 {
        self.listed
            .get(place.0 as usize)
            .map_or(0, |block| block.used_length)
    }

    /// The number of a block; a block gets the next one when it is asked for the first time.
    pub(super) fn number(&mut self, place: Place) -> BlockId {
        let next = BlockId(u32::try_from(self.numbered.len()).unwrap_or(u32::MAX));
        match self.listed.get_mut(place.0 as usize) {
            Some(block) => *block.id.get_or_insert_with(|| {
                self.numbered.push(place);
                next
            }),
            None => next,
        }
    }

    pub(super) fn name(&self, id: BlockId) -> Option<&[u8]> {
        let place = self.numbered.get(id.0 as usize)?;
        self.listed.get(place.0 as usize).map(|block| &*block.name)
    }
}
