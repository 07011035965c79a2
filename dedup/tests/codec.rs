//! The codec from end to end: what goes into an encoder comes out of a decoder, whatever the stores
//! forget, and nothing else ever comes out.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Mutex;

use proptest::prelude::*;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_core::qemu::{CommitMark, Event};
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeError, DecodeLimits, DomainId, DomainKey,
    EncodeOptions, FillError, FinishError, Flush, Frame, Hasher, KnownPages, MemoryStore,
    PAGE_SIZE, PageId, PageStore, ShortId, StoreStats,
};

const MEGABYTE: u64 = 1 << 20;

fn key() -> DomainKey {
    DomainKey::derive(b"test", "tenant")
}

fn small_frames() -> EncodeOptions {
    EncodeOptions {
        batch_bytes: 20_000,
        max_raw: 128 * 1024,
        ..EncodeOptions::default()
    }
}

/// Both ends of a channel, and the stores of the two gateways.
struct Pair {
    encoder: ChannelEncoder,
    decoder: ChannelDecoder,
    known: KnownPages,
    near: MemoryStore,
    far: MemoryStore,
    out: Vec<u8>,
    frames: Vec<Frame>,
    events: Vec<(u64, Event)>,
    misses: usize,
}

impl Pair {
    fn new(kind: ChannelKind, options: EncodeOptions, far_bytes: u64) -> Self {
        Self {
            encoder: ChannelEncoder::new(kind, &key(), options),
            decoder: ChannelDecoder::new(kind, &key(), DecodeLimits::default()),
            known: KnownPages::new(100_000),
            near: MemoryStore::new(64 * MEGABYTE),
            far: MemoryStore::new(far_bytes),
            out: Vec::new(),
            frames: Vec::new(),
            events: Vec::new(),
            misses: 0,
        }
    }

    /// The same gateways carry another migration.
    fn next_migration(&mut self, kind: ChannelKind, options: EncodeOptions) {
        self.encoder = ChannelEncoder::new(kind, &key(), options);
        self.decoder = ChannelDecoder::new(kind, &key(), DecodeLimits::default());
        self.out.clear();
        self.frames.clear();
        self.events.clear();
    }

    /// Encodes all that can be, delivers every frame; returns how much of the input is left.
    fn feed<'a>(&mut self, mut input: &'a [u8], flush: Flush) -> &'a [u8] {
        loop {
            let known = Some(&self.known);
            let encoded = self
                .encoder
                .encode(input, flush, known, Some(&self.near))
                .unwrap();
            let idle =
                encoded.consumed == 0 && encoded.frame.is_none() && encoded.events.is_empty();
            input = &input[encoded.consumed..];
            self.events.extend(&encoded.events);
            if let Some(frame) = encoded.frame {
                self.deliver(frame);
            }
            if idle {
                return input;
            }
        }
    }

    fn deliver(&mut self, frame: Frame) {
        let mut pending = self.decoder.begin(&frame.payload, &self.far).unwrap();
        loop {
            self.misses += pending.missing().len();
            for index in pending.missing().to_vec() {
                let id = frame.retained.id(index).unwrap();
                assert_eq!(pending.id(index), Some(id.short()));
                pending
                    .fill(index, frame.retained.page(index).unwrap())
                    .unwrap();
            }
            match self.decoder.finish(&mut pending, &self.far) {
                Ok(finished) => {
                    assert_eq!(finished.bytes.len(), frame.raw_len as usize);
                    assert_eq!(finished.stats.opaque_bytes, frame.stats.opaque_bytes);
                    assert_eq!(finished.stats.zero_pages, frame.stats.zero_pages);
                    assert_eq!(finished.stats.same_pages, frame.stats.same_pages);
                    assert_eq!(finished.stats.ref_pages, frame.stats.ref_pages);
                    assert_eq!(finished.stats.delta_pages, frame.stats.delta_pages);
                    assert_eq!(finished.stats.delta_bytes, frame.stats.delta_bytes);
                    assert_eq!(finished.stats.similar_bytes, frame.stats.similar_bytes);
                    assert_eq!(finished.stats.batch_pages, frame.stats.batch_pages);
                    self.out.extend_from_slice(&finished.bytes);
                    self.decoder.recycle(finished.bytes);
                    break;
                }
                Err(FinishError::Missing(_)) => {}
                Err(FinishError::Mismatch) => panic!("digests differ"),
            }
        }
        assert_eq!(self.encoder.offset(), self.out.len() as u64);
        self.frames.push(frame);
    }

    fn wire_bytes(&self) -> usize {
        self.frames.iter().map(|frame| frame.payload.len()).sum()
    }
}

