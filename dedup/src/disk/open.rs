//! Opening a store: its folder, its superblock, and the segments that are there.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, RwLock};

use rustix::io::Errno;

use super::append::{Appender, NUMBERS_AT_ONCE};
use super::crypt::{KeySource, NoRandomness, StoreKey, random};
use super::feed::IdCache;
use super::index::{Index, Location};
use super::live::{Limits, OpenFiles, Segment, segment_number, segment_path};
use super::scan::read_segment;
use super::segment::MAX_SEGMENT;
use super::superblock::{BadSuperblock, FORMAT_VERSION, SUPERBLOCK_SIZE, Superblock};
use super::uses;
use super::writer::{self, Queue};
use super::{Counters, DiskOptions, DiskStore, Health, Inner, MIN_CAPACITY, Segments};

const SUPERBLOCK: &str = "superblock";
const NEW_SUPERBLOCK: &str = "superblock.new";
const LOCK: &str = "lock";
pub(super) const WRITE_SUPERBLOCK: &str = "write the superblock";

/// Smallest segment.
const MIN_SEGMENT: u64 = 32 << 10;

/// Smallest chunk.
const MIN_CHUNK: usize = 8 << 10;

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("page store {}: {kind}", folder.display())]
pub struct OpenError {
    /// The store's folder.
    pub folder: PathBuf,
    /// What is wrong with it.
    #[source]
    pub kind: OpenErrorKind,
}

/// What is wrong with a store that could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// The capacity is too small for any store.
    #[error("a capacity of {0} bytes is too small, at least {MIN_CAPACITY} are needed")]
    TooSmall(u64),
    /// Another process has it open.
    #[error(
        "another process has it open; each gateway needs a folder of its own, and `skyferry seed` a gateway that \
         runs or none"
    )]
    Locked,
    /// The folder has files of segments and no superblock, or the superblock is damaged.
    #[error("its superblock is missing or damaged; `skyferry store purge --all --yes` begins anew")]
    Damaged,
    /// Written by another version of the software.
    #[error(
        "its format has version {found}, this program reads version {FORMAT_VERSION}; `skyferry store purge --all --yes` begins anew"
    )]
    Version {
        /// The version of its format.
        found: u32,
    },
    /// Written with another key.
    #[error(
        "it was written with another key: give that one (store.key_file, store.credential), or let `skyferry store \
         purge --all --yes` begin anew"
    )]
    WrongKey,
    /// Written with a key that lasts, and is now to be given keys that do not.
    #[error(
        "it was written with a key, and the configuration names none: give it (store.key_file, store.credential), \
         or let `skyferry store purge --all --yes` begin anew with a key for each start"
    )]
    KeyMissing,
    /// The folder holds no store.
    #[error("there is no page store in this folder")]
    NoStore,
    /// The system has no random numbers to give.
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    /// The file system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Adds what was tried to an error of the file system.
pub(super) fn tried(what: &'static str) -> impl FnOnce(io::Error) -> OpenErrorKind {
    move |source| OpenErrorKind::Io { what, source }
}

impl DiskStore {
    /// Opens the store in a folder, or makes one there. Segments that are not whole, or not of this
    /// store, are deleted; so are the oldest when they exceed the capacity.
    ///
    /// # Errors
    /// When the folder is in use, cannot be read or written, or holds a store with another key or of
    /// another version. Nothing in it is changed then.
    pub fn open(options: DiskOptions, key: &KeySource) -> Result<Self, OpenError> {
        let folder = options.folder.clone();
        let opened = open(options, key);
        opened.map_err(|kind| OpenError { folder, kind })
    }
}

