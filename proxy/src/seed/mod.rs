//! Filling a store from disk images, kernels and folders, so that the pages of guests booted from them are
//! known at a site before any guest has come.
//!
//! ```text
//! source (plain | image by qemu-nbd | folder) → pages, without those of zeroes → sink → store
//!                                                 (gateway by its socket | the store itself)
//! ```
//!
//! Guests keep files in their page cache in pages of 4 KiB, and file systems keep them in blocks of that
//! size, aligned to the disk's start: so the pages of an image are the pages of the page cache. Pages go
//! to the store in the order in which they lie in the source; peers hear of them in that order, and name
//! them by the run.
//!
//! The store has what it got; how far sources were read is noted every few seconds, behind what is
//! written. So nothing is lost by whatever end but the time to read those seconds again.

mod contents;
mod nbd;
mod pace;
mod qemu;
mod sink;
pub mod socket;
mod source;
mod state;
mod walk;
pub mod wire;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use skyferry_dedup::{DomainKey, PAGE_SIZE, SeedCounts};

pub use qemu::Format;
pub use sink::SinkError;
pub use state::remove as forget_progress;

use contents::{Contents, Next, Plain};
use pace::Pace;
use sink::{Address, Sink};
use source::{Kind, Source};
use state::{Position, State};
use walk::{Entry, Trouble, shown};
use wire::MAX_PAGES_BYTES;

use crate::config::DiskConfig;

/// How often it is noted how far sources have been read.
const SAVE_INTERVAL: Duration = Duration::from_secs(3);
/// Longest sleep before the wish to stop is looked at.
const NAP: Duration = Duration::from_millis(50);

static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// What is to be read, and for whom.
#[derive(Debug)]
pub struct Order<'a> {
    /// The store.
    pub store: &'a DiskConfig,
    /// Whose pages they are.
    pub tenant: &'a str,
    /// The key of that tenant's pages.
    pub key: &'a DomainKey,
    /// Disks, images, files and folders.
    pub paths: &'a [PathBuf],
    /// How files among them are to be read; `None`: as they look, see [`Format`].
    pub format: Option<Format>,
    /// Most bytes to read a second.
    pub bytes_per_sec: Option<u64>,
    /// Whether to begin anew where an earlier run was interrupted.
    pub restart: bool,
}

/// What happens on the way.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something that the operator should know and that is no failure.
    Warning(String),
    /// Something could not be read; the rest is.
    Trouble(String),
    /// An interrupted run goes on: at this share of all that there is.
    Resumed {
        /// From 0 to 1.
        share: f64,
    },
    /// Comes often.
    Progress(&'a Progress),
}

/// How far it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Share of all that there is, from 0 to 1.
    pub share: f64,
    /// Bytes read by this run.
    pub read_bytes: u64,
    /// What became of pages: their counts lag behind what was read by a few MiB.
    pub counts: SeedCounts,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// How far it came, and what became of the pages.
    pub progress: Progress,
    /// Things that could not be read.
    pub troubles: u64,
    /// Whether it was stopped before the end.
    pub interrupted: bool,
    /// Whether a gateway took the pages.
    pub by_gateway: bool,
    /// Bytes that the files of the store take.
    pub used_bytes: u64,
    /// Bytes that they may take.
    pub capacity_bytes: u64,
}

/// Why it ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeedFailure {
    /// Paths that cannot be read at all: nothing was done.
    #[error("{}", .0.join("\n"))]
    Paths(Vec<String>),
    /// The store takes no pages (any more).
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// It cannot be noted how far sources were read.
    #[error("cannot note in the store's folder how far this is: {0}")]
    State(#[source] io::Error),
}

