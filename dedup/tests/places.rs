//! Pages that are sent again: what a place holds already, and deltas from it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeError, DecodeLimits, DomainId, DomainKey,
    EncodeOptions, FinishError, Flush, Frame, FrameStats, Hasher, KnownPages, Manifest,
    MemoryStore, PAGE_SIZE, PageId, PageStore, Pending, ShortId, StoreStats,
};

const MEGABYTE: u64 = 1 << 20;

fn key() -> DomainKey {
    DomainKey::derive(b"test", "tenant")
}

/// A guest with one block of RAM, and the stream that its migration has come to so far.
struct Guest {
    pages: Vec<[u8; PAGE_SIZE]>,
    stream: Vec<u8>,
}

impl Guest {
    /// Text-like pages, no two alike.
    fn new(pages: usize) -> Self {
        let blocks = [("pc.ram", pages as u64)];
        let made_up = SyntheticStream::builder().blocks(&blocks).build();
        let record = &made_up.records[0];
        // The stream up to the first page: the section that it is in goes on for ever.
        let mut stream = made_up.bytes[..record.at].to_vec();
        // One named record, so that the others need not be.
        stream.extend_from_slice(&(record.offset | 2).to_be_bytes());
        stream.extend_from_slice(b"\x06pc.ram\0");
        let page = |n: usize| {
            let mut page = [0; PAGE_SIZE];
            blake3::Hasher::new()
                .update(&n.to_le_bytes())
                .finalize_xof()
                .fill(&mut page);
            page.map(|byte| b'a' + byte % 8)
        };
        Self {
            pages: (0..pages).map(page).collect(),
            stream,
        }
    }

    fn send(&mut self, page: usize) {
        let offset = (page * PAGE_SIZE) as u64;
        let zero = self.pages[page] == [0; PAGE_SIZE];
        let kind = if zero { 0x22 } else { 0x28 };
        self.stream
            .extend_from_slice(&(offset | kind).to_be_bytes());
        if zero {
            self.stream.push(0);
        } else {
            self.stream.extend_from_slice(&self.pages[page]);
        }
    }

    fn send_all(&mut self) {
        (0..self.pages.len()).for_each(|page| self.send(page));
    }
}

/// A store that has forgotten a share (in 256) of what it is asked for.
struct Forgetful {
    store: MemoryStore,
    share: u8,
    asked: AtomicU64,
}

impl Forgetful {
    fn new(bytes: u64, share: u8) -> Self {
        Self {
            store: MemoryStore::new(bytes),
            share,
            asked: AtomicU64::new(0),
        }
    }
}

impl PageStore for Forgetful {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        let dice = id.as_bytes()[3].wrapping_add((asked as u8).wrapping_mul(97));
        if dice < self.share {
            self.store.remove(id);
        }
        self.store.get(id, out)
    }
    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.store.put(domain, id, contents);
    }
    fn contains(&self, id: &ShortId) -> bool {
        self.store.contains(id)
    }
    fn remove(&self, id: &ShortId) -> bool {
        self.store.remove(id)
    }
    fn stats(&self) -> StoreStats {
        self.store.stats()
    }
    fn capacity_pages(&self) -> u64 {
        self.store.capacity_pages()
    }
}

/// A frame that has been begun.
struct Waiting {
    frame: Frame,
    pending: Pending,
    /// What frames before it bring.
    deferred: Vec<u32>,
}

/// Both ends of a main channel. The receiver begins up to `ahead` frames before it finishes the first.
struct Pair {
    encoder: ChannelEncoder,
    decoder: ChannelDecoder,
    known: KnownPages,
    near: Forgetful,
    far: Forgetful,
    ahead: usize,
    waiting: VecDeque<Waiting>,
    out: Vec<u8>,
    total: FrameStats,
    payload: usize,
    missed: u32,
    /// Old pages of deltas among those.
    forgotten: u64,
}

