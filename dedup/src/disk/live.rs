//! A segment in use: its file, where its records are, and what is not written yet.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::crypt::{SegmentCipher, TAG_SIZE};
use super::scan::{FoundSegment, read_chunks, read_sealed};
use super::segment::{
    CHUNK_HEAD_SIZE, CHUNK_OVERHEAD, ChunkAt, HEADER_SIZE, Header, MAX_RECORDS, RECORD_OVERHEAD,
    SEGMENT_OVERHEAD, TableEntry, table_size,
};
use crate::page::{DomainId, PAGE_SIZE, ShortId};

/// Read errors after which a segment is given up.
pub(super) const MAX_READ_ERRORS: u32 = 8;

/// Files of segments kept open: a few hundred, far below what a process may have by default.
pub(super) const MAX_OPEN_FILES: usize = 256;

/// Where a segment is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Records are appended.
    Open,
    /// Nothing is appended any more; not all of it is written.
    Closing,
    /// Written to the end.
    Sealed,
    /// Its writer died or could not go on: good up to its last whole chunk.
    Cut,
}

/// A record's length and how often it was used: `uses << 12 | length - 1`.
#[derive(Debug)]
struct Record(AtomicU16);

const LENGTH_BITS: u32 = 12;
/// Uses are counted up to here.
pub(super) const MAX_USES: u16 = 3;

impl Record {
    fn new(length: usize, uses: u16) -> Self {
        Self(AtomicU16::new((length - 1) as u16 | uses << LENGTH_BITS))
    }

    fn length(&self) -> usize {
        usize::from(self.0.load(Ordering::Relaxed) & (PAGE_SIZE - 1) as u16) + 1
    }

    fn uses(&self) -> u16 {
        self.0.load(Ordering::Relaxed) >> LENGTH_BITS
    }

    /// Sets the uses to what `change` makes of them; returns those before and after.
    fn update(&self, change: impl Fn(u16) -> u16) -> (u16, u16) {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let before = now >> LENGTH_BITS;
            let after = change(before);
            if after == before {
                return (before, before);
            }
            let next = now & (PAGE_SIZE - 1) as u16 | after << LENGTH_BITS;
            let swap =
                self.0
                    .compare_exchange_weak(now, next, Ordering::Relaxed, Ordering::Relaxed);
            match swap {
                Ok(_) => return (before, after),
                Err(other) => now = other,
            }
        }
    }
}

/// Contents of a chunk that is not written yet.
struct PendingChunk {
    first: u32,
    contents: Arc<Vec<u8>>,
    /// Nothing is added any more.
    complete: bool,
}

struct Body {
    phase: Phase,
    records: Vec<Record>,
    /// Chunks that are written.
    chunks: Vec<ChunkAt>,
    /// Records that are written.
    written: u32,
    pending: VecDeque<PendingChunk>,
    /// Ids of all records, until the segment is sealed or cut.
    ids: Vec<ShortId>,
    /// End of what is written.
    end: u64,
    /// Size of the file if it were sealed with what it holds now.
    planned: u64,
}

/// A segment in use.
pub(super) struct Segment {
    pub(super) number: u32,
    /// Its place in memory; given to another one when this one is gone.
    pub(super) slot: u32,
    pub(super) domain: DomainId,
    header: [u8; HEADER_SIZE],
    cipher: SegmentCipher,
    path: PathBuf,
    file: Mutex<Option<Arc<File>>>,
    body: RwLock<Body>,
    /// Holds what has proved to be of use, see `evict.rs`.
    protected: AtomicBool,
    /// Records with uses.
    used: AtomicU32,
    /// Seconds since 1970.
    last_used: AtomicU64,
    /// The last use that the time of the file tells.
    noted_use: AtomicU64,
    read_errors: AtomicU32,
}

/// How an append went.
pub(super) enum Appended {
    /// The number of the record; whether the chunk is full and should be written.
    At { record: u16, chunk_full: bool },
    /// There is no room.
    Full,
}

/// What a look for a record found.
pub(super) enum Found {
    /// It was still in memory and has been copied; its length.
    Copied(usize),
    /// Where its sealed bytes are and the length of its contents.
    InFile(u64, usize),
    /// There is no such record.
    Nothing,
}

/// A complete chunk to be written.
pub(super) struct Ready {
    pub(super) first: u32,
    pub(super) entries: Vec<TableEntry>,
    pub(super) contents: Arc<Vec<u8>>,
    /// Where it goes.
    pub(super) offset: u64,
}

