//! The receiving side of a channel: frames become the bytes of the stream again.

use std::ops::Range;

use skyferry_core::piece::MAX_ZERO_RUN;
use skyferry_core::qemu::Encoder;
use skyferry_core::{BlockId, Piece};

use crate::digest::{RunningDigest, StreamDigest};
use crate::encoder::ChannelKind;
use crate::frame::{LayoutError, Sections};
use crate::literals::Unpacker;
use crate::page::{DomainKey, Hasher, PAGE_SIZE, PageId, ShortId, ZERO_PAGE};
use crate::program::{self, Cursor, MAX_BLOCK_NAME, Op};
use crate::store::PageStore;

/// Smallest record of a zero page: its header and the fill byte.
const MIN_ZERO_RECORD: usize = 9;

/// Largest record header: flags with offset, length of the name, name.
const MAX_RECORD_HEADER: usize = 8 + 1 + MAX_BLOCK_NAME;

/// What a peer's frames may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Bytes of the stream that one frame may stand for.
    pub max_raw: usize,
    /// RAM blocks that a channel may name.
    pub max_blocks: u32,
    /// Largest compression window as a power of two in bytes; a channel takes about this much.
    pub max_window_log: u32,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            max_raw: 2 * 1024 * 1024,
            max_blocks: 4096,
            max_window_log: 24,
        }
    }
}

/// The peer has sent a frame that none of our encoders makes. The channel cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload ends early or has a malformed number.
    #[error("frame is cut off or malformed")]
    Truncated,
    /// A flag that this version does not know.
    #[error("frame has an unknown flag")]
    UnknownFlag,
    /// A length is over its limit.
    #[error("frame is longer than allowed")]
    TooLong,
    /// The parts of the frame do not fit together.
    #[error("parts of the frame do not add up")]
    Inconsistent,
    /// The literals do not decompress to the announced length.
    #[error("literals do not decompress as announced")]
    Literals,
    /// The program has an operation that does not exist.
    #[error("program has an unknown or malformed operation")]
    Program,
    /// The program names a RAM block that was not defined, or defines too many.
    #[error("RAM block unknown, or too many of them")]
    Block,
}

impl From<LayoutError> for DecodeError {
    fn from(error: LayoutError) -> Self {
        match error {
            LayoutError::Truncated => Self::Truncated,
            LayoutError::UnknownFlag => Self::UnknownFlag,
            LayoutError::TooLong => Self::TooLong,
            LayoutError::Inconsistent => Self::Inconsistent,
        }
    }
}

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

/// Why a frame could not be completed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FinishError {
    /// These references are not filled yet, or their contents (from the store) were not what their
    /// ids say: those were removed from the store and count as missing now. Fill them, then finish.
    #[error("{} pages are missing", .0.len())]
    Corrupt(Vec<u32>),
    /// The stream is not what the source sent. The migration must fail.
    #[error("stream digest differs from the sender's")]
    Mismatch,
}

/// Counters of one decoded frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecodeStats {
    /// Pages of zeroes.
    pub zero_pages: u32,
    /// Pages that the frame referred to.
    pub ref_pages: u32,
    /// Pages and chunks referred to that our store did not have.
    pub missed_pages: u32,
    /// Pages that came with their contents.
    pub batch_pages: u32,
    /// Bytes that belong to no page record.
    pub opaque_bytes: u32,
}

/// A complete, verified frame.
#[derive(Debug)]
pub struct Finished {
    /// The bytes of the stream. Give the buffer back with [`ChannelDecoder::recycle`].
    pub bytes: Vec<u8>,
    /// What the frame consisted of.
    pub stats: DecodeStats,
    /// The digest of the stream up to the frame's end, on which both sides agree.
    pub digest: StreamDigest,
}

/// A frame whose references may not all be filled.
#[derive(Debug)]
pub struct Pending {
    out: Vec<u8>,
    /// Contents of pages and chunks in `out`, in order.
    pages: Vec<PageAt>,
    references: Vec<Reference>,
    missing: Vec<u32>,
    digest: StreamDigest,
    hasher: Hasher,
    stats: DecodeStats,
}