impl Pair {
    fn new(options: EncodeOptions, near: Forgetful, far: Forgetful, ahead: usize) -> Self {
        let kind = ChannelKind::QemuMain;
        Self {
            encoder: ChannelEncoder::new(kind, &key(), options),
            decoder: ChannelDecoder::new(kind, &key(), DecodeLimits::default()),
            known: KnownPages::new(100_000),
            near,
            far,
            ahead,
            waiting: VecDeque::new(),
            out: Vec::new(),
            total: FrameStats::default(),
            payload: 0,
            missed: 0,
            forgotten: 0,
        }
    }

    fn plain() -> Self {
        let store = || Forgetful::new(64 * MEGABYTE, 0);
        Self::new(EncodeOptions::default(), store(), store(), 0)
    }

    /// The next migration, back: each side has the store of its own, and knows what it knew.
    fn back(self) -> Self {
        let mut pair = Self::new(EncodeOptions::default(), self.far, self.near, self.ahead);
        pair.known = self.known;
        pair
    }

    /// What both sides remember of the guest, which must be one and the same.
    fn manifest(&mut self) -> Option<Arc<Manifest>> {
        let near = self.encoder.take_table().into_manifest();
        let far = self.decoder.take_table().into_manifest();
        let ids = [&near, &far].map(|manifest| manifest.as_ref().map(Manifest::id));
        assert_eq!(ids[0], ids[1]);
        near.map(Arc::new)
    }

    fn adopt(&mut self, manifest: &Arc<Manifest>) {
        self.decoder.agree(manifest.clone());
        self.encoder.adopt(manifest);
    }

    /// Carries the guest's stream as far as it goes; returns the counters of this part.
    fn carry(&mut self, guest: &Guest) -> FrameStats {
        self.total = FrameStats::default();
        self.payload = 0;
        let mut at = self.encoder.offset() as usize;
        while at < guest.stream.len() {
            let input = &guest.stream[at..];
            let (known, near) = (Some(&self.known), &self.near);
            let encoded = self
                .encoder
                .encode(input, Flush::Hard, known, Some(near))
                .unwrap();
            at += encoded.consumed;
            if let Some(frame) = encoded.frame {
                self.count(&frame);
                let pending = self.decoder.begin(&frame.payload, &self.far).unwrap();
                let before = self.waiting.iter().map(|begun| &begun.pending);
                let (asked, deferred) = pending.missing_behind(before);
                self.missed += asked.len() as u32;
                self.waiting.push_back(Waiting {
                    frame,
                    pending,
                    deferred,
                });
            }
            while self.waiting.len() > self.ahead {
                self.deliver_first();
            }
        }
        while !self.waiting.is_empty() {
            self.deliver_first();
        }
        assert!(self.out == guest.stream, "the bytes differ");
        self.total
    }

    fn count(&mut self, frame: &Frame) {
        let stats = &frame.stats;
        self.payload += frame.payload.len();
        self.total.zero_pages += stats.zero_pages;
        self.total.same_pages += stats.same_pages;
        self.total.ref_pages += stats.ref_pages;
        self.total.delta_pages += stats.delta_pages;
        self.total.delta_bytes += stats.delta_bytes;
        self.total.similar_pages += stats.similar_pages;
        self.total.similar_bytes += stats.similar_bytes;
        self.total.batch_pages += stats.batch_pages;
    }

    /// All misses of all waiting frames were asked for at once, but for what frames before them bring; now
    /// the answers come.
    fn deliver_first(&mut self) {
        let Waiting {
            frame,
            mut pending,
            deferred,
        } = self.waiting.pop_front().unwrap();
        if !deferred.is_empty() {
            pending.look_again(&self.far);
            let still = |index| pending.missing().contains(index);
            let forgets = self.far.share > 0 || self.far.capacity_pages() < 10_000;
            assert!(forgets || !deferred.iter().any(still));
        }
        for index in pending.missing().to_vec() {
            let id = frame.retained.id(index).unwrap().short();
            assert!(pending.id(index).is_none_or(|named| named == id));
            if frame.retained.old(index).is_some() {
                self.forgotten += 1;
                self.known.remove(&id);
            }
            pending
                .fill(index, frame.retained.page(index).unwrap())
                .unwrap();
        }
        self.encoder.peer_has_forgotten(self.forgotten);
        let finished = self.decoder.finish(&mut pending, &self.far).unwrap();
        assert_eq!(finished.stats.same_pages, frame.stats.same_pages);
        assert_eq!(finished.stats.delta_pages, frame.stats.delta_pages);
        assert_eq!(finished.stats.delta_bytes, frame.stats.delta_bytes);
        assert_eq!(finished.stats.similar_pages, frame.stats.similar_pages);
        assert_eq!(finished.stats.similar_bytes, frame.stats.similar_bytes);
        self.out.extend_from_slice(&finished.bytes);
        self.decoder.recycle(finished.bytes);
    }
}

