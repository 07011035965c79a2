//! The pipeline of a gateway pair on one stream, in one process and on one thread, without network.
//!
//! The stream passes twice. The first time its pages are *new*: encoder and decoder are compared with
//! a *bare loop* over the same pages, zero check, BLAKE3 and zstd level 1 in batches of 128 KiB, which
//! is the least that any such gateway has to do. The second time (another migration on the same
//! gateways) all pages are *known*, and the bare loop is BLAKE3 alone. All three take turns every few
//! MiB, so that a machine that is slow for a while is so for all, and what is measured is the thread's
//! processor time, so that other work on the machine counts little. The stores of both sides are full
//! from the start, as after some time of operation: memory that the kernel has yet to hand out would
//! cost more than a page's way through the codec.
//!
//! In a program with [`CountingAllocator`](crate::allocations::CountingAllocator) allocations are
//! counted, too, from the middle of the first passage on: until then buffers grow. There may be so many
//! for each frame, whatever the number of its pages.

use std::fmt;
use std::hint::black_box;
use std::time::Duration;

use skyferry_core::Piece;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_core::qemu::{Decoder, Step};
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeError,
    EncodeOptions, Flush, Frame, FrameStats, Hasher, KnownPages, MemoryStore, PAGE_SIZE, PageStore,
};
use zstd_safe::CCtx;

use crate::allocations;
use skyferry_tests::bars::Bars;

/// What the bare loop compresses at once.
const BARE_BATCH: usize = 128 * 1024;
const BARE_LEVEL: i32 = 1;

/// How much of the stream the encoder gets to see at once, like a socket's buffer.
const READ: usize = 512 * 1024;

/// Bytes of the stream after which the bare loop has its turn.
const TURN: usize = 8 << 20;

/// What the bars say: encoding new pages against the bare loop (both at zstd level 1), encoding known
/// ones against BLAKE3, decoding new ones against encoding them.
pub const NEW_TO_BARE: f64 = 0.75;
/// See [`NEW_TO_BARE`].
pub const KNOWN_TO_BARE: f64 = 0.6;
/// See [`NEW_TO_BARE`].
pub const DECODE_TO_ENCODE: f64 = 1.5;

/// Allocations of the encoder for each frame: the payload with its shared count; retained contents, ids
/// and ends, made and cut to size; now and then an event, a place's table or a store's slab.
pub const ENCODE_ALLOCATIONS: f64 = 9.0;
/// Allocations of the decoder for each frame: the list of what is missing, and what is kept of places.
pub const DECODE_ALLOCATIONS: f64 = 6.0;

/// Speeds of one passage, in 10^6 bytes of the stream per second of processor time.
#[derive(Debug, Clone, Copy)]
pub struct Speeds {
    /// The encoder, from bytes to frames.
    pub encode_mb_s: f64,
    /// The decoder, from frames to verified bytes.
    pub decode_mb_s: f64,
    /// The bare loop.
    pub bare_mb_s: f64,
    /// What encoder and decoder allocate for each frame; not a number where nobody counts.
    pub allocations_per_frame: [f64; 2],
}

impl Speeds {
    /// Speed of the encoder in terms of the bare loop.
    #[must_use]
    pub fn encode_to_bare(&self) -> f64 {
        self.encode_mb_s / self.bare_mb_s
    }

    /// Speed of the decoder in terms of the encoder.
    #[must_use]
    pub fn decode_to_encode(&self) -> f64 {
        self.decode_mb_s / self.encode_mb_s
    }
}

impl fmt::Display for Speeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "encode {:.0} MB/s ({:.2} of the bare loop's {:.0}), decode {:.0} MB/s",
            self.encode_mb_s,
            self.encode_to_bare(),
            self.bare_mb_s,
            self.decode_mb_s,
        )
    }
}

/// What a pipeline does on one stream.
#[derive(Debug, Clone, Copy)]
pub struct PipelineFigures {
    /// The stream for the first time.
    pub new: Speeds,
    /// The same stream once more, with all its pages known; the bare loop is BLAKE3.
    pub known: Speeds,
    /// Bytes of the stream per byte of all frames, like all that follows for the first time.
    pub ratio: f64,
    /// Bytes of all frames.
    pub wire_bytes: u64,
    /// What the bare loop compressed the pages to, with nothing to put them in order again.
    pub bare_bytes: u64,
    /// Bytes of all frames that are not literals, for each page that is not zero.
    pub overhead_per_page: f64,
    /// Pages by their way, over all frames.
    pub pages: FrameStats,
}

