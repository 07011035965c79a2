//! The layout of a segment file. No file is touched here.
//!
//! ```text
//! header │ chunk │ chunk │ … │ footer │ trailer          a chunk: head │ table │ records
//! ```
//!
//! A chunk is written with one write and tells of itself, so a segment that was never sealed is good
//! up to its last whole chunk. The footer repeats all tables, so a sealed one is opened with one read.
//! Numbers are little endian. The layout in full is in `docs/store-format.md`.

use super::crypt::{CHECK_SIZE, SegmentCipher, StoreKey, TAG_SIZE, Unauthentic};
use super::superblock::FORMAT_VERSION;
use crate::page::{DomainId, PAGE_SIZE, ShortId};

/// Size of a segment's header in bytes.
pub(super) const HEADER_SIZE: usize = 128;

/// Size of a chunk's head.
pub(super) const CHUNK_HEAD_SIZE: usize = 16;

/// Size of the trailer, the last bytes of a sealed segment.
pub(super) const TRAILER_SIZE: usize = 32;

/// Bytes of a record in a table: its id and its length.
pub(super) const TABLE_ENTRY_SIZE: usize = ShortId::SIZE + 2;

/// Bytes of a chunk in the footer: the number of its records.
pub(super) const FOOTER_CHUNK_SIZE: usize = 4;

/// Most records of a segment: record numbers have 16 bits in memory.
pub(super) const MAX_RECORDS: usize = 1 << 16;

/// Longest segment that is read, in bytes; offsets have 32 bits.
pub(super) const MAX_SEGMENT: u64 = 1 << 30;

const SEGMENT_MAGIC: [u8; 8] = *b"SKYFSEGM";
const CHUNK_MAGIC: [u8; 4] = *b"CHNK";
const TRAILER_MAGIC: [u8; 8] = *b"SKYFSEAL";

/// Bytes in the file besides a record's contents: its tag and its entries in two tables.
pub(super) const RECORD_OVERHEAD: usize = TAG_SIZE + 2 * TABLE_ENTRY_SIZE;

/// Bytes that a chunk adds besides its records.
pub(super) const CHUNK_OVERHEAD: usize = CHUNK_HEAD_SIZE + TAG_SIZE + FOOTER_CHUNK_SIZE;

/// Bytes of a segment without any chunk, sealed.
pub(super) const SEGMENT_OVERHEAD: usize = HEADER_SIZE + TAG_SIZE + TRAILER_SIZE;

/// The bytes are not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadSegment;

impl From<Unauthentic> for BadSegment {
    fn from(_: Unauthentic) -> Self {
        Self
    }
}

/// What a segment says of itself at its front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) number: u32,
    pub(super) store: [u8; 16],
    pub(super) domain: DomainId,
    /// Random; makes the segment's key.
    pub(super) salt: [u8; 32],
    /// Seconds since 1970.
    pub(super) created: u64,
    /// Whether it was made for pages that were used and copied from other segments.
    pub(super) protected: bool,
}

impl Header {
    /// The bytes of the header and the cipher for what follows.
    pub(super) fn write(&self, key: &StoreKey) -> ([u8; HEADER_SIZE], SegmentCipher) {
        let mut body = [0; HEADER_SIZE - CHECK_SIZE];
        body[..8].copy_from_slice(&SEGMENT_MAGIC);
        body[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        body[12..16].copy_from_slice(&self.number.to_le_bytes());
        body[16..32].copy_from_slice(&self.store);
        body[32..48].copy_from_slice(self.domain.as_bytes());
        body[48..80].copy_from_slice(&self.salt);
        body[80..88].copy_from_slice(&self.created.to_le_bytes());
        body[88] = u8::from(self.protected);
        let (cipher, check) = key.segment(&body);
        let mut bytes = [0; HEADER_SIZE];
        bytes[..body.len()].copy_from_slice(&body);
        bytes[body.len()..].copy_from_slice(&check);
        (bytes, cipher)
    }

    /// Reads a header without its key: it may be forged.
    pub(super) fn read_unchecked(bytes: &[u8; HEADER_SIZE]) -> Result<Self, BadSegment> {
        let version = u32::from_le_bytes(field(bytes, 8)?);
        if bytes[..8] != SEGMENT_MAGIC || version != FORMAT_VERSION {
            return Err(BadSegment);
        }
        Ok(Self {
            number: u32::from_le_bytes(field(bytes, 12)?),
            store: field(bytes, 16)?,
            domain: DomainId::from_bytes(field(bytes, 32)?),
            salt: field(bytes, 48)?,
            created: u64::from_le_bytes(field(bytes, 80)?),
            protected: bytes[88] == 1,
        })
    }

    /// Reads a header that was written with `key`.
    pub(super) fn read(
        bytes: &[u8; HEADER_SIZE],
        key: &StoreKey,
    ) -> Result<(Self, SegmentCipher), BadSegment> {
        let header = Self::read_unchecked(bytes)?;
        let (cipher, check) = key.segment(&field(bytes, 0)?);
        if bytes[HEADER_SIZE - CHECK_SIZE..] != check {
            return Err(BadSegment);
        }
        Ok((header, cipher))
    }
}

/// A record in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableEntry {
    pub(super) id: ShortId,
    /// Length of the contents, 1 to `PAGE_SIZE`.
    pub(super) length: u16,
}

