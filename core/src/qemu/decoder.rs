//! Stream decoder: the bytes of a main channel into pieces and observations.
//!
//! The stream is a sequence of *units*: a header, a RAM record, a command, a footer. A unit's length
//! follows from its first bytes, its *head*. The decoder parses heads only; contents are passed by
//! length, straight from the caller's buffer. The grammar lives beside this file: `header` (file
//! header, configuration), `item` (section headers, commands), `ram` and `section` (bodies).
//!
//! ```text
//! header ─► item ─► body ─► footer ─┐            lost (structure not understood)
//!             ▲                     │              │ ▲
//!             └─────────────────────┤              │ │ anything that is not in the grammar,
//!                                   ▼              ▼ │ sections of unknown layout
//!                            tail (device state)   resume, where `resync` has verified it
//! ```
//!
//! As long as nothing unknown has come up, the decoder reads the stream as the destination will, so
//! it knows where the commit byte can be. Once structure had to be searched for, a forged stream in
//! guest memory may have been found in its place; from then on every byte also passes the `tail`
//! scanner, and what looks like the end of a stream ends the trust in the structure.

use std::collections::{HashMap, VecDeque};
use std::fmt;

use super::blocks::{BlockTable, Place};
use super::ram::Record;
use super::section::Section;
use super::tail::{self, Halt, Scanner};
use super::wire::{Parsed, Stop};
use super::{header, item, ram, resync, section};
use crate::piece::{BlockId, Piece, RUN_PAGE_SIZE};

/// Most bytes that [`Decoder::step`] leaves to the caller with [`Step::NeedMore`]: a record of the
/// largest page with its head, and the head of the record behind it.
pub const MAX_PENDING: usize = (64 << 10) + 2 * MAX_HEAD;
/// Longest head of a unit (a dirty-bitmap record with two names has 541 bytes).
pub(super) const MAX_HEAD: usize = 1024;
/// Page size until the configuration says otherwise, in bytes.
const DEFAULT_PAGE_SIZE: u64 = 4096;

/// Where a migration stands, as seen in the stream of its main channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// The structure is not (or no longer) understood; everything passes as it is. The phase that was
    /// left comes again when the structure has been found again.
    Opaque,
}

impl Phase {
    /// Number of the pass over dirty pages, while there is one.
    pub fn round(self) -> Option<u32> {
        match self {
            Self::Precopy { round } => Some(round),
            _ => None,
        }
    }
}

/// The word for logs, without the round.
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::Precopy { .. } => "precopy",
            Self::Switchover => "switchover",
            Self::DeviceState => "device-state",
            Self::Postcopy => "postcopy",
            Self::End => "end",
            Self::Opaque => "opaque",
        })
    }
}

/// What the decoder learns about the byte on which the destination commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CommitMark {
    /// The next byte of the input may be the commit byte: hold it and all that follows.
    Candidate,
    /// The last candidate was none; what was held may go on.
    Refuted,
    /// Everything up to here completes the stream (or the postcopy package) that began at the last
    /// candidate. Should a stream go on all the same, further candidates may follow.
    Complete,
}

/// An observation; it consumes no input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Whether the source opened a return path; comes once, before any RAM. It does not come where
    /// the channel became opaque before its first command or section.
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

/// What the decoder expects next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The file header.
    FileHeader,
    /// The configuration, if there is one.
    Configuration,
    /// A subsection of the configuration, or the first item.
    ConfigurationSubsection,
    /// Names in the list of capabilities.
    Capabilities { left: u32 },
    /// A section header or command.
    Item,
    /// The footer of the open section.
    Footer,
    /// A RAM record.
    Ram,
    /// An entry of the RAM block list; the lengths of those to come add up to `left`.
    BlockList { left: u64 },
    /// A record of a body other than RAM.
    Body,
    /// Device state up to the end of the stream.
    Tail,
    /// Bytes of unknown structure in a main channel.
    Lost,
    /// Everything passes: no main channel, or behind its end.
    Passing,
}