#[derive(Debug, Clone, Copy)]
struct PageAt {
    /// Where the contents are.
    at: usize,
    length: usize,
    origin: Origin,
}

impl PageAt {
    fn range(&self) -> Range<usize> {
        self.at..self.at + self.length
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Literals,
    Zeroes,
    /// A reference by its number.
    Reference(u32),
}

#[derive(Debug, Clone, Copy)]
struct Reference {
    id: ShortId,
    at: usize,
    length: usize,
    /// The contents came from the peer, not from our store.
    filled: bool,
}

impl Reference {
    fn range(&self) -> Range<usize> {
        self.at..self.at + self.length
    }
}

impl Pending {
    /// Numbers of the references whose pages are not here: ask the sender for them. They count from
    /// 0 in the order of the frame's references, like the sender's `Retained`.
    #[must_use]
    pub fn missing(&self) -> &[u32] {
        &self.missing
    }

    /// The id that a reference names.
    #[must_use]
    pub fn id(&self, index: u32) -> Option<ShortId> {
        self.references
            .get(index as usize)
            .map(|reference| reference.id)
    }

    /// Puts a page in its place.
    ///
    /// # Errors
    /// When the page was not missing or is not the one that the reference names.
    pub fn fill(&mut self, index: u32, page: &[u8]) -> Result<(), FillError> {
        let position = self
            .missing
            .iter()
            .position(|&missing| missing == index)
            .ok_or(FillError::NotMissing)?;
        let reference = &mut self.references[index as usize];
        if page.len() != reference.length || self.hasher.id(page).short() != reference.id {
            return Err(FillError::WrongPage);
        }
        self.out[reference.range()].copy_from_slice(page);
        reference.filled = true;
        self.missing.remove(position);
        Ok(())
    }

    /// Looks for the missing pages in `store` once more: a frame before this one, finished in the
    /// meantime, may have brought them.
    pub fn look_again(&mut self, store: &dyn PageStore) {
        let Self {
            out,
            references,
            missing,
            ..
        } = self;
        missing.retain(|&index| {
            let reference = references[index as usize];
            !fetch(store, &reference.id, &mut out[reference.range()])
        });
    }

    /// The bytes as they stand, to inject faults into: the digest is computed from them.
    pub fn out_mut(&mut self) -> &mut [u8] {
        &mut self.out
    }
}

/// Copies what is called `id` from the store to `out`, if it has the length of `out`.
fn fetch(store: &dyn PageStore, id: &ShortId, out: &mut [u8]) -> bool {
    if let Ok(page) = <&mut [u8; PAGE_SIZE]>::try_from(&mut *out) {
        return store.get(id, page) == Some(PAGE_SIZE);
    }
    let mut value = [0; PAGE_SIZE];
    let found = store.get(id, &mut value) == Some(out.len());
    if found {
        out.copy_from_slice(&value[..out.len()]);
    }
    found
}

/// Turns the frames of one channel into bytes.
///
/// ```text
/// begin → Pending ─ missing? → ask the peer → fill ─→ finish → bytes
///                                               ↑        │
///                                               └ corrupt ┘
/// ```
///
/// Both `begin` and `finish` go strictly in frame order, but several frames may be pending. After an
/// error other than [`FinishError::Corrupt`] the decoder is of no further use.
pub struct ChannelDecoder {
    kind: ChannelKind,
    limits: DecodeLimits,
    hasher: Hasher,
    digest: RunningDigest,
    encoder: Encoder,
    blocks: u32,
    cursor: Cursor,
    unpacker: Unpacker,
    literals: Vec<u8>,
    /// Ids of the pages of the frame being finished.
    ids: Vec<PageId>,
    spare: Spare,
}

/// Buffers that wait for their next use.
#[derive(Default)]
struct Spare {
    out: Vec<Vec<u8>>,
    pages: Vec<PageAt>,
    references: Vec<Reference>,
}

/// Output buffers kept for reuse.
const MAX_SPARE: usize = 4;

impl ChannelDecoder {
    /// A decoder for a channel that has not carried anything yet.
    #[must_use]
    pub fn new(kind: ChannelKind, key: &DomainKey, limits: DecodeLimits) -> Self {
        Self {
            kind,
            limits,
            hasher: Hasher::new(key),
            digest: RunningDigest::new(key),
            encoder: Encoder::new(),
            blocks: 0,
            cursor: Cursor::default(),
            unpacker: Unpacker::new(limits.max_window_log),
            literals: Vec::new(),
            ids: Vec::new(),
            spare: Spare::default(),
        }
    }

