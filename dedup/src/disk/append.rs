//! Putting contents into a store: which segment they go to, and whether there is room.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::crypt::random;
use super::index::{Location, MAX_SEGMENTS};
use super::live::{Appended, Segment};
use super::segment::Header;
use super::superblock::SUPERBLOCK_SIZE;
use super::writer::Job;
use super::{Inner, count, lock};
use crate::page::{DomainId, PAGE_SIZE, ShortId};

/// Open segments at a time, at most.
const MAX_OPEN: u64 = 64;

/// Numbers of segments that are taken with one write of the superblock.
pub(super) const NUMBERS_AT_ONCE: u32 = 1024;

/// Copies may take this share of what was put, in percent: with it everything written stays below 1.3
/// of it, also where contents are as short as the chunks of streams.
const COPY_PERCENT: u64 = 23;

/// Buffers of chunks kept for their next use.
const MAX_SPARE: usize = 4;

/// Pause of a caller that waits for files to be deleted.
const ROOM_PAUSE: Duration = Duration::from_millis(5);

/// What became of contents that were put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    /// The store has them already.
    Known,
    /// They were added.
    New,
    /// Neither memory nor files have room at this moment.
    NoRoom,
    /// The disk refuses to be written to.
    Failing,
}

/// What is being filled, and the space that everything takes.
pub(super) struct Appender {
    open: HashMap<Place, OpenSegment>,
    /// Counts appends, to tell which open segment has waited longest.
    stamp: u64,
    /// Bytes of the files that are not open or closing any more, of the superblock and of the uses.
    settled: u64,
    /// What the file of uses has of them.
    of_uses: u64,
    /// Segments that are open or closing; each may grow to its full size.
    growing: u64,
    pub(super) next_number: u32,
    /// Numbers below this one may be used, by what the superblock says.
    pub(super) numbers_end: u32,
    /// Bytes that may still be copied when segments are evicted.
    copy_credit: u64,
    pub(super) spare: Vec<Vec<u8>>,
    segment_bytes: u64,
    capacity: u64,
}

/// Which open segment a record goes to: whose it is, and whether it has proved to be of use.
type Place = (DomainId, bool);

fn place_of(segment: &Segment) -> Place {
    (segment.domain, segment.is_protected())
}

struct OpenSegment {
    segment: Arc<Segment>,
    stamp: u64,
}

impl Appender {
    /// `settled` are the bytes of the segments that were found, `of_uses` those of the file of uses.
    pub(super) fn new(
        settled: u64,
        of_uses: u64,
        numbers: (u32, u32),
        segment_bytes: u64,
        capacity: u64,
    ) -> Self {
        Self {
            open: HashMap::new(),
            stamp: 0,
            // The superblock is replaced by a second one beside it.
            settled: settled + of_uses + 2 * SUPERBLOCK_SIZE as u64,
            of_uses,
            growing: 0,
            next_number: numbers.0,
            numbers_end: numbers.1,
            copy_credit: 0,
            spare: Vec::new(),
            segment_bytes,
            capacity,
        }
    }

    /// Whether so many more segments fit.
    pub(super) fn has_room(&self, segments: u64) -> bool {
        self.settled + (self.growing + segments) * self.segment_bytes <= self.capacity
    }

    /// Whether `bytes` more find room: in another segment, or in any of those that are open.
    pub(super) fn has_room_for(&self, bytes: usize) -> bool {
        let fits = |open: &OpenSegment| open.segment.size() + bytes as u64 <= self.segment_bytes;
        self.has_room(1) || !self.open.is_empty() && self.open.values().all(fits)
    }

    /// Bytes that the files take, or will take when what is in memory is written.
    pub(super) fn bytes_on_disk(&self) -> u64 {
        let open = self.open.values().map(|open| open.segment.size());
        // Closing segments are full, near enough.
        let closing = self.growing - self.open.len() as u64;
        self.settled + open.sum::<u64>() + closing * self.segment_bytes
    }

    pub(super) fn open(&self) -> impl Iterator<Item = &Arc<Segment>> {
        self.open.values().map(|open| &open.segment)
    }

    /// `segment` grows no more: it has `size` bytes.
    pub(super) fn settle(&mut self, segment: &Segment, size: u64) {
        let same = |open: &OpenSegment| open.segment.number == segment.number;
        let place = place_of(segment);
        if self.open.get(&place).is_some_and(same) {
            self.open.remove(&place);
        }
        self.growing -= 1;
        self.settled += size;
    }

    /// Takes `bytes` for the file of uses that is to replace the one before, if they are there.
    pub(super) fn take_for_uses(&mut self, bytes: u64) -> bool {
        let taken = self.settled + self.growing * self.segment_bytes;
        let fits = taken + bytes <= self.capacity;
        self.settled += if fits { bytes } else { 0 };
        fits
    }

    /// Of the bytes `taken` for the new file of uses so many are needed, and the old file is gone;
    /// `None`: there is no new one.
    pub(super) fn uses_written(&mut self, taken: u64, needed: Option<u64>) {
        self.settled -= taken;
        if let Some(needed) = needed {
            self.settled = self.settled - self.of_uses + needed;
            self.of_uses = needed;
        }
    }

    /// A file of `size` bytes is gone.
    pub(super) fn freed(&mut self, size: u64) {
        self.settled -= size;
    }

    /// Takes `bytes` from what may be copied, if there is so much.
    pub(super) fn spend_credit(&mut self, bytes: u64) -> bool {
        let left = self.copy_credit.checked_sub(bytes);
        self.copy_credit = left.unwrap_or(self.copy_credit);
        left.is_some()
    }

    fn earn_credit(&mut self, bytes: u64) {
        self.copy_credit =
            (self.copy_credit + bytes * COPY_PERCENT / 100).min(4 * self.segment_bytes);
    }

