//! How often records were used, for the next one who opens the store.
//!
//! Uses decide what stays when room is made (see `evict.rs`). They are counted in memory; a file beside
//! the segments, `uses`, tells of them: written anew now and then and when the store is closed, read
//! when it is opened. Nothing depends on it. Without it, or where it tells of what is not there, pages
//! count as not used. See `docs/store-format.md`, "Uses".

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::crypt::{SegmentCipher, StoreKey, TAG_SIZE, random};
use super::live::Segment;
use super::segment::MAX_RECORDS;
use super::{Inner, Segments, count, lock};

const FILE: &str = "uses";
/// While it is being written.
const NEW: &str = "uses.new";
const MAGIC: [u8; 8] = *b"SKYFUSES";
const VERSION: u32 = 1;
/// Magic, version, 4 zeroes, store, 32 random bytes.
const HEADER_SIZE: usize = 64;
const STORE_AT: usize = 16;
const SALT_AT: usize = 32;
/// What is in front of the uses of a segment: its number, and the number of records with a bit for
/// whether it is protected.
const HEAD_SIZE: usize = 8;
const PROTECTED: u32 = 1 << 31;

/// Records whose uses take a byte.
const PER_BYTE: usize = 4;
const USE_BITS: usize = 8 / PER_BYTE;

/// A larger share of the store is none of ours: two bits a record come to 1/200 where pages are short.
const MAX_SHARE: u64 = 64;

/// The uses of one segment's records.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) number: u32,
    pub(super) protected: bool,
    /// Below 4 each.
    pub(super) uses: Vec<u8>,
}

/// Bytes that an entry of so many records takes.
fn entry_size(records: usize) -> usize {
    HEAD_SIZE + records.div_ceil(PER_BYTE) + TAG_SIZE
}

impl Entry {
    /// The first `records` of a segment.
    fn of(segment: &Segment, records: usize) -> Self {
        let mut uses = segment.all_uses();
        uses.truncate(records);
        Self {
            number: segment.number,
            protected: segment.is_protected(),
            uses,
        }
    }

    pub(super) fn write(&self, cipher: &SegmentCipher, out: &mut Vec<u8>) {
        let mut head = [0; HEAD_SIZE];
        let flag = if self.protected { PROTECTED } else { 0 };
        head[..4].copy_from_slice(&self.number.to_le_bytes());
        head[4..].copy_from_slice(&(self.uses.len() as u32 | flag).to_le_bytes());
        let packed: Vec<u8> = self.uses.chunks(PER_BYTE).map(pack).collect();
        out.extend_from_slice(&head);
        cipher.seal_uses(self.number, &head, &packed, out);
    }

    /// The next one; `None` at the end, and where it is not as it was written.
    fn read(file: &mut impl Read, cipher: &SegmentCipher, sealed: &mut Vec<u8>) -> Option<Self> {
        let mut head = [0; HEAD_SIZE];
        file.read_exact(&mut head).ok()?;
        let ([number, counts], []) = head.as_chunks::<4>() else {
            return None;
        };
        let (number, counts) = (u32::from_le_bytes(*number), u32::from_le_bytes(*counts));
        let records = (counts & !PROTECTED) as usize;
        if records > MAX_RECORDS {
            return None;
        }
        sealed.resize(entry_size(records) - HEAD_SIZE, 0);
        file.read_exact(sealed).ok()?;
        let packed = cipher.open_uses(number, &head, sealed).ok()?;
        let unpacked = packed.iter().flat_map(|byte| unpack(*byte));
        Some(Self {
            number,
            protected: counts & PROTECTED != 0,
            uses: unpacked.take(records).collect(),
        })
    }
}

fn pack(uses: &[u8]) -> u8 {
    let shifted = uses
        .iter()
        .enumerate()
        .map(|(n, uses)| uses << (n * USE_BITS));
    shifted.fold(0, |byte, bits| byte | bits)
}

fn unpack(byte: u8) -> [u8; PER_BYTE] {
    std::array::from_fn(|n| byte >> (n * USE_BITS) & ((1 << USE_BITS) - 1))
}

/// Reads what the file of a store tells of its segments. Returns the bytes that the file takes.
pub(super) fn restore(
    folder: &Path,
    key: &StoreKey,
    store: &[u8; 16],
    segments: &Segments,
    capacity: u64,
) -> u64 {
    // A start was cut short.
    let _ = std::fs::remove_file(folder.join(NEW));
    let path = folder.join(FILE);
    let Ok(size) = path.metadata().map(|file| file.len()) else {
        return 0;
    };
    let file = (size <= capacity / MAX_SHARE).then(|| File::open(&path).ok());
    let entries = file
        .flatten()
        .and_then(|file| Entries::of(BufReader::new(file), key, store));
    let Some(entries) = entries else {
        // Another store's: it would only take room.
        return std::fs::remove_file(&path).map_or(size, |()| 0);
    };
    for entry in entries {
        // One that is gone tells nothing; one that was cut in a crash has lost records at its end.
        if let Some(segment) = segments.numbered(entry.number) {
            segment.restore_uses(&entry.uses);
            if entry.protected {
                segment.protect();
            }
        }
    }
    size
}

/// The beginning of a file. With 32 bytes that no other file has, it has a key of its own.
pub(super) fn header(store: &[u8; 16], salt: &[u8; 32]) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[STORE_AT..SALT_AT].copy_from_slice(store);
    header[SALT_AT..].copy_from_slice(salt);
    header
}

