//! QEMU's migration stream (main channel).
//!
//! [`Decoder`] turns the bytes of a main channel into pieces and observations, [`Encoder`] turns
//! pieces back into bytes, [`return_path`] reads the other direction. Streams of QEMU 7.2 to 10.x are
//! understood; their format is described in QEMU's `docs/devel/migration`.
//!
//! Goals: decoding followed by encoding is the identity for any bytes, cut anywhere; page contents
//! are never copied; the byte on which the destination commits is announced before it passes; memory
//! does not grow with the stream. Not goals: understanding device state, applying XBZRLE deltas,
//! judging whether a stream is valid.

mod blocks;
pub mod decoder;
pub mod encoder;
mod header;
mod item;
mod ram;
mod resync;
pub mod return_path;
mod section;
#[cfg(any(test, feature = "synthetic"))]
pub mod synthetic;
mod tail;
mod wire;

pub use blocks::MAX_BLOCKS;
pub use decoder::{CommitMark, Decoder, Event, MAX_PENDING, Phase, Step};
pub use encoder::Encoder;
pub use return_path::{ReturnMessage, ReturnPath};
pub use tail::MAX_VMDESC;

/// Bytes from hexadecimal digits; blanks are ignored.
#[cfg(test)]
fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let digit = |byte: u8| char::from(byte).to_digit(16).expect("hexadecimal digit") as u8;
    digits
        .chunks_exact(2)
        .map(|pair| digit(pair[0]) << 4 | digit(pair[1]))
        .collect()
}
