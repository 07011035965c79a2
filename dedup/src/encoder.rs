//! The sending side of a channel: bytes of the stream become frames.

use std::sync::Arc;

use skyferry_core::qemu::{CommitMark, Decoder, Event, MAX_PENDING, Step};
use skyferry_core::{BlockId, Piece};

use crate::announce::{Announced, AnnouncedPlace};
use crate::chunk::{self, MIN_CHUNK, MIN_STRETCH};
use crate::delta::{self, MAX_DELTA, MAX_DELTA_FROM_SIMILAR};
use crate::digest::{RunningDigest, StreamDigest};
use crate::effort::Effort;
use crate::frame::{Frame, FrameStats, Old, Retained, Sections};
use crate::known::KnownPages;
use crate::literals::{Matching, PackOptions, Packed, Packer};
use crate::manifest::{Manifest, ManifestMatch, PlaceTable, Search};
use crate::page::{DomainKey, Hasher, PAGE_SIZE, PageId, ShortId};
use crate::places::{DEFAULT_MAX_PLACES, Place, Places};
use crate::program::{Cursor, ProgramWriter, Run};
use crate::similar::{Features, Reliance, SimilarPages};
use crate::store::PageStore;

/// Smallest `max_raw`: whatever the parser waits for as a whole fits.
const MIN_RAW: usize = MAX_PENDING.next_power_of_two();

/// How a TLS connection begins. What it carries never repeats, so it is not cut into chunks, which
/// would displace contents that do.
const TLS_HELLO: [u8; 2] = [0x16, 0x03];

/// What a channel carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelKind {
    /// QEMU's main migration channel.
    QemuMain,
    /// Anything else.
    Opaque,
}

/// How a channel is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// zstd level; higher is smaller and slower.
    pub level: i32,
    /// How far back compression looks, as a power of two in bytes (10 to 27). Each side of the
    /// channel takes this much memory once it has been filled. The peer must allow it
    /// ([`DecodeLimits::max_window_log`](crate::DecodeLimits::max_window_log)).
    pub window_log: u32,
    /// How zstd searches the window.
    pub matching: Matching,
    /// A frame ends when it has this many bytes of literals.
    pub batch_bytes: usize,
    /// A frame ends before it stands for more bytes of the stream than this (at least 128 KiB). The
    /// peer must allow it ([`DecodeLimits::max_raw`](crate::DecodeLimits::max_raw)).
    pub max_raw: usize,
    /// Pages of guest RAM whose last contents a main channel remembers by their ids, 16 bytes each
    /// (4 MiB per GiB of guest that is not zero); pages beyond that go as if never sent. To find similar
    /// pages the encoder takes at most as much again. The peer must allow it
    /// ([`DecodeLimits::max_places`](crate::DecodeLimits::max_places)).
    pub max_places: u64,
}

impl Default for EncodeOptions {
    /// Level 2 with the window of that level: on a guest of 1.5 GiB 5 % fewer bytes than level 1 at
    /// 0.9 of its speed, at 3 MiB of memory on both sides together.
    fn default() -> Self {
        Self {
            level: 2,
            window_log: 20,
            matching: Matching::OfLevel,
            batch_bytes: 256 * 1024,
            max_raw: 1024 * 1024,
            max_places: DEFAULT_MAX_PLACES,
        }
    }
}

/// What to do when the input ends before a frame is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Wait for more.
    No,
    /// End the frame behind the last whole piece.
    Soft,
    /// Let everything go, also a piece that is cut off.
    Hard,
}

/// The encoder cannot go on, because of our environment: the compressor got no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the compressor failed, probably for want of memory")]
pub struct EncodeError;

/// The result of one call of [`ChannelEncoder::encode`].
#[derive(Debug, Default)]
pub struct Encoded {
    /// Bytes taken from the start of the input.
    pub consumed: usize,
    /// A frame that ends behind those bytes.
    pub frame: Option<Frame>,
    /// Observations with the offset in the stream at which they hold. A commit event lies on the
    /// border of two frames: at the end of `frame` or of the one before.
    pub events: Vec<(u64, Event)>,
}