/// Path of the file of segment `number`.
pub(super) fn segment_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("segment-{number:08x}"))
}

/// The number in the name of a segment's file.
pub(super) fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("segment-")?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    (format!("{number:08x}") == digits).then_some(number)
}

impl Segment {
    /// A segment that is to be filled. Its file is made with its first chunk.
    pub(super) fn new(
        folder: &Path,
        slot: u32,
        header: &Header,
        sealed_header: ([u8; HEADER_SIZE], SegmentCipher),
    ) -> Self {
        let body = Body {
            phase: Phase::Open,
            records: Vec::new(),
            chunks: Vec::new(),
            written: 0,
            pending: VecDeque::new(),
            ids: Vec::new(),
            end: HEADER_SIZE as u64,
            planned: SEGMENT_OVERHEAD as u64,
        };
        let segment = Self::with_body(folder, slot, header, sealed_header, body, header.created);
        // The file's time is what the system's clock says, until the first use is noted.
        segment.noted_use.store(0, Ordering::Relaxed);
        segment
    }

    fn with_body(
        folder: &Path,
        slot: u32,
        header: &Header,
        (sealed_header, cipher): ([u8; HEADER_SIZE], SegmentCipher),
        body: Body,
        last_used: u64,
    ) -> Self {
        Self {
            number: header.number,
            slot,
            domain: header.domain,
            header: sealed_header,
            cipher,
            path: segment_path(folder, header.number),
            file: Mutex::new(None),
            body: RwLock::new(body),
            protected: AtomicBool::new(header.protected),
            used: AtomicU32::new(0),
            last_used: AtomicU64::new(last_used),
            noted_use: AtomicU64::new(last_used),
            read_errors: AtomicU32::new(0),
        }
    }

    /// A segment that was found on disk.
    pub(super) fn found(folder: &Path, slot: u32, found: FoundSegment) -> Self {
        let entries = &found.contents.entries;
        let body = Body {
            phase: if found.sealed {
                Phase::Sealed
            } else {
                Phase::Cut
            },
            records: entries
                .iter()
                .map(|entry| Record::new(usize::from(entry.length), 0))
                .collect(),
            written: entries.len() as u32,
            chunks: found.contents.chunks,
            pending: VecDeque::new(),
            ids: Vec::new(),
            end: found.size,
            planned: found.size,
        };
        let sealed_header = (found.sealed_header, found.cipher);
        Self::with_body(
            folder,
            slot,
            &found.header,
            sealed_header,
            body,
            found.last_used,
        )
    }

