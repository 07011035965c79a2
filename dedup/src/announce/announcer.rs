//! The announcing side: compares what the store has with what the peer was told.

use std::collections::BTreeMap;

use super::message::{MAX_ITEM, MAX_PAGES_HEAD, write_dropped, write_pages_head, write_store};
use super::{PREFIX_SIZE, StoreId};
use crate::page::ShortId;

/// How far a segment is known, or how far it is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentState {
    /// Number of the segment, never used for another one in the life of the store.
    pub segment: u32,
    /// Records in it.
    pub records: u32,
}

/// The segments of a store that are to be announced.
pub trait SegmentSource {
    /// Appends the segments that there are, each with the records that it has by now.
    fn segments(&self, out: &mut Vec<SegmentState>);

    /// Appends the ids of records `from` on, `most` at a time, in order. None, when the segment is
    /// gone.
    fn ids(&self, segment: u32, from: u32, most: usize, out: &mut Vec<ShortId>);
}

/// What one peer has been told of one store.
#[derive(Debug)]
pub struct Announcer {
    store: StoreId,
    introduced: bool,
    /// Records told, by segment.
    told: BTreeMap<u32, u32>,
    segments: Vec<SegmentState>,
    ids: Vec<ShortId>,
}

impl Announcer {
    /// Announces `store` to a peer that knows `position`
    /// (see [`Announced::position`](super::Announced::position)).
    #[must_use]
    pub fn new(store: StoreId, position: &(StoreId, Vec<SegmentState>)) -> Self {
        let same = position.0 == store;
        let told = position.1.iter().filter(|_| same);
        Self {
            store,
            introduced: same,
            told: told.map(|state| (state.segment, state.records)).collect(),
            segments: Vec::new(),
            ids: Vec::new(),
        }
    }

    /// Writes the next message of at most `most` bytes (at least 40), which may come out empty.
    /// Returns whether there is more to say. New segments go before old ones: they are likelier to be
    /// of use.
    pub fn next(&mut self, source: &impl SegmentSource, most: usize, out: &mut Vec<u8>) -> bool {
        let end = out.len() + most;
        if !self.introduced {
            write_store(self.store, out);
            self.introduced = true;
        }
        let mut segments = std::mem::take(&mut self.segments);
        segments.clear();
        source.segments(&mut segments);
        segments.sort_unstable_by_key(|state| state.segment);
        let more =
            !self.drop_missing(&segments, end, out) || !self.extend(source, &segments, end, out);
        self.segments = segments;
        more
    }

    /// Tells which segments are gone; false when there was no room for all of them.
    fn drop_missing(&mut self, segments: &[SegmentState], end: usize, out: &mut Vec<u8>) -> bool {
        let mut all = true;
        self.told.retain(|&segment, _| {
            let there = segments
                .binary_search_by_key(&segment, |state| state.segment)
                .is_ok();
            if there {
                return true;
            }
            if out.len() + MAX_ITEM > end {
                all = false;
                return true;
            }
            write_dropped(segment, out);
            false
        });
        all
    }

    /// Tells of pages that the peer does not know; false when there was no room for all of them.
    fn extend(
        &mut self,
        source: &impl SegmentSource,
        segments: &[SegmentState],
        end: usize,
        out: &mut Vec<u8>,
    ) -> bool {
        for state in segments.iter().rev() {
            let told = self.told.get(&state.segment).copied().unwrap_or(0);
            if told >= state.records {
                continue;
            }
            let room = end.saturating_sub(out.len() + MAX_PAGES_HEAD) / PREFIX_SIZE;
            let most = room.min((state.records - told) as usize);
            if most == 0 {
                return false;
            }
            self.ids.clear();
            source.ids(state.segment, told, most, &mut self.ids);
            self.ids.truncate(most);
            if self.ids.is_empty() {
                continue;
            }
            write_pages_head(state.segment, told, self.ids.len(), out);
            for id in &self.ids {
                out.extend_from_slice(&id.as_bytes()[..PREFIX_SIZE]);
            }
            self.told
                .insert(state.segment, told + self.ids.len() as u32);
            if self.ids.len() < (state.records - told) as usize {
                return false;
            }
        }
        true
    }
}