impl PipelineFigures {
    /// Speed of the encoder on new pages in terms of the bare loop.
    #[must_use]
    pub fn encode_to_bare(&self) -> f64 {
        self.new.encode_to_bare()
    }

    /// Adds the bars. Meaningful at zstd level 1, the level of the bare loop.
    pub fn add_bars(&self, bars: &mut Bars) {
        let Self { new, known, .. } = self;
        bars.at_least(
            "encoding known pages / bare BLAKE3",
            known.encode_to_bare(),
            KNOWN_TO_BARE,
            "x",
        );
        bars.at_least(
            "encoding new pages / bare zero check + BLAKE3 + zstd 1",
            new.encode_to_bare(),
            NEW_TO_BARE,
            "x",
        );
        bars.at_least(
            "decoding new pages / encoding them",
            new.decode_to_encode(),
            DECODE_TO_ENCODE,
            "x",
        );
        let names = [
            "allocations a frame, none by the page: encoding new ones",
            "allocations a frame, none by the page: decoding new ones",
            "allocations a frame, none by the page: encoding known ones",
            "allocations a frame, none by the page: decoding known ones",
        ];
        let per_frame = [new, known].map(|speeds| speeds.allocations_per_frame);
        let bounds = [ENCODE_ALLOCATIONS, DECODE_ALLOCATIONS].into_iter().cycle();
        for ((name, figure), bound) in names.iter().zip(per_frame.as_flattened()).zip(bounds) {
            bars.at_most(name, *figure, bound, "");
        }
    }
}

impl fmt::Display for PipelineFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = &self.pages;
        write!(
            f,
            "{}, {} wire bytes (1/{:.2}; bare loop {}), {:.1} bytes of frame per page; pages: {} zero, \
             {} same, {} known, {} deltas of {} bytes, {} similar of {} bytes, {} new\n    again: {}",
            self.new,
            self.wire_bytes,
            self.ratio,
            self.bare_bytes,
            self.overhead_per_page,
            pages.zero_pages,
            pages.same_pages,
            pages.ref_pages,
            pages.delta_pages,
            pages.delta_bytes,
            pages.similar_pages,
            pages.similar_bytes,
            pages.batch_pages,
            self.known,
        )
    }
}

/// A stream for when none was recorded: made-up guest of 64 MiB, half of it zero, three rounds.
#[must_use]
pub fn synthetic_stream() -> Vec<u8> {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", 16_384)])
        .rounds(3)
        .build()
        .bytes
}

/// Measures the pipeline on a stream as a main channel carries it; the median of `runs` runs.
///
/// # Errors
/// When the compressor gets no memory.
///
/// # Panics
/// When what was decoded is not the stream.
pub fn measure(
    stream: &[u8],
    options: EncodeOptions,
    runs: usize,
) -> Result<PipelineFigures, EncodeError> {
    let pages = pages(stream);
    let mut times = [const { Vec::new() }; 6];
    let (mut carried, mut again) = (Carried::default(), Carried::default());
    for _ in 0..runs.max(1) {
        let gateways = Gateways::new(pages.len());
        let mut bare = BareLoop::new(&pages, &gateways.key, true);
        carried = carry(stream, &gateways, &mut bare, options)?;
        let mut bare = BareLoop::new(&pages, &gateways.key, false);
        again = carry(stream, &gateways, &mut bare, options)?;
        for (at, carried) in [(0, &carried), (3, &again)] {
            times[at].push(carried.bare);
            times[at + 1].push(carried.encoding);
            times[at + 2].push(carried.decoding);
        }
    }
    let speeds = times.map(|times| stream.len() as f64 / 1e6 / median(times));
    let speeds = |at: usize, carried: &Carried| Speeds {
        bare_mb_s: speeds[at],
        encode_mb_s: speeds[at + 1],
        decode_mb_s: speeds[at + 2],
        allocations_per_frame: carried.allocations_per_frame(),
    };
    let overhead = (carried.wire_bytes - carried.literals) as f64;
    let sent = carried.pages.ref_pages + carried.pages.batch_pages;
    Ok(PipelineFigures {
        new: speeds(0, &carried),
        known: speeds(3, &again),
        ratio: stream.len() as f64 / carried.wire_bytes as f64,
        wire_bytes: carried.wire_bytes,
        bare_bytes: carried.bare_bytes,
        overhead_per_page: overhead / f64::from(sent.max(1)),
        pages: carried.pages,
    })
}