    /// Unpacks the next frame, with what `store` has of the pages it refers to.
    ///
    /// # Errors
    /// When the peer broke the format or exceeds our limits.
    pub fn begin(&mut self, payload: &[u8], store: &dyn PageStore) -> Result<Pending, DecodeError> {
        let sections = Sections::read(payload, self.limits.max_raw)?;
        let mut literals = std::mem::take(&mut self.literals);
        let unpacked = if sections.zstd {
            self.unpacker
                .unpack(sections.literals, sections.literal_len, &mut literals)
                .map_err(|_| DecodeError::Literals)
        } else {
            Ok(sections.literals)
        };
        let pending = unpacked.and_then(|literals| self.run(&sections, literals, store));
        self.literals = literals;
        pending
    }

    fn run(
        &mut self,
        sections: &Sections<'_>,
        literals: &[u8],
        store: &dyn PageStore,
    ) -> Result<Pending, DecodeError> {
        let mut out = self.spare.out.pop().unwrap_or_default();
        out.clear();
        out.reserve_exact(sections.raw_len);
        let mut assembly = Assembly {
            raw_len: sections.raw_len,
            out,
            pages: std::mem::take(&mut self.spare.pages),
            references: std::mem::take(&mut self.spare.references),
            missing: Vec::new(),
            literals,
            ids: sections.ids,
            stats: DecodeStats::default(),
            store,
        };
        let mut program = sections.program;
        while !program.is_empty() {
            let op = program::read(&mut program).ok_or(DecodeError::Program)?;
            self.execute(op, &mut assembly)?;
        }
        let Assembly {
            out,
            pages,
            references,
            missing,
            literals,
            ids,
            mut stats,
            ..
        } = assembly;
        if out.len() != sections.raw_len || !literals.is_empty() || !ids.is_empty() {
            return Err(DecodeError::Inconsistent);
        }
        stats.missed_pages = missing.len() as u32;
        let (digest, hasher) = (sections.digest, self.hasher.clone());
        Ok(Pending {
            out,
            pages,
            references,
            missing,
            digest,
            hasher,
            stats,
        })
    }

    fn execute(&mut self, op: Op<'_>, assembly: &mut Assembly<'_>) -> Result<(), DecodeError> {
        if self.kind == ChannelKind::Opaque
            && !matches!(op, Op::Other(_) | Op::Chunk(_) | Op::ChunkReference(_))
        {
            return Err(DecodeError::Program);
        }
        match op {
            Op::Other(count) => {
                let bytes = take(&mut assembly.literals, count)?;
                assembly.append(bytes)?;
                assembly.stats.opaque_bytes += bytes.len() as u32;
            }
            Op::Chunk(length) => {
                let chunk = take(&mut assembly.literals, length as u64)?;
                assembly.chunk(chunk, Origin::Literals)?;
            }
            Op::ChunkReference(length) => {
                let index = assembly.next_reference();
                assembly.chunk(&ZERO_PAGE[..length], index)?;
                assembly.refer(length)?;
            }
            Op::Zero(count) => {
                let mut left = count;
                while left > 0 {
                    left -= self.zero_run(left, assembly)?;
                }
            }
            Op::New(count) => {
                for _ in 0..count {
                    let data = take(&mut assembly.literals, PAGE_SIZE as u64)?;
                    self.page(data, Origin::Literals, assembly)?;
                    assembly.stats.batch_pages += 1;
                }
            }
            Op::ZeroData(count) => {
                for _ in 0..count {
                    self.page(&ZERO_PAGE, Origin::Zeroes, assembly)?;
                    assembly.stats.zero_pages += 1;
                }
            }
            Op::Reference(count) => {
                for _ in 0..count {
                    let index = assembly.next_reference();
                    self.page(&ZERO_PAGE, index, assembly)?;
                    assembly.refer(PAGE_SIZE)?;
                    assembly.stats.ref_pages += 1;
                }
            }
            Op::Skip(count) => self.cursor.skip(count),
            Op::Seek(cursor) => self.cursor = cursor,
            Op::Define(name) => {
                let defined = (self.blocks < self.limits.max_blocks)
                    .then(|| self.encoder.define_block(name))
                    .flatten();
                if defined != Some(BlockId(self.blocks)) {
                    return Err(DecodeError::Block);
                }
                self.blocks += 1;
            }
        }
        Ok(())
    }

