//! The pipeline of a gateway pair on one stream, in one process and on one thread, without network.
//!
//! Encoder and decoder are compared with a *bare loop* over the same pages: zero check, BLAKE3 and
//! zstd level 1 in batches of 128 KiB, which is the least that any such gateway has to do. The runs
//! alternate, so that a machine that gets slower does so for all.

use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

use skyferry_core::Piece;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_core::qemu::{Decoder, Step};
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeError,
    EncodeOptions, Flush, Frame, FrameStats, Hasher, KnownPages, MemoryStore, PAGE_SIZE,
};
use zstd_safe::CCtx;

/// What the bare loop compresses at once.
const BARE_BATCH: usize = 128 * 1024;
const BARE_LEVEL: i32 = 1;

/// How much of the stream the encoder gets to see at once, like a socket's buffer.
const READ: usize = 512 * 1024;

/// Stores of both sides: a stream's pages repeat within this.
const STORE_BYTES: u64 = 256 << 20;

/// What a pipeline does on one stream. Speeds are in 10^6 bytes of the stream per second.
#[derive(Debug, Clone, Copy)]
pub struct PipelineFigures {
    /// The encoder, from bytes to frames.
    pub encode_mb_s: f64,
    /// The bare loop.
    pub bare_mb_s: f64,
    /// The decoder, from frames to verified bytes.
    pub decode_mb_s: f64,
    /// Bytes of the stream per byte of all frames.
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
    /// Speed of the encoder in terms of the bare loop.
    #[must_use]
    pub fn encode_to_bare(&self) -> f64 {
        self.encode_mb_s / self.bare_mb_s
    }
}

impl fmt::Display for PipelineFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "encode {:.0} MB/s ({:.2} of the bare loop's {:.0}), decode {:.0} MB/s, {} wire bytes \
             (1/{:.2}; bare loop {}), {:.1} bytes of frame per page; pages: {} zero, {} known, {} new",
            self.encode_mb_s,
            self.encode_to_bare(),
            self.bare_mb_s,
            self.decode_mb_s,
            self.wire_bytes,
            self.ratio,
            self.bare_bytes,
            self.overhead_per_page,
            self.pages.zero_pages,
            self.pages.ref_pages,
            self.pages.batch_pages,
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
    let key = DomainKey::derive(b"benchmark", "");
    let pages = pages(stream);
    let mut times = [const { Vec::new() }; 3];
    let mut last = None;
    for _ in 0..runs.max(1) {
        let start = Instant::now();
        let bare_bytes = bare_loop(&pages, &key);
        times[0].push(start.elapsed());

        let start = Instant::now();
        let frames = encode(stream, &key, options)?;
        times[1].push(start.elapsed());

        times[2].push(decode(&frames, stream, &key));
        last = Some((bare_bytes, frames));
    }
    let [bare, encode, decode] = times.map(|times| stream.len() as f64 / 1e6 / median(times));
    let (bare_bytes, frames) = last.unwrap_or_default();
    let mut pages = FrameStats::default();
    for frame in &frames {
        pages.zero_pages += frame.stats.zero_pages;
        pages.ref_pages += frame.stats.ref_pages;
        pages.batch_pages += frame.stats.batch_pages;
        pages.opaque_bytes += frame.stats.opaque_bytes;
    }
    let wire_bytes: usize = frames.iter().map(|frame| frame.payload.len()).sum();
    let literals: u64 = frames
        .iter()
        .map(|frame| u64::from(frame.stats.compressed_bytes))
        .sum();
    let overhead = wire_bytes as f64 - literals as f64;
    Ok(PipelineFigures {
        encode_mb_s: encode,
        bare_mb_s: bare,
        decode_mb_s: decode,
        ratio: stream.len() as f64 / wire_bytes as f64,
        wire_bytes: wire_bytes as u64,
        bare_bytes,
        overhead_per_page: overhead / f64::from((pages.ref_pages + pages.batch_pages).max(1)),
        pages,
    })
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times
        .get(times.len() / 2)
        .copied()
        .unwrap_or_default()
        .as_secs_f64()
}