/// Turns the bytes of one channel into frames.
///
/// Bytes that were consumed and are not in a frame yet wait inside ([`pending`](Self::pending)), for
/// later input or a flush to complete their frame.
pub struct ChannelEncoder {
    kind: ChannelKind,
    options: EncodeOptions,
    parser: Decoder,
    hasher: Hasher,
    digest: RunningDigest,
    settled: StreamDigest,
    packer: Packer,
    program: ProgramWriter,
    places: Places,
    similar: SimilarPages,
    reliance: Reliance,
    /// Places hold what no page of this stream has told.
    adopted: bool,
    /// What the peer has announced of its store.
    announced: Option<Arc<Announced>>,
    /// Looks for a manifest that the stream is like.
    search: Search,
    draft: Draft,
    /// Opaque bytes may repeat.
    chunks: bool,
    /// Names of the blocks that the peer's decoder knows, by number.
    names: Vec<Box<[u8]>>,
    /// Offset behind the last byte consumed.
    offset: u64,
    /// The last commit mark was a candidate.
    held: bool,
    /// The next byte is such a candidate.
    at_candidate: bool,
}

/// The frame being made.
#[derive(Default)]
struct Draft {
    raw_len: usize,
    /// The delta being tried.
    delta: Vec<u8>,
    /// Short ids of the references.
    ids: Vec<u8>,
    retained: Retained,
    /// Pages and chunks that the peer gets with the frame, to be known when it is done.
    new: Vec<ShortId>,
    /// Size of the last frame's retained contents: the next one's are mostly alike.
    retained_hint: usize,
    held_from_start: bool,
    stats: FrameStats,
    /// The head of the payload.
    head: Vec<u8>,
}

impl ChannelEncoder {
    /// An encoder for a channel that has not carried anything yet.
    #[must_use]
    pub fn new(kind: ChannelKind, key: &DomainKey, options: EncodeOptions) -> Self {
        let mut digest = RunningDigest::new(key);
        let EncodeOptions {
            level,
            window_log,
            matching,
            ..
        } = options;
        Self {
            kind,
            options: EncodeOptions {
                max_raw: options.max_raw.max(MIN_RAW),
                ..options
            },
            parser: Decoder::new(),
            hasher: Hasher::new(key),
            settled: digest.settle(),
            digest,
            packer: Packer::new(PackOptions {
                level,
                window_log,
                matching,
            }),
            program: ProgramWriter::default(),
            places: Places::new(options.max_places),
            similar: SimilarPages::new(options.max_places.saturating_mul(ShortId::SIZE as u64)),
            reliance: Reliance::default(),
            adopted: false,
            announced: None,
            search: Search::default(),
            draft: Draft::default(),
            chunks: true,
            names: Vec::new(),
            offset: 0,
            held: false,
            at_candidate: false,
        }
    }

    /// Compresses as this effort says from the next frame on. A change costs what the window held.
    pub fn set_effort(&mut self, effort: Effort) {
        let options = PackOptions {
            level: effort.level(),
            window_log: effort.window_log(),
            matching: effort.matching(),
        };
        let options = (!effort.is_none()).then_some(options);
        self.packer.set_options(options);
    }

    /// Gives back the memory that compression took. Worth it when nothing has come for a while, and may
    /// not for long: what comes then is compressed with an empty window.
    pub fn rest(&mut self) {
        self.packer.rest();
    }

    /// Refers to what the peer has announced of its store, too: pages in a row there go as one run.
    pub fn refer_to(&mut self, announced: Arc<Announced>) {
        self.announced = Some(announced);
    }

    /// Compares the first pages with what guests held when they left, the latest first: at most
    /// [`MAX_CANDIDATES`](crate::MAX_CANDIDATES) of `candidates`, which are of this domain.
    pub fn compare_with(&mut self, candidates: Vec<Arc<Manifest>>) {
        self.search = Search::new(candidates);
    }