/// The unit at the start of the input, parsed from its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// This many bytes pass as they are.
    Raw(u64),
    /// A page record that a piece can stand for.
    Record(Record),
    /// Nothing is consumed: an event is due, or another state has to look at these bytes.
    Again,
}

/// What happens when the bytes of a unit have passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// They were a package with which postcopy begins.
    Package,
    /// They were the end of the stream.
    End,
}

/// Turns the bytes of a channel into pieces.
///
/// The caller keeps the bytes: each call gets the channel's bytes from the first one that no piece
/// has consumed yet. Memory stays below 8 MiB, whatever the channel carries
/// (names of blocks and ids of sections, all within limits; an ordinary guest needs some KiB).
///
/// ```
/// use skyferry_core::Piece;
/// use skyferry_core::qemu::{Decoder, Event, Phase, Step};
///
/// let mut decoder = Decoder::new();
/// let input = b"not a migration";
/// assert_eq!(decoder.step(input), Step::Event(Event::Phase(Phase::Opaque)));
/// assert_eq!(decoder.step(input), Step::Piece { piece: Piece::Other(input), raw: input });
/// ```
#[derive(Debug)]
pub struct Decoder {
    pub(super) state: State,
    /// Bytes of the current unit that are still to pass.
    skip: u64,
    /// What happens when they have passed.
    pub(super) after: Option<After>,
    /// The candidate of the package at hand has been announced.
    pub(super) package_announced: bool,
    /// The start of a head that a flush has already passed on; at most [`MAX_HEAD`] bytes.
    carry: Vec<u8>,
    events: VecDeque<Event>,
    phase: Option<Phase>,
    /// The phase to go back to from `Opaque`.
    phase_before: Option<Phase>,
    pub(super) page_size: u64,
    pub(super) ignore_shared: bool,
    pub(super) mapped_ram: bool,
    pub(super) return_path_known: bool,
    /// Entries of the block list may carry a page size.
    pub(super) huge_pages: bool,
    pub(super) blocks: BlockTable,
    /// POSTCOPY_ADVISE has come.
    pub(super) postcopy_advised: bool,
    /// Bytes of RAM that the block list announced.
    pub(super) ram_total: Option<u64>,
    /// Block of the last page record, which the next one may continue. `None` when not known.
    pub(super) current: Option<Place>,
    pub(super) sections: HashMap<u32, section::Kind>,
    /// Section id of RAM once its START has come.
    pub(super) ram: Option<u32>,
    pub(super) open: Section,
    /// Section id of the last footer, `None` when something else came behind it.
    pub(super) last_footer: Option<u32>,
    /// Section whose end is searched for.
    lost_in: Option<u32>,
    pub(super) ram_done: bool,
    pub(super) postcopy: bool,
    round: u32,
    /// Where the last page record of this round stood.
    last_page: (Place, u64),
    pub(super) scanner: Scanner,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            state: State::FileHeader,
            skip: 0,
            after: None,
            package_announced: false,
            carry: Vec::new(),
            events: VecDeque::new(),
            phase: None,
            phase_before: None,
            page_size: DEFAULT_PAGE_SIZE,
            ignore_shared: false,
            mapped_ram: false,
            return_path_known: false,
            huge_pages: false,
            blocks: BlockTable::default(),
            postcopy_advised: false,
            ram_total: None,
            current: None,
            sections: HashMap::new(),
            ram: None,
            open: Section::default(),
            last_footer: None,
            lost_in: None,
            ram_done: false,
            postcopy: false,
            round: 0,
            last_page: (Place::default(), 0),
            scanner: Scanner::default(),
        }
    }
}

