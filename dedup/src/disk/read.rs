//! Getting contents out of a store.

use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{Advice, fadvise};

use super::crypt::TAG_SIZE;
use super::index::Location;
use super::live::{Found, Segment};
use super::{Inner, count};
use crate::page::{PAGE_SIZE, ShortId};

/// Size of a cache line.
const ALIGN: usize = 64;

/// Room for a sealed record at any place in a cache line.
#[repr(align(64))]
struct Aligned([u8; ALIGN + PAGE_SIZE + TAG_SIZE]);

thread_local! {
    /// Where a thread reads sealed records to: a new one for each read would have to be cleared.
    static SEALED: RefCell<Aligned> = const { RefCell::new(Aligned([0; ALIGN + PAGE_SIZE + TAG_SIZE])) };
}

/// A record could not be read as what it should be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unreadable;

impl Inner {
    pub(super) fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        // A record that was just copied to another segment is found there the second time.
        for _ in 0..2 {
            let Some((location, segment)) = self.locate(id) else {
                break;
            };
            let use_at = Some(self.now());
            if let Ok(length) = self.read_record(&segment, location.record, id, use_at, out) {
                count(&self.counters.hits, 1);
                return Some(length);
            }
            self.read_failed(id, location, &segment);
        }
        count(&self.counters.misses, 1);
        None
    }

    fn locate(&self, id: &ShortId) -> Option<(Location, Arc<Segment>)> {
        let location = self.index.find(id)?;
        Some((location, self.segment(location.slot)?))
    }

    /// Reads one record, which must have been put under `id`. With a time it counts as a use.
    pub(super) fn read_record(
        &self,
        segment: &Arc<Segment>,
        record: u16,
        id: &ShortId,
        use_at: Option<u64>,
        out: &mut [u8; PAGE_SIZE],
    ) -> Result<usize, Unreadable> {
        let (offset, length) = match segment.find(record, use_at, out) {
            Found::Copied(length) => return Ok(length),
            Found::InFile(offset, length) => (offset, length),
            Found::Nothing => return Err(Unreadable),
        };
        let file = segment.file(&self.files).map_err(|_| Unreadable)?;
        // The kernel copies faster when both sides have the same place in a cache line.
        let begin = offset as usize % ALIGN;
        SEALED.with_borrow_mut(|buffer| {
            let sealed = &mut buffer.0[begin..begin + length + TAG_SIZE];
            file.read_exact_at(sealed, offset).map_err(|_| Unreadable)?;
            segment
                .cipher()
                .open_record(u32::from(record), id, sealed, &mut out[..length])
                .map_err(|_| Unreadable)
        })?;
        Ok(length)
    }

    /// What was at `location` could not be read. If it still should be there, it is forgotten.
    fn read_failed(&self, id: &ShortId, location: Location, segment: &Arc<Segment>) {
        let same = |now: Arc<Segment>| Arc::ptr_eq(&now, segment);
        if !self.segment(location.slot).is_some_and(same) || !self.index.remove_at(id, location) {
            return;
        }
        segment.clear_uses(location.record);
        count(&self.counters.read_errors, 1);
        if segment.read_failed() {
            self.ask_for_room();
        }
    }

    pub(super) fn touch(&self, id: &ShortId) {
        if let Some((location, segment)) = self.locate(id) {
            segment.touch(location.record, self.now());
        }
    }

    pub(super) fn remove(&self, id: &ShortId) -> bool {
        let Some(location) = self.index.remove(id) else {
            return false;
        };
        if let Some(segment) = self.segment(location.slot) {
            segment.clear_uses(location.record);
        }
        true
    }

    /// Lets the kernel begin to read the records, in the order in which they lie.
    pub(super) fn prefetch<'a>(&self, ids: impl Iterator<Item = &'a ShortId>) {
        let mut places: Vec<Location> = ids.filter_map(|id| self.index.find(id)).collect();
        places.sort_unstable_by_key(|place| (place.slot, place.record));
        for of_segment in places.chunk_by(|a, b| a.slot == b.slot) {
            let Some(segment) = self.segment(of_segment[0].slot) else {
                continue;
            };
            let mut wanted: Option<(u64, u64)> = None;
            let extents = of_segment.iter().map(|place| segment.extent(place.record));
            for (offset, length) in extents.flatten() {
                let end = offset + length as u64;
                match &mut wanted {
                    // Neighbours are one request.
                    Some((_, until)) if offset <= *until + PAGE_SIZE as u64 => *until = end,
                    _ => {
                        self.will_need(&segment, wanted.replace((offset, end)));
                    }
                }
            }
            self.will_need(&segment, wanted);
        }
    }

    fn will_need(&self, segment: &Arc<Segment>, range: Option<(u64, u64)>) {
        let Some((offset, end)) = range else { return };
        if let Ok(file) = segment.file(&self.files) {
            // Advice: without it the read is slower and nothing else.
            let length = std::num::NonZeroU64::new(end - offset);
            let _ = fadvise(&*file, offset, length, Advice::WillNeed);
        }
    }

    pub(super) fn ask_for_room(&self) {
        super::lock(&self.queue).room_wanted = true;
        self.wake.notify_one();
    }

    pub(super) fn pending_bytes(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }
}