    /// The peer has asked for so many old pages by now that pages went as similar to
    /// ([`Old::Similar`]). While they are many, no more is built on others.
    pub fn peer_has_forgotten(&mut self, old_pages: u64) {
        self.reliance.on_forgotten(old_pages);
    }

    /// The manifests that the stream is like, the best first, once enough pages have been seen;
    /// given out once.
    pub fn take_matches(&mut self) -> Option<Vec<ManifestMatch>> {
        self.search.take_matches()
    }

    /// Goes on with what `manifest` says of places that hold nothing. The peer's decoder must have
    /// been given the same one ([`ChannelDecoder::agree`](crate::ChannelDecoder::agree)); a channel
    /// adopts one only.
    pub fn adopt(&mut self, manifest: &Manifest) {
        // Both sides fill in what belongs to blocks that are defined.
        while self.define_up_to(BlockId(self.names.len() as u32)) {}
        self.program.adopt();
        self.places.fill(manifest, &self.names);
        self.adopted = true;
    }

    /// Takes the table of places out, at the end of the stream.
    pub fn take_table(&mut self) -> PlaceTable {
        PlaceTable {
            places: self.places.take(),
            names: std::mem::take(&mut self.names),
            hasher: self.hasher.clone(),
        }
    }

    /// Offset in the stream behind the last frame.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset - self.draft.raw_len as u64
    }

    /// Whether the stream has announced that it may switch to postcopy.
    #[must_use]
    pub fn postcopy_advised(&self) -> bool {
        self.parser.postcopy_advised()
    }

    /// Bytes of guest RAM that the stream announced, once it has.
    #[must_use]
    pub fn ram_total(&self) -> Option<u64> {
        self.parser.ram_total()
    }

    /// Bytes consumed that are not in a frame yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.draft.raw_len
    }

    /// The digest of the stream up to [`offset`](Self::offset).
    #[must_use]
    pub fn digest(&self) -> StreamDigest {
        self.settled
    }

    /// Whether the last candidate is the last byte consumed: a stream without device description
    /// ends so, see [`Decoder::candidate_is_last`].
    #[must_use]
    pub fn candidate_is_last(&self) -> bool {
        self.held && self.parser.candidate_is_last()
    }

    /// Takes bytes of the channel and makes at most one frame.
    ///
    /// Call again with what was not consumed as long as a frame or an event comes out or bytes are
    /// consumed. Bytes that are left then are the start of a piece: give them again with more behind
    /// them, or with [`Flush::Hard`]. `known` is what the peer holds and learns of the pages sent;
    /// `store` is our own store, which keeps them.
    ///
    /// # Errors
    /// When the compressor gets no memory. The channel cannot go on then.
    pub fn encode(
        &mut self,
        input: &[u8],
        flush: Flush,
        known: Option<&KnownPages>,
        store: Option<&dyn PageStore>,
    ) -> Result<Encoded, EncodeError> {
        let mut encoded = Encoded::default();
        let announced = self.announced.clone();
        let peer = Peer {
            known,
            announced: announced.as_deref(),
            store,
        };
        loop {
            let rest = &input[encoded.consumed..];
            let room = self.options.max_raw - self.draft.raw_len;
            let window = &rest[..rest.len().min(room)];
            let cut = window.len() < rest.len();
            match self.step(window, flush, cut) {
                Step::Piece { piece, raw } => {
                    encoded.consumed += raw.len();
                    self.take(piece, raw, peer);
                    if self.packer.len() >= self.options.batch_bytes {
                        break;
                    }
                }
                Step::Event(event) => {
                    encoded.events.push((self.offset, event));
                    if let Event::Commit(mark) = event {
                        self.held = mark == CommitMark::Candidate;
                        self.at_candidate = self.held;
                        break;
                    }
                }
                Step::NeedMore if cut => break,
                Step::NeedMore if flush == Flush::No => return Ok(encoded),
                Step::NeedMore => break,
            }
        }
        encoded.frame = self.finish(known)?;
        Ok(encoded)
    }

    /// The next piece in what still fits into the frame (`cut`: the input goes on behind that).
    fn step<'a>(&mut self, window: &'a [u8], flush: Flush, cut: bool) -> Step<'a> {
        if self.kind == ChannelKind::Opaque {
            let whole = window.len().min(self.options.batch_bytes.max(1));
            let raw = &window[..whole];
            let piece = Piece::Other(raw);
            return if raw.is_empty() {
                Step::NeedMore
            } else {
                Step::Piece { piece, raw }
            };
        }
        // A piece that does not fit into an empty frame has to go in parts.
        let part = cut && self.draft.raw_len == 0;
        match self.parser.step(window) {
            Step::NeedMore if part || flush == Flush::Hard && !cut => self.parser.flush(window),
            step => step,
        }
    }

    fn take(&mut self, piece: Piece<'_>, raw: &[u8], peer: Peer<'_>) {
        if self.draft.raw_len == 0 {
            self.draft.held_from_start = self.at_candidate;
            self.at_candidate = false;
        }
        if self.offset == 0 && self.kind == ChannelKind::Opaque {
            self.chunks = !raw.starts_with(&TLS_HELLO);
        }
        self.draft.raw_len += raw.len();
        self.offset += raw.len() as u64;
        match piece {
            Piece::Page {
                block,
                offset,
                named,
                data,
            } if let Ok(data) = data.try_into()
                && self.define_up_to(block) =>
            {
                let header = &raw[..raw.len() - PAGE_SIZE];
                self.digest.bytes(header);
                let place = Cursor {
                    block: block.0,
                    offset,
                    named,
                };
                self.take_page(place, data, peer);
            }
            Piece::ZeroRun {
                block,
                offset,
                named,
                count,
            } if self.parser.page_size() == PAGE_SIZE && self.define_up_to(block) => {
                self.digest.bytes(raw);
                let place = Cursor {
                    block: block.0,
                    offset,
                    named,
                };
                self.program.records(Run::Zero, place, u64::from(count));
                self.places.clear(place.into(), u64::from(count));
                self.draft.stats.zero_pages += count;
            }
            _ => {
                self.draft.stats.opaque_bytes += raw.len() as u32;
                self.take_other(raw, peer);
            }
        }
    }

    fn take_other(&mut self, raw: &[u8], peer: Peer<'_>) {
        let mut rest = raw;
        if self.chunks && raw.len() >= MIN_STRETCH {
            while rest.len() >= MIN_CHUNK {
                let (chunk, behind) = rest.split_at(chunk::cut(rest));
                let id = self.hasher.id(chunk);
                self.digest.page(&id);
                let is_known = peer.holds(&id.short());
                if is_known {
                    self.draft.refer(id, chunk);
                } else {
                    self.packer.push(chunk);
                    self.draft.keep(&id, chunk, &self.hasher, peer);
                }
                self.program.chunk(is_known, chunk.len());
                self.draft.stats.opaque_ref_bytes += if is_known { chunk.len() as u32 } else { 0 };
                rest = behind;
            }
        }
        if !rest.is_empty() {
            self.digest.bytes(rest);
            self.program.other(rest.len() as u64);
            self.packer.push(rest);
        }
    }

    fn take_page(&mut self, at: Cursor, data: &[u8; PAGE_SIZE], peer: Peer<'_>) {
        let place = Place::from(at);
        let draft = &mut self.draft;
        if self.hasher.is_zero(data) {
            self.digest.page(&self.hasher.zero_id());
            self.places.clear(place, 1);
            self.program.records(Run::ZeroData, at, 1);
            draft.stats.zero_pages += 1;
            return;
        }
        let id = self.hasher.id(data);
        self.digest.page(&id);
        let short = id.short();
        if self.search.goes_on()
            && let Some(name) = self.names.get(place.block as usize)
        {
            self.search.look(name, place.page, &short);
        }
        let held = self.places.get(place);
        self.similar.prepare(self.parser.ram_total().unwrap_or(0));
        let stored = peer.place_of(&short);
        if stored.is_some() || peer.knows(&short) {
            if held == Some(short) {
                draft.retain(id, data, None);
                draft.stats.same_pages += 1;
                self.program.records(Run::Same, at, 1);
                if self.adopted {
                    self.similar.note(&Features::of(place, data), place);
                }
                return;
            }
            draft.stats.ref_pages += 1;
            if let Some(stored) = stored {
                draft.retain(id, data, None);
                self.program.stored(at, stored, &short);
            } else {
                draft.refer(id, data);
                self.program.records(Run::Reference, at, 1);
            }
        } else {
            draft.keep(&id, data, &self.hasher, peer);
            self.take_new(at, held, data, peer);
        }
        if self.places.set(place, short) {
            self.similar.note(&Features::of(place, data), place);
        }
    }

    /// Adds a page whose contents the peer does not hold: as a change of what its place held, or of
    /// a similar page, or as it is.
    fn take_new(
        &mut self,
        at: Cursor,
        held: Option<ShortId>,
        data: &[u8; PAGE_SIZE],
        peer: Peer<'_>,
    ) {
        let place = Place::from(at);
        let draft = &mut self.draft;
        let hasher = &self.hasher;
        self.reliance.on_new_page();
        if let Some(held) = held
            && let Some(length) =
                draft.change(Old::OfPlace, &held, data, hasher, peer, &mut self.packer)
        {
            draft.stats.delta_pages += 1;
            draft.stats.delta_bytes += length;
            self.program.records(Run::Delta, at, 1);
        } else if self.packer.compresses()
            && self.reliance.is_justified()
            && let Some(page) = self.similar.find(&Features::of(place, data))
            && page != place.page
            && let Some(held) = self.places.get(Place { page, ..place })
            && let Some(length) =
                draft.change(Old::Similar, &held, data, hasher, peer, &mut self.packer)
        {
            self.reliance.on_sent();
            draft.stats.similar_pages += 1;
            draft.stats.similar_bytes += length;
            let distance = page.wrapping_sub(place.page).cast_signed();
            self.program.similar(at, distance);
        } else {
            self.packer.push(data);
            draft.stats.batch_pages += 1;
            self.program.records(Run::New, at, 1);
        }
    }

    /// Tells the peer the names of all blocks up to `block`. False when a name is not known.
    fn define_up_to(&mut self, block: BlockId) -> bool {
        while self.names.len() as u64 <= u64::from(block.0) {
            let next = BlockId(self.names.len() as u32);
            let Some(name) = self.parser.block_name(next) else {
                return false;
            };
            self.program.define(name);
            self.names.push(name.into());
        }
        true
    }

    /// Ends the frame, if there is anything in it.
    fn finish(&mut self, known: Option<&KnownPages>) -> Result<Option<Frame>, EncodeError> {
        let draft = &mut self.draft;
        if draft.raw_len == 0 {
            return Ok(None);
        }
        self.settled = self.digest.settle();
        let literal_len = self.packer.len();
        let packed = self.packer.pack().map_err(|_| EncodeError)?;
        let (zstd, literals) = match packed {
            Packed::Stored(literals) => (false, literals),
            Packed::Zstd(literals) => (true, literals),
        };
        let sections = Sections {
            raw_len: draft.raw_len,
            digest: self.settled,
            program: self.program.finish(),
            ids: &draft.ids,
            literal_len,
            zstd,
            literals,
        };
        let mut retained = std::mem::take(&mut draft.retained);
        draft.retained_hint = retained.len();
        retained.trim();
        draft.stats.id_bytes = draft.ids.len() as u32;
        draft.stats.literal_bytes = literal_len as u32;
        draft.stats.compressed_bytes = literals.len() as u32;
        draft.stats.stored_bytes = if zstd { 0 } else { literal_len as u32 };
        let frame = Frame {
            payload: sections.write(&mut draft.head),
            raw_len: draft.raw_len as u32,
            retained,
            held_from_start: draft.held_from_start,
            stats: draft.stats,
        };
        if let Some(known) = known {
            draft.new.iter().for_each(|id| known.insert(id));
        }
        self.similar.enter();
        self.program.clear();
        self.packer.next_frame();
        draft.clear();
        Ok(Some(frame))
    }
}

