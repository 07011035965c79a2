//! File header and configuration, from the first byte to the first item.
//!
//! ```text
//! "QEVM" be32 3  [ 07 be32 len, machine type[len], subsection* ]
//! subsection := 05 cstr name, be32 version, fields
//! ```

use super::decoder::{Decoder, Phase, State, Unit};
use super::wire::{FILE_HEADER, Parsed, Reader, Stop, item};

/// Longest machine type name that is taken for one, in bytes.
const MAX_MACHINE_NAME: u32 = 256;
/// Most entries in the list of capabilities; QEMU has about twenty and lists two of them.
const MAX_CAPABILITIES: u32 = 64;
/// Page sizes QEMU's targets have, as powers of two.
const PAGE_BITS: std::ops::RangeInclusive<u32> = 10..=16;

/// The file header; a channel that begins with anything else is no main channel.
pub(super) fn file_header(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let len = bytes.len().min(FILE_HEADER.len());
    if bytes[..len] != FILE_HEADER[..len] {
        decoder.pass_all();
        return Ok(Unit::Again);
    }
    if len < FILE_HEADER.len() {
        return Err(Stop::Short);
    }
    decoder.announce(Phase::Setup);
    decoder.state = State::Configuration;
    Ok(Unit::Raw(len as u64))
}

/// The machine type, if there is a configuration (machine types before 2.4 send none).
pub(super) fn configuration(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? != item::CONFIGURATION {
        decoder.state = State::Item;
        return Ok(Unit::Again);
    }
    let len = reader.be32()?;
    if len > MAX_MACHINE_NAME {
        return Err(Stop::Lost);
    }
    decoder.state = State::ConfigurationSubsection;
    Ok(Unit::Raw(reader.at() as u64 + u64::from(len)))
}

/// A subsection of the configuration. An unknown one has no end that could be found.
pub(super) fn subsection(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? != item::SUBSECTION {
        decoder.state = State::Item;
        return Ok(Unit::Again);
    }
    let name = reader.cstr()?;
    reader.be32()?;
    match name {
        b"configuration/target-page-bits" => {
            let bits = reader.be32()?;
            if !PAGE_BITS.contains(&bits) {
                return Err(Stop::Lost);
            }
            decoder.page_size = 1 << bits;
        }
        b"configuration/capabilities" => {
            let left = reader.be32()?;
            if left > MAX_CAPABILITIES {
                return Err(Stop::Lost);
            }
            if left > 0 {
                decoder.state = State::Capabilities { left };
            }
        }
        b"configuration/uuid" => return Ok(Unit::Raw(reader.at() as u64 + 16)),
        _ => return Err(Stop::Lost),
    }
    Ok(Unit::Raw(reader.at() as u64))
}

/// A name in the list of capabilities.
pub(super) fn capability(decoder: &mut Decoder, bytes: &[u8], left: u32) -> Parsed<Unit> {
    let mut reader = Reader::new(bytes);
    match reader.cstr()? {
        b"x-ignore-shared" => decoder.ignore_shared = true,
        b"mapped-ram" => decoder.mapped_ram = true,
        // Only those two change the stream.
        _ => {}
    }
    decoder.state = match left {
        0 | 1 => State::ConfigurationSubsection,
        _ => State::Capabilities { left: left - 1 },
    };
    Ok(Unit::Raw(reader.at() as u64))
}
