//! Header of a data stream: one frame of a channel, the pages that answer a miss, or what the far
//! gateway's store holds.
//!
//! ```text
//! offset size field
//!      0    1 kind        1 frame, 2 pages, 3 announcements
//!      1    1 flags       frames: 1 end, 2 held, 4 unheld; else: 0
//!      2   16 migration
//!     18    4 channel
//!     22    8 sequence    frames: position in the direction, from 0; pages: the frame they belong to
//!     30    4 length      bytes of the payload that follows, at most MAX_PAYLOAD
//!     34      payload     ends with the stream
//! ```
//!
//! Of a stream of announcements all other fields are 0; what follows are messages, each a `u32` length and
//! that many bytes, until the connection ends.

use super::{ChannelNo, MigrationId, WireError, reader::Reader};

/// Largest payload of a data stream in bytes: a frame of [`MAX_RAW_BYTES`] of incompressible data
/// and its bookkeeping fit.
pub const MAX_PAYLOAD: u32 = 3 << 20;

/// Most stream bytes that one frame stands for.
pub const MAX_RAW_BYTES: usize = 1 << 20;

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 34;

/// What a data stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataKind {
    /// The next frame of a channel's direction.
    Frame,
    /// Pages the receiver asked for.
    Pages,
    /// What the far gateway's store holds.
    Announcements,
}

/// Marks on a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DataFlags {
    /// The direction ends behind this frame: its socket was half-closed.
    pub end: bool,
    /// The frame begins with a commit candidate: hold it, and all that follows, until the verdict.
    pub held: bool,
    /// The last candidate was none: what is held may go on, this frame included.
    pub unheld: bool,
}

const FLAG_END: u8 = 1;
const FLAG_HELD: u8 = 2;
const FLAG_UNHELD: u8 = 4;

/// The header of a data stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataHeader {
    /// What the stream carries.
    pub kind: DataKind,
    /// Marks (frames only).
    pub flags: DataFlags,
    /// The migration.
    pub migration: MigrationId,
    /// The channel inside the migration.
    pub channel: ChannelNo,
    /// Position of the frame in its direction.
    pub seq: u64,
    /// Length of the payload in bytes.
    pub len: u32,
}

impl DataHeader {
    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = match self.kind {
            DataKind::Frame => 1,
            DataKind::Pages => 2,
            DataKind::Announcements => 3,
        };
        out[1] = if self.flags.end { FLAG_END } else { 0 }
            | if self.flags.held { FLAG_HELD } else { 0 }
            | if self.flags.unheld { FLAG_UNHELD } else { 0 };
        out[2..18].copy_from_slice(&self.migration.0);
        out[18..22].copy_from_slice(&self.channel.to_le_bytes());
        out[22..30].copy_from_slice(&self.seq.to_le_bytes());
        out[30..34].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// An unknown kind or flag, or a payload over [`MAX_PAYLOAD`]: the peer broke the protocol.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let kind = match reader.u8()? {
            1 => DataKind::Frame,
            2 => DataKind::Pages,
            3 => DataKind::Announcements,
            other => return Err(WireError::UnknownType(other)),
        };
        let bits = reader.u8()?;
        let allowed = match kind {
            DataKind::Frame => FLAG_END | FLAG_HELD | FLAG_UNHELD,
            DataKind::Pages | DataKind::Announcements => 0,
        };
        if bits & !allowed != 0 {
            return Err(WireError::BadValue("flags"));
        }
        let header = Self {
            kind,
            flags: DataFlags {
                end: bits & FLAG_END != 0,
                held: bits & FLAG_HELD != 0,
                unheld: bits & FLAG_UNHELD != 0,
            },
            migration: MigrationId(reader.array()?),
            channel: reader.u32()?,
            seq: reader.u64()?,
            len: reader.u32()?,
        };
        if header.len > MAX_PAYLOAD {
            return Err(WireError::TooLong("length"));
        }
        reader.end()?;
        let unnamed = header.migration.0 == [0; 16] && header.channel == 0;
        let empty = header.seq == 0 && header.len == 0;
        if kind == DataKind::Announcements && !(unnamed && empty) {
            return Err(WireError::BadValue("announcements"));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> DataHeader {
        DataHeader {
            kind: DataKind::Frame,
            flags: DataFlags {
                end: true,
                held: false,
                unheld: true,
            },
            migration: MigrationId(*b"0123456789abcdef"),
            channel: 3,
            seq: 0x0102_0304_0506_0708,
            len: 0x0001_0000,
        }
    }

    #[test]
    fn golden() {
        let hex: String = header()
            .encode()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "0105303132333435363738396162636465660300000008070605040302010000\
             0100"
        );
    }

    #[test]
    fn round_trip_and_refusals() {
        let good = header().encode();
        assert_eq!(DataHeader::decode(&good), Ok(header()));
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            DataHeader::decode(&bytes)
        };
        assert_eq!(with(0, 0), Err(WireError::UnknownType(0)));
        assert_eq!(with(0, 4), Err(WireError::UnknownType(4)));
        let mut bytes = good;
        (bytes[0], bytes[1]) = (3, 0);
        let refused = Err(WireError::BadValue("announcements"));
        assert_eq!(DataHeader::decode(&bytes), refused);
        bytes[2..].fill(0);
        let announcements = DataHeader::decode(&bytes).unwrap();
        assert_eq!(announcements.kind, DataKind::Announcements);
        assert_eq!(announcements.encode(), bytes);
        assert_eq!(with(0, 2), Err(WireError::BadValue("flags")));
        assert_eq!(with(1, 8), Err(WireError::BadValue("flags")));
        assert_eq!(with(33, 1), Err(WireError::TooLong("length")));
    }
}
