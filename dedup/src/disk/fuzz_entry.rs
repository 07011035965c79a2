//! What fuzz targets and tests run: readers of the files, on any bytes.
//!
//! Each entry takes any bytes and panics if a promise is broken.

use std::io;

use super::crypt::{StoreKey, TAG_SIZE};
use super::scan::{ReadAt, read_chunks, read_sealed};
use super::segment::{Contents, HEADER_SIZE, Header, TableEntry, write_chunk, write_footer};
use super::superblock::Superblock;
use super::uses::{self, Entries, Entry};
use crate::page::{DomainId, PAGE_SIZE, ShortId};

/// A file in memory.
struct Bytes<'a>(&'a [u8]);

impl ReadAt for Bytes<'_> {
    fn fill(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        let at = usize::try_from(at).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let found = self.0.get(at..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn key() -> StoreKey {
    StoreKey::new(&[4; 32])
}

/// A superblock out of nowhere: what is taken is written again as it was.
pub fn superblock(data: &[u8]) {
    if let Ok(superblock) = Superblock::read(data) {
        let again = superblock.write(&key());
        assert_eq!(Superblock::read(&again), Ok(superblock));
        assert!(Superblock::is_of(&again, &key()));
    }
}

/// Most changes of a file.
const CHANGES: usize = 16;

/// How a file is to be damaged, and the rest of the input.
fn plan_of(data: &[u8]) -> (&[u8], &[u8]) {
    data.split_at(data.len().min(2 + 3 * CHANGES))
}

/// Cuts and changes a file as planned.
fn damage(file: &mut Vec<u8>, plan: &[u8]) {
    if let Some((cut, changes)) = plan.split_first_chunk::<2>() {
        file.truncate(file.len() - usize::from(u16::from_le_bytes(*cut)) % file.len());
        for change in changes.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % file.len();
            file[at] ^= change[2];
        }
    }
}

/// A file of uses with changes, as those of a [`segment`]: what is read is what was written, up to the
/// first change.
pub fn uses(data: &[u8]) {
    let (plan, rest) = plan_of(data);
    let entry = |(number, uses): (u32, &[u8])| Entry {
        number,
        protected: uses[0] & 4 != 0,
        uses: uses.iter().map(|uses| uses & 3).collect(),
    };
    let entries: Vec<Entry> = (1..).zip(rest.chunks(97)).map(entry).collect();
    let (key, store) = (key(), [1; 16]);
    let mut file = uses::header(&store, &[5; 32]).to_vec();
    let cipher = key.uses(&file);
    for entry in &entries {
        entry.write(&cipher, &mut file);
    }
    let whole = file.clone();
    damage(&mut file, plan);
    let found = Entries::of(&file[..], &key, &store).map(Iterator::collect::<Vec<_>>);
    assert!(found.is_some() || file != whole, "a good file was refused");
    let found = found.unwrap_or_default();
    assert!(entries.starts_with(&found), "uses out of nowhere");
    assert!(found.len() == entries.len() || file != whole);
}

/// A segment with changes: bytes 0 and 1 say how much is cut off its end, then come changes, a place
/// of two bytes and what it is changed by, 16 of them at most, and the rest are contents. Whatever is
/// changed, a record that is read is one that was written, under its own id.
pub fn segment(data: &[u8]) {
    let (plan, rest) = plan_of(data);
    let values: Vec<&[u8]> = rest.chunks(97).collect();
    let header = Header {
        number: 3,
        store: [1; 16],
        domain: DomainId::from_bytes([2; 16]),
        salt: [5; 32],
        created: 7,
        protected: false,
    };
    let entries: Vec<TableEntry> = values
        .iter()
        .map(|value| TableEntry {
            id: id_of(value),
            length: value.len() as u16,
        })
        .collect();
    let (sealed_header, cipher) = header.write(&key());
    let mut file = sealed_header.to_vec();
    let mut chunks = Vec::new();
    let mut first = 0;
    for of_chunk in entries.chunks(5) {
        let contents = values[first..first + of_chunk.len()].concat();
        write_chunk(&cipher, first as u32, of_chunk, &contents, &mut file);
        chunks.push(of_chunk.len() as u32);
        first += of_chunk.len();
    }
    write_footer(&cipher, &chunks, &entries, 9, &mut file);
    let whole = file.clone();
    damage(&mut file, plan);
    read_back(&file, whole == file, &entries, &values);
}

fn id_of(value: &[u8]) -> ShortId {
    let mut id = [0; ShortId::SIZE];
    id.copy_from_slice(&blake3::hash(value).as_bytes()[..ShortId::SIZE]);
    ShortId::from_bytes(id)
}

fn read_back(file: &[u8], whole: bool, entries: &[TableEntry], values: &[&[u8]]) {
    let Some(header) = file.first_chunk::<HEADER_SIZE>() else {
        return;
    };
    let Ok((_, cipher)) = Header::read(header, &key()) else {
        assert!(!whole);
        return;
    };
    let source = Bytes(file);
    let size = file.len() as u64;
    let sealed = read_sealed(&source, &cipher, size).ok().flatten();
    assert!(!whole || sealed.is_some(), "a good footer was refused");
    let cut = read_chunks(&source, &cipher, size).map(|(contents, _)| contents);
    for contents in sealed.into_iter().chain(cut) {
        assert!(
            entries.starts_with(&contents.entries),
            "records out of nowhere"
        );
        check_records(&source, &cipher, &contents, values, whole);
    }
}

fn check_records(
    source: &Bytes<'_>,
    cipher: &super::crypt::SegmentCipher,
    contents: &Contents,
    values: &[&[u8]],
    whole: bool,
) {
    for (at, chunk) in contents.chunks.iter().enumerate() {
        let next = contents.chunks.get(at + 1);
        let end = next.map_or(contents.entries.len(), |next| next.first as usize);
        let mut offset = u64::from(chunk.offset);
        let numbers = chunk.first as usize..end;
        let records = contents.entries[numbers.clone()].iter().zip(numbers);
        for (entry, number) in records {
            let length = usize::from(entry.length);
            let mut sealed = vec![0; length + TAG_SIZE];
            let mut out = [0; PAGE_SIZE];
            let read = source.fill(&mut sealed, offset);
            let out = &mut out[..length];
            let opened = cipher.open_record(number as u32, &entry.id, &sealed, out);
            if read.is_ok() && opened.is_ok() {
                assert_eq!(out, values[number], "other contents under an id");
            } else {
                assert!(!whole, "a good record was refused");
            }
            offset += (length + TAG_SIZE) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The inputs kept for a fuzz target.
    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../fuzz/corpus")
            .join(target);
        let inputs = folder.read_dir().unwrap();
        inputs
            .map(|input| std::fs::read(input.unwrap().path()).unwrap())
            .collect()
    }

    #[test]
    fn the_corpora_pass() {
        for input in corpus("store_superblock") {
            assert!(Superblock::read(&input).is_ok());
            superblock(&input);
        }
        for input in corpus("store_segment") {
            segment(&input);
        }
        for input in corpus("store_uses") {
            uses(&input);
        }
    }

    proptest! {
        #[test]
        fn any_superblock(data in prop::collection::vec(any::<u8>(), 0..200)) {
            superblock(&data);
        }

        #[test]
        fn any_change_of_a_segment(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            segment(&data);
        }

        #[test]
        fn any_change_of_uses(data in prop::collection::vec(any::<u8>(), 0..1000)) {
            uses(&data);
        }

        /// Without a cut, and with changes of one place only.
        #[test]
        fn one_change_of_a_segment(
            place in any::<[u8; 2]>(),
            change in any::<u8>(),
            values in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut data = vec![0; 50];
            data[2..4].copy_from_slice(&place);
            data[4] = change;
            data.extend_from_slice(&values);
            segment(&data);
            uses(&data);
        }
    }
}