/// What there is to refer to.
#[derive(Clone, Copy)]
struct Peer<'a> {
    /// What the peer is believed to hold.
    known: Option<&'a KnownPages>,
    /// What it has announced.
    announced: Option<&'a Announced>,
    /// What we hold ourselves.
    store: Option<&'a dyn PageStore>,
}

impl Peer<'_> {
    fn knows(&self, id: &ShortId) -> bool {
        self.known.is_some_and(|known| known.contains(id))
    }

    /// Where the peer has announced the page to be.
    fn place_of(&self, id: &ShortId) -> Option<AnnouncedPlace> {
        self.announced.and_then(|announced| announced.find(id))
    }

    fn holds(&self, id: &ShortId) -> bool {
        self.knows(id) || self.place_of(id).is_some()
    }
}

impl Draft {
    /// Adds contents as a reference.
    fn refer(&mut self, id: PageId, contents: &[u8]) {
        self.ids.extend_from_slice(id.short().as_bytes());
        self.retain(id, contents, None);
    }

    /// Notes contents that the frame brings in any form. Our own store gets them at once, while they
    /// are in the processor's caches.
    fn keep(&mut self, id: &PageId, contents: &[u8], hasher: &Hasher, peer: Peer<'_>) {
        if let Some(store) = peer.store {
            store.put(hasher.domain(), id, contents);
        }
        self.new.push(id.short());
    }