/// Reads everything, until it is done or `stop` is set.
///
/// # Errors
/// When a path cannot be read from the start, or the store takes nothing. What was put stays, and the next
/// run goes on where this one was.
pub fn run(
    order: &Order<'_>,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Report, SeedFailure> {
    let domain = order.key.id();
    let mut sources = Vec::new();
    let mut unreadable = Vec::new();
    for path in order.paths {
        let opened = Source::open(path, order.format, &domain).and_then(|mut source| {
            source.measure(stop)?;
            Ok(source)
        });
        match opened {
            Ok(source) => sources.push(source),
            Err(error) => unreadable.push(format!("{}: {error}", path.display())),
        }
    }
    if !unreadable.is_empty() {
        return Err(SeedFailure::Paths(unreadable));
    }
    let sink = Sink::open(Address {
        store: order.store,
        tenant: order.tenant,
        key: order.key,
    })?;
    let mut state = State::load(&order.store.path, sink.store);
    if order.restart {
        sources.iter().for_each(|source| state.forget(&source.id));
    }
    let total: u64 = sources.iter().map(|source| source.allocated).sum();
    if total > sink.capacity_bytes {
        watch(Event::Warning(format!(
            "there are {} MiB to read and the store holds {} MiB: what is read last throws out what was \
             read first",
            total >> 20,
            sink.capacity_bytes >> 20
        )));
    }
    let mut seeding = Seeding {
        sink,
        state,
        stop,
        watch,
        pace: Pace::new(order.bytes_per_sec),
        batch: Vec::with_capacity(MAX_PAGES_BYTES),
        zero_pages: 0,
        progress: Progress::default(),
        troubles: 0,
        used_bytes: 0,
        saved: Instant::now(),
        total,
        before: 0,
        resumed: false,
    };
    seeding.all(&sources)?;
    Ok(seeding.report())
}

/// Why a piece could not be passed on: the two are treated differently.
enum StepError {
    /// The source cannot be read here.
    Unreadable(io::Error),
    /// The store takes no more.
    Failed(SinkError),
}

/// A run.
struct Seeding<'a> {
    sink: Sink,
    state: State,
    stop: &'a AtomicBool,
    watch: &'a mut dyn FnMut(Event<'_>),
    pace: Pace,
    /// Whole pages that were not handed over yet.
    batch: Vec<u8>,
    /// Pages of zeroes that nobody was asked about, holes included.
    zero_pages: u64,
    progress: Progress,
    troubles: u64,
    used_bytes: u64,
    saved: Instant,
    /// Allocated bytes of all sources, and of those before the one being read.
    total: u64,
    before: u64,
    /// Whether an earlier run is continued.
    resumed: bool,
}

