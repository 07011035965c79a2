//! The migration core that gateway and VMM share: value types and stream codecs, without I/O.
//!
//! Nothing here opens a socket, reads a clock or starts a task. A codec turns bytes into
//! [`Piece`]s and pieces into the same bytes; see [`qemu`] for QEMU's migration stream.

pub mod piece;
pub mod qemu;

pub use piece::{BlockId, Piece};