/// Feeds `stream` in parts of the given lengths (then the rest), the last one hard.
fn run(pair: &mut Pair, stream: &[u8], parts: &[(usize, Flush)]) {
    let (mut fed, mut end) = (0, 0);
    for &(length, flush) in parts {
        end = (end + length).min(stream.len());
        let left = pair.feed(&stream[fed..end], flush).len();
        fed = end - left;
    }
    let left = pair.feed(&stream[fed..], Flush::Hard);
    assert!(left.is_empty());
    assert_eq!(pair.encoder.pending(), 0);
    assert!(pair.out == stream, "the bytes differ");
}

fn synthetic(seed: u64) -> SyntheticStream {
    let blocks = [
        ("pc.ram", 500),
        ("vga.vram", 40),
        ("/rom@etc/acpi/tables", 4),
    ];
    SyntheticStream::builder()
        .seed(seed)
        .blocks(&blocks)
        .rounds(3)
        .build()
}

#[test]
fn a_migration_gets_smaller_and_a_second_one_almost_vanishes() {
    let stream = synthetic(1).bytes;
    let options = EncodeOptions::default();
    let mut pair = Pair::new(ChannelKind::QemuMain, options, 64 * MEGABYTE);
    run(&mut pair, &stream, &[]);
    let first = pair.wire_bytes();
    assert!(first * 2 < stream.len(), "{first} of {}", stream.len());
    pair.next_migration(ChannelKind::QemuMain, options);
    run(&mut pair, &stream, &[]);
    let second = pair.wire_bytes();
    assert!(second * 3 < first, "{second} after {first}");
    assert_eq!(pair.misses, 0);
    assert!(pair.frames.iter().all(|frame| frame.stats.batch_pages == 0));
}

#[test]
fn commit_events_lie_on_frame_borders() {
    let stream = synthetic(2);
    let mut pair = Pair::new(ChannelKind::QemuMain, small_frames(), 64 * MEGABYTE);
    run(&mut pair, &stream.bytes, &[]);
    let expected: Vec<(u64, Event)> = stream
        .events
        .iter()
        .map(|&(at, event)| (at as u64, event))
        .collect();
    assert_eq!(pair.events, expected);
    let mut borders = vec![0];
    borders.extend(pair.frames.iter().scan(0, |end, frame| {
        *end += u64::from(frame.raw_len);
        Some(*end)
    }));
    for (offset, event) in &pair.events {
        if let Event::Commit(mark) = event {
            let border = borders.iter().position(|border| border == offset).unwrap();
            if *mark == CommitMark::Candidate {
                assert!(pair.frames[border].held_from_start);
            }
        }
    }
    let held = pair
        .frames
        .iter()
        .filter(|frame| frame.held_from_start)
        .count();
    assert_eq!(held, 1);
    assert_eq!(u64::try_from(stream.commit.unwrap()).unwrap(), {
        let first = pair
            .frames
            .iter()
            .position(|frame| frame.held_from_start)
            .unwrap();
        borders[first]
    });
}

