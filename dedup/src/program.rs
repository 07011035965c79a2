//! The program of a frame: what to put in which order to get the bytes of the stream again.
//!
//! Page records come in address order, so a [`Cursor`] predicts the header of the next one: the same
//! block, the page behind the last, the block not named. A run of pages that are as predicted is one
//! operation of one or two bytes, whatever the number of pages.

use crate::announce::{AnnouncedPlace, MAX_RECORDS, RunCheck};
use crate::chunk::{MAX_CHUNK, MIN_CHUNK};
use crate::page::{PAGE_SIZE, ShortId};
use crate::varint;

/// Low bits of an operation's first number; the rest is its count.
const CODE_BITS: u32 = 4;

/// Longest block name in bytes; the source format has one byte for the length.
pub(crate) const MAX_BLOCK_NAME: usize = 255;

/// Codes of operations. Zero is never a valid one.
const ZERO: u64 = 1;
const NEW: u64 = 2;
const REFERENCE: u64 = 3;
const ZERO_DATA: u64 = 4;
const SKIP: u64 = 5;
const SEEK: u64 = 6;
const DEFINE: u64 = 7;
const OTHER: u64 = 8;
const CHUNK: u64 = 9;
const CHUNK_REFERENCE: u64 = 10;
const SAME: u64 = 11;
const DELTA: u64 = 12;
const STORED: u64 = 13;
const ADOPT: u64 = 14;
const SIMILAR: u64 = 15;

/// One operation. Counts are at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op<'a> {
    /// This many zero-page records at the cursor.
    Zero(u64),
    /// This many page records at the cursor, contents from the literals.
    New(u64),
    /// This many page records at the cursor, contents by the next ids.
    Reference(u64),
    /// This many page records at the cursor whose contents are all zero.
    ZeroData(u64),
    /// Moves the cursor ahead by this many pages.
    Skip(u64),
    /// Sets the cursor.
    Seek(Cursor),
    /// The next block has this name.
    Define(&'a [u8]),
    /// This many other bytes, from the literals.
    Other(u64),
    /// A chunk of this many other bytes, from the literals.
    Chunk(usize),
    /// A chunk of this many other bytes, by the next id.
    ChunkReference(usize),
    /// This many page records at the cursor, each with what its place holds already.
    Same(u64),
    /// This many page records at the cursor, each by a delta (from the literals) from what its place
    /// holds.
    Delta(u64),
    /// This many page records at the cursor, each by a delta (from the literals) from what the place
    /// holds that is so many pages further on in the block, or back; never 0.
    Similar { count: u64, distance: i64 },
    /// Page records at the cursor, contents from the receiver's store by where they lie there.
    Stored(StoredRun),
    /// Places that hold nothing hold what the agreed manifest says.
    Adopt,
}

/// Records that lie one behind the other in the receiver's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoredRun {
    pub(crate) segment: u32,
    /// Number of the first.
    pub(crate) record: u32,
    pub(crate) count: u32,
    /// [`RunCheck`] of their ids.
    pub(crate) check: u32,
}

/// The predicted place and form of the next page record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Number of the RAM block, in order of definition.
    pub(crate) block: u32,
    /// Byte offset in the block, a multiple of the page size.
    pub(crate) offset: u64,
    /// The record names its block.
    pub(crate) named: bool,
}

impl Cursor {
    /// Moves behind `count` records. Offsets are data from outside and may wrap.
    pub(crate) fn pass(&mut self, count: u64) {
        self.skip(count);
        self.named = false;
    }

    /// Moves ahead without a record.
    pub(crate) fn skip(&mut self, count: u64) {
        self.offset = self
            .offset
            .wrapping_add(count.wrapping_mul(PAGE_SIZE as u64));
    }
}

/// What a run consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    Zero,
    New,
    Reference,
    ZeroData,
    Other,
    Same,
    Delta,
    Similar,
    Stored,
}

impl Run {
    fn code(self) -> u64 {
        match self {
            Self::Zero => ZERO,
            Self::New => NEW,
            Self::Reference => REFERENCE,
            Self::ZeroData => ZERO_DATA,
            Self::Other => OTHER,
            Self::Same => SAME,
            Self::Delta => DELTA,
            Self::Similar => SIMILAR,
            Self::Stored => STORED,
        }
    }
}

