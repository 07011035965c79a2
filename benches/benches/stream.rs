//! Micro-benchmarks of the steps that a stream's bytes go through, on the stream of a real guest.
//!
//! `cargo xtask bench micro` records a guest if need be and runs these; `SKYFERRY_STREAM` names another
//! recording. Without it a made-up stream is used, whose pages are too much alike to say anything about
//! compression.

use std::env;
use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::BytesCount;
use skyferry_benches::pipeline::{page_contents, synthetic_stream};
use skyferry_core::qemu::{Decoder, Step};
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions, Flush,
    Frame, Hasher, KnownPages, MemoryStore, PAGE_SIZE, PageId, PageStore,
};

/// Of a recording, no more than this: enough for all windows to be full.
const MOST: u64 = 64 << 20;

/// What a gateway sees of the stream at once.
const READ: usize = 512 << 10;

static STREAM: LazyLock<Vec<u8>> = LazyLock::new(|| match env::var_os("SKYFERRY_STREAM") {
    None => synthetic_stream(),
    Some(path) => {
        let mut stream = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MOST).read_to_end(&mut stream))
            .unwrap_or_else(|e| panic!("SKYFERRY_STREAM={}: {e}", path.display()));
        stream
    }
});

static KEY: LazyLock<DomainKey> = LazyLock::new(|| DomainKey::derive(b"micro-benchmark", ""));

/// Contents of all pages of the stream.
static PAGES: LazyLock<Vec<&'static [u8]>> = LazyLock::new(|| page_contents(&STREAM));

fn main() {
    println!("{} bytes of stream, {} pages", STREAM.len(), PAGES.len());
    divan::main();
}

/// Telling the pieces of the stream apart.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn parse(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::new(STREAM.len())).bench(|| {
        let mut decoder = Decoder::new();
        let mut at = 0;
        loop {
            match decoder.flush(&STREAM[at..STREAM.len().min(at + READ)]) {
                Step::Piece { piece, raw } => {
                    black_box(&piece);
                    at += raw.len();
                }
                Step::Event(_) => {}
                Step::NeedMore => break at,
            }
        }
    });
}

/// Looking for pages of zeroes.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn zero_check(bencher: Bencher<'_, '_>) {
    let hasher = Hasher::new(&KEY);
    bencher
        .counter(BytesCount::new(PAGES.len() * PAGE_SIZE))
        .bench(|| PAGES.iter().filter(|page| hasher.is_zero(page)).count());
}

/// The identity of every page.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn identity(bencher: Bencher<'_, '_>) {
    let hasher = Hasher::new(&KEY);
    bencher
        .counter(BytesCount::new(PAGES.len() * PAGE_SIZE))
        .bench_local(|| {
            for page in PAGES.iter() {
                black_box(hasher.id(page));
            }
        });
}

fn store_of_all() -> MemoryStore {
    MemoryStore::new((PAGES.len() as u64 + 1024) * (PAGE_SIZE as u64 + 64))
}

fn identities() -> Vec<PageId> {
    let hasher = Hasher::new(&KEY);
    PAGES.iter().map(|page| hasher.id(page)).collect()
}

/// Into the store in memory, which has all its memory already.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn memory_store_put(bencher: Bencher<'_, '_>) {
    let (store, ids, domain) = (store_of_all(), identities(), KEY.id());
    let put = || {
        for (id, page) in ids.iter().zip(PAGES.iter()) {
            store.put(&domain, id, page);
        }
    };
    put();
    bencher
        .counter(BytesCount::new(PAGES.len() * PAGE_SIZE))
        .with_inputs(|| {
            for id in &ids {
                store.remove(&id.short());
            }
        })
        .bench_local_values(|()| put());
}

/// Out of the store in memory.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn memory_store_get(bencher: Bencher<'_, '_>) {
    let (store, ids, domain) = (store_of_all(), identities(), KEY.id());
    for (id, page) in ids.iter().zip(PAGES.iter()) {
        store.put(&domain, id, page);
    }
    let mut out = [0; PAGE_SIZE];
    bencher
        .counter(BytesCount::new(PAGES.len() * PAGE_SIZE))
        .bench_local(|| {
            for id in &ids {
                black_box(store.get(&id.short(), &mut out));
            }
        });
}

fn options(level: i32) -> EncodeOptions {
    EncodeOptions {
        level,
        ..EncodeOptions::default()
    }
}

/// The stream as frames for a peer that knows nothing at first.
fn encode_all(options: EncodeOptions, known: &KnownPages, store: &MemoryStore) -> Vec<Frame> {
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &KEY, options);
    let mut frames = Vec::new();
    let mut at = 0;
    loop {
        let end = STREAM.len().min(at + READ);
        let flush = if end == STREAM.len() {
            Flush::Hard
        } else {
            Flush::No
        };
        let encoded = encoder
            .encode(&STREAM[at..end], flush, Some(known), Some(store))
            .expect("memory for a compressor");
        at += encoded.consumed;
        frames.extend(encoded.frame);
        if at == STREAM.len() && encoder.pending() == 0 {
            return frames;
        }
    }
}

/// The whole encoder on pages that nobody knows, by zstd level; stores and tables are new each time.
#[divan::bench(args = [1, 2, 3], sample_count = 10, sample_size = 1)]
fn encode_new_pages(bencher: Bencher<'_, '_>, level: i32) {
    bencher
        .counter(BytesCount::new(STREAM.len()))
        .with_inputs(|| (KnownPages::new(PAGES.len() as u64 + 1024), store_of_all()))
        .bench_local_refs(|(known, store)| encode_all(options(level), known, store));
}

/// The whole encoder on a stream that the peer holds in full.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn encode_known_pages(bencher: Bencher<'_, '_>) {
    let (known, store) = (KnownPages::new(PAGES.len() as u64 + 1024), store_of_all());
    encode_all(EncodeOptions::default(), &known, &store);
    bencher
        .counter(BytesCount::new(STREAM.len()))
        .bench_local(|| encode_all(EncodeOptions::default(), &known, &store));
}

/// The whole decoder on frames of new pages.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn decode_new_pages(bencher: Bencher<'_, '_>) {
    let (known, store) = (KnownPages::new(PAGES.len() as u64 + 1024), store_of_all());
    let frames = encode_all(EncodeOptions::default(), &known, &store);
    bencher
        .counter(BytesCount::new(STREAM.len()))
        .with_inputs(store_of_all)
        .bench_local_refs(|store| {
            let limits = DecodeLimits::default();
            let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &KEY, limits);
            for frame in &frames {
                let mut pending = decoder.begin(&frame.payload, store).expect("our own frame");
                let finished = decoder.finish(&mut pending, store).expect("our own frame");
                decoder.recycle(finished.bytes);
            }
        });
}
