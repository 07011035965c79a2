//! Stream decoder (interface only; the parser follows).
use crate::piece::Piece;

/// Where a migration stands, as seen in the stream of its main channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// File header, configuration and the RAM block list.
    Setup,
    /// Copying while the guest runs; rounds count from 1.
    Precopy {
        /// Number of the pass over dirty pages.
        round: u32,
    },
    /// The source guest has stopped; the last pages are on their way.
    Switchover,
    /// All RAM has been sent; device state follows.
    DeviceState,
    /// The destination runs the guest and asks for the missing pages.
    Postcopy,
    /// The stream is complete.
    End,
    /// The structure is not (or no longer) understood; everything passes as it is.
    Opaque,
}

/// What the decoder learns about the byte on which the destination commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitMark {
    /// The next byte of the input may be the commit byte: hold it and all that follows.
    Candidate,
    /// The last candidate was none; what was held may go on.
    Refuted,
    /// Everything up to here completes the stream (or the postcopy package) that began at the last candidate.
    Complete,
}

/// An observation; it consumes no input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Whether the source opened a return path; comes once, before any RAM.
    ReturnPath(bool),
    /// A new phase has begun.
    Phase(Phase),
    /// News about the commit byte.
    Commit(CommitMark),
}

/// The result of one decoding step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// A piece; `raw` is the part of the input it was decoded from and begins where the input begins.
    Piece {
        /// The decoded piece.
        piece: Piece<'a>,
        /// The consumed bytes, never empty.
        raw: &'a [u8],
    },
    /// An observation about what follows; call again with the same input.
    Event(Event),
    /// The input ends inside a piece (or is empty): call again with more bytes behind the same ones.
    NeedMore,
}

/// Turns the bytes of a channel into pieces.
#[derive(Debug, Default)]
pub struct Decoder {}

impl Decoder {
    /// A decoder for a channel that has not sent anything yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes the next piece or event at the start of `input`.
    pub fn step<'a>(&mut self, input: &'a [u8]) -> Step<'a> {
        if input.is_empty() { Step::NeedMore } else { Step::Piece { piece: Piece::Other(input), raw: input } }
    }

    /// Like [`step`](Self::step), but never waits: a piece cut by the end of `input` comes out as
    /// other bytes (and so does its remainder later). `NeedMore` means that `input` is empty.
    pub fn flush<'a>(&mut self, input: &'a [u8]) -> Step<'a> {
        self.step(input)
    }

    /// The name of a block seen so far.
    #[must_use]
    pub fn block_name(&self, _block: crate::BlockId) -> Option<&[u8]> {
        None
    }

    /// The page size in bytes.
    #[must_use]
    pub fn page_size(&self) -> usize {
        4096
    }
}