#[test]
fn soft_keeps_a_cut_piece_and_hard_lets_it_go() {
    let stream = synthetic(3);
    let record = stream.records.iter().find(|record| !record.zero).unwrap();
    let cut = &stream.bytes[..record.at + 100];
    let mut pair = Pair::new(ChannelKind::QemuMain, small_frames(), 64 * MEGABYTE);
    let left = pair.feed(cut, Flush::No).len();
    assert_eq!(pair.out.len(), 0);
    assert_eq!(pair.encoder.pending() + left, cut.len());
    let rest = &cut[cut.len() - left..];
    let left = pair.feed(rest, Flush::Soft).len();
    assert!(left > 0);
    assert_eq!(pair.out.len() + left, cut.len());
    let rest = &cut[cut.len() - left..];
    assert!(pair.feed(rest, Flush::Hard).is_empty());
    assert_eq!(pair.out, cut);
    pair.feed(&stream.bytes[cut.len()..], Flush::Hard);
    assert!(pair.out == stream.bytes);
}

#[test]
fn opaque_channels_pass_whatever_it_is() {
    let mut pair = Pair::new(ChannelKind::Opaque, EncodeOptions::default(), MEGABYTE);
    // Small messages, as on a return path, then something large.
    let message = b"\0\x01\0\x04\0\0\0\0";
    let mut all = Vec::new();
    for _ in 0..10 {
        assert!(pair.feed(message, Flush::Hard).is_empty());
        all.extend_from_slice(message);
    }
    assert_eq!(pair.frames.len(), 10);
    assert!(
        pair.frames
            .iter()
            .all(|frame| frame.payload.len() <= message.len() + 24)
    );
    let large = vec![7; 3_000_000];
    assert!(pair.feed(&large, Flush::Hard).is_empty());
    all.extend_from_slice(&large);
    assert!(pair.out == all);
}

/// Text-like bytes, different for each seed, that zstd does not reduce to nothing.
fn text(seed: u64, length: usize) -> Vec<u8> {
    let mut text = vec![0; length];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut text);
    text.iter_mut().for_each(|byte| *byte = b'a' + *byte % 16);
    text
}

#[test]
fn what_an_opaque_channel_repeats_is_referred_to_wherever_it_begins() {
    let first = text(1, 1_000_000);
    let second = [
        &b"moved"[..],
        &first[..400_000],
        &text(2, 1000),
        &first[400_000..],
    ]
    .concat();
    for far_bytes in [64 * MEGABYTE, 0] {
        let mut pair = Pair::new(ChannelKind::Opaque, EncodeOptions::default(), far_bytes);
        run(&mut pair, &first, &[]);
        let new = pair.wire_bytes();
        pair.next_migration(ChannelKind::Opaque, EncodeOptions::default());
        run(
            &mut pair,
            &second,
            &[(70_000, Flush::Hard), (12_345, Flush::Hard)],
        );
        let again = pair.wire_bytes();
        assert!(again * 12 < new, "{again} after {new}");
        let referred: u32 = pair
            .frames
            .iter()
            .map(|frame| frame.stats.opaque_ref_bytes)
            .sum();
        assert!(referred > 920_000, "{referred}");
        assert_eq!(pair.misses > 300, far_bytes == 0);
    }
}

#[test]
fn what_tls_carries_displaces_nothing() {
    let stream = [&[0x16, 3, 1][..], &text(3, 300_000)].concat();
    let mut pair = Pair::new(ChannelKind::Opaque, EncodeOptions::default(), MEGABYTE);
    run(&mut pair, &stream, &[]);
    assert!(pair.known.is_empty());
    assert_eq!(
        pair.near.stats().insertions + pair.far.stats().insertions,
        0
    );
}

/// A store whose every value has a flipped byte.
struct Corrupting(MemoryStore, Mutex<usize>);

impl PageStore for Corrupting {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        let length = self.0.get(id, out)?;
        out[length / 2] ^= 1;
        *self.1.lock().unwrap() += 1;
        Some(length)
    }
    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.0.put(domain, id, contents);
    }
    fn contains(&self, id: &ShortId) -> bool {
        self.0.contains(id)
    }
    fn remove(&self, id: &ShortId) -> bool {
        self.0.remove(id)
    }
    fn stats(&self) -> StoreStats {
        self.0.stats()
    }
    fn capacity_pages(&self) -> u64 {
        self.0.capacity_pages()
    }
}

