//! Bodies of sections other than RAM whose end can be found.

use super::decoder::{Decoder, State, Unit};
use super::item;
use super::wire::{Parsed, Reader, Stop};

/// What the body of a section holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Kind {
    Ram,
    /// Bitmaps of block devices.
    DirtyBitmap,
    /// Block migration of QEMU up to 9.0.
    Block,
    /// State of a VFIO device while the guest runs.
    Vfio,
    /// What virtio-mem sends before RAM.
    VirtioMemEarly,
    /// A layout that is not known.
    #[default]
    Unknown,
}

impl Kind {
    /// The kind of the section that a START or FULL header announces.
    pub(super) fn of(idstr: &[u8], version: u32, full: bool) -> Self {
        match idstr {
            _ if full && idstr.ends_with(b"/virtio-mem-device-early") => Self::VirtioMemEarly,
            _ if full => Self::Unknown,
            _ if item::is_ram(idstr, version) => Self::Ram,
            b"dirty-bitmap" if version == 1 => Self::DirtyBitmap,
            b"block" if version == 1 => Self::Block,
            _ if idstr.ends_with(b"/vfio") => Self::Vfio,
            _ => Self::Unknown,
        }
    }
}

/// The section that is open, or was last.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Section {
    pub(super) id: u32,
    pub(super) kind: Kind,
    /// Its last part.
    pub(super) last: bool,
}

/// A record of the open section.
pub(super) fn unit(decoder: &mut Decoder, bytes: &[u8]) -> Parsed<Unit> {
    let (len, end) = match decoder.open.kind {
        Kind::DirtyBitmap => dirty_bitmap(bytes)?,
        Kind::Block => block(bytes)?,
        Kind::Vfio => vfio(bytes)?,
        Kind::VirtioMemEarly => (virtio_mem_early(bytes)?, true),
        Kind::Ram | Kind::Unknown => return Err(Stop::Lost),
    };
    if end {
        decoder.state = State::Footer;
    }
    Ok(Unit::Raw(len))
}

/// Length of a record, and whether it ends the body.
type Record = (u64, bool);

/// `u8 flags`, names of node and bitmap where flagged, and one of START, BITS, COMPLETE, EOS.
fn dirty_bitmap(bytes: &[u8]) -> Parsed<Record> {
    const EOS: u8 = 0x01;
    const ZEROES: u8 = 0x02;
    const BITMAP_NAME: u8 = 0x04;
    const NODE_NAME: u8 = 0x08;
    const START: u8 = 0x10;
    const COMPLETE: u8 = 0x20;
    const BITS: u8 = 0x40;
    /// A bit per 512 bytes of a disk of 512 TiB would be this long; records hold a small part.
    const MAX_BITS: u64 = 128 << 30;

    let mut reader = Reader::new(bytes);
    let flags = reader.u8()?;
    if flags & NODE_NAME != 0 {
        reader.cstr()?;
    }
    if flags & BITMAP_NAME != 0 {
        reader.cstr()?;
    }
    let mut data = 0;
    match flags & !(NODE_NAME | BITMAP_NAME) {
        EOS => return Ok((reader.at() as u64, true)),
        START => {
            reader.be32()?;
            reader.u8()?;
        }
        COMPLETE => {}
        kind if kind & !ZEROES == BITS => {
            reader.be64()?;
            reader.be32()?;
            if kind & ZEROES == 0 {
                data = reader.be64()?;
            }
        }
        _ => return Err(Stop::Lost),
    }
    if data > MAX_BITS {
        return Err(Stop::Lost);
    }
    Ok((reader.at() as u64 + data, false))
}

/// `be64 (sector << 9 | flags)`, a device name and 1 MiB of data unless it is zero.
fn block(bytes: &[u8]) -> Parsed<Record> {
    const DEVICE_BLOCK: u64 = 0x01;
    const EOS: u64 = 0x02;
    const PROGRESS: u64 = 0x04;
    const ZERO_BLOCK: u64 = 0x08;
    const FLAGS: u64 = 0x1FF;
    const DATA: u64 = 1 << 20;

    let mut reader = Reader::new(bytes);
    let header = reader.be64()?;
    match header & FLAGS {
        EOS => Ok((reader.at() as u64, true)),
        PROGRESS => Ok((reader.at() as u64, false)),
        DEVICE_BLOCK => {
            reader.cstr()?;
            Ok((reader.at() as u64 + DATA, false))
        }
        flags if flags == DEVICE_BLOCK | ZERO_BLOCK => {
            reader.cstr()?;
            Ok((reader.at() as u64, false))
        }
        _ => Err(Stop::Lost),
    }
}

/// `be64 tag`, and for device data `be64 size, data[size]`.
fn vfio(bytes: &[u8]) -> Parsed<Record> {
    const END_OF_STATE: u64 = 0xFFFF_FFFF_EF10_0001;
    const DEV_SETUP_STATE: u64 = 0xFFFF_FFFF_EF10_0003;
    const DEV_DATA_STATE: u64 = 0xFFFF_FFFF_EF10_0004;
    const DEV_INIT_DATA_SENT: u64 = 0xFFFF_FFFF_EF10_0005;
    /// QEMU sends at most 1 MiB at a time.
    const MAX_DATA: u64 = 64 << 20;

    let mut reader = Reader::new(bytes);
    match reader.be64()? {
        END_OF_STATE | DEV_INIT_DATA_SENT => Ok((reader.at() as u64, true)),
        DEV_SETUP_STATE => Ok((reader.at() as u64, false)),
        DEV_DATA_STATE => {
            let size = reader.be64()?;
            if size > MAX_DATA {
                return Err(Stop::Lost);
            }
            Ok((reader.at() as u64 + size, false))
        }
        // The device's configuration has no length.
        _ => Err(Stop::Lost),
    }
}

/// `be64 addr, region_size, block_size, be32 node, be64 size`, and a bitmap of the region's blocks.
fn virtio_mem_early(bytes: &[u8]) -> Parsed<u64> {
    /// A region of 64 TiB in blocks of 1 MiB.
    const MAX_BLOCKS: u64 = 64 << 20;

    let mut reader = Reader::new(bytes);
    reader.be64()?;
    let region = reader.be64()?;
    let block = reader.be64()?;
    reader.be32()?;
    let size = reader.be64()?;
    if !block.is_power_of_two() || size > region || region / block > MAX_BLOCKS {
        return Err(Stop::Lost);
    }
    Ok(reader.at() as u64 + (region / block).div_ceil(64) * 8)
}
