//! Page frames from a hostile peer.

use std::sync::{Arc, OnceLock};

use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions,
    FinishError, Flush, Manifest, MemoryStore, PageStore,
};

use super::carry::carry;

const MAX_RAW: usize = 256 << 10;

fn limits() -> DecodeLimits {
    DecodeLimits {
        max_raw: MAX_RAW,
        max_window_log: 20,
        ..DecodeLimits::default()
    }
}

fn key() -> DomainKey {
    DomainKey::from_bytes([3; 32])
}

fn kind(byte: u8) -> ChannelKind {
    if byte & 1 == 0 {
        ChannelKind::QemuMain
    } else {
        ChannelKind::Opaque
    }
}

/// Decodes one payload. `None`: refused. What is missing is filled with what `page` has for it,
/// wherever that is believed.
fn decode<'a>(
    decoder: &mut ChannelDecoder,
    payload: &[u8],
    store: &dyn PageStore,
    page: impl Fn(u32) -> Option<&'a [u8]>,
) -> Option<Result<Vec<u8>, FinishError>> {
    let mut pending = decoder.begin(payload, store).ok()?;
    assert!(pending.raw_len() <= MAX_RAW);
    for index in pending.missing().to_vec() {
        if let Some(page) = page(index) {
            let _ = pending.fill(index, page);
        }
    }
    let finished = match decoder.finish(&mut pending, store) {
        Ok(finished) => finished,
        Err(error) => {
            if let FinishError::Missing(missing) = &error {
                assert!(!missing.is_empty() && missing == pending.missing());
            }
            return Some(Err(error));
        }
    };
    assert!(!finished.bytes.is_empty() && finished.bytes.len() <= MAX_RAW);
    Some(Ok(finished.bytes))
}

/// What a guest held that left: 600 pages of block 0 of the frames that are damaged.
fn manifest() -> Option<Arc<Manifest>> {
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 600)])
        .build();
    let options = EncodeOptions::default();
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &key(), options);
    let mut rest = &stream.bytes[..];
    while let Ok(encoded) = encoder.encode(rest, Flush::Hard, None, None)
        && encoded.consumed > 0
    {
        rest = &rest[encoded.consumed..];
    }
    encoder.take_table().into_manifest().map(Arc::new)
}

/// Payloads out of nowhere: a byte for the kind, then payloads with a length of two bytes each. One that
/// is not what its digest says ends a channel, yet here the next one is begun all the same: it builds
/// on what the first left in the table of places.
pub(crate) fn hostile(data: &[u8]) {
    let Some((&first, mut rest)) = data.split_first() else {
        return;
    };
    let store = MemoryStore::new(1 << 20);
    let mut decoder = ChannelDecoder::new(kind(first), &key(), limits());
    static LEFT: OnceLock<Option<Arc<Manifest>>> = OnceLock::new();
    if let Some(manifest) = LEFT.get_or_init(manifest) {
        decoder.agree(manifest.clone());
    }
    while let Some((len, behind)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len)).min(behind.len());
        let (payload, behind) = behind.split_at(len);
        let page = |_| Some(&data[..data.len().min(4096)]);
        if decode(&mut decoder, payload, &store, page).is_none() {
            return;
        }
        rest = behind;
    }
}

/// Frames of our own encoder with one change: byte 0 is the kind (and whether the receiver's store
/// keeps nothing), 1 the frame, 2 and 3 the place, 4 what is done to the byte there (nothing when 0),
/// the rest the stream. Unchanged frames give the stream again; a changed one never gives other bytes.
pub(crate) fn damaged(data: &[u8]) {
    let Some((plan, stream)) = data.split_first_chunk::<5>() else {
        return;
    };
    let options = EncodeOptions {
        level: 1,
        window_log: 17,
        batch_bytes: 4096,
        max_raw: MAX_RAW,
        ..EncodeOptions::default()
    };
    let far = MemoryStore::new(if plan[0] & 2 == 0 { 1 << 20 } else { 0 });
    let mut encoder = ChannelEncoder::new(kind(plan[0]), &key(), options);
    let mut decoder = ChannelDecoder::new(kind(plan[0]), &key(), limits());
    let mut number = 0_u8;
    carry(&mut encoder, stream, |frame| {
        let mut payload = frame.payload.to_vec();
        if plan[1] == number {
            let place = usize::from(u16::from_le_bytes([plan[2], plan[3]])) % payload.len();
            payload[place] ^= plan[4];
        }
        number = number.wrapping_add(1);
        let page = |index| frame.retained.page(index);
        let decoded = decode(&mut decoder, &payload, &far, page).and_then(Result::ok);
        assert!(
            decoded.is_some() || payload != frame.payload,
            "a good frame was refused"
        );
        decoded
    });
}
