//! A received frame between its two stages: unpacked, but perhaps not with all it refers to.

use std::collections::HashMap;
use std::ops::Range;

use crate::decoder::DecodeStats;
use crate::delta::Delta;
use crate::digest::StreamDigest;
use crate::page::{Hasher, PAGE_SIZE, PageId, ShortId};
use crate::places::Awaited;
use crate::store::PageStore;

/// Why a page was not taken as the missing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FillError {
    /// No such reference, or it is not missing.
    #[error("page was not missing")]
    NotMissing,
    /// Not of the right length, or not the page with the id of the reference.
    #[error("page is not the one referred to")]
    WrongPage,
}

/// A frame whose references may not all be filled.
///
/// A *reference* is whatever the frame needs besides its own bytes: a page or chunk that it names, a
/// page that its place holds already, the old page of a delta.
#[derive(Debug)]
pub struct Pending {
    pub(crate) out: Vec<u8>,
    /// Contents of pages and chunks in `out`, in order.
    pub(crate) pages: Vec<PageAt>,
    pub(crate) references: Vec<Reference>,
    /// Numbers of the references whose contents are not here, in ascending order.
    pub(crate) missing: Vec<u32>,
    /// Deltas that wait for their old page.
    pub(crate) deltas: Vec<u8>,
    /// Pages (by index) whose ids the table of places is waiting for.
    pub(crate) awaited: Vec<(Awaited, u32)>,
    pub(crate) digest: StreamDigest,
    pub(crate) hasher: Hasher,
    pub(crate) stats: DecodeStats,
    /// Someone had `out` in hand, so the ids of the pages may be those of other bytes.
    pub(crate) touched: bool,
}

/// A page or chunk in the output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageAt {
    /// Where the contents are.
    pub(crate) at: usize,
    pub(crate) length: usize,
    /// What they are called; of no meaning while they are missing.
    pub(crate) id: PageId,
    /// The store gets them with the finished frame.
    pub(crate) keep: bool,
}

impl PageAt {
    pub(crate) fn range(&self) -> Range<usize> {
        self.at..self.at + self.length
    }
}

#[derive(Debug)]
pub(crate) struct Reference {
    /// `None` for what a place holds that is itself still waiting for its contents.
    pub(crate) id: Option<ShortId>,
    /// Index of the page that the contents are for.
    pub(crate) page: u32,
    /// The contents are the old page of this delta, in `deltas`.
    pub(crate) delta: Option<Range<usize>>,
}

impl Pending {
    /// Numbers of the references whose pages are not here: ask the sender for them. They count from
    /// 0 in the order of the frame's references, like the sender's `Retained`.
    #[must_use]
    pub fn missing(&self) -> &[u32] {
        &self.missing
    }

    /// The id that a reference names. `None` when there is no such reference, or when its id is not
    /// known before an earlier frame is finished; what is filled in is then proved by the digest alone.
    #[must_use]
    pub fn id(&self, index: u32) -> Option<ShortId> {
        self.references.get(index as usize)?.id
    }

    /// What is missing, in two parts: what has to be asked for at once, and what the frames `before`
    /// bring, which are not finished yet. [`look_again`](Self::look_again) finds the latter when they are.
    pub fn missing_behind<'a>(
        &self,
        before: impl Iterator<Item = &'a Self>,
    ) -> (Vec<u32>, Vec<u32>) {
        let named = |&index: &u32| Some((self.references[index as usize].id?, index));
        let mut coming: HashMap<ShortId, bool> = self
            .missing
            .iter()
            .filter_map(named)
            .map(|(id, _)| (id, false))
            .collect();
        let mut comes = |id: &ShortId| {
            if let Some(comes) = coming.get_mut(id) {
                *comes = true;
            }
        };
        for frame in before {
            let kept = frame.pages.iter().filter(|page| page.keep);
            kept.for_each(|page| comes(&page.id.short()));
            // What it asks for it keeps, but for old pages of deltas.
            for &index in &frame.missing {
                let reference = &frame.references[index as usize];
                if let Some(id) = reference.id.filter(|_| reference.delta.is_none()) {
                    comes(&id);
                }
            }
        }
        let is_coming = |index: &u32| named(index).is_some_and(|(id, _)| coming[&id]);
        let missing = self.missing.iter();
        missing.partition(|index| !is_coming(index))
    }

    /// Bytes of the stream that the frame stands for.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.out.len()
    }

    /// Puts a page in its place.
    ///
    /// # Errors
    /// When the page was not missing or is not the one that the reference names.
    pub fn fill(&mut self, index: u32, page: &[u8]) -> Result<(), FillError> {
        let position = self
            .missing
            .binary_search(&index)
            .map_err(|_| FillError::NotMissing)?;
        let reference = &self.references[index as usize];
        let range = self.pages[reference.page as usize].range();
        if page.len() != range.len() {
            return Err(FillError::WrongPage);
        }
        let id = self.hasher.id(page);
        if reference.id.is_some_and(|named| named != id.short()) {
            return Err(FillError::WrongPage);
        }
        self.out[range].copy_from_slice(page);
        self.missing.remove(position);
        self.settle(index, id, true);
        Ok(())
    }

    /// Looks for the missing pages in `store` once more: a frame before this one, finished in the
    /// meantime, may have brought them.
    pub fn look_again(&mut self, store: &dyn PageStore) {
        let mut missing = std::mem::take(&mut self.missing);
        missing.retain(|&index| {
            let reference = &self.references[index as usize];
            let range = self.pages[reference.page as usize].range();
            let Some(named) = reference.id else {
                return true;
            };
            match fetch(store, &self.hasher, &named, &mut self.out[range]) {
                Some(id) => self.settle(index, id, false),
                None => return true,
            }
            false
        });
        self.missing = missing;
    }

    /// The output has the contents of a reference, whose id is `id`.
    fn settle(&mut self, index: u32, id: PageId, from_peer: bool) {
        let reference = &self.references[index as usize];
        let page = &mut self.pages[reference.page as usize];
        (page.id, page.keep) = (id, from_peer);
        let Some(delta) = &reference.delta else {
            return;
        };
        // Both were checked when the delta was kept.
        if let Some(delta) = Delta::take(&mut &self.deltas[delta.clone()])
            && let Ok(contents) = <&mut [u8; PAGE_SIZE]>::try_from(&mut self.out[page.range()])
        {
            delta.apply(contents);
            (page.id, page.keep) = (self.hasher.id(contents), true);
        }
    }

    /// The bytes as they stand, to inject faults into: the digest is computed from them, page by page
    /// once more.
    pub fn out_mut(&mut self) -> &mut [u8] {
        self.touched = true;
        &mut self.out
    }
}

/// Copies what is called `named` from the store to `out`, if it has the length of `out` and is what
/// its name says. A value that is not is removed from the store, and counts as not there.
pub(crate) fn fetch(
    store: &dyn PageStore,
    hasher: &Hasher,
    named: &ShortId,
    out: &mut [u8],
) -> Option<PageId> {
    if let Ok(page) = <&mut [u8; PAGE_SIZE]>::try_from(&mut *out) {
        if store.get(named, page)? != PAGE_SIZE {
            return None;
        }
    } else {
        let mut value = [0; PAGE_SIZE];
        if store.get(named, &mut value)? != out.len() {
            return None;
        }
        out.copy_from_slice(&value[..out.len()]);
    }
    let id = hasher.id(out);
    if id.short() == *named {
        return Some(id);
    }
    store.remove(named);
    None
}