#[test]
fn pages_sent_again_cost_next_to_nothing() {
    let mut guest = Guest::new(1000);
    let mut pair = Pair::plain();
    guest.send_all();
    let first = pair.carry(&guest);
    assert_eq!(first.batch_pages, 1000);

    guest.send_all();
    let again = pair.carry(&guest);
    assert_eq!(again.same_pages, 1000);
    assert!(pair.payload < 300, "{} bytes for the same", pair.payload);

    for page in 0..1000 {
        guest.pages[page][40 + page % 3000] ^= 1;
    }
    guest.send_all();
    let changed = pair.carry(&guest);
    assert_eq!(changed.delta_pages, 1000);
    assert!(pair.payload < 7000, "{} bytes for changes", pair.payload);

    for page in &mut guest.pages {
        for byte in page.iter_mut() {
            *byte ^= 1;
        }
    }
    guest.send_all();
    assert_eq!(pair.carry(&guest).batch_pages, 1000);
    assert_eq!(pair.missed, 0);
}

#[test]
fn moved_pages_are_references_and_zero_pages_leave_nothing_behind() {
    let mut guest = Guest::new(10);
    let mut pair = Pair::plain();
    guest.send_all();
    pair.carry(&guest);
    guest.pages.swap(2, 3);
    let was_there = std::mem::replace(&mut guest.pages[4], [0; PAGE_SIZE]);
    guest.send_all();
    let stats = pair.carry(&guest);
    assert_eq!((stats.ref_pages, stats.same_pages), (2, 7));
    // What was zero is new, though it is what was there before, with a change.
    guest.pages[4] = was_there;
    guest.pages[4][7] ^= 1;
    guest.send_all();
    let stats = pair.carry(&guest);
    assert_eq!((stats.batch_pages, stats.same_pages), (1, 9));
}

/// A frame waits for a page, and those behind it refer to what it brings.
#[test]
fn what_a_waiting_frame_brings_is_not_asked_for() {
    let mut guest = Guest::new(400);
    let mut pair = Pair::plain();
    (0..10).for_each(|page| guest.send(page));
    pair.carry(&guest);
    let id = Hasher::new(&key()).id(&guest.pages[0]);
    assert!(pair.far.remove(&id.short()));
    pair.ahead = 8;
    guest.send(0);
    (10..400).for_each(|page| guest.send(page));
    for page in 5..10 {
        guest.pages[page] = guest.pages[page + 10];
        guest.send(page);
    }
    guest.pages[4] = guest.pages[0];
    guest.send(4);
    let stats = pair.carry(&guest);
    assert_eq!((stats.same_pages, stats.ref_pages), (1, 6));
    assert_eq!(pair.missed, 1);
}

/// Copies with changes, as a program's of the pages of a file.
fn copies(guest: &mut Guest, from: usize, to: usize, count: usize) {
    for n in 0..count {
        guest.pages[to + n] = guest.pages[from + n];
        let at = n * 31 % (PAGE_SIZE - 32);
        for byte in &mut guest.pages[to + n][at..at + 32] {
            *byte = byte.wrapping_add(37);
        }
        guest.send(to + n);
    }
}