/// The contents of all page records of a stream.
fn pages(mut stream: &[u8]) -> Vec<&[u8]> {
    let mut decoder = Decoder::new();
    let mut pages = Vec::new();
    loop {
        match decoder.flush(&stream[..stream.len().min(READ)]) {
            Step::Piece { piece, raw } => {
                if let Piece::Page { data, .. } = piece {
                    // The piece borrows from a part of the stream; the page lies at the record's end.
                    pages.push(&stream[raw.len() - data.len()..raw.len()]);
                }
                stream = &stream[raw.len()..];
            }
            Step::Event(_) => {}
            Step::NeedMore => return pages,
        }
    }
}

/// Returns the number of bytes after compression.
fn bare_loop(pages: &[&[u8]], key: &DomainKey) -> u64 {
    let hasher = Hasher::new(key);
    let mut context = CCtx::create();
    let mut batch = Vec::with_capacity(BARE_BATCH);
    let mut out = vec![0; zstd_safe::compress_bound(BARE_BATCH)];
    let mut total = 0;
    let mut compress = |batch: &mut Vec<u8>| {
        let written = context
            .compress(&mut out[..], batch, BARE_LEVEL)
            .unwrap_or(0);
        batch.clear();
        total += written as u64;
    };
    for page in pages {
        if hasher.is_zero(page) {
            continue;
        }
        black_box(blake3::keyed_hash(key.as_bytes(), page));
        batch.extend_from_slice(page);
        if batch.len() + PAGE_SIZE > BARE_BATCH {
            compress(&mut batch);
        }
    }
    compress(&mut batch);
    total
}

fn encode(
    stream: &[u8],
    key: &DomainKey,
    options: EncodeOptions,
) -> Result<Vec<Frame>, EncodeError> {
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, key, options);
    let known = KnownPages::new(STORE_BYTES / PAGE_SIZE as u64);
    let store = MemoryStore::new(STORE_BYTES);
    let mut frames = Vec::new();
    let mut at = 0;
    while at < stream.len() || encoder.pending() > 0 {
        let end = stream.len().min(at + READ);
        let flush = if end == stream.len() {
            Flush::Hard
        } else {
            Flush::No
        };
        let encoded = encoder.encode(&stream[at..end], flush, Some(&known), Some(&store))?;
        at += encoded.consumed;
        frames.extend(encoded.frame);
    }
    Ok(frames)
}

fn decode(frames: &[Frame], stream: &[u8], key: &DomainKey) -> Duration {
    let limits = DecodeLimits {
        max_window_log: 27,
        ..DecodeLimits::default()
    };
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, key, limits);
    let store = MemoryStore::new(STORE_BYTES);
    let mut at = 0;
    let mut time = Duration::ZERO;
    for frame in frames {
        let start = Instant::now();
        let mut pending = decoder
            .begin(&frame.payload, &store)
            .expect("our own frame");
        for index in pending.missing().to_vec() {
            // The sender's idea of the store may be larger than the store: serve the miss.
            let page = frame
                .retained
                .page(index)
                .expect("every reference is retained");
            pending
                .fill(index, page)
                .expect("the page that was referred to");
        }
        let finished = decoder.finish(&mut pending, &store).expect("our own frame");
        time += start.elapsed();
        let end = at + finished.bytes.len();
        assert!(
            stream.get(at..end) == Some(&finished.bytes[..]),
            "decoded bytes differ at {at}"
        );
        at = end;
        decoder.recycle(finished.bytes);
    }
    assert_eq!(at, stream.len(), "decoded length");
    time
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
        assert!(figures.encode_mb_s > 0.0 && figures.decode_mb_s > 0.0 && figures.bare_mb_s > 0.0);
        assert!(figures.pages.zero_pages > 0 && figures.pages.ref_pages > 0);
    }
}