/// All frames of one stream.
fn frames(stream: &[u8], known: &KnownPages) -> Vec<Frame> {
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key(), small_frames());
    let mut frames = Vec::new();
    let mut at = 0;
    while at < stream.len() {
        let encoded = encoder
            .encode(&stream[at..], Flush::Hard, Some(known), None)
            .unwrap();
        at += encoded.consumed;
        frames.extend(encoded.frame);
    }
    frames
}

#[test]
fn corrupt_store_entries_are_found_removed_and_refilled() {
    let stream = synthetic(4).bytes;
    let store = Corrupting(MemoryStore::new(64 * MEGABYTE), Mutex::new(0));
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), DecodeLimits::default());
    let mut out = Vec::new();
    let mut refilled = 0;
    for frame in frames(&stream, &KnownPages::new(10_000)) {
        let mut pending = decoder.begin(&frame.payload, &store).unwrap();
        let missing = pending.missing().to_vec();
        assert_eq!(missing.len(), frame.retained.len());
        assert_eq!(
            pending.fill(u32::MAX, &[0; PAGE_SIZE]),
            Err(FillError::NotMissing)
        );
        for index in missing {
            assert!(!store.contains(&pending.id(index).unwrap()));
            let page = frame.retained.page(index).unwrap();
            let mut wrong = page.to_vec();
            wrong[0] ^= 1;
            assert_eq!(pending.fill(index, &wrong), Err(FillError::WrongPage));
            assert_eq!(pending.fill(index, &page[1..]), Err(FillError::WrongPage));
            pending.fill(index, page).unwrap();
            assert_eq!(pending.fill(index, page), Err(FillError::NotMissing));
            refilled += 1;
        }
        let finished = decoder.finish(&mut pending, &store).unwrap();
        out.extend_from_slice(&finished.bytes);
    }
    assert!(refilled > 10);
    // The same page twice in a frame is found to be corrupt once, and then missing.
    assert!(refilled >= *store.1.lock().unwrap());
    assert!(out == stream);
}

#[test]
fn any_flipped_byte_behind_the_decoder_is_a_mismatch() {
    let stream = synthetic(5).bytes;
    let known = KnownPages::new(10_000);
    for frame in frames(&stream, &known).into_iter().take(1) {
        for at in (0..frame.raw_len as usize).step_by(997) {
            let store = MemoryStore::new(MEGABYTE);
            let kind = ChannelKind::QemuMain;
            let mut decoder = ChannelDecoder::new(kind, &key(), DecodeLimits::default());
            let mut pending = decoder.begin(&frame.payload, &store).unwrap();
            assert!(pending.missing().is_empty());
            pending.out_mut()[at] ^= 0x40;
            let refused = decoder.finish(&mut pending, &store);
            assert_eq!(refused.unwrap_err(), FinishError::Mismatch, "{at}");
            // What failed leaves nothing behind.
            assert_eq!(store.stats().pages, 0);
        }
    }
}

#[test]
fn another_key_is_a_mismatch() {
    let stream = synthetic(6).bytes;
    let frame = &frames(&stream, &KnownPages::new(10_000))[0];
    let other = DomainKey::derive(b"test", "other tenant");
    let store = MemoryStore::new(MEGABYTE);
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &other, DecodeLimits::default());
    let mut pending = decoder.begin(&frame.payload, &store).unwrap();
    assert_eq!(
        decoder.finish(&mut pending, &store).unwrap_err(),
        FinishError::Mismatch
    );
}