#[test]
fn a_page_like_another_one_goes_as_its_changes() {
    let mut guest = Guest::new(1000);
    let mut pair = Pair::plain();
    (0..500).for_each(|page| guest.send(page));
    pair.carry(&guest);
    copies(&mut guest, 0, 500, 250);
    let stats = pair.carry(&guest);
    assert_eq!(
        (stats.similar_pages, stats.batch_pages),
        (250, 0),
        "{stats:?}"
    );
    assert!(stats.similar_bytes < 250 * 40, "{stats:?}");
    // In a row, so what is not the changes themselves costs next to nothing.
    assert!(pair.payload < 250 * 40, "{} bytes", pair.payload);
    // Backwards in memory, from pages that are deltas themselves, and one by one.
    for page in (100..200).rev() {
        copies(&mut guest, 600 + (page * 7) % 100, page, 1);
    }
    let stats = pair.carry(&guest);
    assert!(stats.similar_pages >= 95, "{stats:?}");
    assert_eq!(pair.missed, 0);
}

#[test]
fn pages_that_the_peer_holds_are_built_upon() {
    let mut guest = Guest::new(200);
    let mut first = Pair::plain();
    (0..100).for_each(|page| guest.send(page));
    first.carry(&guest);
    // The next stream has no page of its own before the copies.
    let mut pair = first.back();
    let mut guest = next_stream(guest);
    (0..100).for_each(|page| guest.send(page));
    assert_eq!(pair.carry(&guest).ref_pages, 100);
    copies(&mut guest, 0, 100, 100);
    assert_eq!(pair.carry(&guest).similar_pages, 100);
}

#[test]
fn what_a_guest_left_unchanged_is_built_upon_when_it_returns() {
    let (guest, pair, manifest) = moved(300);
    let mut pair = pair.back();
    let mut guest = next_stream(guest);
    guest.send(299);
    pair.carry(&guest);
    pair.adopt(&manifest);
    (0..100).for_each(|page| guest.send(page));
    assert_eq!(pair.carry(&guest).same_pages, 100);
    copies(&mut guest, 0, 150, 100);
    let stats = pair.carry(&guest);
    assert_eq!(stats.similar_pages, 100, "{stats:?}");
}

/// Each old page that is asked for costs more than its delta saved.
#[test]
fn a_peer_that_has_forgotten_is_not_built_upon_for_long() {
    let (near, far) = (Forgetful::new(64 * MEGABYTE, 0), Forgetful::new(0, 0));
    let options = EncodeOptions {
        max_raw: 0,
        ..EncodeOptions::default()
    };
    let mut pair = Pair::new(options, near, far, 0);
    let mut guest = Guest::new(2000);
    (0..1000).for_each(|page| guest.send(page));
    pair.carry(&guest);
    copies(&mut guest, 0, 1000, 1000);
    let stats = pair.carry(&guest);
    assert!((64..130).contains(&stats.similar_pages), "{stats:?}");
    assert_eq!(pair.missed, stats.similar_pages);
}

/// The receiver has lost all of them, and pages are like pages that are not known yet themselves.
#[test]
fn similar_pages_whose_old_ones_are_missing_are_asked_for_at_once() {
    let options = EncodeOptions {
        max_raw: 0,
        ..EncodeOptions::default()
    };
    let (near, far) = (Forgetful::new(64 * MEGABYTE, 0), Forgetful::new(0, 0));
    let mut pair = Pair::new(options, near, far, 100);
    let mut guest = Guest::new(400);
    (0..100).for_each(|page| guest.send(page));
    pair.carry(&guest);
    for from in [0, 100, 200] {
        copies(&mut guest, from, from + 100, 100);
    }
    let stats = pair.carry(&guest);
    assert!(stats.similar_pages > 200, "{stats:?}");
    assert_eq!(pair.missed, stats.similar_pages);
    // What was asked for is not believed to be there any more; the places agree.
    guest.send_all();
    assert!(pair.carry(&guest).same_pages >= 100);
}

#[test]
fn without_places_everything_goes_by_its_id() {
    let options = EncodeOptions {
        max_places: 0,
        ..EncodeOptions::default()
    };
    let store = || Forgetful::new(64 * MEGABYTE, 0);
    let mut pair = Pair::new(options, store(), store(), 0);
    let mut guest = Guest::new(100);
    guest.send_all();
    pair.carry(&guest);
    guest.pages[50][50] ^= 1;
    guest.send_all();
    let stats = pair.carry(&guest);
    assert_eq!((stats.ref_pages, stats.batch_pages), (99, 1));
}