fn write_table(entries: &[TableEntry], out: &mut Vec<u8>) {
    for entry in entries {
        out.extend_from_slice(entry.id.as_bytes());
        out.extend_from_slice(&entry.length.to_le_bytes());
    }
}

/// Appends the entries of a table; returns the sum of their sealed lengths.
fn read_table(table: &[u8], out: &mut Vec<TableEntry>) -> Result<u64, BadSegment> {
    let mut sealed = 0;
    for entry in table.chunks_exact(TABLE_ENTRY_SIZE) {
        let length = u16::from_le_bytes(field(entry, ShortId::SIZE)?);
        if !(1..=PAGE_SIZE).contains(&usize::from(length)) {
            return Err(BadSegment);
        }
        sealed += u64::from(length) + TAG_SIZE as u64;
        out.push(TableEntry {
            id: ShortId::from_bytes(field(entry, 0)?),
            length,
        });
    }
    Ok(sealed)
}

/// The head of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkHead {
    /// Number of the first record.
    pub(super) first: u32,
    /// Number of records, at least 1.
    pub(super) records: u32,
    /// Bytes of the sealed records.
    pub(super) bytes: u32,
}

impl ChunkHead {
    /// Reads a head; its numbers are within bounds and nothing more is sure.
    pub(super) fn read(bytes: &[u8; CHUNK_HEAD_SIZE]) -> Result<Self, BadSegment> {
        let head = Self {
            first: u32::from_le_bytes(field(bytes, 4)?),
            records: u32::from_le_bytes(field(bytes, 8)?),
            bytes: u32::from_le_bytes(field(bytes, 12)?),
        };
        let end = u64::from(head.first) + u64::from(head.records);
        let good = bytes[..4] == CHUNK_MAGIC
            && head.records > 0
            && end <= MAX_RECORDS as u64
            && u64::from(head.bytes) <= MAX_SEGMENT;
        good.then_some(head).ok_or(BadSegment)
    }

    fn write(self) -> [u8; CHUNK_HEAD_SIZE] {
        let mut bytes = [0; CHUNK_HEAD_SIZE];
        bytes[..4].copy_from_slice(&CHUNK_MAGIC);
        bytes[4..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.records.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// Size of the sealed table behind the head.
    pub(super) fn table_size(self) -> usize {
        table_size(self.records as usize)
    }

    /// Size of the whole chunk.
    pub(super) fn size(self) -> u64 {
        (CHUNK_HEAD_SIZE + self.table_size()) as u64 + u64::from(self.bytes)
    }

    /// Appends the entries of the chunk, whose sealed table this is. Nothing is appended on an error.
    pub(super) fn open_table(
        self,
        cipher: &SegmentCipher,
        sealed: &mut [u8],
        out: &mut Vec<TableEntry>,
    ) -> Result<(), BadSegment> {
        if sealed.len() != self.table_size() {
            return Err(BadSegment);
        }
        let before = out.len();
        let table = cipher.open_chunk_table(self.first, &self.write(), sealed)?;
        let read = read_table(table, out);
        if read != Ok(u64::from(self.bytes)) {
            out.truncate(before);
            return Err(BadSegment);
        }
        Ok(())
    }
}

/// Bytes that the sealed table of so many records takes.
pub(super) fn table_size(records: usize) -> usize {
    records * TABLE_ENTRY_SIZE + TAG_SIZE
}

/// Appends a whole chunk: `entries` and their `contents`, one behind the other.
pub(super) fn write_chunk(
    cipher: &SegmentCipher,
    first: u32,
    entries: &[TableEntry],
    mut contents: &[u8],
    out: &mut Vec<u8>,
) {
    let head = ChunkHead {
        first,
        records: entries.len() as u32,
        bytes: (contents.len() + entries.len() * TAG_SIZE) as u32,
    };
    let head = head.write();
    out.extend_from_slice(&head);
    let mut table = Vec::with_capacity(entries.len() * TABLE_ENTRY_SIZE);
    write_table(entries, &mut table);
    cipher.seal_chunk_table(first, &head, &table, out);
    for (number, entry) in (first..).zip(entries) {
        let (record, rest) = contents.split_at(usize::from(entry.length));
        cipher.seal_record(number, &entry.id, record, out);
        contents = rest;
    }
}

/// The last bytes of a sealed segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) records: u32,
    pub(super) chunks: u32,
    /// Seconds since 1970.
    pub(super) sealed_at: u64,
}

impl Trailer {
    fn write(self) -> [u8; TRAILER_SIZE] {
        let mut bytes = [0; TRAILER_SIZE];
        bytes[..8].copy_from_slice(&self.sealed_at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.records.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.chunks.to_le_bytes());
        bytes[24..].copy_from_slice(&TRAILER_MAGIC);
        bytes
    }