    /// Keeps a chunk's buffer for later.
    pub(super) fn recycle(&mut self, contents: Arc<Vec<u8>>) {
        if self.spare.len() < MAX_SPARE
            && let Ok(mut buffer) = Arc::try_unwrap(contents)
        {
            buffer.clear();
            self.spare.push(buffer);
        }
    }
}

/// Where contents come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// A caller.
    Put,
    /// The segment at this location, which is about to go.
    Copy { from: Location, uses: u16 },
}

impl Inner {
    pub(super) fn put(&self, domain: &DomainId, id: &ShortId, contents: &[u8]) {
        if contents.is_empty() || contents.len() > PAGE_SIZE {
            return;
        }
        if let Put::NoRoom | Put::Failing = self.try_put(domain, id, contents) {
            count(&self.counters.dropped_puts, 1);
        }
    }

    /// Puts a page, for at most `limit` waiting for the disk.
    pub(super) fn put_waiting(
        &self,
        domain: &DomainId,
        id: &ShortId,
        page: &[u8; PAGE_SIZE],
        limit: Duration,
    ) -> Put {
        let end = Instant::now() + limit;
        loop {
            let put = self.try_put(domain, id, page);
            let left = end.saturating_duration_since(Instant::now());
            if put != Put::NoRoom || left.is_zero() || !self.wait_for_room(left) {
                return put;
            }
            // There may be memory and no room in the files: the writer is making it.
            std::thread::sleep(ROOM_PAUSE.min(left));
        }
    }

    fn try_put(&self, domain: &DomainId, id: &ShortId, contents: &[u8]) -> Put {
        if let Some(location) = self.index.find(id) {
            if let Some(segment) = self.segment(location.slot) {
                segment.touch(location.record, self.now());
            }
            return Put::Known;
        }
        let full = self.pending_bytes() + contents.len() > self.limits.pending_bytes;
        if full {
            self.hurry();
        }
        if self.degraded.load(Ordering::Relaxed) {
            Put::Failing
        } else if full || !self.append(domain, id, contents, Source::Put) {
            Put::NoRoom
        } else {
            Put::New
        }
    }

    /// Adds a record to the open segment of `domain`; false if there is no room.
    pub(super) fn append(
        &self,
        domain: &DomainId,
        id: &ShortId,
        contents: &[u8],
        source: Source,
    ) -> bool {
        let mut appender = lock(&self.appender);
        let appender = &mut *appender;
        let uses = match source {
            Source::Put if self.index.find(id).is_some() => return true,
            Source::Put => 0,
            Source::Copy { from, .. } if self.index.find(id) != Some(from) => return true,
            Source::Copy { uses, .. } => uses,
        };
        let place = (*domain, matches!(source, Source::Copy { .. }));
        // The first segment may be full; a new one takes any record.
        for _ in 0..2 {
            let Some(segment) = self.open_segment(appender, place) else {
                self.ask_for_room();
                return false;
            };
            match segment.append(id, contents, uses, &self.limits, &mut appender.spare) {
                Appended::At { record, chunk_full } => {
                    self.pending.fetch_add(contents.len(), Ordering::Relaxed);
                    let slot = segment.slot;
                    self.index.insert(id, Location { slot, record });
                    if chunk_full {
                        self.enqueue(Job::Write(segment));
                    }
                    if let Source::Put = source {
                        appender.earn_credit(contents.len() as u64);
                        count(&self.counters.insertions, 1);
                        count(&self.counters.put_bytes, contents.len() as u64);
                    }
                    self.changes.fetch_add(1, Ordering::Relaxed);
                    return true;
                }
                Appended::Full => self.close(appender, &segment),
            }
        }
        false
    }

    /// Hands what is left of an open segment to the writer, which seals it.
    pub(super) fn close(&self, appender: &mut Appender, segment: &Arc<Segment>) {
        appender.open.remove(&place_of(segment));
        let write = segment.complete_chunk();
        segment.close();
        if write {
            self.enqueue(Job::Write(segment.clone()));
        }
        self.enqueue(Job::Seal(segment.clone()));
    }

    /// The open segment for `place`; a new one if it has none and there is room.
    fn open_segment(&self, appender: &mut Appender, place: Place) -> Option<Arc<Segment>> {
        appender.stamp += 1;
        let stamp = appender.stamp;
        if let Some(open) = appender.open.get_mut(&place) {
            open.stamp = stamp;
            return Some(open.segment.clone());
        }
        let most = (appender.capacity / appender.segment_bytes / 4).clamp(1, MAX_OPEN);
        if appender.open.len() as u64 >= most {
            let oldest = appender.open.values().min_by_key(|open| open.stamp);
            if let Some(oldest) = oldest.map(|open| open.segment.clone()) {
                self.close(appender, &oldest);
            }
        }
        if !appender.has_room(1) || appender.next_number >= appender.numbers_end {
            return None;
        }
        let header = Header {
            number: appender.next_number,
            store: self.superblock.id,
            domain: place.0,
            salt: random().ok()?,
            created: self.now(),
            protected: place.1,
        };
        let folder: &Path = &self.options.folder;
        let mut segments = self.segments_mut();
        let slot = segments.vacant();
        if slot as usize >= MAX_SEGMENTS {
            return None;
        }
        let segment = Segment::new(folder, slot, &header, header.write(&self.key));
        let segment = Arc::new(segment);
        segments.insert(segment.clone());
        drop(segments);
        appender.next_number += 1;
        appender.growing += 1;
        let open = OpenSegment {
            segment: segment.clone(),
            stamp,
        };
        appender.open.insert(place, open);
        Some(segment)
    }
}
