//! Pieces: what a migration stream consists of once its structure is understood.

/// A RAM block of one channel, numbered in the order in which page records first named blocks there.
///
/// Numbers start at 0 and are dense, so they index a table on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Distance in bytes between the pages of a [`Piece::ZeroRun`].
///
/// QEMU's pages are of this size on all common targets; where they are not, runs have one page.
pub const RUN_PAGE_SIZE: u64 = 4096;

/// Most pages in a [`Piece::ZeroRun`]: 256 MiB of guest memory, 576 KiB of stream.
pub const MAX_ZERO_RUN: u32 = 65_536;

/// A part of a migration stream. Pieces never overlap and leave no gap.
///
/// `Page` and `ZeroRun` stand for records whose bytes follow from the piece alone (given the block
/// names): encoding them gives the very bytes they were decoded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// One page with its contents.
    Page {
        /// The RAM block the page belongs to.
        block: BlockId,
        /// Byte offset inside the block, a multiple of the page size.
        offset: u64,
        /// The record carries the block's name (else it continues the block of the record before).
        named: bool,
        /// The page's contents, exactly one page long.
        data: &'a [u8],
    },
    /// `count` consecutive pages of zeroes, each a record of its own in the stream.
    ZeroRun {
        /// The RAM block the pages belong to.
        block: BlockId,
        /// Byte offset of the first page inside the block; the next ones follow at distances of
        /// [`RUN_PAGE_SIZE`].
        offset: u64,
        /// The first record carries the block's name; the others never do.
        named: bool,
        /// Number of records, 1 to [`MAX_ZERO_RUN`].
        count: u32,
    },
    /// Bytes passed on as they are: framing, commands, device state, anything not understood.
    Other(&'a [u8]),
}