#[test]
fn a_receiver_with_fewer_places_than_agreed_refuses() {
    let mut guest = Guest::new(2);
    guest.send(0);
    guest.send(0);
    let store = MemoryStore::new(MEGABYTE);
    let known = KnownPages::new(100);
    let options = EncodeOptions {
        max_raw: 0,
        ..EncodeOptions::default()
    };
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key(), options);
    let limits = DecodeLimits {
        max_places: 0,
        ..DecodeLimits::default()
    };
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
    let mut results = Vec::new();
    let first = guest.stream.len() - PAGE_SIZE - 8;
    for part in [&guest.stream[..first], &guest.stream[first..]] {
        let frame = encoder
            .encode(part, Flush::Hard, Some(&known), Some(&store))
            .unwrap()
            .frame
            .unwrap();
        results.push(decoder.begin(&frame.payload, &store).map(|_| ()));
    }
    assert_eq!(results, [Ok(()), Err(DecodeError::Place)]);
}

/// Every old page is missing and every frame is begun before the first is finished: all is asked for
/// at once, and later frames build on pages that are not known yet.
#[test]
fn a_burst_of_misses_is_asked_for_at_once() {
    let options = EncodeOptions {
        max_raw: 0,
        ..EncodeOptions::default()
    };
    let mut pair = Pair::new(
        options,
        Forgetful::new(64 * MEGABYTE, 0),
        Forgetful::new(0, 0),
        100,
    );
    let mut guest = Guest::new(100);
    guest.send_all();
    pair.carry(&guest);
    for round in 0..4 {
        for page in &mut guest.pages {
            page[round * 100] ^= 1;
        }
        guest.send_all();
        guest.send_all();
    }
    let stats = pair.carry(&guest);
    assert!(stats.delta_pages >= 300, "{stats:?}");
    assert!(stats.same_pages >= 300, "{stats:?}");
    assert_eq!(pair.missed, stats.delta_pages + stats.same_pages);
    // The table is right again when the frames are done.
    guest.send_all();
    assert_eq!(pair.carry(&guest).same_pages, 100);
}

/// A store of ours whose pages are not what they are called ends no migration.
#[test]
fn a_corrupt_store_of_the_sender_gives_no_delta() {
    let mut guest = Guest::new(20);
    let mut pair = Pair::plain();
    guest.send_all();
    pair.carry(&guest);
    let domain = key().id();
    let hasher = Hasher::new(&key());
    for page in &guest.pages {
        let id = hasher.id(page);
        pair.near.remove(&id.short());
        let mut wrong = *page;
        wrong[9] ^= 1;
        pair.near.put(&domain, &id, &wrong);
    }
    for page in &mut guest.pages {
        page[5] ^= 1;
    }
    guest.send_all();
    assert_eq!(pair.carry(&guest).batch_pages, 20);
}

#[derive(Debug, Clone)]
enum Change {
    Resend,
    Byte(u16),
    Run(u16, u16),
    Whole,
    Zero,
    CopyOfNext,
    LikeNext(u16),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Resend),
        (0..4096_u16).prop_map(Change::Byte),
        (0..4096_u16, 1..4096_u16).prop_map(|(at, length)| Change::Run(at, length)),
        Just(Change::Whole),
        Just(Change::Zero),
        Just(Change::CopyOfNext),
        (0..4096_u16).prop_map(Change::LikeNext),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Invariants 1 and 7 for a guest at work: whatever either store forgets, however few places
    /// there are and however many frames wait, the same bytes come out.
    #[test]
    fn a_guest_at_work_comes_out_as_it_went_in(
        changes in prop::collection::vec((0..60_usize, change()), 0..300),
        near_pages in prop_oneof![Just(0_u64), 1..30_u64, Just(10_000)],
        far_pages in prop_oneof![Just(0_u64), 1..30_u64, Just(10_000)],
        forgets in (prop_oneof![Just(0), any::<u8>()], prop_oneof![Just(0), any::<u8>()]),
        ahead in 0..8_usize,
        max_places in prop_oneof![Just(0_u64), Just(512), Just(1 << 20)],
        batch_bytes in 1000..100_000_usize,
    ) {
        let options = EncodeOptions { max_places, batch_bytes, max_raw: 0, ..EncodeOptions::default() };
        let near = Forgetful::new(near_pages * 4200, forgets.0);
        let far = Forgetful::new(far_pages * 4200, forgets.1);
        let mut pair = Pair::new(options, near, far, ahead);
        let mut guest = Guest::new(60);
        guest.send_all();
        pair.carry(&guest);
        for (n, (page, change)) in changes.into_iter().enumerate() {
            let other = guest.pages[(page + 1) % 60];
            let contents = &mut guest.pages[page];
            match change {
                Change::Resend => {}
                Change::Byte(at) => contents[usize::from(at)] ^= n as u8,
                Change::Run(at, length) => {
                    let end = PAGE_SIZE.min(usize::from(at) + usize::from(length));
                    contents[usize::from(at)..end].fill(n as u8);
                }
                Change::Whole => contents.iter_mut().for_each(|byte| *byte = !*byte),
                Change::Zero => contents.fill(0),
                Change::CopyOfNext => *contents = other,
                Change::LikeNext(at) => {
                    *contents = other;
                    contents[usize::from(at)] ^= n as u8 | 1;
                }
            }
            guest.send(page);
        }
        pair.carry(&guest);
        guest.send_all();
        pair.carry(&guest);
    }
}

