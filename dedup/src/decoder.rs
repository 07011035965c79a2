//! The receiving side of a channel: frames become the bytes of the stream again.

use std::sync::Arc;

use skyferry_core::piece::MAX_ZERO_RUN;
use skyferry_core::qemu::Encoder;
use skyferry_core::{BlockId, Piece};

use crate::announce::RunCheck;
use crate::delta::Delta;
use crate::digest::{RunningDigest, StreamDigest};
use crate::encoder::ChannelKind;
use crate::frame::{LayoutError, Sections};
use crate::known::KnownPages;
use crate::literals::Unpacker;
use crate::manifest::{Manifest, PlaceTable};
use crate::page::{DomainKey, Hasher, PAGE_SIZE, PageId, ShortId, ZERO_PAGE};
use crate::pending::{PageAt, Pending, Reference, fetch};
use crate::places::{DEFAULT_MAX_PLACES, Held, Place, ReceiverPlaces};
use crate::program::{self, Cursor, MAX_BLOCK_NAME, Op, StoredRun};
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
    /// Pages of guest RAM whose last contents a main channel remembers by their ids, 16 bytes each
    /// (4 MiB per GiB of guest that is not zero). Not less than what the peer's encoder was told
    /// ([`EncodeOptions::max_places`](crate::EncodeOptions::max_places)).
    pub max_places: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            max_raw: 2 * 1024 * 1024,
            max_blocks: 4096,
            max_window_log: 24,
            max_places: DEFAULT_MAX_PLACES,
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
    /// The program relies on what a place holds that holds nothing.
    #[error("place holds nothing to refer to")]
    Place,
    /// The program adopts a manifest, and none was agreed on.
    #[error("adopts a manifest that was not agreed on")]
    Manifest,
    /// A delta is cut off or goes beyond its page.
    #[error("malformed delta")]
    Delta,
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

/// Why a frame could not be completed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FinishError {
    /// These references are not filled yet. Fill them, then finish.
    #[error("{} pages are missing", .0.len())]
    Missing(Vec<u32>),
    /// The stream is not what the source sent. The migration must fail.
    #[error("stream digest differs from the sender's")]
    Mismatch,
}

/// Counters of one decoded frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecodeStats {
    /// Pages of zeroes.
    pub zero_pages: u32,
    /// Pages that their place held already.
    pub same_pages: u32,
    /// Pages that the frame named.
    pub ref_pages: u32,
    /// Pages that came as deltas from what their place held.
    pub delta_pages: u32,
    /// Bytes of those deltas, after decompression.
    pub delta_bytes: u32,
    /// Pages that came as deltas from what another place held.
    pub similar_pages: u32,
    /// Bytes of those deltas, after decompression.
    pub similar_bytes: u32,
    /// Contents referred to in any of these ways that our store did not have.
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

