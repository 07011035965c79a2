//! Nothing allocates per page: counted with an allocator that counts, so these tests have a process
//! (and this file) of their own.

#![allow(unsafe_code, reason = "a global allocator is unsafe by definition")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions, Flush,
    Hasher, KnownPages, MemoryStore, PageStore,
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to the contract.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of a call.
fn counted<T>(total: &mut u64, call: impl FnOnce() -> T) -> T {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let result = call();
    *total += ALLOCATIONS.load(Ordering::Relaxed) - before;
    result
}

#[test]
fn allocations_go_by_frames_and_not_by_pages() {
    // Too small for the guest; then large enough, so that most pages that are sent again go as deltas.
    carry(1000);
    let large = carry(50_000);
    assert!(large.deltas > 20 * large.frames);
}

struct Carried {
    frames: u64,
    deltas: u64,
}

/// Carries a stream between stores of this size, full as after a while of operation, and counts.
fn carry(store_pages: u64) -> Carried {
    let blocks = [("pc.ram", 6000)];
    let builder = SyntheticStream::builder()
        .blocks(&blocks)
        .zero_percent(10)
        .dirty_percent(90);
    let stream = builder.rounds(4).build().bytes;
    let key = DomainKey::from_bytes([1; 32]);
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key, EncodeOptions::default());
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key, DecodeLimits::default());
    let known = KnownPages::new(store_pages);
    let near = MemoryStore::new(store_pages * 4200);
    let far = MemoryStore::new(store_pages * 4200);
    let other = Hasher::new(&DomainKey::from_bytes([2; 32]));
    for number in 0..store_pages * 5 / 4 {
        let contents = number.to_le_bytes();
        let id = other.id(&contents);
        near.put(other.domain(), &id, &contents);
        far.put(other.domain(), &id, &contents);
        known.insert(&id.short());
    }
    let (mut at, mut frames, mut pages, mut deltas) = (0, 0, 0, 0_u64);
    let (mut encoding, mut decoding) = (0, 0);
    while at < stream.len() {
        let encoded = counted(&mut encoding, || {
            let input = &stream[at..stream.len().min(at + 300_000)];
            let flush = if at + input.len() == stream.len() {
                Flush::Hard
            } else {
                Flush::No
            };
            encoder
                .encode(input, flush, Some(&known), Some(&near))
                .unwrap()
        });
        at += encoded.consumed;
        let Some(frame) = encoded.frame else { continue };
        let bytes = counted(&mut decoding, || {
            let mut pending = decoder.begin(&frame.payload, &far).unwrap();
            for index in pending.missing().to_vec() {
                pending
                    .fill(index, frame.retained.page(index).unwrap())
                    .unwrap();
            }
            decoder.finish(&mut pending, &far).unwrap().bytes
        });
        decoder.recycle(bytes);
        if at < stream.len() / 2 {
            // Buffers are growing and contexts are made.
            (encoding, decoding) = (0, 0);
        } else {
            frames += 1;
            let stats = frame.stats;
            pages += u64::from(stats.ref_pages + stats.batch_pages);
            pages += u64::from(stats.same_pages + stats.delta_pages);
            deltas += u64::from(stats.delta_pages);
        }
    }
    assert!(frames > 20 && pages > 60 * frames);
    // The payload with its shared count; retained contents, ids and ends, made and cut to size; now
    // and then an event; misses; a place's table and a store's slab.
    println!("{encoding} and {decoding} allocations for {frames} frames, {pages} pages");
    assert!(
        encoding <= 9 * frames,
        "{encoding} allocations for {frames} frames"
    );
    assert!(
        decoding <= 6 * frames,
        "{decoding} allocations for {frames} frames"
    );
    assert!(near.stats().evictions > 0);
    Carried { frames, deltas }
}