#[test]
fn a_page_of_an_unfinished_frame_is_found_when_looked_for_again() {
    let stream = synthetic(7).bytes;
    let known = KnownPages::new(10_000);
    let store = MemoryStore::new(64 * MEGABYTE);
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), DecodeLimits::default());
    let frames = frames(&stream, &known);
    let mut pending: Vec<_> = frames
        .iter()
        .map(|frame| decoder.begin(&frame.payload, &store).unwrap())
        .collect();
    assert!(pending.iter().any(|pending| !pending.missing().is_empty()));
    let mut out = Vec::new();
    for pending in &mut pending {
        pending.look_again(&store);
        assert_eq!(pending.missing(), []);
        out.extend(decoder.finish(pending, &store).unwrap().bytes);
    }
    assert!(out == stream);
}

#[test]
fn a_frame_is_not_finished_while_pages_are_missing() {
    let stream = synthetic(8).bytes;
    let known = KnownPages::new(10_000);
    let empty = MemoryStore::new(0);
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), DecodeLimits::default());
    for frame in frames(&stream, &known) {
        let mut pending = decoder.begin(&frame.payload, &empty).unwrap();
        let missing = pending.missing().to_vec();
        assert_eq!(missing.len(), frame.retained.len());
        for &index in &missing {
            let refused = decoder.finish(&mut pending, &empty).unwrap_err();
            assert_eq!(refused, FinishError::Missing(pending.missing().to_vec()));
            pending
                .fill(index, frame.retained.page(index).unwrap())
                .unwrap();
        }
        decoder.finish(&mut pending, &empty).unwrap();
    }
}

#[test]
fn limits_are_kept() {
    let stream = synthetic(9).bytes;
    let frame = &frames(&stream, &KnownPages::new(10_000))[0];
    let store = MemoryStore::new(0);
    let begin = |limits| {
        let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
        decoder.begin(&frame.payload, &store).map(|_| ())
    };
    let limits = DecodeLimits::default();
    assert_eq!(begin(limits), Ok(()));
    let raw = frame.raw_len as usize;
    assert_eq!(
        begin(DecodeLimits {
            max_raw: raw - 1,
            ..limits
        }),
        Err(DecodeError::TooLong)
    );
    assert_eq!(
        begin(DecodeLimits {
            max_blocks: 0,
            ..limits
        }),
        Err(DecodeError::Block)
    );
    assert_eq!(
        begin(DecodeLimits {
            max_window_log: 18,
            ..limits
        }),
        Err(DecodeError::Literals)
    );
    // An opaque channel has no pages.
    let mut decoder = ChannelDecoder::new(ChannelKind::Opaque, &key(), limits);
    assert_eq!(
        decoder.begin(&frame.payload, &store).unwrap_err(),
        DecodeError::Program
    );
}

#[test]
fn truncated_frames_are_refused() {
    let stream = synthetic(10).bytes;
    let frame = &frames(&stream, &KnownPages::new(10_000))[0];
    let store = MemoryStore::new(0);
    for cut in 0..frame.payload.len() {
        let limits = DecodeLimits::default();
        let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
        assert!(
            decoder.begin(&frame.payload[..cut], &store).is_err(),
            "{cut}"
        );
    }
}

fn flush() -> impl Strategy<Value = Flush> {
    prop_oneof![Just(Flush::No), Just(Flush::Soft), Just(Flush::Hard)]
}