    /// Reads the last bytes of a file. An error says that the segment was not sealed.
    pub(super) fn read(bytes: &[u8; TRAILER_SIZE]) -> Result<Self, BadSegment> {
        let trailer = Self {
            sealed_at: u64::from_le_bytes(field(bytes, 0)?),
            records: u32::from_le_bytes(field(bytes, 8)?),
            chunks: u32::from_le_bytes(field(bytes, 12)?),
        };
        let good = trailer.write() == *bytes
            && trailer.records as usize <= MAX_RECORDS
            && trailer.chunks <= trailer.records;
        good.then_some(trailer).ok_or(BadSegment)
    }

    /// Size of the sealed footer in front of the trailer.
    pub(super) fn footer_size(self) -> usize {
        self.chunks as usize * FOOTER_CHUNK_SIZE + table_size(self.records as usize)
    }
}

/// Appends footer and trailer. `chunks` are the numbers of records of the chunks.
pub(super) fn write_footer(
    cipher: &SegmentCipher,
    chunks: &[u32],
    entries: &[TableEntry],
    sealed_at: u64,
    out: &mut Vec<u8>,
) {
    let trailer = Trailer {
        records: entries.len() as u32,
        chunks: chunks.len() as u32,
        sealed_at,
    };
    let mut footer = Vec::with_capacity(trailer.footer_size());
    for records in chunks {
        footer.extend_from_slice(&records.to_le_bytes());
    }
    write_table(entries, &mut footer);
    let trailer = trailer.write();
    cipher.seal_footer(&trailer, &footer, out);
    out.extend_from_slice(&trailer);
}

/// Where the chunks of a segment begin, and all its records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Contents {
    /// Number of the first record and offset of the first sealed record, for each chunk.
    pub(super) chunks: Vec<ChunkAt>,
    pub(super) entries: Vec<TableEntry>,
}

/// Where the records of a chunk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkAt {
    /// Number of the first record.
    pub(super) first: u32,
    /// Where it begins in the file.
    pub(super) offset: u32,
    /// Whether every record is a whole page, so that each can be found without counting.
    pub(super) whole_pages: bool,
}

impl ChunkAt {
    /// The chunk whose first record has number `first` and lies at `offset`.
    pub(super) fn new(first: u32, offset: u64, entries: &[TableEntry]) -> Result<Self, BadSegment> {
        Ok(Self {
            first,
            offset: u32::try_from(offset).map_err(|_| BadSegment)?,
            whole_pages: entries
                .iter()
                .all(|entry| usize::from(entry.length) == PAGE_SIZE),
        })
    }
}

/// Reads the footer in front of `trailer`. `end` is where it begins in the file.
pub(super) fn read_footer(
    cipher: &SegmentCipher,
    trailer: Trailer,
    sealed: &mut [u8],
    end: u64,
) -> Result<Contents, BadSegment> {
    if sealed.len() != trailer.footer_size() {
        return Err(BadSegment);
    }
    let footer = cipher.open_footer(&trailer.write(), sealed)?;
    let (counts, table) = footer.split_at(trailer.chunks as usize * FOOTER_CHUNK_SIZE);
    let mut entries = Vec::with_capacity(trailer.records as usize);
    read_table(table, &mut entries)?;
    let mut chunks = Vec::with_capacity(trailer.chunks as usize);
    let (mut first, mut offset) = (0_usize, HEADER_SIZE as u64);
    for count in counts.chunks_exact(FOOTER_CHUNK_SIZE) {
        let count = u32::from_le_bytes(field(count, 0)?) as usize;
        let records = entries.get(first..first.saturating_add(count));
        let records = records.ok_or(BadSegment)?;
        offset += (CHUNK_HEAD_SIZE + table_size(count)) as u64;
        chunks.push(ChunkAt::new(first as u32, offset, records)?);
        offset += records
            .iter()
            .map(|entry| u64::from(entry.length) + TAG_SIZE as u64)
            .sum::<u64>();
        first += count;
    }
    if first != entries.len() || offset != end {
        return Err(BadSegment);
    }
    Ok(Contents { chunks, entries })
}