/// A guest of so many pages that went over, both sides, and what they remember of it.
fn moved(pages: usize) -> (Guest, Pair, Arc<Manifest>) {
    let mut guest = Guest::new(pages);
    let mut pair = Pair::plain();
    guest.send_all();
    pair.carry(&guest);
    let manifest = pair.manifest().unwrap();
    (guest, pair, manifest)
}

/// The guest's next stream has none of its pages yet.
fn next_stream(guest: Guest) -> Guest {
    let stream = Guest::new(guest.pages.len()).stream;
    Guest { stream, ..guest }
}

#[test]
fn a_guest_that_comes_back_is_built_upon() {
    let (guest, pair, manifest) = moved(1500);
    assert_eq!(manifest.places(), 1500);
    let (_, _, other) = moved(700);
    assert_ne!(manifest.id(), other.id());

    let mut guest = next_stream(guest);
    for page in (1100..1500).step_by(4) {
        guest.pages[page][77] ^= 1;
    }
    let mut pair = pair.back();
    pair.encoder.compare_with(vec![other, manifest.clone()]);
    (0..1000).for_each(|page| guest.send(page));
    assert_eq!(pair.carry(&guest).ref_pages, 1000);
    assert!(pair.encoder.take_matches().is_none(), "too early");
    (1000..1100).for_each(|page| guest.send(page));
    pair.carry(&guest);
    let matches = pair.encoder.take_matches().unwrap();
    let found: Vec<_> = matches.iter().map(|m| (m.manifest.id(), m.hits)).collect();
    assert_eq!(found[0], (manifest.id(), 1024));
    assert_eq!((found.len(), found[1].1, matches[1].sample), (2, 700, 1024));

    pair.adopt(&matches[0].manifest);
    (1100..1500).for_each(|page| guest.send(page));
    let stats = pair.carry(&guest);
    assert_eq!((stats.same_pages, stats.delta_pages), (300, 100));
    assert_eq!((pair.missed, stats.ref_pages), (0, 0));
    assert!(pair.payload < 1500, "{} bytes", pair.payload);
    let again = pair.manifest().unwrap();
    assert_eq!(again.places(), 1500);
    assert_ne!(again.id(), manifest.id());
}

#[test]
fn a_stream_that_is_like_none_adopts_none() {
    let (_, _, manifest) = moved(1500);
    let mut pair = Pair::plain();
    let mut guest = Guest::new(1500);
    guest.pages.rotate_left(1);
    pair.encoder.compare_with(vec![manifest]);
    guest.send_all();
    pair.carry(&guest);
    assert!(pair.encoder.take_matches().unwrap().is_empty());
    assert!(pair.encoder.take_matches().is_none(), "given out once");
}

