//! Messages and headers from a hostile peer.

use skyferry::seed::wire::{Reply, Request};
use skyferry::wire::data::HEADER_LEN;
use skyferry::wire::{Control, DataHeader};

/// What decodes encodes to the very same bytes: no two forms of one message exist.
pub(crate) fn control(data: &[u8]) {
    let Ok(message) = Control::decode(data) else {
        return;
    };
    let mut encoded = Vec::new();
    message.encode(&mut encoded);
    let (length, body) = encoded.split_first_chunk::<4>().expect("a length");
    assert_eq!(u32::from_le_bytes(*length) as usize, body.len());
    assert!(body == data, "{message:?} has another form");
}

/// The same for the header of a data stream.
pub(crate) fn data_header(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<HEADER_LEN>() else {
        return;
    };
    if let Ok(header) = DataHeader::decode(bytes) {
        assert_eq!(&header.encode(), bytes);
    }
}

/// The same for both directions of the socket that `skyferry seed` speaks on.
pub(crate) fn seed(data: &[u8]) {
    let mut encoded = Vec::new();
    if let Ok(request) = Request::decode(data) {
        encoded.clear();
        request.encode(&mut encoded);
        assert!(&encoded[4..] == data, "a request has another form");
    }
    if let Ok(reply) = Reply::decode(data) {
        encoded.clear();
        reply.encode(&mut encoded);
        assert!(&encoded[4..] == data, "{reply:?} has another form");
    }
}
