//! Runs of pages named by where they lie in the receiver's store.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;

use proptest::prelude::*;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource};
use skyferry_dedup::{
    Announced, Announcer, ChannelDecoder, ChannelEncoder, ChannelKind, DecodeError, DecodeLimits,
    DomainKey, EncodeOptions, Flush, Frame, KnownPages, MemoryStore, PAGE_SIZE, PageStore,
    RunCheck, StoreId,
};
use tempfile::TempDir;

fn key() -> DomainKey {
    DomainKey::derive(b"test", "tenant")
}

/// So large that a guest fits into what may wait for the disk: nothing is dropped.
fn disk(folder: &TempDir) -> DiskStore {
    let options = DiskOptions::new(folder.path().join("store"), 1 << 30);
    DiskStore::open(options, &KeySource::secret(&[7; 32]).unwrap()).unwrap()
}

fn guest(pages: u64, seed: u64) -> Vec<u8> {
    SyntheticStream::builder()
        .seed(seed)
        .blocks(&[("pc.ram", pages)])
        .zero_percent(20)
        .repeated_percent(5)
        .random_percent(40)
        .build()
        .bytes
}

/// Everything that a store has of the domain, as a peer hears of it.
fn announced(store: &DiskStore) -> Arc<Announced> {
    let announced = Announced::new(1 << 20);
    let mut announcer = Announcer::new(store.id(), &(StoreId([0; 16]), Vec::new()));
    let mut message = Vec::new();
    while {
        message.clear();
        announcer.next(&store.feed(key().id()), 4096, &mut message)
    } {
        announced.apply(&message).unwrap();
    }
    announced.apply(&message).unwrap();
    Arc::new(announced)
}

fn frames(stream: &[u8], announced: Option<&Arc<Announced>>) -> Vec<Frame> {
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key(), EncodeOptions::default());
    if let Some(announced) = announced {
        encoder.refer_to(announced.clone());
    }
    let (known, own) = (KnownPages::new(10_000), MemoryStore::new(64 << 20));
    let (mut frames, mut rest) = (Vec::new(), stream);
    loop {
        let encoded = encoder
            .encode(rest, Flush::Hard, Some(&known), Some(&own))
            .unwrap();
        rest = &rest[encoded.consumed..];
        let nothing = encoded.frame.is_none() && encoded.events.is_empty();
        frames.extend(encoded.frame);
        if nothing && encoded.consumed == 0 {
            assert!(rest.is_empty());
            return frames;
        }
    }
}

/// Decodes with `store`; returns the stream and how many pages had to be asked for.
fn decode(frames: &[Frame], store: &dyn PageStore) -> (Vec<u8>, usize) {
    let limits = DecodeLimits::default();
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
    let (mut out, mut asked) = (Vec::new(), 0);
    for frame in frames {
        let mut pending = decoder.begin(&frame.payload, store).unwrap();
        for index in pending.missing().to_vec() {
            let page = frame.retained.page(index).unwrap();
            pending.fill(index, page).unwrap();
            asked += 1;
        }
        out.extend(decoder.finish(&mut pending, store).unwrap().bytes);
    }
    (out, asked)
}

fn payload(frames: &[Frame]) -> usize {
    frames.iter().map(|frame| frame.payload.len()).sum()
}

#[test]
fn a_guest_that_is_stored_goes_as_runs() {
    let folder = tempfile::tempdir().unwrap();
    let store = disk(&folder);
    let stream = guest(3000, 1);
    let cold = frames(&stream, None);
    assert!(decode(&cold, &store).0 == stream);
    drop(store);

    let store = disk(&folder);
    let warm = frames(&stream, Some(&announced(&store)));
    let (cold, warm_bytes) = (payload(&cold), payload(&warm));
    println!(
        "{} bytes of stream: {cold} cold, {warm_bytes} warm",
        stream.len()
    );
    let (out, asked) = decode(&warm, &store);
    assert!(out == stream);
    assert_eq!(asked, 0);
    // Half a percent, most of which is what is no page.
    assert!(warm_bytes * 200 < stream.len(), "{warm_bytes} bytes");

    // Bytes that nobody has: all is asked for, and every place is right afterwards.
    let (out, asked) = decode(&warm, &MemoryStore::new(64 << 20));
    assert!(out == stream);
    assert!(asked > 2000, "{asked} pages");
}

#[test]
fn a_segment_of_another_domain_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let store = disk(&folder);
    decode(&frames(&guest(200, 1), None), &store);
    let number = store.segments(&key().id())[0].number;
    let mut ids = Vec::new();
    store.records(&key().id(), number, 0, 10, &mut ids);
    assert_eq!(ids.len(), 10);
    store.records(&key().id(), number, 10, u32::MAX, &mut ids);
    assert_eq!(ids.len(), store.disk_stats().pages as usize);
    ids.clear();
    let other = DomainKey::derive(b"test", "other").id();
    store.records(&other, number, 0, 10, &mut ids);
    store.records(&key().id(), number + 1, 0, 10, &mut ids);
    store.records(&key().id(), number, u32::MAX, 10, &mut ids);
    assert!(ids.is_empty());
}

/// A program may name more pages than its frame has room for.
#[test]
fn runs_over_the_frame_are_refused() {
    let varint = |mut value: u64| {
        let mut bytes = Vec::new();
        while value >= 128 {
            bytes.push(value as u8 | 128);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    };
    for count in [3, 1000, 1 << 22] {
        let mut program = vec![0x37, b'r', b'a', b'm'];
        program.extend(varint(count << 4 | 13));
        program.extend([1, 0]);
        program.extend(RunCheck::default().value().to_le_bytes());
        let raw_len = 2 * (8 + PAGE_SIZE as u64);
        let mut frame = vec![0];
        frame.extend(varint(raw_len));
        frame.extend([0; 16]);
        frame.extend([program.len() as u8, 0, 0]);
        frame.extend(program);
        let limits = DecodeLimits::default();
        let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
        let refused = decoder.begin(&frame, &MemoryStore::new(1 << 20));
        assert_eq!(refused.unwrap_err(), DecodeError::Inconsistent, "{count}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever the receiver has lost since it announced, the stream is the same.
    #[test]
    fn loss_costs_bytes_only(
        seeds in (0..3_u64, 0..3_u64),
        forgets in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        anew in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let store = disk(&folder);
        decode(&frames(&guest(300, seeds.0), None), &store);
        let announced = announced(&store);
        let number = store.segments(&key().id())[0].number;
        let mut ids = Vec::new();
        store.records(&key().id(), number, 0, u32::MAX, &mut ids);
        for forget in forgets {
            store.remove(forget.get(&ids));
        }
        let stream = guest(300, seeds.1);
        let frames = frames(&stream, Some(&announced));
        if anew {
            // Another store whose segments have the same numbers and other pages.
            drop(store);
            let other = tempfile::tempdir().unwrap();
            let store = disk(&other);
            decode(&self::frames(&guest(300, 9), None), &store);
            prop_assert!(decode(&frames, &store).0 == stream);
        } else {
            prop_assert!(decode(&frames, &store).0 == stream);
        }
    }
}