/// Writes programs; the cursor lives on from one to the next.
#[derive(Debug, Default)]
pub(crate) struct ProgramWriter {
    bytes: Vec<u8>,
    cursor: Cursor,
    /// The run that may still grow.
    open: Option<(Run, u64)>,
    /// Where the open run of stored pages begins, and the check of its ids so far.
    stored: Option<(AnnouncedPlace, RunCheck)>,
    /// How far away the old pages of the open run of similar pages are.
    distance: i64,
}

impl ProgramWriter {
    /// Adds page records of one kind in a row, the first of them at `place`.
    pub(crate) fn records(&mut self, run: Run, place: Cursor, count: u64) {
        self.go_to(place);
        self.extend(run, count);
        self.cursor.pass(count);
    }

    /// Adds a page record whose contents, called `id`, lie at `stored` in the receiver's store.
    pub(crate) fn stored(&mut self, place: Cursor, stored: AnnouncedPlace, id: &ShortId) {
        self.go_to(place);
        let next = match (&self.open, &self.stored) {
            (Some((Run::Stored, count)), Some((first, _))) => {
                let record = u64::from(first.record) + count;
                first.segment == stored.segment && record == u64::from(stored.record)
            }
            _ => false,
        };
        if !next {
            self.close();
            self.stored = Some((stored, RunCheck::default()));
        }
        if let Some((_, check)) = &mut self.stored {
            check.add(id);
        }
        self.extend(Run::Stored, 1);
        self.cursor.pass(1);
    }

    /// Adds a page record that is a delta from what the place holds that is `distance` pages further on.
    pub(crate) fn similar(&mut self, place: Cursor, distance: i64) {
        self.go_to(place);
        if distance != self.distance {
            self.close();
            self.distance = distance;
        }
        self.extend(Run::Similar, 1);
        self.cursor.pass(1);
    }

    fn go_to(&mut self, place: Cursor) {
        if place != self.cursor {
            self.close();
            let ahead = place.offset.wrapping_sub(self.cursor.offset);
            if (Cursor {
                offset: self.cursor.offset,
                ..place
            }) == self.cursor
                && place.offset > self.cursor.offset
            {
                put(SKIP, ahead / PAGE_SIZE as u64, &mut self.bytes);
            } else {
                put(
                    SEEK,
                    u64::from(place.block) << 1 | u64::from(place.named),
                    &mut self.bytes,
                );
                varint::write(place.offset / PAGE_SIZE as u64, &mut self.bytes);
            }
            self.cursor = place;
        }
    }

    /// Adds other bytes.
    pub(crate) fn other(&mut self, count: u64) {
        self.extend(Run::Other, count);
    }

    /// Adds a chunk of other bytes, whose contents the peer has or not.
    pub(crate) fn chunk(&mut self, known: bool, length: usize) {
        self.close();
        put(
            if known { CHUNK_REFERENCE } else { CHUNK },
            length as u64,
            &mut self.bytes,
        );
    }

    /// Adds the definition of the next block.
    pub(crate) fn define(&mut self, name: &[u8]) {
        self.close();
        put(DEFINE, name.len() as u64, &mut self.bytes);
        self.bytes.extend_from_slice(name);
    }

    /// Has the receiver take the agreed manifest's places.
    pub(crate) fn adopt(&mut self) {
        self.close();
        put(ADOPT, 1, &mut self.bytes);
    }

    fn extend(&mut self, run: Run, count: u64) {
        match &mut self.open {
            Some((open, total)) if *open == run => *total += count,
            _ => {
                self.close();
                self.open = Some((run, count));
            }
        }
    }

    fn close(&mut self) {
        if let Some((run, count)) = self.open.take() {
            put(run.code(), count, &mut self.bytes);
            if run == Run::Similar {
                varint::write(varint::zigzag(self.distance), &mut self.bytes);
            }
            if run == Run::Stored
                && let Some((first, check)) = self.stored.take()
            {
                varint::write(u64::from(first.segment), &mut self.bytes);
                varint::write(u64::from(first.record), &mut self.bytes);
                self.bytes.extend_from_slice(&check.value().to_le_bytes());
            }
        }
    }

    /// The program so far, complete.
    pub(crate) fn finish(&mut self) -> &[u8] {
        self.close();
        &self.bytes
    }

    /// Begins the next program.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.open = None;
        self.stored = None;
    }
}

fn put(code: u64, count: u64, out: &mut Vec<u8>) {
    varint::write(count << CODE_BITS | code, out);
}

