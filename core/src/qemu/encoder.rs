//! Stream encoder: pieces back into the bytes of a main channel.

use super::blocks::MAX_BLOCKS;
use super::wire::flag;
use crate::piece::{BlockId, MAX_ZERO_RUN, Piece, RUN_PAGE_SIZE};

/// Longest block name: its length is one byte on the wire.
const MAX_NAME: usize = u8::MAX as usize;
/// Page sizes that QEMU's targets have, in bytes.
const PAGE_SIZES: std::ops::RangeInclusive<usize> = 1 << 10..=1 << 16;

/// Turns pieces back into the bytes of a channel.
///
/// Pieces may come from an untrusted peer: one that no decoder can have made is refused.
#[derive(Debug, Default)]
pub struct Encoder {
    names: Vec<Box<[u8]>>,
}

impl Encoder {
    /// An encoder that knows no blocks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a block; the first one is `BlockId(0)`. `None` when the name or table is over its limit
    /// (1 to 255 bytes, [`MAX_BLOCKS`] names).
    pub fn define_block(&mut self, name: &[u8]) -> Option<BlockId> {
        if name.is_empty() || name.len() > MAX_NAME || self.names.len() >= MAX_BLOCKS {
            return None;
        }
        let id = BlockId(u32::try_from(self.names.len()).ok()?);
        self.names.push(name.into());
        Some(id)
    }

    /// Number of blocks defined so far, which is the next block's id.
    #[must_use]
    pub fn block_count(&self) -> usize {
        self.names.len()
    }

    /// Appends the bytes of `piece` to `out`. Returns false (and appends nothing) if the piece
    /// names an unknown block, or no stream can hold it: an offset that is not on a page boundary or
    /// overflows, contents that are no page, an empty run or one above [`MAX_ZERO_RUN`].
    #[must_use]
    pub fn encode(&mut self, piece: &Piece<'_>, out: &mut Vec<u8>) -> bool {
        match *piece {
            Piece::Other(bytes) => {
                out.extend_from_slice(bytes);
                true
            }
            Piece::Page {
                block,
                offset,
                named,
                data,
            } => {
                let sized = data.len().is_power_of_two() && PAGE_SIZES.contains(&data.len());
                if !sized || offset % data.len() as u64 != 0 {
                    return false;
                }
                let Some(name) = self.name(block) else {
                    return false;
                };
                put_head(out, offset | flag::PAGE, named.then_some(name));
                out.extend_from_slice(data);
                true
            }
            Piece::ZeroRun {
                block,
                offset,
                named,
                count,
            } => {
                if count == 0 || count > MAX_ZERO_RUN || offset % (*PAGE_SIZES.start() as u64) != 0
                {
                    return false;
                }
                let last = u64::from(count - 1) * RUN_PAGE_SIZE;
                if offset.checked_add(last).is_none() || (count > 1 && offset % RUN_PAGE_SIZE != 0)
                {
                    return false;
                }
                let Some(name) = self.name(block) else {
                    return false;
                };
                put_head(out, offset | flag::ZERO, named.then_some(name));
                out.push(0);
                out.reserve(9 * (count as usize - 1));
                for index in 1..u64::from(count) {
                    let header = (offset + index * RUN_PAGE_SIZE) | flag::ZERO | flag::CONTINUE;
                    let mut record = [0; 9];
                    record[..8].copy_from_slice(&header.to_be_bytes());
                    out.extend_from_slice(&record);
                }
                true
            }
        }
    }

    fn name(&self, block: BlockId) -> Option<&[u8]> {
        self.names.get(block.0 as usize).map(|name| &**name)
    }
}

/// A record's header and, where it carries one, its block name.
fn put_head(out: &mut Vec<u8>, header: u64, name: Option<&[u8]>) {
    let header = if name.is_some() {
        header
    } else {
        header | flag::CONTINUE
    };
    out.extend_from_slice(&header.to_be_bytes());
    if let Some(name) = name {
        // `define_block` has checked the length.
        out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        out.extend_from_slice(name);
    }
}
