//! Stream encoder (interface only).
use crate::piece::{BlockId, Piece};

/// Turns pieces back into the bytes of a channel.
#[derive(Debug, Default)]
pub struct Encoder {}

impl Encoder {
    /// An encoder that knows no blocks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a block; the first one is `BlockId(0)`. `None` when the name or table is over its limit.
    pub fn define_block(&mut self, _name: &[u8]) -> Option<BlockId> {
        None
    }

    /// Appends the bytes of `piece` to `out`. Returns false (and appends nothing) if the piece
    /// names an unknown block.
    #[must_use]
    pub fn encode(&mut self, _piece: &Piece<'_>, _out: &mut Vec<u8>) -> bool {
        false
    }
}