    /// Appends as many of `count` zero records as a piece can have; returns that number.
    fn zero_run(&mut self, count: u64, assembly: &mut Assembly<'_>) -> Result<u64, DecodeError> {
        if count > (assembly.room() / MIN_ZERO_RECORD) as u64 {
            return Err(DecodeError::Inconsistent);
        }
        let records = count.min(u64::from(MAX_ZERO_RUN)) as u32;
        let Cursor {
            block,
            offset,
            named,
        } = self.cursor;
        let piece = Piece::ZeroRun {
            block: BlockId(block),
            offset,
            named,
            count: records,
        };
        self.encode(&piece, assembly)?;
        self.cursor.pass(u64::from(records));
        assembly.stats.zero_pages += records;
        Ok(u64::from(records))
    }

    /// Appends a page record at the cursor.
    fn page(
        &mut self,
        data: &[u8],
        origin: Origin,
        assembly: &mut Assembly<'_>,
    ) -> Result<(), DecodeError> {
        let Cursor {
            block,
            offset,
            named,
        } = self.cursor;
        self.encode(
            &Piece::Page {
                block: BlockId(block),
                offset,
                named,
                data,
            },
            assembly,
        )?;
        self.cursor.pass(1);
        assembly.mark(PAGE_SIZE, origin);
        Ok(())
    }

    fn encode(
        &mut self,
        piece: &Piece<'_>,
        assembly: &mut Assembly<'_>,
    ) -> Result<(), DecodeError> {
        if !self.encoder.encode(piece, &mut assembly.out) {
            return Err(DecodeError::Block);
        }
        // At most one record too many was appended, which is no more than a page and its header.
        debug_assert!(assembly.out.len() <= assembly.raw_len + PAGE_SIZE + MAX_RECORD_HEADER);
        if assembly.out.len() > assembly.raw_len {
            return Err(DecodeError::Inconsistent);
        }
        Ok(())
    }

    /// Completes the oldest pending frame: checks its bytes and keeps its pages in `store`.
    ///
    /// # Errors
    /// [`FinishError::Corrupt`] when pages are missing (again): fill them and call once more.
    /// [`FinishError::Mismatch`] when the stream is not the sender's.
    pub fn finish(
        &mut self,
        pending: &mut Pending,
        store: &dyn PageStore,
    ) -> Result<Finished, FinishError> {
        self.check_references(pending, store)?;
        let mut behind = 0;
        for (page, id) in pending.pages.iter().zip(&self.ids) {
            self.digest.bytes(&pending.out[behind..page.at]);
            self.digest.page(id);
            behind = page.range().end;
        }
        self.digest.bytes(&pending.out[behind..]);
        if self.digest.settle() != pending.digest {
            return Err(FinishError::Mismatch);
        }
        for (page, id) in pending.pages.iter().zip(&self.ids) {
            let keep = match page.origin {
                Origin::Literals => true,
                Origin::Zeroes => false,
                Origin::Reference(index) => pending.references[index as usize].filled,
            };
            if keep {
                store.put(self.hasher.domain(), id, &pending.out[page.range()]);
            }
        }
        self.spare.pages = std::mem::take(&mut pending.pages);
        self.spare.pages.clear();
        self.spare.references = std::mem::take(&mut pending.references);
        self.spare.references.clear();
        Ok(Finished {
            bytes: std::mem::take(&mut pending.out),
            stats: pending.stats,
            digest: pending.digest,
        })
    }

