//! What a hostile peer announces of its store, and what becomes of a guest that is sent to it.

use std::sync::{Arc, OnceLock};

use skyferry_core::Piece;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_core::qemu::{Decoder, Step};
use skyferry_dedup::{
    Announced, ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions,
    Hasher, MemoryStore, ShortId,
};

use super::carry::carry;

const CAPACITY: usize = 16 << 10;

fn key() -> DomainKey {
    DomainKey::from_bytes([3; 32])
}

/// A small guest and the ids of its pages.
fn guest() -> &'static (Vec<u8>, Vec<ShortId>) {
    static GUEST: OnceLock<(Vec<u8>, Vec<ShortId>)> = OnceLock::new();
    GUEST.get_or_init(|| {
        let stream = SyntheticStream::builder()
            .blocks(&[("pc.ram", 24)])
            .zero_percent(10)
            .build()
            .bytes;
        let hasher = Hasher::new(&key());
        let (mut decoder, mut ids, mut at) = (Decoder::new(), Vec::new(), 0);
        loop {
            match decoder.flush(&stream[at..]) {
                Step::Piece { piece, raw } => {
                    at += raw.len();
                    if let Piece::Page { data, .. } = piece {
                        ids.push(hasher.id(data).short());
                    }
                }
                Step::Event(_) => {}
                Step::NeedMore => return (stream, ids),
            }
        }
    })
}

/// Each operation is a byte for what and a byte for which: a page of the guest announced in a segment, a
/// segment dropped, or the bytes that follow as a message. Whatever a table takes, it stays within its
/// bytes and names only what was announced; and the guest arrives.
pub(crate) fn hostile(data: &[u8]) {
    let (stream, ids) = guest();
    let announced = Announced::new(CAPACITY);
    let mut store = vec![1];
    store.extend([7; 16]);
    announced.apply(&store).expect("a store");
    let mut rest = data;
    while let Some((&[what, which], behind)) = rest.split_first_chunk::<2>() {
        rest = behind;
        let segment = what >> 2;
        match what & 3 {
            0 | 1 => {
                let (_, segments) = announced.position();
                let told = segments
                    .iter()
                    .find(|told| told.segment == u32::from(segment));
                let first = told.map_or(0, |told| told.records).min(127) as u8;
                let id = ids[usize::from(which) % ids.len()].as_bytes();
                let mut message = vec![2, segment, first, 1];
                message.extend_from_slice(&id[..5]);
                let _ = announced.apply(&message);
            }
            2 => {
                let _ = announced.apply(&[3, segment]);
            }
            _ => {
                let (message, behind) = rest.split_at(rest.len().min(which.into()));
                rest = behind;
                let _ = announced.apply(message);
            }
        }
        check(&announced, ids);
    }
    send(stream, Arc::new(announced));
}

fn check(announced: &Announced, ids: &[ShortId]) {
    assert!(announced.bytes() <= CAPACITY, "{}", announced.bytes());
    let (_, segments) = announced.position();
    for place in ids.iter().filter_map(|id| announced.find(id)) {
        let there = segments
            .iter()
            .any(|told| told.segment == place.segment && place.record < told.records);
        assert!(there, "{place:?} was not announced");
    }
}

/// Sends the guest to a peer that has nothing of what it announced.
fn send(stream: &[u8], announced: Arc<Announced>) {
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key(), EncodeOptions::default());
    encoder.refer_to(announced);
    let mut decoder = ChannelDecoder::new(ChannelKind::QemuMain, &key(), DecodeLimits::default());
    let far = MemoryStore::new(1 << 20);
    carry(&mut encoder, stream, |frame| {
        let mut pending = decoder.begin(&frame.payload, &far).expect("our own frame");
        for index in pending.missing().to_vec() {
            let page = frame.retained.page(index).expect("what a frame refers to");
            pending.fill(index, page).expect("the page that was meant");
        }
        let finished = decoder.finish(&mut pending, &far);
        Some(finished.expect("our own frame").bytes)
    });
}