/// `N` bytes at `at`.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], BadSegment> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().ok_or(BadSegment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> StoreKey {
        StoreKey::new(&[4; 32])
    }

    fn header() -> Header {
        Header {
            number: 7,
            store: [1; 16],
            domain: DomainId::from_bytes([2; 16]),
            salt: [3; 32],
            created: 1_700_000_000,
            protected: true,
        }
    }

    fn entries() -> Vec<TableEntry> {
        let entry = |byte, length| TableEntry {
            id: ShortId::from_bytes([byte; 16]),
            length,
        };
        vec![entry(1, 4), entry(2, 1), entry(3, 5)]
    }

    /// A sealed segment of two chunks.
    fn file() -> Vec<u8> {
        let (header, cipher) = header().write(&key());
        let mut file = header.to_vec();
        write_chunk(&cipher, 0, &entries()[..2], b"abcde", &mut file);
        write_chunk(&cipher, 2, &entries()[2..], b"fghij", &mut file);
        write_footer(&cipher, &[2, 1], &entries(), 1_700_000_009, &mut file);
        file
    }

    fn read(file: &[u8]) -> Result<Contents, BadSegment> {
        let header = file.first_chunk().ok_or(BadSegment)?;
        let (_, cipher) = Header::read(header, &key())?;
        let (rest, trailer) = file.split_last_chunk().ok_or(BadSegment)?;
        let trailer = Trailer::read(trailer)?;
        let end = rest.len().checked_sub(trailer.footer_size());
        let end = end.ok_or(BadSegment)?;
        read_footer(&cipher, trailer, &mut rest[end..].to_vec(), end as u64)
    }

    #[test]
    fn headers_come_back_and_damaged_ones_do_not() {
        let (bytes, _) = header().write(&key());
        assert_eq!(Header::read(&bytes, &key()).unwrap().0, header());
        assert!(Header::read(&bytes, &StoreKey::new(&[5; 32])).is_err());
        for at in 0..HEADER_SIZE {
            let mut damaged = bytes;
            damaged[at] ^= 0x80;
            assert!(Header::read(&damaged, &key()).is_err(), "byte {at}");
        }
    }

    #[test]
    fn footers_tell_where_everything_is() {
        let file = file();
        let contents = read(&file).unwrap();
        assert_eq!(contents.entries, entries());
        let (_, cipher) = header().write(&key());
        let mut out = [0; 5];
        let at = contents.chunks[1].offset as usize;
        let sealed = &file[at..at + 5 + TAG_SIZE];
        cipher
            .open_record(2, &entries()[2].id, sealed, &mut out)
            .unwrap();
        assert_eq!(&out, b"fghij");
        assert_eq!(contents.chunks[1].first, 2);
    }

    #[test]
    fn chunks_tell_of_themselves() {
        let file = file();
        let (_, cipher) = header().write(&key());
        let mut found = Vec::new();
        let mut at = HEADER_SIZE;
        while let Ok(head) = ChunkHead::read(&field(&file, at).unwrap()) {
            let table = at + CHUNK_HEAD_SIZE..at + CHUNK_HEAD_SIZE + head.table_size();
            let mut sealed = file[table].to_vec();
            head.open_table(&cipher, &mut sealed, &mut found).unwrap();
            at += head.size() as usize;
        }
        assert_eq!(found, entries());
        assert_eq!(at + read_footer_size(), file.len());
    }

    fn read_footer_size() -> usize {
        let trailer = Trailer {
            records: 3,
            chunks: 2,
            sealed_at: 0,
        };
        trailer.footer_size() + TRAILER_SIZE
    }

    #[test]
    fn no_changed_or_shortened_footer_is_believed() {
        let file = file();
        let begin = file.len() - read_footer_size();
        for at in begin..file.len() {
            for bit in 0..8 {
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                assert_eq!(read(&damaged), Err(BadSegment), "byte {at}");
            }
        }
        for length in 0..file.len() {
            assert_eq!(read(&file[..length]), Err(BadSegment));
        }
    }

    #[test]
    fn impossible_heads_are_refused() {
        let good = ChunkHead {
            first: 0,
            records: 1,
            bytes: 17,
        };
        assert_eq!(ChunkHead::read(&good.write()), Ok(good));
        let bad = [
            ChunkHead { records: 0, ..good },
            ChunkHead {
                first: MAX_RECORDS as u32,
                ..good
            },
            ChunkHead {
                records: u32::MAX,
                first: u32::MAX,
                ..good
            },
            ChunkHead {
                bytes: u32::MAX,
                ..good
            },
        ];
        for head in bad {
            assert_eq!(ChunkHead::read(&head.write()), Err(BadSegment));
        }
    }

    /// The layout in `docs/store-format.md`, byte by byte, by its hash.
    #[test]
    fn the_format_has_not_changed() {
        let file = file();
        assert_eq!(file.len(), 414);
        assert_eq!(
            blake3::hash(&file).to_hex().as_str(),
            "b9e67364c00e6c4370f656260a150e08a84c2e6e08530d0184158e931cf3f278"
        );
    }
}
