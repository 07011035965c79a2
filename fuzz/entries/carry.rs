//! A stream through our own encoder, and what becomes of its frames.

use skyferry_dedup::{ChannelEncoder, Flush, Frame, KnownPages, MemoryStore};

/// Hands the frames of `stream` to `arrive`, one after the other: it gives the bytes that came out, which
/// must be those of the stream, or `None` when nothing more is to be sent.
pub(crate) fn carry(
    encoder: &mut ChannelEncoder,
    stream: &[u8],
    mut arrive: impl FnMut(&Frame) -> Option<Vec<u8>>,
) {
    let (known, near) = (KnownPages::new(256), MemoryStore::new(1 << 20));
    let (mut consumed, mut decoded) = (0, 0);
    loop {
        let step = encoder
            .encode(&stream[consumed..], Flush::Hard, Some(&known), Some(&near))
            .expect("memory");
        consumed += step.consumed;
        let Some(frame) = step.frame else {
            if step.consumed == 0 && step.events.is_empty() {
                break;
            }
            continue;
        };
        let Some(bytes) = arrive(&frame) else {
            return;
        };
        assert!(
            stream[decoded..].starts_with(&bytes),
            "other bytes came out"
        );
        decoded += bytes.len();
    }
    assert_eq!(decoded, stream.len());
}
