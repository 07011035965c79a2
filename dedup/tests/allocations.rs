//! Nothing allocates per page: counted with an allocator that counts, so these tests have a process
//! (and this file) of their own.

#![allow(unsafe_code, reason = "a global allocator is unsafe by definition")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions, Flush,
    KnownPages, MemoryStore, PageStore,
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
    let blocks = [("pc.ram", 6000)];
    let builder = SyntheticStream::builder()
        .blocks(&blocks)
        .zero_percent(10)
        .dirty_percent(90);
    let stream = builder.rounds(4).build().bytes;
    let key = DomainKey::from_bytes([1; 32]);
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key, EncodeOptions::default());
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key, DecodeLimits::default());
    // Full stores, as after a while of operation.
    let known = KnownPages::new(1000);
    let near = MemoryStore::new(4 << 20);
    let far = MemoryStore::new(4 << 20);
    let (mut at, mut frames, mut pages) = (0, 0, 0);
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
            pages += u64::from(frame.stats.ref_pages + frame.stats.batch_pages);
        }
    }
    assert!(near.stats().evictions > 0 && frames > 20 && pages > 60 * frames);
    // The payload with its shared count, retained contents and ids, now and then an event; misses.
    assert!(
        encoding <= 5 * frames,
        "{encoding} allocations for {frames} frames"
    );
    assert!(
        decoding <= 5 * frames,
        "{decoding} allocations for {frames} frames"
    );
}