fn parts() -> impl Strategy<Value = Vec<(usize, Flush)>> {
    let length = prop_oneof![0..40_usize, 0..5000_usize, 0..300_000_usize];
    prop::collection::vec((length, flush()), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The same for channels without structure.
    #[test]
    fn opaque_streams_come_out_as_they_went_in(
        lengths in prop::collection::vec(0..60_000_usize, 1..12),
        parts in parts(),
        far_pages in prop_oneof![Just(0_u64), 1..50_u64, Just(100_000)],
    ) {
        let texts = lengths.iter().enumerate().map(|(n, length)| text(n as u64 % 4, *length));
        let stream = texts.collect::<Vec<_>>().concat();
        let mut pair = Pair::new(ChannelKind::Opaque, small_frames(), far_pages * 4200);
        run(&mut pair, &stream, &parts);
        pair.next_migration(ChannelKind::Opaque, EncodeOptions::default());
        run(&mut pair, &stream, &[]);
    }

    /// Invariant 1, with invariant 7: small stores, entries killed at random, stores too small for
    /// anything; two migrations on the same gateways.
    #[test]
    fn synthetic_streams_come_out_as_they_went_in(
        seed in 0..1000_u64,
        parts in parts(),
        far_pages in prop_oneof![Just(0_u64), 1..200_u64, Just(100_000)],
        kills in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
        flags in any::<[bool; 6]>(),
    ) {
        let [xbzrle, unknown, bitmap, virtio_mem, postcopy, vmdesc] = flags;
        let stream = SyntheticStream::builder()
            .seed(seed)
            .blocks(&[("pc.ram", 300), ("vga.vram", 20)])
            .rounds(3)
            .xbzrle(xbzrle)
            .unknown_section(unknown)
            .dirty_bitmap(bitmap)
            .virtio_mem(virtio_mem)
            .postcopy(postcopy)
            .vmdesc(vmdesc)
            .build();
        let kind = ChannelKind::QemuMain;
        let mut pair = Pair::new(kind, small_frames(), far_pages * 4200);
        run(&mut pair, &stream.bytes, &parts);
        let hasher = Hasher::new(&key());
        for kill in &kills {
            let record = kill.get(&stream.records);
            let contents = &stream.bytes[record.at..record.at + record.len];
            if !record.zero {
                pair.far.remove(&hasher.id(&contents[contents.len() - PAGE_SIZE..]).short());
            }
        }
        pair.next_migration(kind, small_frames());
        run(&mut pair, &stream.bytes, &parts);
    }

    /// Whatever a channel carries, as whatever kind it is taken.
    #[test]
    fn any_bytes_come_out_as_they_went_in(
        head in prop_oneof![Just(b"QEVM\0\0\0\x03".to_vec()), Just(Vec::new())],
        body in prop::collection::vec(any::<u8>(), 0..20_000),
        repeat in 1..20_usize,
        parts in parts(),
        main in any::<bool>(),
    ) {
        let stream = [head, body.repeat(repeat)].concat();
        let kind = if main { ChannelKind::QemuMain } else { ChannelKind::Opaque };
        run(&mut Pair::new(kind, small_frames(), MEGABYTE), &stream, &parts);
    }

    /// A synthetic stream with damage passes as well: the parser only loses its footing.
    #[test]
    fn damaged_streams_come_out_as_they_went_in(
        seed in 0..100_u64,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        parts in parts(),
    ) {
        let mut stream = SyntheticStream::builder().seed(seed).build().bytes;
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        run(&mut Pair::new(ChannelKind::QemuMain, small_frames(), MEGABYTE), &stream, &parts);
    }

    /// A hostile peer gets an error or a mismatch, never wrong bytes, a panic or much memory.
    #[test]
    fn damaged_frames_never_deliver_other_bytes(
        seed in 0..100_u64,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        head_only in any::<bool>(),
    ) {
        let stream = synthetic(seed).bytes;
        let frame = &frames(&stream, &KnownPages::new(10_000))[0];
        let mut payload = frame.payload.to_vec();
        for (at, byte) in damage {
            let at = at.index(if head_only { 60 } else { payload.len() });
            payload[at] = byte;
        }
        let store = MemoryStore::new(MEGABYTE);
        let limits = DecodeLimits::default();
        let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
        if let Ok(mut pending) = decoder.begin(&payload, &store)
            && let Ok(finished) = decoder.finish(&mut pending, &store)
        {
            prop_assert!(finished.bytes == stream[..finished.bytes.len()]);
        }
    }

    #[test]
    fn random_frames_are_survived(payload in prop::collection::vec(any::<u8>(), 0..300)) {
        let store = MemoryStore::new(0);
        let limits = DecodeLimits::default();
        let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
        if let Ok(mut pending) = decoder.begin(&payload, &store) {
            prop_assert!(decoder.finish(&mut pending, &store).is_err());
        }
    }
}
