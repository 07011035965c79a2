//! QEMU's migration stream (main channel).
pub mod decoder;
pub mod encoder;

pub use decoder::{CommitMark, Decoder, Event, Phase, Step};
pub use encoder::Encoder;