impl Seeding<'_> {
    fn all(&mut self, sources: &[Source]) -> Result<(), SeedFailure> {
        for source in sources {
            let from = self.state.position(&source.id).cloned();
            if from != Some(Position::Done) {
                let read = match source.kind {
                    Kind::Folder => self.folder(source, from)?,
                    _ => self.disk(source, from)?,
                };
                match read {
                    Some(position) => self.save(source, position)?,
                    None => {
                        // Could not be read at all; that is said, and the next run tries again.
                        self.state.forget(&source.id);
                    }
                }
                if self.stopped() {
                    return Ok(());
                }
                if source.has_changed() {
                    let path = source.path.display();
                    let warning = format!("{path} was written to while it was read");
                    (self.watch)(Event::Warning(warning));
                }
            } else {
                self.resumed = true;
            }
            self.before += source.allocated;
            self.tell(0.0, 0);
        }
        self.used_bytes = self.settle()?;
        // The next run reads everything again: the store may have forgotten some.
        sources.iter().for_each(|s| self.state.forget(&s.id));
        self.state.save().map_err(SeedFailure::State)
    }

    fn report(mut self) -> Report {
        let interrupted = self.stopped();
        if !interrupted {
            self.progress.share = 1.0;
        }
        Report {
            progress: self.progress,
            troubles: self.troubles,
            interrupted,
            by_gateway: self.sink.is_gateway(),
            used_bytes: self.used_bytes,
            capacity_bytes: self.sink.capacity_bytes,
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Reads a disk or file; returns how far, or `None` if it cannot be read.
    fn disk(
        &mut self,
        source: &Source,
        from: Option<Position>,
    ) -> Result<Option<Position>, SeedFailure> {
        let mut contents = match source.contents() {
            Ok(contents) => contents,
            Err(error) => {
                self.trouble(source.path.display().to_string(), &error);
                return Ok(None);
            }
        };
        let size = contents.size();
        let mut at = match from {
            Some(Position::Byte(at)) if at <= size && at.is_multiple_of(PAGE_SIZE as u64) => at,
            _ => 0,
        };
        let share = |at: u64| at as f64 / size.max(1) as f64;
        if at > 0 {
            self.go_on(share(at), source.allocated);
        }
        let mut buffer = Vec::new();
        loop {
            if self.stopped() {
                return Ok(Some(Position::Byte(at)));
            }
            match self.step(&mut *contents, at, &mut buffer) {
                Ok(Some(next)) => at = next,
                Ok(None) => return Ok(Some(Position::Done)),
                Err(StepError::Failed(error)) => return Err(error.into()),
                Err(StepError::Unreadable(error)) => {
                    let place = format!("{} at byte {at}", source.path.display());
                    self.trouble(place, &error);
                    return Ok(None);
                }
            }
            self.tell(share(at), source.allocated);
            if self.saved.elapsed() >= SAVE_INTERVAL {
                self.save(source, Position::Byte(at))?;
            }
        }
    }

    /// Reads a folder's files; returns how far, or `None` if it cannot be read.
    fn folder(
        &mut self,
        source: &Source,
        from: Option<Position>,
    ) -> Result<Option<Position>, SeedFailure> {
        let skipped = match from {
            Some(Position::Files { count, last }) => self.skip(source, count, &last),
            _ => None,
        };
        let opened = match skipped {
            Some(there) => Ok(there),
            None => source.walk().map(|walk| (walk, 0, 0)),
        };
        let (mut walk, mut count, mut passed) = match opened {
            Ok(there) => there,
            Err(error) => {
                self.trouble(source.path.display().to_string(), &error);
                return Ok(None);
            }
        };
        let share = |passed: u64| passed as f64 / source.allocated.max(1) as f64;
        if count > 0 {
            self.go_on(share(passed), source.allocated);
        }
        let mut buffer = Vec::new();
        let mut last = String::new();
        let place = |count: u64, last: &str| match count {
            0 => Position::Byte(0),
            _ => Position::Files {
                count,
                last: last.into(),
            },
        };
        while let Some(found) = walk.next() {
            let entry = match found {
                Ok(entry) => entry,
                Err(Trouble { path, error }) => {
                    self.trouble(shown(&source.path, &path), &error);
                    continue;
                }
            };
            let opened = walk.open(&entry).map(|file| Plain::new(file, entry.size));
            let mut contents = opened.map_err(|error| self.unreadable(source, &entry, &error));
            let mut at = 0;
            while let Ok(contents) = &mut contents {
                if self.stopped() {
                    return Ok(Some(place(count, &last)));
                }
                match self.step(contents, at, &mut buffer) {
                    Ok(Some(next)) => at = next,
                    Ok(None) => break,
                    Err(StepError::Failed(error)) => return Err(error.into()),
                    Err(StepError::Unreadable(error)) => {
                        self.unreadable(source, &entry, &error);
                        break;
                    }
                }
                self.tell(share(passed + at.min(entry.allocated)), source.allocated);
                if self.saved.elapsed() >= SAVE_INTERVAL {
                    self.save(source, place(count, &last))?;
                }
            }
            passed += entry.allocated;
            count += 1;
            last = entry.path.to_string_lossy().into_owned();
        }
        Ok(Some(Position::Done))
    }

    fn unreadable(&mut self, source: &Source, entry: &Entry, error: &io::Error) {
        self.trouble(shown(&source.path, &entry.path), error);
    }

    /// Passes over `count` files of which `last` must be the last one: otherwise the folder is not what it
    /// was. Returns the walk, the count and the bytes passed over.
    fn skip(&self, source: &Source, count: u64, last: &str) -> Option<(walk::Walk, u64, u64)> {
        let mut walk = source.walk().ok()?;
        let (mut skipped, mut passed) = (0, 0);
        while let Some(found) = walk.next() {
            if self.stopped() {
                return None;
            }
            let Ok(entry) = found else { continue };
            skipped += 1;
            passed += entry.allocated;
            if skipped == count {
                return (entry.path.to_string_lossy() == last).then_some((walk, count, passed));
            }
        }
        None
    }

    /// Reads a piece from `at` on and hands its pages over; returns where the next one begins, or `None` at
    /// the end.
    fn step(
        &mut self,
        contents: &mut dyn Contents,
        at: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<u64>, StepError> {
        Ok(
            match contents.next(at, buffer).map_err(StepError::Unreadable)? {
                Next::End => None,
                Next::Hole(until) => {
                    self.zero_pages += (until - at).div_ceil(PAGE_SIZE as u64);
                    Some(until)
                }
                Next::Data(start) => {
                    self.take(buffer).map_err(StepError::Failed)?;
                    Some(start + buffer.len() as u64)
                }
            },
        )
    }

    /// Takes what was read: the last page is filled up with zeroes.
    fn take(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.progress.read_bytes += bytes.len() as u64;
        for page in bytes.chunks(PAGE_SIZE) {
            if page == &ZEROES[..page.len()] {
                self.zero_pages += 1;
                continue;
            }
            self.batch.extend_from_slice(page);
            self.batch
                .resize(self.batch.len().next_multiple_of(PAGE_SIZE), 0);
            if self.batch.len() == MAX_PAGES_BYTES {
                self.hand_over()?;
            }
        }
        let mut pause = self.pace.pause(bytes.len(), Instant::now());
        while !pause.is_zero() && !self.stopped() {
            let nap = pause.min(NAP);
            std::thread::sleep(nap);
            pause -= nap;
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<(), SinkError> {
        if !self.batch.is_empty() {
            self.sink.put(&self.batch)?;
            self.batch.clear();
        }
        Ok(())
    }

    /// Waits until the store has written all that was read.
    fn settle(&mut self) -> Result<u64, SinkError> {
        self.hand_over()?;
        let used = self.sink.settle()?;
        self.count();
        Ok(used)
    }

    /// Notes that the store has all of `source` up to `position`.
    fn save(&mut self, source: &Source, position: Position) -> Result<(), SeedFailure> {
        self.used_bytes = self.settle()?;
        self.state.set(&source.id, position);
        self.state.save().map_err(SeedFailure::State)?;
        self.saved = Instant::now();
        Ok(())
    }

    fn count(&mut self) {
        self.progress.counts = self.sink.counts;
        self.progress.counts.zero += self.zero_pages;
    }

    /// Tells how far it is, in a source of `allocated` bytes of which `share` has been read.
    fn tell(&mut self, share: f64, allocated: u64) {
        self.count();
        let done = self.before as f64 + share.min(1.0) * allocated as f64;
        self.progress.share = (done / self.total.max(1) as f64).min(1.0);
        (self.watch)(Event::Progress(&self.progress));
    }

    /// An earlier run is continued at `share` of a source.
    fn go_on(&mut self, share: f64, allocated: u64) {
        self.tell(share, allocated);
        let share = self.progress.share;
        (self.watch)(Event::Resumed { share });
    }

    fn trouble(&mut self, what: String, error: &io::Error) {
        self.troubles += 1;
        (self.watch)(Event::Trouble(format!("{what}: {error}")));
    }
}