    fn body(&self) -> RwLockReadGuard<'_, Body> {
        self.body.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn body_mut(&self) -> RwLockWriteGuard<'_, Body> {
        self.body.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn file_slot(&self) -> MutexGuard<'_, Option<Arc<File>>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn cipher(&self) -> &SegmentCipher {
        &self.cipher
    }

    pub(super) fn phase(&self) -> Phase {
        self.body().phase
    }

    /// Number of records, written or not.
    pub(super) fn records(&self) -> u32 {
        self.body().records.len() as u32
    }

    /// Bytes of the file when it is sealed or cut; what it would be now before.
    pub(super) fn size(&self) -> u64 {
        let body = self.body();
        match body.phase {
            Phase::Open | Phase::Closing => body.planned,
            Phase::Sealed | Phase::Cut => body.end,
        }
    }

    /// Bytes of memory that the segment takes.
    pub(super) fn memory_bytes(&self) -> usize {
        let body = self.body();
        size_of::<Self>()
            + body.records.capacity() * size_of::<Record>()
            + body.chunks.capacity() * size_of::<ChunkAt>()
            + body.ids.capacity() * ShortId::SIZE
    }

    /// Adds a record to the last chunk.
    pub(super) fn append(
        &self,
        id: &ShortId,
        contents: &[u8],
        uses: u16,
        limits: &Limits,
        spare: &mut Vec<Vec<u8>>,
    ) -> Appended {
        let mut body = self.body_mut();
        let body = &mut *body;
        let filling = body.pending.back().is_some_and(|chunk| !chunk.complete);
        let mut planned = body.planned + (contents.len() + RECORD_OVERHEAD) as u64;
        if !filling {
            planned += CHUNK_OVERHEAD as u64;
        }
        if planned > limits.segment_bytes
            || body.records.len() == MAX_RECORDS
            || body.phase != Phase::Open
        {
            return Appended::Full;
        }
        let record = body.records.len();
        if !filling {
            let room = spare
                .pop()
                .unwrap_or_else(|| Vec::with_capacity(limits.chunk_bytes));
            body.pending.push_back(PendingChunk {
                first: record as u32,
                contents: Arc::new(room),
                complete: false,
            });
        }
        let Some(chunk) = body.pending.back_mut() else {
            return Appended::Full;
        };
        // Only complete chunks are shared with the writer.
        let Some(room) = Arc::get_mut(&mut chunk.contents) else {
            return Appended::Full;
        };
        room.extend_from_slice(contents);
        chunk.complete = room.len() + PAGE_SIZE > limits.chunk_bytes;
        let chunk_full = chunk.complete;
        body.planned = planned;
        grow_gently(&mut body.records);
        grow_gently(&mut body.ids);
        body.records.push(Record::new(contents.len(), uses));
        body.ids.push(*id);
        if uses > 0 {
            self.used.fetch_add(1, Ordering::Relaxed);
        }
        Appended::At {
            record: record as u16,
            chunk_full,
        }
    }

    /// Completes the chunk being filled, if there is one; returns whether there was.
    pub(super) fn complete_chunk(&self) -> bool {
        match self.body_mut().pending.back_mut() {
            Some(chunk) if !chunk.complete => {
                chunk.complete = true;
                true
            }
            _ => false,
        }
    }

    /// Takes no more records.
    pub(super) fn close(&self) {
        let mut body = self.body_mut();
        if body.phase == Phase::Open {
            body.phase = Phase::Closing;
        }
    }

    /// The oldest complete chunk that is not written.
    pub(super) fn ready_chunk(&self) -> Option<Ready> {
        let body = self.body();
        let chunk = body.pending.front().filter(|chunk| chunk.complete)?;
        let first = chunk.first as usize;
        let until = body.pending.get(1);
        let until = until.map_or(body.records.len(), |next| next.first as usize);
        let records = body.ids[first..until]
            .iter()
            .zip(&body.records[first..until]);
        Some(Ready {
            first: chunk.first,
            entries: records
                .map(|(id, record)| TableEntry {
                    id: *id,
                    length: record.length() as u16,
                })
                .collect(),
            contents: chunk.contents.clone(),
            offset: body.end,
        })
    }

    /// The oldest chunk is in the file now, which ends at `end`.
    pub(super) fn chunk_written(&self, ready: &Ready, end: u64) {
        let mut body = self.body_mut();
        body.pending.pop_front();
        let head = CHUNK_HEAD_SIZE + table_size(ready.entries.len());
        let chunk = ChunkAt::new(ready.first, ready.offset + head as u64, &ready.entries);
        // Segments end far below 4 GiB.
        body.chunks.extend(chunk);
        body.written = ready.first + ready.entries.len() as u32;
        body.end = end;
    }

    /// What the footer has to tell: records per chunk and all entries. `None` while chunks wait.
    pub(super) fn table(&self) -> Option<(Vec<u32>, Vec<TableEntry>)> {
        let body = self.body();
        if !body.pending.is_empty() {
            return None;
        }
        let begins = body.chunks.iter().map(|chunk| chunk.first);
        let ends = begins.clone().skip(1).chain([body.written]);
        let counts = begins.zip(ends).map(|(begin, end)| end - begin).collect();
        let entries = body.ids.iter().zip(&body.records);
        let entries = entries.map(|(id, record)| TableEntry {
            id: *id,
            length: record.length() as u16,
        });
        Some((counts, entries.collect()))
    }

    /// Where the next write goes.
    pub(super) fn end(&self) -> u64 {
        self.body().end
    }

    /// The footer is written; the file ends at `end`.
    pub(super) fn sealed(&self, end: u64) {
        let mut body = self.body_mut();
        body.phase = Phase::Sealed;
        body.end = end;
        body.ids = Vec::new();
        body.records.shrink_to_fit();
        body.chunks.shrink_to_fit();
    }

    /// Nothing more can be written: what waits is lost. Returns the lost ids with their numbers and the
    /// bytes that they took.
    pub(super) fn cut(&self) -> (Vec<(u32, ShortId)>, usize) {
        let mut body = self.body_mut();
        body.phase = Phase::Cut;
        let written = body.written;
        let lost = body.ids.split_off(written as usize);
        let bytes = body.pending.iter().map(|chunk| chunk.contents.len()).sum();
        let used = body.records.drain(written as usize..);
        let used = used.filter(|record| record.uses() > 0).count();
        self.used.fetch_sub(used as u32, Ordering::Relaxed);
        body.pending.clear();
        body.ids = Vec::new();
        ((written..).zip(lost).collect(), bytes)
    }

    /// Looks for `record`; one that is still in memory is copied to `out`. With a time it counts as a
    /// use.
    pub(super) fn find(
        &self,
        record: u16,
        used_at: Option<u64>,
        out: &mut [u8; PAGE_SIZE],
    ) -> Found {
        let body = self.body();
        let number = u32::from(record);
        let Some(found) = body.records.get(usize::from(record)) else {
            return Found::Nothing;
        };
        let length = found.length();
        if let Some(now) = used_at {
            self.count_use(found, now);
        }
        if number < body.written {
            return body
                .offset(number)
                .map_or(Found::Nothing, |offset| Found::InFile(offset, length));
        }
        let chunk = body
            .pending
            .iter()
            .rev()
            .find(|chunk| chunk.first <= number);
        let Some(chunk) = chunk else {
            return Found::Nothing;
        };
        let before = &body.records[chunk.first as usize..usize::from(record)];
        let at = before.iter().map(Record::length).sum::<usize>();
        match chunk.contents.get(at..at + length) {
            Some(contents) => {
                out[..length].copy_from_slice(contents);
                Found::Copied(length)
            }
            None => Found::Nothing,
        }
    }

    /// Where the sealed bytes of a written record are: offset and length.
    pub(super) fn extent(&self, record: u16) -> Option<(u64, usize)> {
        let body = self.body();
        let number = u32::from(record);
        let length = body.records.get(usize::from(record))?.length() + TAG_SIZE;
        let written = number < body.written;
        written
            .then(|| body.offset(number))?
            .map(|offset| (offset, length))
    }

    /// Counts a use of `record` at `now`.
    pub(super) fn touch(&self, record: u16, now: u64) {
        if let Some(record) = self.body().records.get(usize::from(record)) {
            self.count_use(record, now);
        }
    }

    fn count_use(&self, record: &Record, now: u64) {
        self.count_used(record.update(|uses| (uses + 1).min(MAX_USES)));
        if self.last_used.load(Ordering::Relaxed) < now {
            self.last_used.store(now, Ordering::Relaxed);
        }
    }

    /// Forgets how often `record` was used.
    pub(super) fn clear_uses(&self, record: u16) {
        if let Some(record) = self.body().records.get(usize::from(record)) {
            self.count_used(record.update(|_| 0));
        }
    }

    fn count_used(&self, (before, after): (u16, u16)) {
        if before == 0 && after > 0 {
            self.used.fetch_add(1, Ordering::Relaxed);
        } else if before > 0 && after == 0 {
            self.used.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes one use from every record.
    pub(super) fn age(&self) {
        for record in &self.body().records {
            self.count_used(record.update(|uses| uses.saturating_sub(1)));
        }
    }

    /// How often each record was used.
    pub(super) fn all_uses(&self) -> Vec<u8> {
        let body = self.body();
        body.records
            .iter()
            .map(|record| record.uses() as u8)
            .collect()
    }

    /// Sets how often records were used, from the first on; what is told of more than there are is lost.
    pub(super) fn restore_uses(&self, uses: &[u8]) {
        for (record, uses) in self.body().records.iter().zip(uses) {
            self.count_used(record.update(|_| u16::from(*uses).min(MAX_USES)));
        }
    }

    pub(super) fn uses(&self, record: u16) -> u16 {
        let body = self.body();
        body.records
            .get(usize::from(record))
            .map_or(0, Record::uses)
    }

    /// Number of records that have been used lately.
    pub(super) fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn is_protected(&self) -> bool {
        self.protected.load(Ordering::Relaxed)
    }

    /// What it holds has proved to be of use.
    pub(super) fn protect(&self) {
        self.protected.store(true, Ordering::Relaxed);
    }

    pub(super) fn last_used(&self) -> u64 {
        self.last_used.load(Ordering::Relaxed)
    }

    /// Writes the last use to the file's time, if it is more than `step` seconds later than noted.
    pub(super) fn note_use(&self, step: u64) -> io::Result<()> {
        let (used, noted) = (self.last_used(), self.noted_use.load(Ordering::Relaxed));
        if used <= noted.saturating_add(step)
            || matches!(self.phase(), Phase::Open | Phase::Closing)
        {
            return Ok(());
        }
        self.noted_use.store(used, Ordering::Relaxed);
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(used);
        File::options()
            .write(true)
            .open(&self.path)?
            .set_modified(time)
    }

    /// Counts a read error; returns whether the segment should be given up.
    pub(super) fn read_failed(&self) -> bool {
        self.read_errors.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_READ_ERRORS
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.read_errors.load(Ordering::Relaxed) >= MAX_READ_ERRORS
    }

    /// The file, opened if need be.
    pub(super) fn file(self: &Arc<Self>, files: &OpenFiles) -> io::Result<Arc<File>> {
        let mut slot = self.file_slot();
        if let Some(file) = &*slot {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(&self.path)?);
        *slot = Some(file.clone());
        drop(slot);
        files.opened(self);
        Ok(file)
    }

    /// Makes the file, with its header.
    pub(super) fn create_file(self: &Arc<Self>, files: &OpenFiles) -> io::Result<Arc<File>> {
        let mut slot = self.file_slot();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)?;
        file.write_all_at(&self.header, 0)?;
        let file = Arc::new(file);
        *slot = Some(file.clone());
        drop(slot);
        files.opened(self);
        Ok(file)
    }

    /// Appends the ids of at most `most` records from record `from` on, if they are still in memory;
    /// returns whether they are.
    pub(super) fn open_ids(&self, from: usize, most: usize, out: &mut Vec<ShortId>) -> bool {
        let body = self.body();
        let open = matches!(body.phase, Phase::Open | Phase::Closing);
        if open {
            out.extend(body.ids.iter().skip(from).take(most));
        }
        open
    }

    /// The ids of all records in order, read from the file if they are not in memory.
    pub(super) fn ids(self: &Arc<Self>, files: &OpenFiles) -> io::Result<Vec<ShortId>> {
        let body = self.body();
        if matches!(body.phase, Phase::Open | Phase::Closing) {
            return Ok(body.ids.clone());
        }
        let (phase, end) = (body.phase, body.end);
        drop(body);
        let file = self.file(files)?;
        let contents = match phase {
            Phase::Sealed => read_sealed(&*file, &self.cipher, end)?,
            _ => Some(read_chunks(&*file, &self.cipher, end)?.0),
        };
        let contents = contents.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(contents.entries.iter().map(|entry| entry.id).collect())
    }
}

