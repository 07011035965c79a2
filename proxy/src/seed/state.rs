//! How far sources have been read, so that an interrupted seeding goes on there.
//!
//! The state is a small file in the store's folder. It holds names and sizes of the sources, no contents.
//! It is worth a little time only: a file that is missing, damaged or of another version means to begin
//! anew, which costs nothing but reading.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use skyferry_dedup::{DomainId, StoreId};

/// Name of the file in the store's folder.
pub(super) const STATE: &str = "seed.state";
const NEW_STATE: &str = "seed.state.new";

const VERSION: u32 = 1;
/// Sources that are remembered; the oldest are forgotten.
const MAX_SOURCES: usize = 256;
/// Longest file that is read: each source has a path of at most 4 KiB, and some numbers.
const MAX_STATE: u64 = 4 << 20;

/// What a source is: any other value is another source, or one that has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SourceId {
    path: String,
    domain: String,
    format: String,
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds since 1970, and nanoseconds.
    modified: (i64, i64),
}

impl SourceId {
    /// The source at `path` (which is absolute), read in `format`, for `domain`.
    pub(super) fn new(path: &Path, format: &str, meta: &Metadata, domain: &DomainId) -> Self {
        Self {
            path: path.to_string_lossy().into_owned(),
            domain: domain.to_string(),
            format: format.into(),
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        }
    }

    /// Whether a file is as it was.
    pub(super) fn is_of(&self, meta: &Metadata) -> bool {
        self.bytes == meta.size() && self.modified == (meta.mtime(), meta.mtime_nsec())
    }
}

/// How far a source has been read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Position {
    /// A disk or file: up to this byte.
    Byte(u64),
    /// A folder: so many files, in the order of the walk; and the path of the last one, to know it by.
    Files {
        /// Their number.
        count: u64,
        /// Path of the last one below the folder.
        last: String,
    },
    /// To its end.
    Done,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    version: u32,
    store: String,
    /// The oldest come first.
    sources: Vec<(SourceId, Position)>,
}

/// The state of one store.
#[derive(Debug)]
pub(super) struct State {
    folder: PathBuf,
    kept: Kept,
}

impl State {
    /// The state in the folder of `store`; an empty one, if there is none of this very store.
    pub(super) fn load(folder: &Path, store: StoreId) -> Self {
        let store = format!("{:032x}", u128::from_be_bytes(store.0));
        let kept = read(&folder.join(STATE))
            .ok()
            .filter(|kept| kept.version == VERSION && kept.store == store);
        let kept = kept.unwrap_or(Kept {
            version: VERSION,
            store,
            sources: Vec::new(),
        });
        Self {
            folder: folder.into(),
            kept,
        }
    }

    /// How far `source` was read.
    pub(super) fn position(&self, source: &SourceId) -> Option<&Position> {
        let found = self.kept.sources.iter().find(|(id, _)| id == source);
        found.map(|(_, position)| position)
    }

    /// Notes how far `source` has been read, in memory.
    pub(super) fn set(&mut self, source: &SourceId, position: Position) {
        self.forget(source);
        self.kept.sources.push((source.clone(), position));
        let excess = self.kept.sources.len().saturating_sub(MAX_SOURCES);
        self.kept.sources.drain(..excess);
    }

    /// Forgets `source`, in memory.
    pub(super) fn forget(&mut self, source: &SourceId) {
        self.kept.sources.retain(|(id, _)| id != source);
    }

    /// Writes the state: after a crash there is the old one or the new one.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn save(&self) -> io::Result<()> {
        if self.kept.sources.is_empty() {
            return remove(&self.folder);
        }
        let new = self.folder.join(NEW_STATE);
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)?;
        let text = serde_json::to_vec(&self.kept).map_err(io::Error::other)?;
        file.write_all(&text)?;
        fs::rename(&new, self.folder.join(STATE))
    }
}

fn read(path: &Path) -> io::Result<Kept> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_STATE).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map_err(io::Error::other)
}

/// Removes the state from the folder of a store: what it says is true no more.
///
/// # Errors
/// Those of the file system, except that there is none.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(STATE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: StoreId = StoreId([0xa1; 16]);

    fn source(path: &Path, format: &str) -> SourceId {
        let domain = DomainId::from_bytes([1; 16]);
        SourceId::new(path, format, &path.metadata().unwrap(), &domain)
    }

    #[test]
    fn what_was_noted_is_found_for_the_same_source_and_store_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "1234").unwrap();
        let raw = source(&path, "raw");
        let mut state = State::load(dir.path(), STORE);
        assert_eq!(state.position(&raw), None);
        state.set(&raw, Position::Byte(4096));
        let folder = source(dir.path(), "folder");
        let files = Position::Files {
            count: 7,
            last: "a/b".into(),
        };
        state.set(&folder, files.clone());
        state.set(&raw, Position::Byte(8192));
        state.save().unwrap();

        let again = State::load(dir.path(), STORE);
        assert_eq!(again.position(&raw), Some(&Position::Byte(8192)));
        assert_eq!(again.position(&folder), Some(&files));
        assert_eq!(again.position(&source(&path, "qcow2")), None);
        assert_eq!(
            State::load(dir.path(), StoreId([2; 16])).position(&raw),
            None
        );
        fs::write(&path, "12345").unwrap();
        assert_eq!(again.position(&source(&path, "raw")), None);

        let mut again = again;
        again.forget(&raw);
        again.forget(&folder);
        again.save().unwrap();
        assert!(!dir.path().join(STATE).exists());
        again.save().unwrap();
    }

    #[test]
    fn a_damaged_state_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "1234").unwrap();
        let raw = source(&path, "raw");
        let mut state = State::load(dir.path(), STORE);
        state.set(&raw, Position::Done);
        state.save().unwrap();
        let text = fs::read(dir.path().join(STATE)).unwrap();
        for end in 0..text.len() {
            fs::write(dir.path().join(STATE), &text[..end]).unwrap();
            assert_eq!(State::load(dir.path(), STORE).position(&raw), None);
        }
        fs::write(dir.path().join(STATE), "[".repeat(100_000)).unwrap();
        assert_eq!(State::load(dir.path(), STORE).position(&raw), None);
    }

    #[test]
    fn old_sources_make_way() {
        let dir = tempfile::tempdir().unwrap();
        let first = source(dir.path(), "0");
        let mut state = State::load(dir.path(), STORE);
        for n in 0..=MAX_SOURCES {
            state.set(&source(dir.path(), &n.to_string()), Position::Done);
        }
        assert_eq!(state.position(&first), None);
        let last = source(dir.path(), &MAX_SOURCES.to_string());
        assert_eq!(state.position(&last), Some(&Position::Done));
    }
}