/// What two gateways keep from one migration to the next.
struct Gateways {
    key: DomainKey,
    known: KnownPages,
    near: MemoryStore,
    far: MemoryStore,
}

impl Gateways {
    /// With room for this many pages of a stream, and full of others.
    fn new(pages: usize) -> Self {
        let pages = pages as u64 * 9 / 8 + 1024;
        let store = || MemoryStore::new(pages * (PAGE_SIZE as u64 + 64));
        let gateways = Self {
            key: DomainKey::derive(b"benchmark", ""),
            known: KnownPages::new(pages),
            near: store(),
            far: store(),
        };
        let other = DomainKey::derive(b"benchmark", "another tenant");
        let hasher = Hasher::new(&other);
        let mut page = [1; PAGE_SIZE];
        for number in 0..pages * 5 / 4 {
            page[..8].copy_from_slice(&number.to_le_bytes());
            let id = hasher.id(&page[..8]);
            for store in [&gateways.near, &gateways.far] {
                store.put(&other.id(), &id, &page);
            }
            gateways.known.insert(&id.short());
        }
        gateways
    }
}

/// Processor time of this thread so far.
#[expect(unsafe_code, reason = "the standard library does not know this clock")]
pub(crate) fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes to `time`, which lives through it, and to nothing else.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "every Linux has this clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times
        .get(times.len() / 2)
        .copied()
        .unwrap_or_default()
        .as_secs_f64()
}

/// Contents of a page record.
struct Page<'a> {
    /// Where the record ends in the stream.
    end: usize,
    data: &'a [u8],
}

/// Contents of all page records of a stream.
#[must_use]
pub fn page_contents(stream: &[u8]) -> Vec<&[u8]> {
    pages(stream).into_iter().map(|page| page.data).collect()
}

/// All page records of a stream.
fn pages(stream: &[u8]) -> Vec<Page<'_>> {
    let mut decoder = Decoder::new();
    let mut pages = Vec::new();
    let mut at = 0;
    loop {
        match decoder.flush(&stream[at..stream.len().min(at + READ)]) {
            Step::Piece { piece, raw } => {
                at += raw.len();
                if let Piece::Page { data, .. } = piece {
                    pages.push(Page { end: at, data });
                }
            }
            Step::Event(_) => {}
            Step::NeedMore => return pages,
        }
    }
}

/// Zero check, hash, compression, and nothing else; or hashes of pages that are not zero alone.
struct BareLoop<'a> {
    pages: &'a [Page<'a>],
    key: &'a DomainKey,
    hasher: Hasher,
    context: CCtx<'static>,
    batch: Vec<u8>,
    out: Vec<u8>,
    compressing: bool,
    /// Bytes after compression.
    bytes: u64,
}

impl<'a> BareLoop<'a> {
    fn new(pages: &'a [Page<'a>], key: &'a DomainKey, compressing: bool) -> Self {
        Self {
            pages,
            key,
            hasher: Hasher::new(key),
            context: CCtx::create(),
            batch: Vec::with_capacity(BARE_BATCH),
            out: vec![0; zstd_safe::compress_bound(BARE_BATCH)],
            compressing,
            bytes: 0,
        }
    }

    /// Goes on up to this position in the stream.
    fn run_to(&mut self, end: usize) {
        let turn = self.pages.iter().take_while(|page| page.end <= end).count();
        let (turn, rest) = self.pages.split_at(turn);
        self.pages = rest;
        for page in turn {
            if self.hasher.is_zero(page.data) {
                continue;
            }
            black_box(blake3::keyed_hash(self.key.as_bytes(), page.data));
            if !self.compressing {
                continue;
            }
            self.batch.extend_from_slice(page.data);
            if self.batch.len() + PAGE_SIZE > BARE_BATCH {
                self.compress();
            }
        }
        if rest.is_empty() && !self.batch.is_empty() {
            self.compress();
        }
    }

    fn compress(&mut self) {
        let written = self
            .context
            .compress(&mut self.out[..], &self.batch, BARE_LEVEL);
        self.bytes += written.unwrap_or(0) as u64;
        self.batch.clear();
    }
}

/// What a stream came to on its way through encoder and decoder.
#[derive(Debug, Default)]
struct Carried {
    bare: Duration,
    bare_bytes: u64,
    encoding: Duration,
    decoding: Duration,
    wire_bytes: u64,
    /// Those of them that are literals.
    literals: u64,
    pages: FrameStats,
    /// Frames of the second half, and what encoder and decoder allocated for them.
    late_frames: u64,
    allocations: [u64; 2],
}

