//! What an operator does with a store that is not in use (or, for [`stat`], that is).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::crypt::{KeySource, StoreKey, TAG_SIZE};
use super::live::segment_path;
use super::manifests::{self, largest_file, read_manifest};
use super::open::{
    OpenError, OpenErrorKind, lock_folder, read_superblock, remove_superblock, segment_numbers,
    tried,
};
use super::scan::{FoundSegment, read_segment};
use super::segment::{HEADER_SIZE, Header, TRAILER_SIZE, Trailer};
use super::superblock::{FORMAT_VERSION, Superblock};
use super::uses;
use crate::page::{DomainId, PAGE_SIZE};

/// What can be told of a store without its key. Nothing in it is authenticated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Version of the format.
    pub version: u32,
    /// Identity of the store.
    pub id: [u8; 16],
    /// Seconds since 1970.
    pub created: u64,
    /// The segments, in the order of their numbers.
    pub segments: Vec<SegmentSummary>,
    /// What guests held that left, the oldest first.
    pub manifests: Vec<ManifestSummary>,
}

/// What can be told of a segment without its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentSummary {
    /// Its number.
    pub number: u32,
    /// Whose pages are in it.
    pub domain: DomainId,
    /// Seconds since 1970.
    pub created: u64,
    /// Size of the file.
    pub bytes: u64,
    /// Number of its records; `None` while it is being filled or after a crash.
    pub records: Option<u32>,
}

/// What can be told of a manifest without its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestSummary {
    /// Whose pages it names.
    pub domain: DomainId,
    /// Size of the file.
    pub bytes: u64,
    /// When it was written, in seconds since 1970.
    pub written: u64,
}

/// Describes the store in `folder`, which may be in use.
///
/// # Errors
/// When there is no store, or one of another version, or it cannot be read.
pub fn stat(folder: &Path) -> Result<Summary, OpenError> {
    let summary = || {
        let (superblock, _) = read_superblock(folder)?.ok_or(OpenErrorKind::NoStore)?;
        let numbers = segment_numbers(folder)?.into_iter();
        Ok(Summary {
            version: FORMAT_VERSION,
            id: superblock.id,
            created: superblock.created,
            segments: numbers
                // One that cannot be read has just been deleted, or is of no use.
                .filter_map(|number| stat_segment(folder, number))
                .collect(),
            manifests: stat_manifests(folder),
        })
    };
    summary().map_err(|kind| error(folder, kind))
}

fn error(folder: &Path, kind: OpenErrorKind) -> OpenError {
    OpenError {
        folder: folder.into(),
        kind,
    }
}

fn stat_segment(folder: &Path, number: u32) -> Option<SegmentSummary> {
    let file = File::open(segment_path(folder, number)).ok()?;
    let bytes = file.metadata().ok()?.len();
    let mut header = [0; HEADER_SIZE];
    file.read_exact_at(&mut header, 0).ok()?;
    let header = Header::read_unchecked(&header).ok()?;
    let mut trailer = [0; TRAILER_SIZE];
    file.read_exact_at(&mut trailer, bytes.checked_sub(TRAILER_SIZE as u64)?)
        .ok()?;
    Some(SegmentSummary {
        number,
        domain: header.domain,
        created: header.created,
        bytes,
        records: Trailer::read(&trailer).ok().map(|trailer| trailer.records),
    })
}

fn stat_manifests(folder: &Path) -> Vec<ManifestSummary> {
    let described = manifests::complete(folder).into_iter();
    let described = described.filter_map(|(written, path)| {
        let (domain, bytes) = manifests::describe(&path)?;
        Some(ManifestSummary {
            domain,
            bytes,
            written: written
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        })
    });
    described.collect()
}

/// What was found when a whole store was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Segments that are whole.
    pub segments: u64,
    /// Records that are what was put.
    pub records: u64,
    /// Bytes of contents in them.
    pub bytes: u64,
    /// Segments that were not sealed: their last pages were lost in a crash.
    pub cut: u64,
    /// Segments of which something is damaged.
    pub damaged: Vec<DamagedSegment>,
    /// Manifests that are what was kept.
    pub manifests: u64,
    /// Bytes of their files.
    pub manifest_bytes: u64,
    /// Files of manifests that are not.
    pub damaged_manifests: Vec<PathBuf>,
    /// Files that are larger than any manifest that may be kept, which nobody looked into.
    pub oversized_manifests: Vec<PathBuf>,
}

/// What is wrong with a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DamagedSegment {
    /// Its number.
    pub number: u32,
    /// Records that cannot be read; `None` when not even their number can be told.
    pub records: Option<u32>,
}