#[test]
fn what_was_not_agreed_on_is_not_adopted() {
    let (guest, _, manifest) = moved(20);
    for agreed in [0, 1] {
        let mut pair = Pair::plain();
        // Once each.
        (0..agreed).for_each(|_| pair.adopt(&manifest));
        pair.encoder.adopt(&manifest);
        let input = &guest.stream;
        let frame = pair.encoder.encode(input, Flush::Hard, None, None).unwrap();
        let refused = pair.decoder.begin(&frame.frame.unwrap().payload, &pair.far);
        assert_eq!(refused.unwrap_err(), DecodeError::Manifest);
    }
}

/// Two manifests with one id cannot be; should they, what was made of the wrong one does not pass.
#[test]
fn another_manifest_than_the_senders_does_not_pass() {
    let (guest, pair, manifest) = moved(40);
    let mut wrong = Guest::new(40);
    wrong.pages.rotate_left(1);
    wrong.send_all();
    let mut other = Pair::plain();
    other.carry(&wrong);
    let mut pair = pair.back();
    let mut guest = next_stream(guest);
    guest.send(0);
    pair.carry(&guest);
    pair.encoder.adopt(&manifest);
    pair.decoder.agree(other.manifest().unwrap());
    let at = guest.stream.len();
    guest.send_all();
    let (known, near) = (Some(&pair.known), Some(&pair.near as &dyn PageStore));
    let input = &guest.stream[at..];
    let encoded = pair.encoder.encode(input, Flush::Hard, known, near);
    let frame = encoded.unwrap().frame.unwrap();
    assert_eq!(frame.stats.same_pages, 40);
    let mut pending = pair.decoder.begin(&frame.payload, &pair.far).unwrap();
    let finished = pair.decoder.finish(&mut pending, &pair.far);
    assert_eq!(finished.unwrap_err(), FinishError::Mismatch);
}

#[test]
fn what_a_limit_leaves_out_is_the_same_on_both_sides() {
    let options = EncodeOptions {
        max_places: 1024,
        ..EncodeOptions::default()
    };
    let limits = DecodeLimits {
        max_places: 1024,
        ..DecodeLimits::default()
    };
    let (guest, pair, manifest) = moved(2000);
    let mut guest = next_stream(guest);
    let mut pair = pair.back();
    pair.encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key(), options);
    pair.decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), limits);
    guest.send(1999);
    pair.carry(&guest);
    pair.adopt(&manifest);
    guest.send_all();
    let stats = pair.carry(&guest);
    // The chunk that was there, which is the last one, and the first of the manifest.
    assert_eq!((stats.same_pages, stats.ref_pages), (512 + 464, 1024));
    assert_eq!(pair.manifest().unwrap().places(), 512 + 464);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A guest goes there and back, with zero pages that come and go, adoption anywhere, frames of any
    /// size in flight, and stores that forget.
    #[test]
    fn a_trip_there_and_back_is_the_identity(
        changes in prop::collection::vec((0..300_usize, 0..4_u8, 0..PAGE_SIZE), 0..200),
        adopt_at in 0..300_usize,
        share in 0..120_u8,
        ahead in 0..5_usize,
        batch_bytes in 1..100_000_usize,
    ) {
        let store = |share| Forgetful::new(64 * MEGABYTE, share);
        let mut guest = Guest::new(300);
        (0..20).for_each(|page| guest.pages[page * 7] = [0; PAGE_SIZE]);
        let options = EncodeOptions { batch_bytes, ..EncodeOptions::default() };
        let mut pair = Pair::new(options, store(share / 2), store(share), ahead);
        guest.send_all();
        pair.carry(&guest);
        let manifest = pair.manifest().unwrap();
        let mut guest = next_stream(guest);
        let mut pair = pair.back();
        for (at, (page, change, byte)) in changes.into_iter().enumerate() {
            match change {
                0 => guest.pages[page] = [0; PAGE_SIZE],
                1 => guest.pages[page] = guest.pages[byte % 300],
                _ => guest.pages[page][byte] ^= change,
            }
            guest.send(page);
            if at == adopt_at / 2 {
                pair.carry(&guest);
                pair.adopt(&manifest);
            }
        }
        (0..adopt_at).for_each(|page| guest.send(page));
        pair.carry(&guest);
        guest.send_all();
        pair.carry(&guest);
        pair.manifest();
    }
}