fn carry(
    stream: &[u8],
    gateways: &Gateways,
    bare: &mut BareLoop<'_>,
    options: EncodeOptions,
) -> Result<Carried, EncodeError> {
    let Gateways {
        key,
        known,
        near,
        far,
    } = gateways;
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, key, options);
    let limits = DecodeLimits {
        max_window_log: 27,
        ..DecodeLimits::default()
    };
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, key, limits);
    let mut carried = Carried::default();
    let mut frames = Vec::new();
    let (mut at, mut out, mut turn) = (0, 0, 0);
    while turn < stream.len() {
        turn = stream.len().min(turn + TURN);
        let start = cpu_time();
        bare.run_to(turn);
        carried.bare += cpu_time() - start;

        // Encoder and decoder are on different machines in life: neither is to find its tables
        // displaced from the caches by the other after each frame.
        let late = turn > stream.len() / 2;
        let before = allocations::count();
        let start = cpu_time();
        while at < turn || turn == stream.len() && encoder.pending() > 0 {
            let end = stream.len().min(at + READ);
            let flush = if end == stream.len() {
                Flush::Hard
            } else {
                Flush::No
            };
            let encoded = encoder.encode(&stream[at..end], flush, Some(known), Some(near))?;
            at += encoded.consumed;
            frames.extend(encoded.frame);
        }
        carried.encoding += cpu_time() - start;
        if late {
            carried.allocations[0] += allocations::count() - before;
            carried.late_frames += frames.len() as u64;
        }

        for frame in frames.drain(..) {
            let before = allocations::count();
            let start = cpu_time();
            let bytes = decode(&frame, &mut decoder, far);
            carried.decoding += cpu_time() - start;
            if late {
                carried.allocations[1] += allocations::count() - before;
            }
            assert!(
                stream.get(out..out + bytes.len()) == Some(&bytes[..]),
                "decoded bytes at {out}"
            );
            out += bytes.len();
            decoder.recycle(bytes);
            carried.count(&frame);
        }
    }
    assert_eq!(out, stream.len(), "decoded length");
    carried.bare_bytes = bare.bytes;
    Ok(carried)
}

fn decode(frame: &Frame, decoder: &mut ChannelDecoder, store: &MemoryStore) -> Vec<u8> {
    let mut pending = decoder.begin(&frame.payload, store).expect("our own frame");
    for index in pending.missing().to_vec() {
        // What the sender believes may be more than the store can hold: serve the miss.
        let page = frame
            .retained
            .page(index)
            .expect("every reference is retained");
        pending
            .fill(index, page)
            .expect("the page that was referred to");
    }
    decoder
        .finish(&mut pending, store)
        .expect("our own frame")
        .bytes
}

impl Carried {
    fn allocations_per_frame(&self) -> [f64; 2] {
        if !allocations::are_counted() {
            return [f64::NAN; 2];
        }
        self.allocations
            .map(|count| count as f64 / self.late_frames as f64)
    }

    fn count(&mut self, frame: &Frame) {
        self.wire_bytes += frame.payload.len() as u64;
        self.literals += u64::from(frame.stats.compressed_bytes);
        self.pages.zero_pages += frame.stats.zero_pages;
        self.pages.same_pages += frame.stats.same_pages;
        self.pages.ref_pages += frame.stats.ref_pages;
        self.pages.delta_pages += frame.stats.delta_pages;
        self.pages.delta_bytes += frame.stats.delta_bytes;
        self.pages.similar_pages += frame.stats.similar_pages;
        self.pages.similar_bytes += frame.stats.similar_bytes;
        self.pages.batch_pages += frame.stats.batch_pages;
        self.pages.opaque_bytes += frame.stats.opaque_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_made_up_stream_make_sense() {
        let stream = synthetic_stream();
        let figures = measure(&stream, EncodeOptions::default(), 1).unwrap();
        assert!(figures.ratio > 1.5);
        assert!(figures.overhead_per_page < 20.0);
        for speeds in [figures.new, figures.known] {
            assert!(speeds.encode_mb_s > 0.0 && speeds.decode_mb_s > 0.0 && speeds.bare_mb_s > 0.0);
        }
        assert!(figures.pages.zero_pages > 0 && figures.pages.ref_pages > 0);
        assert!(figures.pages.delta_pages > 0);
    }
}