/// Turns the frames of one channel into bytes.
///
/// ```text
/// begin → Pending ─ missing? → ask the peer → fill ─→ finish → bytes
/// ```
///
/// Both `begin` and `finish` go strictly in frame order, but several frames may be pending. After an
/// error other than [`FinishError::Missing`] the decoder is of no further use.
///
/// What came from the store is compared with its id in `begin`. What a delta makes of a page that is
/// missing is not known until that page is filled in; a frame begun in the meantime that refers to
/// such a place asks for its contents as well, so that any number of misses costs one round trip.
pub struct ChannelDecoder {
    kind: ChannelKind,
    limits: DecodeLimits,
    hasher: Hasher,
    digest: RunningDigest,
    encoder: Encoder,
    /// Names of the blocks that were defined, by number.
    names: Vec<Box<[u8]>>,
    cursor: Cursor,
    unpacker: Unpacker,
    literals: Vec<u8>,
    places: ReceiverPlaces,
    /// What the sender may adopt.
    agreed: Option<Arc<Manifest>>,
    /// Ids that the store is told about beforehand.
    wanted: Vec<ShortId>,
    /// Learns what the sender holds.
    peer: Option<Arc<KnownPages>>,
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
            names: Vec::new(),
            cursor: Cursor::default(),
            unpacker: Unpacker::new(limits.max_window_log),
            literals: Vec::new(),
            places: ReceiverPlaces::new(limits.max_places),
            agreed: None,
            wanted: Vec::new(),
            peer: None,
            spare: Spare::default(),
        }
    }

    /// Has `known` learn of all that arrives: the sender holds it, so it need not be sent back.
    pub fn learn(&mut self, known: Arc<KnownPages>) {
        self.peer = Some(known);
    }

    /// The sender has been told that it may adopt `manifest`, which it may do once.
    pub fn agree(&mut self, manifest: Arc<Manifest>) {
        self.agreed = Some(manifest);
    }

    /// Takes the table of places out, at the end: all frames must be finished.
    pub fn take_table(&mut self) -> PlaceTable {
        PlaceTable {
            places: self.places.take(),
            names: std::mem::take(&mut self.names),
            hasher: self.hasher.clone(),
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
            pending: Pending {
                out,
                pages: std::mem::take(&mut self.spare.pages),
                references: std::mem::take(&mut self.spare.references),
                missing: Vec::new(),
                deltas: Vec::new(),
                awaited: Vec::new(),
                digest: sections.digest,
                hasher: self.hasher.clone(),
                stats: DecodeStats::default(),
                touched: false,
            },
            literals,
            ids: sections.ids,
            store,
        };
        let ids = sections.ids.as_chunks().0;
        self.wanted.clear();
        self.wanted
            .extend(ids.iter().map(|id| ShortId::from_bytes(*id)));
        store.prefetch(&self.wanted);
        self.prefetch_similar(sections.program, sections.raw_len, store);
        let mut program = sections.program;
        while !program.is_empty() {
            let op = program::read(&mut program).ok_or(DecodeError::Program)?;
            self.execute(op, &mut assembly)?;
        }
        let Assembly {
            mut pending,
            literals,
            ids,
            ..
        } = assembly;
        if pending.out.len() != sections.raw_len || !literals.is_empty() || !ids.is_empty() {
            return Err(DecodeError::Inconsistent);
        }
        pending.stats.missed_pages = pending.missing.len() as u32;
        Ok(pending)
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
                assembly.pending.stats.opaque_bytes += bytes.len() as u32;
            }
            Op::Chunk(length) => {
                let chunk = take(&mut assembly.literals, length as u64)?;
                assembly.chunk(chunk)?;
                assembly.name_new(length);
            }
            Op::ChunkReference(length) => {
                assembly.chunk(&ZERO_PAGE[..length])?;
                assembly.named(length)?;
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
                    let place = self.page(data, assembly)?;
                    self.places.set(place, assembly.name_new(PAGE_SIZE));
                    assembly.pending.stats.batch_pages += 1;
                }
            }
            Op::ZeroData(count) => {
                for _ in 0..count {
                    let place = self.page(&ZERO_PAGE, assembly)?;
                    let id = self.hasher.zero_id();
                    assembly.mark(PAGE_SIZE, id, false);
                    self.places.clear(place, 1);
                    assembly.pending.stats.zero_pages += 1;
                }
            }
            Op::Reference(count) => {
                for _ in 0..count {
                    let place = self.page(&ZERO_PAGE, assembly)?;
                    self.places.set(place, assembly.named(PAGE_SIZE)?);
                    assembly.pending.stats.ref_pages += 1;
                }
            }
            Op::Same(count) => {
                self.prefetch(count, assembly);
                for _ in 0..count {
                    let place = self.page(&ZERO_PAGE, assembly)?;
                    let held = self.places.get(place).ok_or(DecodeError::Place)?;
                    assembly.refer(held, PAGE_SIZE, None);
                    assembly.pending.stats.same_pages += 1;
                }
            }
            Op::Delta(count) => {
                self.prefetch(count, assembly);
                for _ in 0..count {
                    let length = self.delta(0, assembly)?;
                    assembly.pending.stats.delta_pages += 1;
                    assembly.pending.stats.delta_bytes += length as u32;
                }
            }
            Op::Similar { count, distance } => {
                for _ in 0..count {
                    let length = self.delta(distance, assembly)?;
                    assembly.pending.stats.similar_pages += 1;
                    assembly.pending.stats.similar_bytes += length as u32;
                }
            }
            Op::Stored(run) => self.stored(run, assembly)?,
            Op::Skip(count) => self.cursor.skip(count),
            Op::Seek(cursor) => self.cursor = cursor,
            Op::Define(name) => {
                let blocks = self.names.len() as u32;
                let defined = (blocks < self.limits.max_blocks)
                    .then(|| self.encoder.define_block(name))
                    .flatten();
                if defined != Some(BlockId(blocks)) {
                    return Err(DecodeError::Block);
                }
                self.names.push(name.into());
            }
            Op::Adopt => {
                let manifest = self.agreed.take().ok_or(DecodeError::Manifest)?;
                self.places.fill(&manifest, &self.names);
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
        self.places.clear(self.cursor.into(), u64::from(records));
        self.cursor.pass(u64::from(records));
        assembly.pending.stats.zero_pages += records;
        Ok(u64::from(records))
    }

    /// Tells the store which pages the next `count` places hold.
    fn prefetch(&mut self, count: u64, assembly: &Assembly<'_>) {
        let count = count.min((assembly.room() / PAGE_SIZE) as u64);
        self.wanted.clear();
        self.want(self.cursor.into(), count);
        assembly.store.prefetch(&self.wanted);
    }

    /// Tells the store about all old pages of similar ones at once: they lie far apart, so most of these
    /// operations are for one page. What is malformed shows when the program is executed.
    fn prefetch_similar(&mut self, mut program: &[u8], raw_len: usize, store: &dyn PageStore) {
        let mut room = (raw_len / PAGE_SIZE) as u64;
        let mut cursor = self.cursor;
        self.wanted.clear();
        while let Some(op) = program::read(&mut program) {
            match op {
                Op::Similar { count, distance } => {
                    self.want(Place::from(cursor).ahead(distance), count.min(room));
                    room = room.saturating_sub(count);
                    cursor.skip(count);
                }
                Op::Zero(count)
                | Op::New(count)
                | Op::ZeroData(count)
                | Op::Reference(count)
                | Op::Same(count)
                | Op::Delta(count)
                | Op::Skip(count) => cursor.skip(count),
                Op::Stored(run) => cursor.skip(run.count.into()),
                Op::Seek(to) => cursor = to,
                Op::Other(_) | Op::Chunk(_) | Op::ChunkReference(_) => {}
                Op::Define(_) | Op::Adopt => {}
            }
        }
        if !self.wanted.is_empty() {
            store.prefetch(&self.wanted);
        }
    }

    /// Adds what `count` places in a row hold to the pages that the store is told about.
    fn want(&mut self, first: Place, count: u64) {
        let mut place = first;
        for _ in 0..count {
            if let Some(Held::Known(id)) = self.places.get(place) {
                self.wanted.push(id);
            }
            place = place.ahead(1);
        }
    }

    /// Appends page records that the sender found in our announcements. When the segment is gone or was
    /// another than the sender believed, all of them are missing.
    fn stored(&mut self, run: StoredRun, assembly: &mut Assembly<'_>) -> Result<(), DecodeError> {
        if run.count as usize > assembly.room() / PAGE_SIZE {
            return Err(DecodeError::Inconsistent);
        }
        let mut ids = std::mem::take(&mut self.wanted);
        ids.clear();
        let StoredRun {
            segment,
            record,
            count,
            check,
        } = run;
        let domain = self.hasher.domain();
        assembly
            .store
            .records(domain, segment, record, count, &mut ids);
        let mut found = RunCheck::default();
        ids.iter().for_each(|id| found.add(id));
        if ids.len() != count as usize || found.value() != check {
            ids.clear();
        }
        assembly.store.prefetch(&ids);
        for at in 0..count as usize {
            let place = self.page(&ZERO_PAGE, assembly)?;
            let page = assembly.pending.pages.len() as u32;
            if let Some(id) = ids.get(at) {
                assembly.refer(Held::Known(*id), PAGE_SIZE, None);
                self.places.set(place, *id);
            } else {
                assembly.refer(Held::Awaited, PAGE_SIZE, None);
                let awaited = self.places.set_awaited(place);
                assembly.pending.awaited.push((awaited, page));
            }
        }
        assembly.pending.stats.ref_pages += count;
        self.wanted = ids;
        Ok(())
    }

    /// Appends a page record that is a delta from what the place holds that is `distance` pages further
    /// on. Returns the delta's length.
    fn delta(&mut self, distance: i64, assembly: &mut Assembly<'_>) -> Result<usize, DecodeError> {
        let delta = Delta::take(&mut assembly.literals).ok_or(DecodeError::Delta)?;
        let place = self.page(&ZERO_PAGE, assembly)?;
        let old = place.ahead(distance);
        let held = self.places.get(old).ok_or(DecodeError::Place)?;
        let page = assembly.pending.pages.len() as u32;
        match assembly.refer(held, PAGE_SIZE, Some(delta)) {
            Some(id) => self.places.set(place, id),
            None => {
                let awaited = self.places.set_awaited(place);
                assembly.pending.awaited.push((awaited, page));
            }
        }
        Ok(delta.as_bytes().len())
    }

    /// Appends a page record at the cursor and returns the place that it was.
    fn page(&mut self, data: &[u8], assembly: &mut Assembly<'_>) -> Result<Place, DecodeError> {
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
        let place = self.cursor.into();
        self.cursor.pass(1);
        Ok(place)
    }

    fn encode(
        &mut self,
        piece: &Piece<'_>,
        assembly: &mut Assembly<'_>,
    ) -> Result<(), DecodeError> {
        let out = &mut assembly.pending.out;
        if !self.encoder.encode(piece, out) {
            return Err(DecodeError::Block);
        }
        // At most one record too many was appended, which is no more than a page and its header.
        debug_assert!(out.len() <= assembly.raw_len + PAGE_SIZE + MAX_RECORD_HEADER);
        if out.len() > assembly.raw_len {
            return Err(DecodeError::Inconsistent);
        }
        Ok(())
    }

    /// Completes the oldest pending frame: checks its bytes and keeps its pages in `store`.
    ///
    /// # Errors
    /// [`FinishError::Missing`] when pages are missing: fill them and call once more.
    /// [`FinishError::Mismatch`] when the stream is not the sender's.
    pub fn finish(
        &mut self,
        pending: &mut Pending,
        store: &dyn PageStore,
    ) -> Result<Finished, FinishError> {
        if !pending.missing.is_empty() {
            return Err(FinishError::Missing(pending.missing.clone()));
        }
        if pending.touched {
            for page in &mut pending.pages {
                page.id = self.hasher.id(&pending.out[page.range()]);
            }
        }
        let mut behind = 0;
        for page in &pending.pages {
            self.digest.bytes(&pending.out[behind..page.at]);
            self.digest.page(&page.id);
            behind = page.range().end;
        }
        self.digest.bytes(&pending.out[behind..]);
        if self.digest.settle() != pending.digest {
            return Err(FinishError::Mismatch);
        }
        for (awaited, page) in pending.awaited.drain(..) {
            let id = pending.pages[page as usize].id.short();
            self.places.resolve(awaited, id);
        }
        for page in pending.pages.iter().filter(|page| page.keep) {
            store.put(self.hasher.domain(), &page.id, &pending.out[page.range()]);
        }
        if let Some(peer) = &self.peer {
            let zero = self.hasher.zero_id();
            let pages = pending.pages.iter().filter(|page| page.id != zero);
            pages.for_each(|page| peer.insert(&page.id.short()));
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

    /// Gives back the memory that waits for the next frame, for a channel on which nothing comes.
    pub fn rest(&mut self) {
        self.literals = Vec::new();
        self.spare = Spare::default();
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
    pending: Pending,
    /// What is left of the literals.
    literals: &'a [u8],
    /// What is left of the ids.
    ids: &'a [u8],
    store: &'a dyn PageStore,
}

impl Assembly<'_> {
    fn room(&self) -> usize {
        self.raw_len - self.pending.out.len()
    }

    /// The last `length` bytes of the output are contents called `id`.
    fn mark(&mut self, length: usize, id: PageId, keep: bool) {
        self.pending.pages.push(PageAt {
            at: self.pending.out.len() - length,
            length,
            id,
            keep,
        });
    }

    /// The last `length` bytes of the output are new contents.
    fn name_new(&mut self, length: usize) -> ShortId {
        let at = self.pending.out.len() - length;
        let id = self.pending.hasher.id(&self.pending.out[at..]);
        self.mark(length, id, true);
        id.short()
    }

    fn chunk(&mut self, contents: &[u8]) -> Result<(), DecodeError> {
        self.append(contents)?;
        self.pending.stats.opaque_bytes += contents.len() as u32;
        Ok(())
    }

    /// Puts what the next id names over the last `length` bytes of the output.
    fn named(&mut self, length: usize) -> Result<ShortId, DecodeError> {
        let (id, rest) = self
            .ids
            .split_first_chunk()
            .ok_or(DecodeError::Inconsistent)?;
        self.ids = rest;
        let id = ShortId::from_bytes(*id);
        self.refer(Held::Known(id), length, None);
        Ok(id)
    }

    /// Puts `held`, or what the delta makes of it, over the last `length` bytes of the output.
    /// Returns the id of the result, unless something is missing for it.
    fn refer(&mut self, held: Held, length: usize, delta: Option<Delta<'_>>) -> Option<ShortId> {
        let pending = &mut self.pending;
        let at = pending.out.len() - length;
        let named = match held {
            Held::Known(id) => Some(id),
            Held::Awaited => None,
        };
        let contents = &mut pending.out[at..];
        let found = named.and_then(|named| fetch(self.store, &pending.hasher, &named, contents));
        let mut reference = Reference {
            id: named,
            page: pending.pages.len() as u32,
            delta: None,
        };
        let mut result = found;
        if let Some(delta) = delta {
            if found.is_none() {
                let start = pending.deltas.len();
                pending.deltas.extend_from_slice(delta.as_bytes());
                reference.delta = Some(start..pending.deltas.len());
            } else if let Ok(page) = <&mut [u8; PAGE_SIZE]>::try_from(contents) {
                delta.apply(page);
                result = Some(pending.hasher.id(page));
            }
        }
        if found.is_none() {
            pending.missing.push(pending.references.len() as u32);
        }
        pending.references.push(reference);
        let id = result.unwrap_or(pending.hasher.zero_id());
        self.mark(length, id, delta.is_some());
        result.map(|id| id.short())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        if bytes.len() > self.room() {
            return Err(DecodeError::Inconsistent);
        }
        self.pending.out.extend_from_slice(bytes);
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
