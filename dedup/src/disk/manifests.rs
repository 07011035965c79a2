//! Manifests beside the segments: one file each, written once and sealed like a segment.
//!
//! They are found again when the store is opened. A file that is cut, damaged, of another store, of
//! another key or under another's name is deleted: nothing depends on it. See `docs/store-format.md`, "Manifests".

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::crypt::{StoreKey, random};
use super::{DiskStore, Inner};
use crate::manifest::{Manifest, ManifestId};
use crate::page::DomainId;

const PREFIX: &str = "manifest-";
/// A file that is being written.
const NEW: &str = "manifest.new";
const MAGIC: [u8; 8] = *b"SKYFMANI";
const VERSION: u32 = 1;
/// Magic, version, 4 zeroes, store, domain, id, 32 random bytes.
pub(super) const HEADER_SIZE: usize = 96;
const DOMAIN_AT: usize = 32;
const ID_AT: usize = 48;
const SALT_AT: usize = 64;
/// Longest name of a peer.
const MAX_PEER: usize = 1024;
/// Most files that are looked at when the store is opened; the rest is deleted.
const MAX_FILES: usize = 1024;

impl DiskStore {
    /// Keeps a manifest that was made with `peer`, until it is deleted or older than the store's time
    /// to live. Nothing waits for the disk to have it.
    ///
    /// # Errors
    /// What the file system said. There is no file then.
    pub fn save_manifest(&self, peer: &str, manifest: &Manifest) -> io::Result<()> {
        let mut header = [0; HEADER_SIZE];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..32].copy_from_slice(&self.inner.superblock.id);
        header[DOMAIN_AT..ID_AT].copy_from_slice(manifest.domain().as_bytes());
        header[ID_AT..SALT_AT].copy_from_slice(manifest.id().as_bytes());
        header[SALT_AT..].copy_from_slice(&random::<32>().map_err(io::Error::other)?);
        let mut body = Vec::with_capacity(manifest.bytes() + manifest.bytes() / 512 + 4096);
        let peer = &peer.as_bytes()[..peer.len().min(MAX_PEER)];
        body.extend_from_slice(&(peer.len() as u16).to_le_bytes());
        body.extend_from_slice(peer);
        manifest.write(&mut body);
        self.inner.key.manifest(&header).seal_whole(&mut body);
        let folder = &self.inner.options.folder;
        let new = folder.join(NEW);
        let written = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| {
                file.write_all(&header)?;
                file.write_all(&body)
            })
            .and_then(|()| std::fs::rename(&new, path(folder, peer, manifest.id())));
        if written.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        written
    }

    /// Deletes a manifest, if it is there.
    pub fn delete_manifest(&self, peer: &str, id: ManifestId) {
        let peer = &peer.as_bytes()[..peer.len().min(MAX_PEER)];
        // One that stays is found at the next start, and is as good as it was.
        let _ = std::fs::remove_file(path(&self.inner.options.folder, peer, id));
    }

    /// The manifests that were kept, with their peers, the latest first: as many as take `most_bytes`.
    /// All others are deleted, and those that are of no use any more.
    #[must_use]
    pub fn load_manifests(&self, most_bytes: u64) -> Vec<(String, Manifest)> {
        let Inner { options, .. } = &*self.inner;
        let mut files = files(&options.folder);
        files.sort_unstable_by(|a, b| b.cmp(a));
        let (mut loaded, mut left) = (Vec::new(), most_bytes);
        for (at, (modified, path)) in files.into_iter().enumerate() {
            let age = SystemTime::now().duration_since(modified);
            let too_old = options
                .ttl
                .is_some_and(|ttl| age.is_ok_and(|age| age > ttl));
            let found = (at < MAX_FILES && !too_old)
                .then(|| read_manifest(&path, &self.inner.key, &self.inner.superblock.id, left))
                .flatten();
            match found {
                Some((peer, manifest)) => {
                    left = left.saturating_sub(manifest.bytes() as u64);
                    loaded.push((peer, manifest));
                }
                None => {
                    let _ = std::fs::remove_file(&path);
                }
            }
        }
        loaded
    }
}