/// The entries of a file, up to its end or to the first that is not as it was written.
pub(super) struct Entries<R> {
    file: R,
    cipher: SegmentCipher,
    sealed: Vec<u8>,
}

impl<R: Read> Entries<R> {
    /// `None` when the file is not of this store and version.
    pub(super) fn of(mut file: R, key: &StoreKey, store: &[u8; 16]) -> Option<Self> {
        let mut header = [0; HEADER_SIZE];
        file.read_exact(&mut header).ok()?;
        let is_ours = header[..8] == MAGIC
            && header[8..12] == VERSION.to_le_bytes()
            && header[STORE_AT..SALT_AT] == *store;
        is_ours.then(|| Self {
            file,
            cipher: key.uses(&header),
            sealed: Vec::new(),
        })
    }
}

impl<R: Read> Iterator for Entries<R> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        Entry::read(&mut self.file, &self.cipher, &mut self.sealed)
    }
}

impl Inner {
    /// Writes the file anew, if there is room for it beside the old one.
    pub(super) fn write_uses(&self) {
        let used = |segment: &&Arc<Segment>| segment.used() > 0 || segment.is_protected();
        let segments: Vec<_> = self.segments().iter().filter(used).cloned().collect();
        // Segments may grow meanwhile: what comes then is told of the next time.
        let segments: Vec<_> = segments
            .into_iter()
            .map(|segment| (segment.records() as usize, segment))
            .collect();
        let entries = segments.iter().map(|(records, _)| entry_size(*records));
        let most = (HEADER_SIZE + entries.sum::<usize>()) as u64;
        if !lock(&self.appender).take_for_uses(most) {
            return;
        }
        let folder = &self.options.folder;
        let new = folder.join(NEW);
        let written = self
            .write_uses_to(&new, &segments)
            .and_then(|written| std::fs::rename(&new, folder.join(FILE)).map(|()| written));
        lock(&self.appender).uses_written(most, written.as_ref().ok().copied());
        match written {
            Ok(written) => self.wrote(written),
            Err(_) => {
                // So many uses are forgotten at the next start: not worth degrading for.
                count(&self.counters.write_errors, 1);
                let _ = std::fs::remove_file(&new);
            }
        }
    }

    /// Returns the bytes written.
    fn write_uses_to(&self, new: &Path, segments: &[(usize, Arc<Segment>)]) -> io::Result<u64> {
        let header = header(&self.superblock.id, &random().map_err(io::Error::other)?);
        let cipher = self.key.uses(&header);
        let file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(new)?;
        let mut file = BufWriter::new(file);
        file.write_all(&header)?;
        let (mut written, mut sealed) = (header.len(), Vec::new());
        for (records, segment) in segments {
            sealed.clear();
            Entry::of(segment, *records).write(&cipher, &mut sealed);
            file.write_all(&sealed)?;
            written += sealed.len();
        }
        file.flush()?;
        Ok(written as u64)
    }
}

/// Deletes the file.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    for name in [FILE, NEW] {
        super::open::remove_if_there(&folder.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: [u8; 16] = [1; 16];

    fn key() -> StoreKey {
        StoreKey::new(&[4; 32])
    }

    fn entries() -> Vec<Entry> {
        let entry = |number, protected, records: u8| Entry {
            number,
            protected,
            uses: (0..records).map(|n| n * 7 % 4).collect(),
        };
        vec![entry(1, false, 5), entry(9, true, 0), entry(4, true, 8)]
    }

    fn file() -> Vec<u8> {
        let mut file = header(&STORE, &[3; 32]).to_vec();
        let cipher = key().uses(&file);
        for entry in entries() {
            entry.write(&cipher, &mut file);
        }
        file
    }

    fn read(file: &[u8]) -> Option<Vec<Entry>> {
        Some(Entries::of(file, &key(), &STORE)?.collect())
    }

    #[test]
    fn entries_come_back_up_to_the_first_damage() {
        let file = file();
        assert_eq!(read(&file), Some(entries()));
        let sizes = entries()
            .iter()
            .map(|entry| entry_size(entry.uses.len()))
            .sum::<usize>();
        assert_eq!(file.len(), HEADER_SIZE + sizes);
        for length in 0..file.len() {
            let found = read(&file[..length]);
            assert_eq!(found.is_some(), length >= HEADER_SIZE);
            assert!(found.is_none_or(|found| found.len() < 3 && entries().starts_with(&found)));
        }
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 0x10;
            let found = read(&damaged).unwrap_or_default();
            assert!(
                found.len() < 3 && entries().starts_with(&found),
                "byte {at}"
            );
        }
        assert!(Entries::of(&file[..], &key(), &[2; 16]).is_none());
        let other = StoreKey::new(&[5; 32]);
        assert_eq!(
            Entries::of(&file[..], &other, &STORE).map(Iterator::count),
            Some(0)
        );
    }

    /// The layout in `docs/store-format.md`, byte by byte, by its hash.
    #[test]
    fn the_format_has_not_changed() {
        assert_eq!(
            blake3::hash(&file()).to_hex().as_str(),
            "702c972107ed29310813fa4aa1479f4c7e15a75517bbef9a879bd08604d2a99a"
        );
    }
}
