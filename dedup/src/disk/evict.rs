//! Making room: whole segments go, what is used in them is copied first.
//!
//! New pages are on probation: their segments go in the order in which they came. When one goes, the
//! pages that were used in it are copied to a *protected* segment (or all of it is protected, if most
//! of it was used, which costs no write). So a scan (one huge guest whose pages nobody asks for again)
//! passes through the probation and does not touch what many guests share. Protected segments go only
//! when they hold more than [`PROTECTED_SHARE`] of the store: the one with the fewest used pages first,
//! the oldest among equals. Uses are counted to three and wear off as protected segments go, so what
//! was used long ago makes way, too.
//!
//! What is copied is at most 23 % of what was put (see `append.rs`); used pages beyond that are
//! let go.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::append::Source;
use super::index::Location;
use super::live::{Phase, Segment};
use super::writer::Writer;
use super::{Inner, count, lock};
use crate::page::PAGE_SIZE;

/// Percent of the capacity that protected segments may take.
const PROTECTED_SHARE: u64 = 80;

/// Segments that fit after room was made: one for new pages, one for those that are copied to make
/// room the next time.
const ROOM: u64 = 2;

impl Writer {
    /// Deletes segments until [`ROOM`] is made.
    pub(super) fn make_room(&mut self) {
        let inner = self.inner().clone();
        loop {
            // A disk that refuses to delete would lose one segment after the other.
            if lock(&inner.appender).has_room(ROOM) || inner.degraded.load(Ordering::Relaxed) {
                return;
            }
            match inner.victim() {
                Some(victim) if !victim.is_protected() && is_mostly_used(&victim) => {
                    victim.protect();
                    victim.age();
                }
                Some(victim) => self.evict(&victim, true),
                None if !self.close_one() => return,
                None => {}
            }
        }
    }

    /// Closes the fullest of several open segments; false if there are not several.
    fn close_one(&mut self) -> bool {
        let inner = self.inner().clone();
        let mut appender = lock(&inner.appender);
        let fullest = appender.open().max_by_key(|segment| segment.size());
        let Some(segment) = fullest.cloned() else {
            return false;
        };
        if appender.open().count() < 2 {
            return false;
        }
        inner.close(&mut appender, &segment);
        drop(appender);
        self.drain();
        true
    }

    /// Removes `victim`; what is used in it may be copied within the budget.
    fn evict(&mut self, victim: &Arc<Segment>, copy: bool) {
        let inner = self.inner().clone();
        let slot = victim.slot;
        let size = victim.size();
        match victim.ids(&inner.files) {
            Ok(ids) => {
                let mut page = [0; PAGE_SIZE];
                for (number, id) in ids.iter().enumerate() {
                    let record = number as u16;
                    let from = Location { slot, record };
                    if inner.index.find(id) != Some(from) {
                        continue;
                    }
                    let uses = victim.uses(record);
                    if copy
                        && uses > 0
                        && let Ok(length) = inner.read_record(victim, record, id, None, &mut page)
                        && lock(&inner.appender).spend_credit(length as u64)
                    {
                        let uses = uses - 1;
                        let copied = Source::Copy { from, uses };
                        inner.append(&victim.domain, id, &page[..length], copied);
                        count(&inner.counters.copied, 1);
                        // Copies come faster than callers' pages, whose half of the room they leave.
                        if inner.pending_bytes() > inner.limits.pending_bytes / 2 {
                            self.drain();
                        }
                    }
                    if inner.index.remove_at(id, from) {
                        count(&inner.counters.evictions, 1);
                    }
                }
            }
            Err(_) => {
                count(&inner.counters.read_errors, 1);
                let removed = inner.index.remove_segment(slot);
                count(&inner.counters.evictions, removed as u64);
            }
        }
        self.delete(victim, size);
    }

    /// Removes what nobody used for longer than the time to live.
    pub(super) fn expire(&mut self) {
        let inner = self.inner().clone();
        let Some(ttl) = inner.options.ttl else {
            return;
        };
        let now = inner.now();
        let old = |segment: &&Arc<Segment>| segment.last_used().saturating_add(ttl.as_secs()) < now;
        let mut appender = lock(&inner.appender);
        let open: Vec<_> = appender.open().filter(old).cloned().collect();
        for segment in &open {
            inner.close(&mut appender, segment);
        }
        drop(appender);
        self.drain();
        let expired: Vec<_> = inner.segments().iter().filter(old).cloned().collect();
        for segment in expired {
            if matches!(segment.phase(), Phase::Sealed | Phase::Cut) {
                let records = u64::from(segment.records());
                self.evict(&segment, false);
                count(&inner.counters.expired, records);
            }
        }
    }

    /// Removes segments with repeated read errors.
    pub(super) fn drop_unreadable(&mut self) {
        let inner = self.inner().clone();
        let bad: Vec<_> = {
            let segments = inner.segments();
            let bad = segments.iter().filter(|segment| segment.is_given_up());
            bad.cloned().collect()
        };
        for segment in bad {
            if matches!(segment.phase(), Phase::Sealed | Phase::Cut) {
                self.evict(&segment, false);
            }
        }
    }
}

fn is_mostly_used(segment: &Segment) -> bool {
    segment.used() * 2 > segment.records()
}

impl Inner {
    /// The segment to go next.
    fn victim(&self) -> Option<Arc<Segment>> {
        let segments = self.segments();
        // In the order of numbers: the first among equals is the oldest.
        let whole = |segment: &&Arc<Segment>| matches!(segment.phase(), Phase::Sealed | Phase::Cut);
        let protected = || {
            let whole = segments.iter().filter(whole);
            whole.filter(|segment| segment.is_protected())
        };
        let limit = self.options.capacity_bytes / 100 * PROTECTED_SHARE;
        let size: u64 = protected().map(|segment| segment.size()).sum();
        let mut probation = segments.iter().filter(whole);
        let oldest = probation.find(|segment| !segment.is_protected());
        if let Some(oldest) = oldest
            && size <= limit
        {
            return Some(oldest.clone());
        }
        let victim = protected().min_by_key(|segment| segment.used())?;
        if is_mostly_used(victim) {
            // Even the least used one is in use: those that stay have to prove it again.
            for segment in protected() {
                segment.age();
            }
        }
        Some(victim.clone())
    }
}
