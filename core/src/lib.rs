//! The migration core that gateway and VMM share: value types and stream codecs, without I/O.
//!
//! Nothing here opens a socket, reads a clock or starts a task. A codec turns bytes into
//! [`Piece`]s and pieces into the same bytes; see [`qemu`] for QEMU's migration stream.

#[cfg(any(test, fuzzing, feature = "synthetic"))]
pub mod fuzz_entry;
pub mod piece;
pub mod qemu;
pub mod sniff;

pub use piece::{BlockId, Piece};
pub use sniff::{Sniff, sniff};
