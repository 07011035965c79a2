//! Constants of QEMU's main channel and a bounded reader for its big-endian fields.
//!
//! Values are those of `migration/savevm.c` and `migration/ram.c`, unchanged from QEMU 7.2 to 10.x.

/// First bytes of a main channel: "QEVM" and stream version 3.
pub(super) const FILE_HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";

/// Item types: the byte that begins every item of the stream.
pub(super) mod item {
    pub(in crate::qemu) const EOF: u8 = 0x00;
    pub(in crate::qemu) const START: u8 = 0x01;
    pub(in crate::qemu) const PART: u8 = 0x02;
    pub(in crate::qemu) const END: u8 = 0x03;
    pub(in crate::qemu) const FULL: u8 = 0x04;
    pub(in crate::qemu) const SUBSECTION: u8 = 0x05;
    pub(in crate::qemu) const VMDESCRIPTION: u8 = 0x06;
    pub(in crate::qemu) const CONFIGURATION: u8 = 0x07;
    pub(in crate::qemu) const COMMAND: u8 = 0x08;
    pub(in crate::qemu) const FOOTER: u8 = 0x7E;
}

/// Numbers of commands (item type 0x08).
pub(super) mod command {
    pub(in crate::qemu) const OPEN_RETURN_PATH: u16 = 1;
    pub(in crate::qemu) const PING: u16 = 2;
    pub(in crate::qemu) const POSTCOPY_ADVISE: u16 = 3;
    pub(in crate::qemu) const POSTCOPY_LISTEN: u16 = 4;
    pub(in crate::qemu) const POSTCOPY_RUN: u16 = 5;
    pub(in crate::qemu) const POSTCOPY_RAM_DISCARD: u16 = 6;
    pub(in crate::qemu) const PACKAGED: u16 = 7;
    pub(in crate::qemu) const ENABLE_COLO: u16 = 8;
    pub(in crate::qemu) const POSTCOPY_RESUME: u16 = 9;
    pub(in crate::qemu) const RECV_BITMAP: u16 = 10;
    pub(in crate::qemu) const SWITCHOVER_START: u16 = 11;

    /// Whether a command of this number may carry `len` bytes; false for unknown numbers.
    pub(in crate::qemu) fn accepts(number: u16, len: u16) -> bool {
        match number {
            OPEN_RETURN_PATH | POSTCOPY_LISTEN | POSTCOPY_RUN | ENABLE_COLO | POSTCOPY_RESUME
            | SWITCHOVER_START => len == 0,
            PING | PACKAGED => len == 4,
            POSTCOPY_ADVISE => len == 0 || len == 16,
            // Version, block name, a zero, and at least one range.
            POSTCOPY_RAM_DISCARD => len >= 1 + 2 + 1 + 16,
            RECV_BITMAP => (2..=256).contains(&len),
            _ => false,
        }
    }
}

/// Flags of a RAM record: the bits of its header below the target page size.
pub(super) mod flag {
    pub(in crate::qemu) const ZERO: u64 = 0x002;
    pub(in crate::qemu) const MEM_SIZE: u64 = 0x004;
    pub(in crate::qemu) const PAGE: u64 = 0x008;
    pub(in crate::qemu) const EOS: u64 = 0x010;
    pub(in crate::qemu) const CONTINUE: u64 = 0x020;
    pub(in crate::qemu) const XBZRLE: u64 = 0x040;
    pub(in crate::qemu) const COMPRESS_PAGE: u64 = 0x100;
    pub(in crate::qemu) const MULTIFD_FLUSH: u64 = 0x200;
}

/// Version of the RAM section this decoder knows (the only one since 2010).
pub(super) const RAM_VERSION: u32 = 4;

/// Why a unit could not be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The bytes end inside it.
    Short,
    /// It is nothing this decoder knows.
    Lost,
}

/// Result of parsing from a slice.
pub(super) type Parsed<T> = Result<T, Stop>;

/// Reads fields from the start of a slice; running out of bytes is [`Stop::Short`].
#[derive(Debug, Clone)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let bytes = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.first_chunk::<N>());
        self.at += N;
        bytes.copied().ok_or(Stop::Short)
    }

    pub(super) fn u8(&mut self) -> Parsed<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn be16(&mut self) -> Parsed<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn be32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn be64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of at most 255 bytes behind its length byte.
    pub(super) fn cstr(&mut self) -> Parsed<&'a [u8]> {
        let len = usize::from(self.u8()?);
        let string = self.bytes.get(self.at..self.at + len).ok_or(Stop::Short)?;
        self.at += len;
        Ok(string)
    }

    /// The next byte without reading it.
    pub(super) fn peek(&self) -> Parsed<u8> {
        self.bytes.get(self.at).copied().ok_or(Stop::Short)
    }
}