/// Takes the next operation off a program. `None` when it is malformed or cut off.
pub(crate) fn read<'a>(program: &mut &'a [u8]) -> Option<Op<'a>> {
    let first = varint::read(program)?;
    let (code, count) = (first & ((1 << CODE_BITS) - 1), first >> CODE_BITS);
    let op = match code {
        ZERO => Op::Zero(count),
        NEW => Op::New(count),
        REFERENCE => Op::Reference(count),
        ZERO_DATA => Op::ZeroData(count),
        SKIP => Op::Skip(count),
        OTHER => Op::Other(count),
        SAME => Op::Same(count),
        DELTA => Op::Delta(count),
        CHUNK => Op::Chunk(chunk_length(count)?),
        CHUNK_REFERENCE => Op::ChunkReference(chunk_length(count)?),
        STORED => return stored_run(count, program),
        SIMILAR => {
            let distance = varint::unzigzag(varint::read(program)?);
            return (count > 0 && distance != 0).then_some(Op::Similar { count, distance });
        }
        ADOPT => return (count == 1).then_some(Op::Adopt),
        SEEK => {
            let page = varint::read(program)?;
            return Some(Op::Seek(Cursor {
                block: u32::try_from(count >> 1).ok()?,
                offset: page.checked_mul(PAGE_SIZE as u64)?,
                named: count & 1 != 0,
            }));
        }
        DEFINE => {
            let length = usize::try_from(count)
                .ok()
                .filter(|&length| length <= MAX_BLOCK_NAME)?;
            let (name, rest) = program.split_at_checked(length)?;
            *program = rest;
            return Some(Op::Define(name));
        }
        _ => return None,
    };
    (count > 0).then_some(op)
}

fn stored_run<'a>(count: u64, program: &mut &'a [u8]) -> Option<Op<'a>> {
    let segment = u32::try_from(varint::read(program)?).ok()?;
    let record = varint::read(program)?;
    let (check, rest) = program.split_first_chunk()?;
    *program = rest;
    let end = record.checked_add(count)?;
    if count == 0 || end > u64::from(MAX_RECORDS) {
        return None;
    }
    Some(Op::Stored(StoredRun {
        segment,
        record: u32::try_from(record).ok()?,
        count: u32::try_from(count).ok()?,
        check: u32::from_le_bytes(*check),
    }))
}