/// Reads the whole store in `folder` and checks that every record and every manifest is what was put.
/// Manifests that take more than `most_manifest_bytes` of memory are only named.
/// `progress` is told the bytes read so far and those that there are; the check ends early when it
/// returns false.
///
/// # Errors
/// When there is no store, it is in use, it was written with another key or in another version, or the
/// folder cannot be read. Damage of segments and manifests is no error but a result.
pub fn verify(
    folder: &Path,
    key: &KeySource,
    most_manifest_bytes: u64,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<Verified, OpenError> {
    let mut verify = || {
        let (superblock, bytes) = read_superblock(folder)?.ok_or(OpenErrorKind::NoStore)?;
        let _lock = lock_folder(folder)?;
        let key = key.key()?;
        if !Superblock::is_of(&bytes, &key) {
            return Err(OpenErrorKind::WrongKey);
        }
        let numbers = segment_numbers(folder)?;
        let segments = numbers.into_iter().map(|number| {
            let path = segment_path(folder, number);
            (size(&path), Part::Segment(number, path))
        });
        let manifests = manifests::complete(folder).into_iter();
        let manifests = manifests.map(|(_, path)| (size(&path), Part::Manifest(path)));
        let parts: Vec<(u64, Part)> = segments.chain(manifests).collect();
        let total = parts.iter().map(|(size, _)| size).sum();
        let mut read = 0;
        let mut verified = Verified::default();
        for (size, part) in parts {
            if !progress(read, total) {
                break;
            }
            read += size;
            match part {
                Part::Manifest(path) if size > largest_file(most_manifest_bytes) => {
                    verified.oversized_manifests.push(path);
                }
                part => verified.add(part, size, &key, &superblock.id),
            }
        }
        progress(read, total);
        Ok(verified)
    };
    verify().map_err(|kind| error(folder, kind))
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |file| file.len())
}

/// A file that is checked by itself.
enum Part {
    Segment(u32, PathBuf),
    Manifest(PathBuf),
}

impl Verified {
    fn add(&mut self, part: Part, size: u64, key: &StoreKey, store: &[u8; 16]) {
        match part {
            Part::Segment(number, path) => match read_segment(&path, number, key, store) {
                Ok(Some(segment)) => verify_segment(&path, number, &segment, self),
                Ok(None) | Err(_) => self.damaged.push(DamagedSegment {
                    number,
                    records: None,
                }),
            },
            Part::Manifest(path) => {
                if read_manifest(&path, key, store, u64::MAX).is_some() {
                    self.manifests += 1;
                    self.manifest_bytes += size;
                } else {
                    self.damaged_manifests.push(path);
                }
            }
        }
    }
}

fn verify_segment(path: &Path, number: u32, segment: &FoundSegment, verified: &mut Verified) {
    let entries = &segment.contents.entries;
    let mut sealed = [0; PAGE_SIZE + TAG_SIZE];
    let mut page = [0; PAGE_SIZE];
    let mut bad = 0;
    let file = File::open(path).ok();
    for (at, chunk) in segment.contents.chunks.iter().enumerate() {
        let next = segment.contents.chunks.get(at + 1);
        let end = next.map_or(entries.len(), |next| next.first as usize);
        let mut offset = u64::from(chunk.offset);
        for (record, entry) in (chunk.first..).zip(&entries[chunk.first as usize..end]) {
            let length = usize::from(entry.length);
            let sealed = &mut sealed[..length + TAG_SIZE];
            let read = file.as_ref().map(|file| file.read_exact_at(sealed, offset));
            let out = &mut page[..length];
            let opened = segment.cipher.open_record(record, &entry.id, sealed, out);
            if matches!(read, Some(Ok(()))) && opened.is_ok() {
                verified.records += 1;
                verified.bytes += length as u64;
            } else {
                bad += 1;
            }
            offset += (length + TAG_SIZE) as u64;
        }
    }
    verified.segments += u64::from(bad == 0);
    verified.cut += u64::from(!segment.sealed);
    if bad > 0 {
        verified.damaged.push(DamagedSegment {
            number,
            records: Some(bad),
        });
    }
}

/// What [`purge`] deletes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purge {
    /// Everything: the next one who opens the folder makes a new store. Works on a store of any version
    /// and without its key.
    All,
    /// The segments of one domain.
    Domain(DomainId),
}

/// What [`purge`] has deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Purged {
    /// Segments of pages.
    pub segments: u64,
    /// Manifests: guests that were remembered.
    pub manifests: u64,
    /// Bytes of all these files.
    pub bytes: u64,
}

/// Deletes segments and manifests of the store in `folder`.
///
/// # Errors
/// When the store is in use, or the folder cannot be read or written; for one domain also when there is
/// no store of this version. What was deleted before the error stays deleted.
pub fn purge(folder: &Path, what: Purge) -> Result<Purged, OpenError> {
    let purge = || {
        if let Purge::Domain(_) = what {
            read_superblock(folder)?.ok_or(OpenErrorKind::NoStore)?;
        }
        let _lock = lock_folder(folder)?;
        let numbers = segment_numbers(folder)?;
        let mut purged = Purged::default();
        for number in numbers {
            let summary = stat_segment(folder, number);
            let wanted = match what {
                Purge::All => true,
                Purge::Domain(domain) => summary.as_ref().is_some_and(|s| s.domain == domain),
            };
            if wanted {
                let path = segment_path(folder, number);
                purged.bytes += path.metadata().map_or(0, |file| file.len());
                std::fs::remove_file(path).map_err(tried("delete a segment"))?;
                purged.segments += 1;
            }
        }
        let domain = match what {
            Purge::All => None,
            Purge::Domain(domain) => Some(domain),
        };
        let (manifests, bytes) =
            manifests::purge(folder, domain).map_err(tried("delete a manifest"))?;
        purged.manifests = manifests;
        purged.bytes += bytes;
        if what == Purge::All {
            uses::remove(folder).map_err(tried("delete the file of uses"))?;
            remove_superblock(folder).map_err(tried("delete the superblock"))?;
        }
        Ok(purged)
    };
    purge().map_err(|kind| error(folder, kind))
}
