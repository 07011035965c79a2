//! What lies where: for peers that are to know what this store holds, and for reading runs of pages.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::live::{Phase, Segment};
use super::{DiskStore, Inner, lock};
use crate::announce::{SegmentSource, SegmentState};
use crate::page::{DomainId, PAGE_SIZE, ShortId};

/// Segments whose ids are kept after they were read from a file: 256 KiB each. The pages of a guest lie in
/// as many as there were when it was stored, and peers name them in any order.
const MAX_CACHED: usize = 32;

/// A segment has proved to be of use when one in so many of its pages was used lately.
const USED_SHARE: u32 = 8;

/// A segment as others may know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Its number, never used for another segment in the life of the store.
    pub number: u32,
    /// Records in it, the first of which is number 0.
    pub records: u32,
    /// Whether it is complete. Otherwise records may be added at its end.
    pub sealed: bool,
}

/// The segments of one domain, to be announced.
#[derive(Debug, Clone, Copy)]
pub struct DomainFeed<'a> {
    store: &'a DiskStore,
    domain: DomainId,
}

impl SegmentSource for DomainFeed<'_> {
    fn segments(&self, out: &mut Vec<SegmentState>) {
        let segments = self.store.segments(&self.domain).into_iter();
        out.extend(segments.map(|segment| SegmentState {
            segment: segment.number,
            records: segment.records,
        }));
    }

    fn ids(&self, segment: u32, from: u32, most: usize, out: &mut Vec<ShortId>) {
        self.store.segment_ids(segment, from, most, out);
    }
}

/// Ids of the segments read last.
#[derive(Default)]
pub(super) struct IdCache(VecDeque<(u32, Arc<Vec<ShortId>>)>);

impl DiskStore {
    /// A number that grows whenever a segment is made, filled, sealed or deleted. Its steps mean
    /// nothing.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.inner.changes.load(Ordering::Relaxed)
    }

    /// What is to be announced of `domain`.
    #[must_use]
    pub fn feed(&self, domain: DomainId) -> DomainFeed<'_> {
        DomainFeed {
            store: self,
            domain,
        }
    }

    /// Appends the segments of `domains` that are worth most to a peer with room for so many pages and
    /// segments: those that have proved to be of use, then those that have not been there long. What many
    /// guests share is used by all of them, and older than most.
    pub fn most_useful(
        &self,
        domains: &[DomainId],
        most_pages: u64,
        most_segments: usize,
        out: &mut Vec<SegmentState>,
    ) {
        let mut ranked: Vec<(bool, SegmentState)> = {
            let segments = self.inner.segments();
            let mine = segments
                .iter()
                .filter(|segment| domains.contains(&segment.domain));
            mine.map(|segment| {
                let records = segment.records();
                let used = segment.used() >= (records / USED_SHARE).max(1);
                let state = SegmentState {
                    segment: segment.number,
                    records,
                };
                (used || segment.is_protected(), state)
            })
            .collect()
        };
        ranked.sort_unstable_by_key(|(used, state)| std::cmp::Reverse((*used, state.segment)));
        let mut room = most_pages;
        let fitting = ranked
            .into_iter()
            .take(most_segments)
            .map_while(|(_, state)| {
                room = room.checked_sub(u64::from(state.records))?;
                Some(state)
            });
        out.extend(fitting);
    }

    /// The segments of `domain`, in the order of their numbers.
    #[must_use]
    pub fn segments(&self, domain: &DomainId) -> Vec<SegmentInfo> {
        let segments = self.inner.segments();
        let of_domain = segments.iter().filter(|segment| segment.domain == *domain);
        of_domain
            .map(|segment| SegmentInfo {
                number: segment.number,
                records: segment.records(),
                sealed: matches!(segment.phase(), Phase::Sealed | Phase::Cut),
            })
            .collect()
    }

    /// Appends the ids of at most `most` records of a segment from record `from` on, in order. None if
    /// the segment is gone or cannot be read. Records may be among them that the store has since
    /// forgotten or moved.
    pub fn segment_ids(&self, number: u32, from: u32, most: usize, out: &mut Vec<ShortId>) {
        let Some(segment) = self.inner.segments().numbered(number).cloned() else {
            return;
        };
        if segment.open_ids(from as usize, most, out) {
            return;
        }
        let Ok(ids) = self.inner.ids_of(&segment) else {
            return;
        };
        let from = ids.get(from as usize..).unwrap_or_default();
        out.extend(&from[..from.len().min(most)]);
    }

    /// Reads `count` records of segment `number` from record `from` on, in order, and gives each with
    /// its id to `take`. Returns how many it gave: fewer, if the run leaves the segment or a record
    /// cannot be read.
    pub fn read_run(
        &self,
        number: u32,
        from: u32,
        count: u32,
        mut take: impl FnMut(&ShortId, &[u8]),
    ) -> u32 {
        let inner = &self.inner;
        let Some(segment) = inner.segments().numbered(number).cloned() else {
            return 0;
        };
        let Ok(ids) = inner.ids_of(&segment) else {
            return 0;
        };
        let run = ids.get(from as usize..).unwrap_or_default();
        let mut page = [0; PAGE_SIZE];
        let (mut given, now) = (0, Some(inner.now()));
        for (record, id) in (from..).zip(run.iter().take(count as usize)) {
            // Numbers of records have 16 bits, see `MAX_RECORDS`.
            let record = record as u16;
            let Ok(length) = inner.read_record(&segment, record, id, now, &mut page) else {
                break;
            };
            take(id, &page[..length]);
            given += 1;
        }
        super::count(&inner.counters.hits, u64::from(given));
        given
    }

    /// One record of segment `number`: its id, and the length of what is copied to `out`.
    #[must_use]
    pub fn record(
        &self,
        number: u32,
        record: u32,
        out: &mut [u8; PAGE_SIZE],
    ) -> Option<(ShortId, usize)> {
        let mut found = None;
        self.read_run(number, record, 1, |id, contents| {
            out[..contents.len()].copy_from_slice(contents);
            found = Some((*id, contents.len()));
        });
        found
    }
}

impl Inner {
    /// The ids of a segment, which are read from its file only if it is not one of the last.
    fn ids_of(&self, segment: &Arc<Segment>) -> io::Result<Arc<Vec<ShortId>>> {
        let number = segment.number;
        let complete = matches!(segment.phase(), Phase::Sealed | Phase::Cut);
        if complete {
            let cache = lock(&self.ids);
            if let Some((_, ids)) = cache.0.iter().find(|(cached, _)| *cached == number) {
                return Ok(ids.clone());
            }
        }
        let ids = Arc::new(segment.ids(&self.files)?);
        if complete {
            let mut cache = lock(&self.ids);
            cache.0.truncate(MAX_CACHED - 1);
            cache.0.push_front((number, ids.clone()));
        }
        Ok(ids)
    }
}
