//! Finding the structure again behind a section of unknown layout.
//!
//! The end of such a section is looked for by its footer, `7E <id>`, and what must follow it: the
//! next item. A footer alone occurs by chance; so the item has to be one that can come there, down to
//! its first record and the head of the one behind it.

use super::decoder::Decoder;
use super::ram::{self, Parse};
use super::section::Kind;
use super::wire::{Parsed, Reader, Stop, command, item};

/// Whether the bytes behind a footer of `id` are an item at which decoding may go on.
///
/// # Errors
/// `Lost` when they are not, `Short` when more of them are needed.
pub(super) fn look(decoder: &Decoder, id: u32, bytes: &[u8]) -> Parsed<()> {
    let of_lost = decoder.lost_in() == Some(id);
    if !of_lost && decoder.ram != Some(id) {
        return Err(Stop::Lost);
    }
    let mut reader = Reader::new(bytes);
    match reader.u8()? {
        item::PART | item::END => {
            let ram = decoder.ram.ok_or(Stop::Lost)?;
            if reader.be32()? != ram {
                return Err(Stop::Lost);
            }
            ram_records(decoder, ram, &bytes[reader.at()..])
        }
        item::COMMAND => {
            let number = reader.be16()?;
            let len = reader.be16()?;
            if command::accepts(number, len) {
                Ok(())
            } else {
                Err(Stop::Lost)
            }
        }
        kind @ (item::START | item::FULL) if of_lost => {
            reader.be32()?;
            let idstr = reader.cstr()?;
            reader.be32()?;
            let version = reader.be32()?;
            let full = kind == item::FULL;
            let known = Kind::of(idstr, version, full) != Kind::Unknown;
            if known || (full && is_name(idstr)) {
                Ok(())
            } else {
                Err(Stop::Lost)
            }
        }
        _ => Err(Stop::Lost),
    }
}

/// Names of devices are paths of printable characters, at least this long.
fn is_name(idstr: &[u8]) -> bool {
    const SHORTEST: usize = 3;
    idstr.len() >= SHORTEST && idstr.iter().all(u8::is_ascii_graphic)
}

/// The first RAM record and the head of the second, or an empty section.
fn ram_records(decoder: &Decoder, ram: u32, bytes: &[u8]) -> Parsed<()> {
    let len = match ram::parse(decoder, bytes)? {
        Parse::Eos => {
            let mut reader = Reader::new(bytes);
            reader.be64()?;
            let footer = reader.u8()? == item::FOOTER && reader.be32()? == ram;
            return if footer { Ok(()) } else { Err(Stop::Lost) };
        }
        // The list comes in START only.
        Parse::BlockList(_) => return Err(Stop::Lost),
        Parse::Mark => ram::HEADER,
        Parse::Page(record) => record.len(decoder.page_size),
        Parse::Other { len, .. } => len,
    };
    match ram::parse(decoder, bytes.get(len..).ok_or(Stop::Short)?)? {
        Parse::BlockList(_) => Err(Stop::Lost),
        _ => Ok(()),
    }
}