impl Decoder {
    /// A decoder for a channel that has not sent anything yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes the next piece or event at the start of `input`, which begins with the first byte
    /// that has not been consumed. Bytes left by `NeedMore` (at most [`MAX_PENDING`]) come again.
    pub fn step<'a>(&mut self, input: &'a [u8]) -> Step<'a> {
        self.advance(input, false)
    }

    /// Like [`step`](Self::step), but never waits: a piece cut by the end of `input` comes out as
    /// other bytes (and so does its remainder later). `NeedMore` means that `input` is empty.
    pub fn flush<'a>(&mut self, input: &'a [u8]) -> Step<'a> {
        self.advance(input, true)
    }

    /// The name of a block that a piece has named.
    #[must_use]
    pub fn block_name(&self, block: BlockId) -> Option<&[u8]> {
        self.blocks.name(block)
    }

    /// Whether the stream has announced that it may switch to postcopy.
    #[must_use]
    pub fn postcopy_advised(&self) -> bool {
        self.postcopy_advised
    }

    /// Bytes of RAM that the stream announced, once it has.
    #[must_use]
    pub fn ram_total(&self) -> Option<u64> {
        self.ram_total
    }

    /// The page size in bytes, 1024 to 65536.
    #[must_use]
    pub fn page_size(&self) -> usize {
        // `header` accepts no page larger than 64 KiB.
        usize::try_from(self.page_size).unwrap_or(usize::MAX)
    }

    /// Whether the last candidate is the last byte so far. A stream without device description
    /// (`suppress-vmdesc=on`) ends so, and only the source's silence or end of file tells it from
    /// one that goes on.
    #[must_use]
    pub fn candidate_is_last(&self) -> bool {
        self.scanner.candidate_is_last()
    }

    fn advance<'a>(&mut self, input: &'a [u8], flush: bool) -> Step<'a> {
        // How much of the input passes as other bytes before something else comes.
        let mut done = 0;
        while self.events.is_empty() {
            let rest = &input[done..];
            if self.skip > 0 {
                let passed = self.pass(rest, flush);
                done += passed;
                if passed == 0 && self.skip > 0 {
                    break;
                }
            } else if let Some(after) = self.after.take() {
                item::on_passed(self, after);
            } else if rest.is_empty() {
                break;
            } else if self.state == State::Passing {
                done = input.len();
            } else if matches!(self.state, State::Tail | State::Lost) {
                let (passed, wait) = self.watch(rest, flush);
                done += passed;
                if wait {
                    break;
                }
            } else {
                match self.head(rest) {
                    Ok(Unit::Again) => {}
                    Ok(Unit::Raw(len)) => self.begin_raw(len),
                    Ok(Unit::Record(record)) => match self.admit(record, rest, flush) {
                        Admit::Whole if done == 0 => return self.emit(record, rest),
                        Admit::Whole | Admit::Wait => break,
                        Admit::Again => {}
                    },
                    Err(Stop::Lost) => self.lose(),
                    Err(Stop::Short) if flush => done += self.keep_head(rest),
                    Err(Stop::Short) => break,
                }
            }
        }
        if done > 0 {
            let raw = &input[..done];
            return Step::Piece {
                piece: Piece::Other(raw),
                raw,
            };
        }
        self.events.pop_front().map_or(Step::NeedMore, Step::Event)
    }

    /// Passes bytes of the current unit; returns how many. Where the structure is in doubt, a mark in
    /// them ends the unit; zero with bytes still to skip means that more of them must be seen.
    fn pass(&mut self, rest: &[u8], flush: bool) -> usize {
        let len = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(rest.len());
        // A package is held as a whole, so nothing in it can be a commit byte that is missed.
        let in_doubt = self.scanner.doubts() && self.after != Some(After::Package);
        let mark = if in_doubt {
            tail::find_mark(rest, len)
        } else {
            None
        };
        let passed = mark.map_or(len, |(at, _)| at);
        self.skip -= passed as u64;
        if let Some((at, whole)) = mark
            && (whole || (flush && at == 0))
        {
            self.lose();
        }
        passed
    }

    /// Parses the unit at the start of `rest`, or of the head that a flush has cut.
    fn head(&mut self, rest: &[u8]) -> Parsed<Unit> {
        if self.carry.is_empty() {
            return self.unit(rest);
        }
        let mut head = self.carry.clone();
        head.extend_from_slice(&rest[..rest.len().min(MAX_HEAD)]);
        self.unit(&head)
    }

    fn unit(&mut self, bytes: &[u8]) -> Parsed<Unit> {
        match self.state {
            State::FileHeader => header::file_header(self, bytes),
            State::Configuration => header::configuration(self, bytes),
            State::ConfigurationSubsection => header::subsection(self, bytes),
            State::Capabilities { left } => header::capability(self, bytes, left),
            State::Item => item::unit(self, bytes),
            State::Footer => item::footer(self, bytes),
            State::Ram => ram::unit(self, bytes),
            State::BlockList { left } => ram::block_entry(self, bytes, left),
            State::Body => section::unit(self, bytes),
            State::Tail | State::Lost | State::Passing => Ok(Unit::Again),
        }
    }

    /// Lets a unit pass as it is, minus what a flush has passed already.
    fn begin_raw(&mut self, len: u64) {
        let carried = usize::try_from(len)
            .unwrap_or(usize::MAX)
            .min(self.carry.len());
        self.carry.drain(..carried);
        self.skip = len - carried as u64;
    }

    /// Passes the start of a head and remembers it; returns its length.
    fn keep_head(&mut self, rest: &[u8]) -> usize {
        let len = rest.len().min(MAX_HEAD - self.carry.len());
        let in_doubt = self.scanner.doubts() && tail::find_mark(rest, len).is_some();
        if len == 0 || in_doubt {
            self.lose();
            return 0;
        }
        self.carry.extend_from_slice(&rest[..len]);
        len
    }

    /// Decides what becomes of a page record.
    fn admit(&mut self, record: Record, rest: &[u8], flush: bool) -> Admit {
        if self.begins_round(record.place, record.offset) {
            return Admit::Again;
        }
        let len = record.len(self.page_size);
        if !self.carry.is_empty() || (flush && rest.len() < len) {
            self.on_record(record, 1);
            self.begin_raw(len as u64);
            return Admit::Again;
        }
        if rest.len() < len {
            return Admit::Wait;
        }
        if self.scanner.doubts()
            && let Some((_, whole)) = tail::find_mark(rest, len)
        {
            if !whole && !flush {
                return Admit::Wait;
            }
            self.lose();
            return Admit::Again;
        }
        Admit::Whole
    }

    /// The piece of a record that is at the start of `rest` as a whole.
    fn emit<'a>(&mut self, record: Record, rest: &'a [u8]) -> Step<'a> {
        let block = self.blocks.number(record.place);
        let (offset, named) = (record.offset, record.named);
        let first = record.len(self.page_size);
        if !record.zero {
            self.on_record(record, 1);
            let raw = &rest[..first];
            let data = &raw[record.head..];
            return Step::Piece {
                piece: Piece::Page {
                    block,
                    offset,
                    named,
                    data,
                },
                raw,
            };
        }
        let mut run = if self.page_size == RUN_PAGE_SIZE {
            ram::zero_run(
                &rest[first..],
                record,
                self.blocks.used_length(record.place),
            )
        } else {
            0
        };
        if self.scanner.doubts()
            && let Some((at, _)) = tail::find_mark(rest, first + run as usize * ram::ZERO_RECORD)
        {
            // The record with the mark is looked at on its own.
            let before = at.saturating_sub(first) / ram::ZERO_RECORD;
            run = run.min(u32::try_from(before).unwrap_or(u32::MAX));
        }
        self.on_record(record, run + 1);
        let raw = &rest[..first + run as usize * ram::ZERO_RECORD];
        Step::Piece {
            piece: Piece::ZeroRun {
                block,
                offset,
                named,
                count: run + 1,
            },
            raw,
        }
    }

    /// Takes note of `count` page records that pass.
    fn on_record(&mut self, record: Record, count: u32) {
        self.on_page(
            record.place,
            record.offset + u64::from(count - 1) * self.page_size,
        );
    }

    /// Takes note of a page record that passes.
    pub(super) fn on_page(&mut self, place: Place, offset: u64) {
        self.current = Some(place);
        self.last_page = (place, offset);
    }

    /// Announces a round if a record begins one; a record does so once.
    pub(super) fn begins_round(&mut self, place: Place, offset: u64) -> bool {
        if !matches!(self.phase, Some(Phase::Setup | Phase::Precopy { .. })) {
            return false;
        }
        let here = (place, offset);
        if self.round > 0 && here >= self.last_page {
            return false;
        }
        self.round = self.round.saturating_add(1);
        self.last_page = here;
        self.announce(Phase::Precopy { round: self.round });
        true
    }

    /// Reads bytes without structure: how many pass, and whether the rest has to wait for more.
    fn watch(&mut self, rest: &[u8], flush: bool) -> (usize, bool) {
        if self.phase == Some(Phase::End) {
            // The end was forged, or a second one follows.
            let lost = self.state == State::Lost;
            self.announce(if lost {
                Phase::Opaque
            } else {
                Phase::DeviceState
            });
            return (0, false);
        }
        let (passed, halt) = self.scanner.scan(rest, flush, self.state == State::Lost);
        match halt {
            Halt::End => {}
            Halt::Short => return (passed, true),
            Halt::Candidate => self.tell(Event::Commit(CommitMark::Candidate)),
            Halt::Refuted => self.tell(Event::Commit(CommitMark::Refuted)),
            Halt::Complete => {
                self.tell(Event::Commit(CommitMark::Complete));
                self.announce(Phase::End);
            }
            Halt::Footer(id) => match resync::look(self, id, &rest[passed..]) {
                Ok(()) => self.resume(id),
                Err(Stop::Short) if !flush => return (passed, true),
                Err(_) => {
                    self.scanner.pass_footer();
                    if Some(id) == self.ram {
                        // RAM records have passed unread, so the last block is not known.
                        self.current = None;
                    }
                }
            },
        }
        (passed, false)
    }

    /// Goes on at an item behind the footer of `id`.
    fn resume(&mut self, id: u32) {
        if Some(id) == self.ram {
            self.current = None;
        }
        self.state = State::Item;
        self.last_footer = Some(id);
        self.lost_in = None;
        if let Some(phase) = self.phase_before.take() {
            self.announce(phase);
        }
    }

    /// Something came up that is not in the grammar.
    fn lose(&mut self) {
        self.current = None;
        self.lose_inside(None);
        self.skip = 0;
        self.after = None;
        self.scanner.enter_lost(&std::mem::take(&mut self.carry));
    }

    /// The body of section `id` has no known layout; its header still passes as a unit.
    pub(super) fn lose_inside(&mut self, id: Option<u32>) {
        self.state = State::Lost;
        self.lost_in = id;
        if self.phase != Some(Phase::Opaque) {
            self.phase_before = self.phase;
        }
        self.scanner.enter_lost(&[]);
        self.announce(Phase::Opaque);
    }

    /// The section whose end is searched for, if it is known which.
    pub(super) fn lost_in(&self) -> Option<u32> {
        self.lost_in
    }

    /// Device state begins, at the item at hand.
    pub(super) fn enter_tail(&mut self) {
        self.state = State::Tail;
        self.scanner
            .enter(self.last_footer, &std::mem::take(&mut self.carry));
    }

    /// The channel is not a main channel.
    pub(super) fn pass_all(&mut self) {
        self.state = State::Passing;
        self.carry = Vec::new();
        self.announce(Phase::Opaque);
    }

    /// The stream ends here, unless its end was forged.
    pub(super) fn on_end(&mut self) {
        if self.scanner.doubts() {
            self.state = State::Lost;
            self.scanner.enter_lost(&[]);
        } else {
            self.state = State::Passing;
        }
        self.announce(Phase::End);
    }

    pub(super) fn phase(&self) -> Option<Phase> {
        self.phase
    }

    /// Tells of a phase unless it is the present one; returns whether it was told.
    pub(super) fn announce(&mut self, phase: Phase) -> bool {
        let new = self.phase != Some(phase);
        if new {
            self.phase = Some(phase);
            self.tell(Event::Phase(phase));
        }
        new
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.events.push_back(event);
    }
}

/// What becomes of a page record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admit {
    /// All of it is there and nothing speaks against it.
    Whole,
    /// More bytes are needed.
    Wait,
    /// It passes as other bytes, an event comes first, or it is none: look again.
    Again,
}
