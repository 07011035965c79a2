//! Messages and headers from a hostile peer.

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