    /// Names every page of the frame as it stands, and compares references with what they named.
    fn check_references(
        &mut self,
        pending: &mut Pending,
        store: &dyn PageStore,
    ) -> Result<(), FinishError> {
        self.ids.clear();
        let known_missing = pending.missing.len();
        for page in &pending.pages {
            let contents = &pending.out[page.range()];
            let id = match page.origin {
                Origin::Zeroes if self.hasher.is_zero(contents) => self.hasher.zero_id(),
                _ => self.hasher.id(contents),
            };
            self.ids.push(id);
            let Origin::Reference(index) = page.origin else {
                continue;
            };
            let reference = &mut pending.references[index as usize];
            if id.short() != reference.id && !pending.missing[..known_missing].contains(&index) {
                store.remove(&reference.id);
                reference.filled = false;
                pending.missing.push(index);
            }
        }
        if pending.missing.is_empty() {
            return Ok(());
        }
        Err(FinishError::Corrupt(pending.missing.clone()))
    }

    /// Takes the buffer of a finished frame back for the next one.
    pub fn recycle(&mut self, bytes: Vec<u8>) {
        if self.spare.out.len() < MAX_SPARE {
            self.spare.out.push(bytes);
        }
    }
}

impl std::fmt::Debug for ChannelDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelDecoder")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// A frame being put together.
struct Assembly<'a> {
    raw_len: usize,
    out: Vec<u8>,
    pages: Vec<PageAt>,
    references: Vec<Reference>,
    missing: Vec<u32>,
    /// What is left of the literals.
    literals: &'a [u8],
    /// What is left of the ids.
    ids: &'a [u8],
    stats: DecodeStats,
    store: &'a dyn PageStore,
}

impl Assembly<'_> {
    fn room(&self) -> usize {
        self.raw_len - self.out.len()
    }

    /// What a reference that comes now will be called.
    fn next_reference(&self) -> Origin {
        Origin::Reference(self.references.len() as u32)
    }

    /// The last `length` bytes of the output are contents with an id.
    fn mark(&mut self, length: usize, origin: Origin) {
        self.pages.push(PageAt {
            at: self.out.len() - length,
            length,
            origin,
        });
    }

    fn chunk(&mut self, contents: &[u8], origin: Origin) -> Result<(), DecodeError> {
        self.append(contents)?;
        self.mark(contents.len(), origin);
        self.stats.opaque_bytes += contents.len() as u32;
        Ok(())
    }

    /// Puts what the next id names over the last `length` bytes of the output.
    fn refer(&mut self, length: usize) -> Result<(), DecodeError> {
        let (id, rest) = self
            .ids
            .split_first_chunk()
            .ok_or(DecodeError::Inconsistent)?;
        self.ids = rest;
        let id = ShortId::from_bytes(*id);
        let at = self.out.len() - length;
        if !fetch(self.store, &id, &mut self.out[at..]) {
            self.missing.push(self.references.len() as u32);
        }
        self.references.push(Reference {
            id,
            at,
            length,
            filled: false,
        });
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        if bytes.len() > self.room() {
            return Err(DecodeError::Inconsistent);
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }
}

fn take<'a>(literals: &mut &'a [u8], count: u64) -> Result<&'a [u8], DecodeError> {
    let count = usize::try_from(count).map_err(|_| DecodeError::Inconsistent)?;
    let (taken, rest) = literals
        .split_at_checked(count)
        .ok_or(DecodeError::Inconsistent)?;
    *literals = rest;
    Ok(taken)
}