fn open(options: DiskOptions, source: &KeySource) -> Result<DiskStore, OpenErrorKind> {
    if options.capacity_bytes < MIN_CAPACITY {
        return Err(OpenErrorKind::TooSmall(options.capacity_bytes));
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&options.folder)
        .map_err(tried("make the folder"))?;
    let lock = lock_folder(&options.folder)?;
    let key = source.key()?;
    let now = (options.clock)();
    let (superblock, exists) = find_superblock(&options, source, &key, now)?;
    let limits = limits(&options, &superblock);
    let next = superblock.next_segment;
    let numbers_end = next.saturating_add(NUMBERS_AT_ONCE);
    let superblock = Superblock {
        next_segment: numbers_end,
        ..superblock
    };
    let written = write_superblock(&options.folder, &superblock, &key);
    let (numbers_end, failure) = match written {
        Ok(()) => (numbers_end, None),
        // A full disk can still be read. Without numbers nothing is written.
        Err(error) if exists => (next, Some(error)),
        Err(error) => return Err(tried(WRITE_SUPERBLOCK)(error)),
    };
    let index = Index::new();
    let numbers = segment_numbers(&options.folder)?;
    let loaded = load(&options, &key, &superblock.id, &numbers, &index)?;
    let (segments, settled, deleted) = loaded;
    let (folder, capacity) = (&options.folder, options.capacity_bytes);
    let of_uses = uses::restore(folder, &key, &superblock.id, &segments, capacity);
    let appender = Appender::new(
        settled,
        of_uses,
        (next, numbers_end),
        limits.segment_bytes,
        options.capacity_bytes,
    );
    let inner = Arc::new(Inner {
        key,
        superblock,
        limits,
        index,
        segments: RwLock::new(segments),
        appender: Mutex::new(appender),
        queue: Mutex::new(Queue::default()),
        wake: Condvar::new(),
        done: Condvar::new(),
        files: OpenFiles::default(),
        ids: Mutex::new(IdCache::default()),
        pending: AtomicUsize::new(0),
        health: Mutex::new(Health::default()),
        degraded: AtomicBool::new(false),
        now: AtomicU64::new(now),
        changes: AtomicU64::new(0),
        counters: Counters {
            read_errors: AtomicU64::new(deleted),
            ..Counters::default()
        },
        options,
        _lock: lock,
    });
    if let Some(error) = failure {
        inner.degrade(WRITE_SUPERBLOCK, &error);
    }
    let writing = inner.clone();
    let writer = std::thread::Builder::new()
        .name("store-writer".into())
        .spawn(move || writer::run(writing))
        .map_err(tried("start the writer"))?;
    let store = DiskStore {
        inner,
        writer: Some(writer),
    };
    // Room for the first segment, and nothing that is too old.
    store.flush();
    Ok(store)
}

/// The superblock that is there, or a new one; and whether it was there. What nobody has the key of is
/// deleted.
fn find_superblock(
    options: &DiskOptions,
    source: &KeySource,
    key: &StoreKey,
    now: u64,
) -> Result<(Superblock, bool), OpenErrorKind> {
    let numbers = segment_numbers(&options.folder)?;
    match read_superblock(&options.folder)? {
        Some((superblock, _)) if superblock.ephemeral => {
            for number in numbers {
                std::fs::remove_file(segment_path(&options.folder, number))
                    .map_err(tried("delete a segment that nobody can read"))?;
            }
        }
        Some(_) if source.is_ephemeral() => return Err(OpenErrorKind::KeyMissing),
        Some((superblock, bytes)) if Superblock::is_of(&bytes, key) => {
            return Ok((superblock, true));
        }
        Some(_) => return Err(OpenErrorKind::WrongKey),
        None if !numbers.is_empty() => return Err(OpenErrorKind::Damaged),
        None => {}
    }
    let superblock = Superblock {
        id: random()?,
        created: now,
        segment_bytes: options.segment_bytes.clamp(MIN_SEGMENT, MAX_SEGMENT),
        next_segment: 1,
        ephemeral: source.is_ephemeral(),
    };
    Ok((superblock, false))
}

fn limits(options: &DiskOptions, superblock: &Superblock) -> Limits {
    let segment_bytes = options
        .segment_bytes
        .min(superblock.segment_bytes)
        .min(options.capacity_bytes / 16)
        .clamp(MIN_SEGMENT, MAX_SEGMENT);
    let most = (segment_bytes / 4) as usize;
    Limits {
        segment_bytes,
        chunk_bytes: options.chunk_bytes.clamp(MIN_CHUNK, most.max(MIN_CHUNK)),
        pending_bytes: options.pending_bytes.min(most),
    }
}

/// Takes the folder for this process, until the file is closed.
pub(super) fn lock_folder(folder: &Path) -> Result<File, OpenErrorKind> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(folder.join(LOCK))
        .map_err(tried("open the lock file"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenErrorKind::Locked),
        Err(TryLockError::Error(source)) => Err(tried("lock the folder")(source)),
    }
}

