//! RAM records: the body of the "ram" section, and the block list in its START part.
//!
//! ```text
//! record := be64 (value | flags) …     flags are the bits below the page size
//! page   := be64 (offset | type | [CONTINUE]), unless CONTINUE: cstr block name, payload
//! list   := be64 (total | MEM_SIZE), { cstr name, be64 used_length, [be64 page_size], [be64 gpa] }*
//! ```

use super::blocks::Place;
use super::decoder::{Decoder, State, Unit};
use super::wire::{Parsed, Reader, Stop, flag};
use crate::piece::{MAX_ZERO_RUN, RUN_PAGE_SIZE};

/// Bytes of a record for a zero page that continues a block: header and fill byte.
pub(super) const ZERO_RECORD: usize = 9;

/// Bytes of a record's header.
pub(super) const HEADER: usize = 8;

/// A page record that a piece can stand for: its bytes follow from these fields and the contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// A zero page; else a page with contents.
    pub(super) zero: bool,
    pub(super) place: Place,
    pub(super) offset: u64,
    pub(super) named: bool,
    /// Bytes in front of the payload.
    pub(super) head: usize,
}

impl Record {
    /// Length of the whole record.
    pub(super) fn len(self, page_size: u64) -> usize {
        // Pages are at most 64 KiB.
        self.head
            + if self.zero {
                1
            } else {
                usize::try_from(page_size).unwrap_or(usize::MAX)
            }
    }
}

/// A record, parsed from its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parse {
    /// End of the body.
    Eos,
    /// The block list begins; lengths add up to this.
    BlockList(u64),
    Page(Record),
    /// A sync mark of multifd, which passes as it is.
    Mark,
    /// A page record that passes as it is, and its length. `place` is `None` where it continues a
    /// block that is not known.
    Other {
        len: usize,
        place: Option<Place>,
        offset: u64,
    },
}

/// Parses the head of the record at the start of `bytes`; changes nothing.
pub(super) fn parse(decoder: &Decoder, bytes: &[u8]) -> Parsed<Parse> {
    let mut reader = Reader::new(bytes);
    let header = reader.be64()?;
    let flags = header & (decoder.page_size - 1);
    let value = header - flags;
    match flags {
        flag::EOS if value == 0 => return Ok(Parse::Eos),
        flag::MULTIFD_FLUSH if value == 0 => return Ok(Parse::Mark),
        flag::MEM_SIZE if !decoder.mapped_ram => return Ok(Parse::BlockList(value)),
        _ => {}
    }
    let named = flags & flag::CONTINUE == 0;
    let kind = flags & !flag::CONTINUE;
    if !matches!(
        kind,
        flag::ZERO | flag::PAGE | flag::XBZRLE | flag::COMPRESS_PAGE
    ) {
        return Err(Stop::Lost);
    }
    let place = if named {
        Some(decoder.blocks.find(reader.cstr()?).ok_or(Stop::Lost)?)
    } else {
        decoder.current
    };
    if !decoder.blocks.contains(place, value, decoder.page_size) {
        return Err(Stop::Lost);
    }
    let head = reader.at();
    let payload = match kind {
        flag::ZERO if reader.u8()? == 0 => 1,
        flag::PAGE => decoder.page_size(),
        flag::XBZRLE if reader.u8()? == 1 => {
            let len = reader.be16()?;
            if u64::from(len) > decoder.page_size {
                return Err(Stop::Lost);
            }
            3 + usize::from(len)
        }
        flag::COMPRESS_PAGE => {
            // zlib grows what it cannot compress by far less than half.
            let len = reader.be32()? as usize;
            if len > 2 * decoder.page_size() {
                return Err(Stop::Lost);
            }
            4 + len
        }
        _ => return Err(Stop::Lost),
    };
    match (kind, place) {
        (flag::ZERO | flag::PAGE, Some(place)) => {
            let zero = kind == flag::ZERO;
            Ok(Parse::Page(Record {
                zero,
                place,
                offset: value,
                named,
                head,
            }))
        }
        _ => Ok(Parse::Other {
            len: head + payload,
            place,
            offset: value,
        }),
    }
}

/// The record at the start of `bytes`.
pub(super) fn unit(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    match parse(decoder, bytes)? {
        Parse::Eos => {
            decoder.state = State::Footer;
            Ok(Unit::Raw(HEADER as u64))
        }
        Parse::BlockList(total) => {
            decoder.ram_total = Some(total);
            if total > 0 {
                decoder.state = State::BlockList { left: total };
            }
            Ok(Unit::Raw(HEADER as u64))
        }
        Parse::Page(record) => Ok(Unit::Record(record)),
        Parse::Mark => Ok(Unit::Raw(HEADER as u64)),
        Parse::Other { len, place, offset } => {
            if let Some(place) = place {
                if decoder.begins_round(place, offset) {
                    return Ok(Unit::Again);
                }
                decoder.on_page(place, offset);
            }
            Ok(Unit::Raw(len as u64))
        }
    }
}

/// An entry of the block list; the lengths of it and those behind it add up to `left`.
pub(super) fn block_entry(decoder: &mut Decoder, bytes: &[u8], left: u64) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    let name = reader.cstr()?;
    let used = reader.be64()?;
    let left = left.checked_sub(used).ok_or(Stop::Lost)?;
    if name.is_empty() || used % decoder.page_size != 0 {
        return Err(Stop::Lost);
    }
    if decoder.huge_pages && has_page_size(decoder, reader.clone(), left)? {
        reader.be64()?;
    }
    if decoder.ignore_shared {
        // Guest-physical address.
        reader.be64()?;
    }
    if !decoder.blocks.list(name, used) {
        return Err(Stop::Lost);
    }
    decoder.state = if left == 0 {
        State::Ram
    } else {
        State::BlockList { left }
    };
    Ok(Unit::Raw(reader.at() as u64))
}

/// Whether a block's page size follows, which the stream does not say.
///
/// Another entry begins with the length of its name, which is never zero, and a page size with a
/// zero byte. Behind the last entry comes a record, which has flags, and a page size has none.
fn has_page_size(decoder: &Decoder, mut reader: Reader<'_>, left: u64) -> Parsed<bool> {
    if left > 0 {
        return Ok(reader.peek()? == 0);
    }
    let next = reader.be64()?;
    Ok(next != 0 && next % decoder.page_size == 0)
}

/// Number of records at the start of `bytes` that continue a run of zero pages behind `first`.
pub(super) fn zero_run(bytes: &[u8], first: Record, used_length: u64) -> u32 {
    let pages_left = (used_length.saturating_sub(first.offset) / RUN_PAGE_SIZE).saturating_sub(1);
    let most = pages_left.min(u64::from(MAX_ZERO_RUN - 1));
    let mut expected = (first.offset + RUN_PAGE_SIZE) | flag::ZERO | flag::CONTINUE;
    let mut count = 0;
    let (records, _) = bytes.as_chunks::<ZERO_RECORD>();
    for record in records {
        let [header @ .., fill] = record;
        if u64::from(count) >= most || u64::from_be_bytes(*header) != expected || *fill != 0 {
            break;
        }
        count += 1;
        expected += RUN_PAGE_SIZE;
    }
    count
}