fn chunk_length(count: u64) -> Option<usize> {
    usize::try_from(count)
        .ok()
        .filter(|length| (MIN_CHUNK..=MAX_CHUNK).contains(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(block: u32, page: u64, named: bool) -> Cursor {
        Cursor {
            block,
            offset: page * PAGE_SIZE as u64,
            named,
        }
    }

    fn ops(mut program: &[u8]) -> Vec<Op<'_>> {
        let mut ops = Vec::new();
        while !program.is_empty() {
            ops.push(read(&mut program).unwrap());
        }
        ops
    }

    #[test]
    fn similar_pages_with_old_ones_in_a_row_are_one_operation() {
        let mut writer = ProgramWriter::default();
        for page in 100..110 {
            writer.similar(at(0, page, false), -90);
        }
        writer.similar(at(0, 110, false), 5);
        writer.records(Run::New, at(0, 111, false), 1);
        writer.similar(at(0, 112, false), 5);
        let similar = |count, distance| Op::Similar { count, distance };
        let program = writer.finish();
        assert_eq!(
            ops(program),
            [
                Op::Skip(100),
                similar(10, -90),
                similar(1, 5),
                Op::New(1),
                similar(1, 5),
            ]
        );
        // docs/protocol.md, "Program".
        assert_eq!(
            program[2..],
            [0xaf, 0x01, 0xb3, 0x01, 0x1f, 10, 0x12, 0x1f, 10]
        );
    }

    #[test]
    fn predicted_records_cost_next_to_nothing() {
        let mut writer = ProgramWriter::default();
        writer.define(b"pc.ram");
        writer.records(Run::New, at(0, 0, true), 1);
        for page in 1..1000 {
            writer.records(Run::New, at(0, page, false), 1);
        }
        writer.records(Run::Zero, at(0, 1000, false), 70_000);
        writer.records(Run::Reference, at(0, 71_005, false), 1);
        writer.other(10);
        writer.other(8);
        writer.records(Run::ZeroData, at(0, 71_006, false), 1);
        writer.adopt();
        writer.records(Run::Same, at(0, 71_007, false), 500);
        writer.records(Run::Delta, at(0, 71_507, false), 2);
        let program = writer.finish();
        assert_eq!(
            ops(program),
            [
                Op::Define(b"pc.ram"),
                Op::Seek(at(0, 0, true)),
                Op::New(1000),
                Op::Zero(70_000),
                Op::Skip(5),
                Op::Reference(1),
                Op::Other(18),
                Op::ZeroData(1),
                Op::Adopt,
                Op::Same(500),
                Op::Delta(2),
            ]
        );
        // define 7, seek 2, new 2, zero 3, skip 1, reference 1, other 2, zero data 1, adopt 1, same 2, delta 1
        assert_eq!(program.len(), 23);
    }

    fn id(byte: u8) -> ShortId {
        ShortId::from_bytes([byte; 16])
    }

    #[test]
    fn stored_pages_in_a_row_are_one_operation() {
        let mut writer = ProgramWriter::default();
        let at_record = |segment, record| AnnouncedPlace { segment, record };
        let check = |ids: &[u8]| {
            let mut check = RunCheck::default();
            ids.iter().for_each(|&byte| check.add(&id(byte)));
            check.value()
        };
        for n in 0..3 {
            let page = at(0, u64::from(n), false);
            writer.stored(page, at_record(300, 7 + u32::from(n)), &id(n));
        }
        // Another segment, a record that is not the next, a gap in the guest's memory.
        writer.stored(at(0, 3, false), at_record(301, 10), &id(3));
        writer.stored(at(0, 4, false), at_record(301, 10), &id(3));
        writer.stored(at(0, 9, false), at_record(301, 11), &id(4));
        writer.records(Run::Same, at(0, 10, false), 1);
        let run = |segment, record, ids: &[u8]| {
            Op::Stored(StoredRun {
                segment,
                record,
                count: ids.len() as u32,
                check: check(ids),
            })
        };
        let program = writer.finish();
        assert_eq!(
            ops(program),
            [
                run(300, 7, &[0, 1, 2]),
                run(301, 10, &[3]),
                run(301, 10, &[3]),
                Op::Skip(4),
                run(301, 11, &[4]),
                Op::Same(1),
            ]
        );
        assert_eq!(program.len(), 4 * 8 + 1 + 1);
    }

    #[test]
    fn a_cursor_lives_on_and_jumps_are_explicit() {
        let mut writer = ProgramWriter::default();
        writer.records(Run::New, at(3, 7, false), 2);
        writer.finish();
        writer.clear();
        writer.records(Run::New, at(3, 9, false), 1);
        writer.records(Run::New, at(3, 4, false), 1);
        writer.records(Run::New, at(3, 5, true), 1);
        writer.records(Run::New, at(4, 6, false), 1);
        let program = writer.finish();
        assert_eq!(
            ops(program),
            [
                Op::New(1),
                Op::Seek(at(3, 4, false)),
                Op::New(1),
                Op::Seek(at(3, 5, true)),
                Op::New(1),
                Op::Seek(at(4, 6, false)),
                Op::New(1),
            ]
        );
    }

    #[test]
    fn malformed_operations_are_refused() {
        let refused: [&[u8]; 19] = [
            &[],
            &[0x10],                                              // code 0
            &[0x1f],                                              // no distance
            &[0x1f, 0],                                           // similar to itself
            &[0x0f, 2],                                           // no similar pages
            &[0x0e],                                              // no manifest
            &[0x2e],                                              // two of them
            &[0x0d, 1, 1, 0, 0, 0, 0],                            // no stored pages
            &[0x1d, 1, 1, 0, 0, 0],                               // check cut off
            &[0x1d, 0x80, 0x80, 0x80, 0x80, 0x10, 1, 0, 0, 0, 0], // segment of 33 bits
            &[0x1d, 1, 0x80, 0x80, 0x80, 0x02, 0, 0, 0, 0],       // record over the limit
            &[0xf9, 0x7f],                                        // chunk too short
            &[0x9a, 0x80, 0x04],                                  // chunk reference too long
            &[0x01],                                              // no records
            &[0x08],                                              // no bytes
            &[0x06],                                              // seek without its page
            &[0x37, b'a', b'b'],                                  // name cut off
            &[0x87, 0x20, 0],                                     // name too long
            &[0x86],                                              // number cut off
        ];
        for program in refused {
            assert_eq!(read(&mut &program[..]), None, "{program:x?}");
        }
        // A page number whose offset has more than 64 bits.
        let mut program = vec![0x06];
        varint::write(1 << 52, &mut program);
        assert_eq!(read(&mut &program[..]), None);
    }
}
