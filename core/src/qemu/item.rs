//! Items: section headers, footers and commands.
//!
//! ```text
//! section := 01 START | 04 FULL   be32 id, cstr idstr, be32 instance, be32 version, body, footer
//!          | 02 PART  | 03 END    be32 id, body, footer
//! footer  := 7E be32 id
//! command := 08 be16 number, be16 len, data[len]     PACKAGED: be32 n, and n bytes behind it
//! ```

use super::decoder::{After, CommitMark, Decoder, Event, Phase, State, Unit};
use super::section::{Kind, Section};
use super::wire::{Parsed, RAM_VERSION, Reader, Stop, command, item};

/// Most sections whose id is remembered; a large guest has some hundred devices.
const MAX_SECTIONS: usize = 4096;

/// An item's header, or the end of the stream.
pub(super) fn unit(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    if !decoder.return_path_known {
        return return_path(decoder, bytes);
    }
    let mut reader = Reader::new(bytes);
    match reader.u8()? {
        item::START | item::FULL if ends_ram(decoder, bytes) => device_state(decoder, bytes),
        item::START | item::FULL => begin(decoder, bytes),
        kind @ (item::PART | item::END) => {
            let id = reader.be32()?;
            let kind = Section {
                id,
                kind: Kind::Unknown,
                last: kind == item::END,
            };
            go_on(decoder, kind, reader.at())
        }
        item::COMMAND => command(decoder, bytes),
        item::EOF if decoder.postcopy => {
            decoder.after = Some(After::End);
            Ok(Unit::Raw(1))
        }
        item::EOF => device_state(decoder, bytes),
        _ => Err(Stop::Lost),
    }
}

/// The footer of the open section.
pub(super) fn footer(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? != item::FOOTER || reader.be32()? != decoder.open.id {
        return Err(Stop::Lost);
    }
    decoder.ram_done |= decoder.open.kind == Kind::Ram && decoder.open.last;
    decoder.last_footer = Some(decoder.open.id);
    decoder.state = State::Item;
    Ok(Unit::Raw(reader.at() as u64))
}

/// A unit with consequences has passed.
pub(super) fn on_passed(decoder: &mut Decoder, after: After) {
    match after {
        After::Package => {
            decoder.package_announced = false;
            decoder.postcopy = true;
            decoder.tell(Event::Commit(CommitMark::Complete));
            decoder.announce(Phase::Postcopy);
        }
        After::End => decoder.on_end(),
    }
}

/// A source that wants a return path asks for it before anything else.
fn return_path(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    let opened = reader.u8()? == item::COMMAND && {
        let number = reader.be16()?;
        let len = reader.be16()?;
        number == command::OPEN_RETURN_PATH && len == 0
    };
    decoder.return_path_known = true;
    decoder.tell(Event::ReturnPath(opened));
    Ok(Unit::Again)
}

/// Whether a FULL section is the first one of the device state.
fn ends_ram(decoder: &Decoder, bytes: &[u8]) -> bool {
    decoder.ram_done && !decoder.postcopy && bytes.first() == Some(&item::FULL)
}

/// The device state begins, or, with an EOF mark, the stream ends without any.
fn device_state(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? == item::FULL {
        decoder.scanner.learn(reader.be32()?);
    }
    decoder.enter_tail();
    if decoder.ram_done {
        decoder.announce(Phase::DeviceState);
    }
    Ok(Unit::Again)
}

/// The header of a START section, or of a FULL section before the end of RAM.
fn begin(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    let full = reader.u8()? == item::FULL;
    let id = reader.be32()?;
    let idstr = reader.cstr()?;
    if idstr.is_empty() {
        return Err(Stop::Lost);
    }
    reader.be32()?;
    let version = reader.be32()?;
    let kind = Kind::of(idstr, version, full);
    let known = decoder.sections.contains_key(&id);
    if !known && decoder.sections.len() >= MAX_SECTIONS {
        return Err(Stop::Lost);
    }
    if decoder
        .ram
        .is_some_and(|ram| (ram == id) != (kind == Kind::Ram))
    {
        // RAM has one section and keeps it.
        return Err(Stop::Lost);
    }
    decoder.scanner.learn(id);
    decoder.sections.insert(id, kind);
    if kind == Kind::Ram {
        decoder.ram = Some(id);
    }
    open(
        decoder,
        Section {
            id,
            kind,
            last: full,
        },
    );
    Ok(Unit::Raw(reader.at() as u64))
}

/// The header of a PART or END section.
fn go_on(decoder: &mut Decoder, section: Section, len: usize) -> Parsed<Unit> {
    let kind = *decoder.sections.get(&section.id).ok_or(Stop::Lost)?;
    let running = matches!(decoder.phase(), Some(Phase::Setup | Phase::Precopy { .. }));
    if kind == Kind::Ram && section.last && running {
        // Machine types before 10.0 do not announce the switchover.
        decoder.announce(Phase::Switchover);
        return Ok(Unit::Again);
    }
    open(decoder, Section { kind, ..section });
    Ok(Unit::Raw(len as u64))
}

/// The body of a section follows.
fn open(decoder: &mut Decoder, section: Section) {
    decoder.open = section;
    match section.kind {
        Kind::Unknown => decoder.lose_inside(Some(section.id)),
        Kind::Ram => decoder.state = State::Ram,
        _ => decoder.state = State::Body,
    }
}

/// A command, with its data and the package behind it.
fn command(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    reader.u8()?;
    let number = reader.be16()?;
    let len = reader.be16()?;
    if !command::accepts(number, len) {
        return Err(Stop::Lost);
    }
    let mut total = reader.at() as u64 + u64::from(len);
    let stops_guest = matches!(
        number,
        command::SWITCHOVER_START | command::POSTCOPY_RAM_DISCARD
    );
    if stops_guest && begins_switchover(decoder) {
        return Ok(Unit::Again);
    }
    match number {
        command::POSTCOPY_ADVISE if len > 0 => {
            decoder.postcopy_advised = true;
            let sizes = reader.be64()?;
            decoder.huge_pages = !sizes.is_power_of_two();
        }
        command::PACKAGED => {
            let blob = reader.be32()?;
            total += u64::from(blob);
            if starts_postcopy(blob, &mut reader)? {
                if begins_switchover(decoder) {
                    return Ok(Unit::Again);
                }
                if !decoder.package_announced {
                    decoder.package_announced = true;
                    decoder.tell(Event::Commit(CommitMark::Candidate));
                    return Ok(Unit::Again);
                }
                decoder.after = Some(After::Package);
            }
        }
        _ => {}
    }
    decoder.last_footer = None;
    Ok(Unit::Raw(total))
}

/// Announces the switchover if the guest was running so far.
fn begins_switchover(decoder: &mut Decoder) -> bool {
    matches!(decoder.phase(), Some(Phase::Setup | Phase::Precopy { .. }))
        && decoder.announce(Phase::Switchover)
}

/// Whether a package of `len` bytes is the one with which postcopy begins.
fn starts_postcopy(len: u32, blob: &mut Reader<'_>) -> Parsed<bool> {
    // COMMAND, number, data length.
    const LISTEN_LEN: u32 = 5;
    if len < LISTEN_LEN {
        return Ok(false);
    }
    Ok(
        blob.u8()? == item::COMMAND
            && blob.be16()? == command::POSTCOPY_LISTEN
            && blob.be16()? == 0,
    )
}

/// Whether an idstr and version are those of the RAM section.
pub(super) fn is_ram(idstr: &[u8], version: u32) -> bool {
    idstr == b"ram" && version == RAM_VERSION
}