/// Numbers of the segments in the folder, in order.
pub(super) fn segment_numbers(folder: &Path) -> Result<Vec<u32>, OpenErrorKind> {
    let mut numbers = Vec::new();
    for entry in folder.read_dir().map_err(tried("list the folder"))? {
        let entry = entry.map_err(tried("list the folder"))?;
        let name = entry.file_name();
        numbers.extend(name.to_str().and_then(segment_number));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The superblock and its bytes; `None` if there is none.
pub(super) fn read_superblock(
    folder: &Path,
) -> Result<Option<(Superblock, Vec<u8>)>, OpenErrorKind> {
    let mut bytes = vec![0; SUPERBLOCK_SIZE];
    let file = match File::open(folder.join(SUPERBLOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(tried("open the superblock"))?,
    };
    let size = file.metadata().map_err(tried("read the superblock"))?.len();
    if size != SUPERBLOCK_SIZE as u64 {
        return Err(OpenErrorKind::Damaged);
    }
    file.read_exact_at(&mut bytes, 0)
        .map_err(tried("read the superblock"))?;
    match Superblock::read(&bytes) {
        Ok(superblock) => Ok(Some((superblock, bytes))),
        Err(BadSuperblock::Damaged) => Err(OpenErrorKind::Damaged),
        Err(BadSuperblock::Version(found)) => Err(OpenErrorKind::Version { found }),
    }
}

/// Replaces the superblock: after a crash there is the old one or the new one.
pub(super) fn write_superblock(
    folder: &Path,
    superblock: &Superblock,
    key: &StoreKey,
) -> io::Result<()> {
    let new = folder.join(NEW_SUPERBLOCK);
    let file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all_at(&superblock.write(key), 0)?;
    file.sync_all()?;
    // Journals keep the order: a segment that is made later is not there without the new name.
    std::fs::rename(&new, folder.join(SUPERBLOCK))
}

/// Whether a file could not be read for reasons that lie with this process or machine, and may be read
/// by the next.
fn is_passing(error: &io::Error) -> bool {
    let of_process = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::ACCESS,
        Errno::PERM,
    ];
    Errno::from_io_error(error).is_some_and(|errno| of_process.contains(&errno))
}

/// Reads all segments into the index. Returns them, the bytes that they take, and how many were deleted
/// that a disk failed to read or that are none of this store's.
fn load(
    options: &DiskOptions,
    key: &StoreKey,
    store: &[u8; 16],
    numbers: &[u32],
    index: &Index,
) -> Result<(Segments, u64, u64), OpenErrorKind> {
    let mut segments = Segments::default();
    let (mut settled, mut deleted) = (0, 0);
    let page = (crate::page::PAGE_SIZE + super::segment::RECORD_OVERHEAD) as u64;
    let mut room_made = false;
    for number in numbers {
        let path = segment_path(&options.folder, *number);
        let found = match read_segment(&path, *number, key, store) {
            Err(error) if is_passing(&error) => return Err(tried("read a segment")(error)),
            found => found,
        };
        deleted += u64::from(found.is_err());
        let found = found.ok().flatten();
        let Some(found) = found.filter(|found| found.sealed || cut(&path, found.size).is_ok())
        else {
            // A cut header, another store's, or nothing but a failing disk: no use can be made of it.
            remove_if_there(&path).map_err(tried("delete a damaged segment"))?;
            continue;
        };
        if !room_made {
            let bytes = numbers.len() as u64 * found.size;
            index.reserve((bytes.min(options.capacity_bytes) / page) as usize);
            room_made = true;
        }
        settled += found.size;
        let slot = segments.vacant();
        for (record, entry) in found.contents.entries.iter().enumerate() {
            let record = record as u16;
            // What was copied to a later segment is there.
            index.insert(&entry.id, Location { slot, record });
        }
        segments.insert(Arc::new(Segment::found(&options.folder, slot, found)));
    }
    Ok((segments, settled, deleted))
}

/// Cuts a torn end off, which takes space and tells nothing.
fn cut(path: &Path, size: u64) -> io::Result<()> {
    File::options().write(true).open(path)?.set_len(size)
}

/// Makes the folder one without a store.
pub(super) fn remove_superblock(folder: &Path) -> io::Result<()> {
    for name in [SUPERBLOCK, NEW_SUPERBLOCK] {
        remove_if_there(&folder.join(name))?;
    }
    Ok(())
}

/// Deletes a file. That there is none is no error.
pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