    /// Contents that the receiver may have to ask for, perhaps as the old page of a delta.
    fn retain(&mut self, id: PageId, contents: &[u8], old: Option<Old>) {
        if self.retained.is_empty() {
            self.retained.reserve(self.retained_hint);
        }
        self.retained.push(id, contents, old);
    }

    /// Adds a page as a delta from the page `held`, if both sides have that and it is similar enough.
    /// Returns the delta's length.
    fn change(
        &mut self,
        kind: Old,
        held: &ShortId,
        page: &[u8; PAGE_SIZE],
        hasher: &Hasher,
        peer: Peer<'_>,
        packer: &mut Packer,
    ) -> Option<u32> {
        let store = peer.store.filter(|_| peer.holds(held))?;
        let mut old = [0; PAGE_SIZE];
        let (length, most) = match kind {
            Old::OfPlace => (store.get(held, &mut old), MAX_DELTA),
            Old::Similar => (store.get_at_once(held, &mut old), MAX_DELTA_FROM_SIMILAR),
        };
        self.delta.clear();
        if length != Some(PAGE_SIZE) || !delta::write(&old, page, most, &mut self.delta) {
            return None;
        }
        // Our store may be wrong as well, and a delta from another page would end the migration.
        let id = hasher.id(&old);
        if id.short() != *held {
            store.remove(held);
            return None;
        }
        packer.push(&self.delta);
        self.retain(id, &old, Some(kind));
        Some(self.delta.len() as u32)
    }

    fn clear(&mut self) {
        self.raw_len = 0;
        self.ids.clear();
        self.new.clear();
        self.held_from_start = false;
        self.stats = FrameStats::default();
    }
}

impl std::fmt::Debug for ChannelEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelEncoder")
            .field("kind", &self.kind)
            .field("offset", &self.offset())
            .finish_non_exhaustive()
    }
}