/// The manifest in a file of this store that takes at most `most_bytes`, and the peer it was made with.
pub(super) fn read_manifest(
    at: &Path,
    key: &StoreKey,
    store: &[u8; 16],
    most_bytes: u64,
) -> Option<(String, Manifest)> {
    let mut file = File::open(at).ok()?;
    let mut header = [0; HEADER_SIZE];
    file.read_exact(&mut header).ok()?;
    if !is_header(&header) || header[16..DOMAIN_AT] != *store {
        return None;
    }
    let size = file.metadata().ok()?.len();
    if size > largest_file(most_bytes) {
        return None;
    }
    let mut body = Vec::new();
    body.try_reserve_exact(size as usize).ok()?;
    file.take(size).read_to_end(&mut body).ok()?;
    let cipher = key.manifest(&header);
    let body = cipher.open_whole(&mut body).ok()?;
    let (length, rest) = body.split_first_chunk()?;
    let (peer, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    let peer = String::from_utf8(peer.to_vec()).ok()?;
    let domain = domain_of(&header)?;
    let id = ManifestId::from_bytes(*header[ID_AT..].first_chunk()?);
    // Under another name it would not be found when it is to be deleted.
    if at.file_name()? != &*name(peer.as_bytes(), id) {
        return None;
    }
    let manifest = Manifest::read(id, domain, rest)?;
    (manifest.bytes() as u64 <= most_bytes).then_some((peer, manifest))
}

/// Size of the largest file that can hold a manifest which takes `most_bytes` of memory: what is beside
/// the ids takes less than this allows for.
pub(super) fn largest_file(most_bytes: u64) -> u64 {
    most_bytes
        .saturating_add(most_bytes / 8)
        .saturating_add(1 << 20)
}

/// Whether a file begins as those of this version do.
fn is_header(header: &[u8; HEADER_SIZE]) -> bool {
    header[..8] == MAGIC && header[8..12] == VERSION.to_le_bytes()
}

fn domain_of(header: &[u8; HEADER_SIZE]) -> Option<DomainId> {
    let domain = header[DOMAIN_AT..].first_chunk()?;
    Some(DomainId::from_bytes(*domain))
}

/// The manifests in a folder with the times at which they were written, the oldest first. One that is
/// being written is none yet.
pub(super) fn complete(folder: &Path) -> Vec<(SystemTime, PathBuf)> {
    let mut files = files(folder);
    files.retain(|(_, path)| path.file_name().is_some_and(|name| name != NEW));
    files.sort_unstable();
    files
}

/// What can be told of a manifest's file without its key: whose pages it names, and its size.
pub(super) fn describe(path: &Path) -> Option<(DomainId, u64)> {
    let mut file = File::open(path).ok()?;
    let mut header = [0; HEADER_SIZE];
    file.read_exact(&mut header).ok()?;
    let bytes = file.metadata().ok()?.len();
    is_header(&header).then_some((domain_of(&header)?, bytes))
}

fn path(folder: &Path, peer: &[u8], id: ManifestId) -> PathBuf {
    folder.join(name(peer, id))
}

/// Name of the file of a manifest.
fn name(peer: &[u8], id: ManifestId) -> String {
    let hash = blake3::hash(peer);
    let of_peer = hash.as_bytes().first_chunk().unwrap_or(&[0; 4]);
    format!("{PREFIX}{id}-{:08x}", u32::from_le_bytes(*of_peer))
}

/// The files of manifests with the times of their last change.
fn files(folder: &Path) -> Vec<(SystemTime, PathBuf)> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let is_one = |name: &std::ffi::OsStr| {
        let name = name.to_string_lossy();
        name.starts_with(PREFIX) || name == NEW
    };
    entries
        .filter(|entry| is_one(&entry.file_name()))
        .map(|entry| {
            let modified = entry.metadata().and_then(|data| data.modified());
            (modified.unwrap_or(SystemTime::UNIX_EPOCH), entry.path())
        })
        .collect()
}

/// Deletes the manifests of one domain, or all. Returns how many, and their bytes.
pub(super) fn purge(folder: &Path, domain: Option<DomainId>) -> io::Result<(u64, u64)> {
    let (mut count, mut bytes) = (0, 0);
    for (_, path) in files(folder) {
        let is_of = |domain| describe(&path).is_some_and(|(of, _)| of == domain);
        if domain.is_none_or(is_of) {
            bytes += path.metadata().map_or(0, |file| file.len());
            std::fs::remove_file(&path)?;
            count += 1;
        }
    }
    Ok((count, bytes))
}