/// Makes room for one more. Doubling would leave up to half of it unused, in each open segment.
fn grow_gently<T>(list: &mut Vec<T>) {
    const LEAST: usize = 256;
    if list.len() == list.capacity() {
        list.reserve_exact((list.len() / 8).max(LEAST));
    }
}

impl Body {
    /// Where the sealed bytes of a written record begin.
    fn offset(&self, number: u32) -> Option<u64> {
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= number);
        let chunk = self.chunks.get(chunk.checked_sub(1)?)?;
        if chunk.whole_pages {
            let before = u64::from(number - chunk.first) * (PAGE_SIZE + TAG_SIZE) as u64;
            return Some(u64::from(chunk.offset) + before);
        }
        let before = &self.records[chunk.first as usize..number as usize];
        let sealed = before
            .iter()
            .map(|record| (record.length() + TAG_SIZE) as u64);
        Some(u64::from(chunk.offset) + sealed.sum::<u64>())
    }
}

/// Sizes that segments are filled to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Largest file.
    pub(super) segment_bytes: u64,
    /// Contents that are sealed and written at a time.
    pub(super) chunk_bytes: usize,
    /// Contents that may wait to be written: so few that the next segment does not fill before room is
    /// made for the one after it.
    pub(super) pending_bytes: usize,
}

/// Which segments have their files open; the one opened first is closed first.
#[derive(Default)]
pub(super) struct OpenFiles(Mutex<VecDeque<std::sync::Weak<Segment>>>);

impl OpenFiles {
    fn opened(&self, segment: &Arc<Segment>) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.push_back(Arc::downgrade(segment));
        // Files that are still written to stay open: they are few, and get another turn.
        for _ in 0..open.len().saturating_sub(MAX_OPEN_FILES) {
            let Some(oldest) = open.pop_front() else {
                return;
            };
            let Some(segment) = oldest.upgrade() else {
                continue;
            };
            if matches!(segment.phase(), Phase::Open | Phase::Closing) {
                open.push_back(oldest);
            } else {
                *segment.file_slot() = None;
            }
        }
    }
}
