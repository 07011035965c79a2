//! The thread that writes: it alone touches files that grow.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use super::append::NUMBERS_AT_ONCE;
use super::index::Location;
use super::live::{Phase, Segment};
use super::open::{WRITE_SUPERBLOCK, write_superblock};
use super::segment::{write_chunk, write_footer};
use super::superblock::Superblock;
use super::{Inner, count, lock};

/// What was put waits no longer than this before it is written, and maintenance is done so often.
const TICK: Duration = Duration::from_secs(1);

/// Sealed files that may wait to be synced; beyond, the kernel writes them back in its own time.
const MAX_UNSYNCED: usize = 8;

/// The last use of a segment is noted in its file when it is so many seconds later than noted.
const NOTE_STEP: u64 = 600;

/// Work for the writer.
pub(super) enum Job {
    /// A chunk of the segment is complete.
    Write(Arc<Segment>),
    /// The segment takes no more.
    Seal(Arc<Segment>),
}

/// What the writer waits for.
#[derive(Default)]
pub(super) struct Queue {
    jobs: VecDeque<Job>,
    /// Flushes asked for and done.
    asked: u64,
    done: u64,
    pub(super) room_wanted: bool,
    /// Chunks that are being filled are to be written, too: they take the memory that others wait for.
    hurry: bool,
    stop: bool,
}

enum Work {
    Job(Job),
    Room,
    Hurry,
    Flush(u64),
    Stop,
    Nothing,
}

impl Inner {
    pub(super) fn enqueue(&self, job: Job) {
        lock(&self.queue).jobs.push_back(job);
        self.wake.notify_one();
    }

    pub(super) fn flush(&self) {
        let mut queue = lock(&self.queue);
        queue.asked += 1;
        let mine = queue.asked;
        self.wake.notify_one();
        while queue.done < mine && !queue.stop {
            queue = self
                .done
                .wait(queue)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    pub(super) fn wait_for_room(&self, limit: Duration) -> bool {
        let half = self.limits.pending_bytes / 2;
        let end = Instant::now() + limit;
        loop {
            // A disk that refuses to be written to makes no room, and takes nothing anyway.
            let in_files = self.degraded.load(Ordering::Relaxed)
                || lock(&self.appender).has_room_for(self.limits.pending_bytes);
            let mut queue = lock(&self.queue);
            if in_files && self.pending_bytes() <= half {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue.room_wanted |= !in_files;
            queue.hurry |= queue.jobs.is_empty();
            self.wake.notify_one();
            // The writer tells of what it has done since we looked: it has been asked just now.
            let woken = self.done.wait_timeout(queue, left);
            drop(woken.unwrap_or_else(std::sync::PoisonError::into_inner));
        }
    }

    /// Has chunks written that are not full.
    pub(super) fn hurry(&self) {
        lock(&self.queue).hurry = true;
        self.wake.notify_one();
    }

    /// Tells those who wait that something is done.
    fn tell(&self) {
        // The lock: who has just looked is waiting by now.
        drop(lock(&self.queue));
        self.done.notify_all();
    }

    pub(super) fn stop(&self) {
        lock(&self.queue).stop = true;
        self.wake.notify_one();
    }

    fn next_work(&self, tick_at: Instant) -> Work {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Work::Job(job);
            }
            if std::mem::take(&mut queue.room_wanted) {
                return Work::Room;
            }
            if std::mem::take(&mut queue.hurry) {
                return Work::Hurry;
            }
            if queue.asked > queue.done {
                return Work::Flush(queue.asked);
            }
            if queue.stop {
                return Work::Stop;
            }
            let left = tick_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Work::Nothing;
            }
            let woken = self.wake.wait_timeout(queue, left);
            queue = woken.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// The writer and what it needs.
pub(super) struct Writer {
    inner: Arc<Inner>,
    /// A chunk as it goes to the file.
    sealed: Vec<u8>,
    unsynced: SyncSender<Arc<File>>,
    /// When the file of uses was written, in seconds since 1970.
    uses_noted: u64,
}

/// Runs until the store is closed.
pub(super) fn run(inner: Arc<Inner>) {
    let (unsynced, files) = sync_channel(MAX_UNSYNCED);
    std::thread::scope(|scope| {
        let syncing = inner.clone();
        let spawned = std::thread::Builder::new().name("store-sync".into());
        // Without the thread nothing is synced by us: a crash of the machine may cost more pages.
        let _ = spawned.spawn_scoped(scope, move || sync_files(&syncing, &files));
        let mut writer = Writer {
            uses_noted: inner.now(),
            inner,
            sealed: Vec::new(),
            unsynced,
        };
        writer.run();
    });
}

/// Makes sealed segments durable. That takes long, and nothing waits for it.
fn sync_files(inner: &Inner, files: &Receiver<Arc<File>>) {
    for file in files {
        if let Err(error) = file.sync_data() {
            inner.degrade("sync a segment", &error);
        }
    }
}

impl Writer {
    fn run(&mut self) {
        let inner = self.inner.clone();
        let mut tick_at = Instant::now() + TICK;
        loop {
            match inner.next_work(tick_at) {
                Work::Job(job) => self.work(job),
                Work::Room => self.tidy(),
                Work::Hurry => self.write_everything(),
                Work::Flush(asked) => {
                    self.write_everything();
                    self.maintain();
                    lock(&inner.queue).done = asked;
                    inner.done.notify_all();
                }
                Work::Stop => break,
                Work::Nothing => {}
            }
            if tick_at <= Instant::now() {
                self.write_everything();
                self.maintain();
                tick_at = Instant::now() + TICK;
            }
        }
        self.close();
    }

    fn work(&mut self, job: Job) {
        match job {
            Job::Write(segment) => self.write(&segment),
            Job::Seal(segment) => {
                self.seal(&segment);
                self.tidy();
            }
        }
    }

    /// Writes chunks that are being filled, too.
    fn write_everything(&mut self) {
        let appender = lock(&self.inner.appender);
        for segment in appender.open() {
            if segment.complete_chunk() {
                self.inner.enqueue(Job::Write(segment.clone()));
            }
        }
        drop(appender);
        self.drain();
    }

    /// Does the jobs that wait, without what may follow from them.
    pub(super) fn drain(&mut self) {
        loop {
            let Some(job) = lock(&self.inner.queue).jobs.pop_front() else {
                return;
            };
            match job {
                Job::Write(segment) => self.write(&segment),
                Job::Seal(segment) => self.seal(&segment),
            }
        }
    }

    /// Writes the oldest chunk of `segment`.
    fn write(&mut self, segment: &Arc<Segment>) {
        let Some(ready) = segment.ready_chunk() else {
            return;
        };
        self.sealed.clear();
        let cipher = segment.cipher();
        write_chunk(
            cipher,
            ready.first,
            &ready.entries,
            &ready.contents,
            &mut self.sealed,
        );
        let inner = &self.inner;
        let file = if ready.first == 0 {
            segment.create_file(&inner.files)
        } else {
            segment.file(&inner.files)
        };
        let written = file.and_then(|file| file.write_all_at(&self.sealed, ready.offset));
        if let Err(error) = written {
            drop(ready);
            self.fail(segment, "write to a segment", &error);
            return;
        }
        segment.chunk_written(&ready, ready.offset + self.sealed.len() as u64);
        inner.wrote(self.sealed.len() as u64);
        inner
            .pending
            .fetch_sub(ready.contents.len(), Ordering::Relaxed);
        lock(&inner.appender).recycle(ready.contents);
        inner.tell();
    }

    /// Writes the footer of a segment that takes no more.
    fn seal(&mut self, segment: &Arc<Segment>) {
        if segment.phase() != Phase::Closing {
            return;
        }
        // All its chunks were queued before.
        let Some((chunks, entries)) = segment.table() else {
            return;
        };
        let inner = self.inner.clone();
        self.sealed.clear();
        let now = inner.now();
        write_footer(segment.cipher(), &chunks, &entries, now, &mut self.sealed);
        let begin = segment.end();
        let file = segment.file(&inner.files);
        let written = file.and_then(|file| {
            file.write_all_at(&self.sealed, begin)?;
            Ok(file)
        });
        match written {
            Ok(file) => {
                let end = begin + self.sealed.len() as u64;
                inner.wrote(self.sealed.len() as u64);
                segment.sealed(end);
                lock(&inner.appender).settle(segment, end);
                inner.changes.fetch_add(1, Ordering::Relaxed);
                // When many wait already, the kernel writes back by itself.
                let _ = self.unsynced.try_send(file);
                // Who waits for room and saw this job leaves chunks that are not full to us until now.
                inner.tell();
            }
            Err(error) => self.fail(segment, "seal a segment", &error),
        }
    }

    /// `segment` could not be written: what is in the file stays, what waits is lost.
    fn fail(&self, segment: &Arc<Segment>, what: &str, error: &io::Error) {
        let inner = &self.inner;
        inner.degrade(what, error);
        let mut appender = lock(&inner.appender);
        let (lost, bytes) = segment.cut();
        for (number, id) in &lost {
            let record = *number as u16;
            let slot = segment.slot;
            inner.index.remove_at(id, Location { slot, record });
        }
        inner.pending.fetch_sub(bytes, Ordering::Relaxed);
        count(&inner.counters.dropped_puts, lost.len() as u64);
        let end = segment.end();
        let opened = File::options().write(true).open(segment.path());
        let size = match opened.and_then(|file| file.set_len(end)) {
            Ok(()) => end,
            // The rest of the chunk may be there still.
            Err(_) => segment.path().metadata().map_or(0, |file| file.len()),
        };
        appender.settle(segment, size);
        drop(appender);
        if segment.records() == 0 {
            self.delete(segment, size);
        }
        inner.changes.fetch_add(1, Ordering::Relaxed);
        inner.tell();
    }

    /// Deletes a file that has nothing in the index any more.
    pub(super) fn delete(&self, segment: &Segment, size: u64) {
        let inner = &self.inner;
        inner.segments_mut().remove(segment);
        inner.changes.fetch_add(1, Ordering::Relaxed);
        match std::fs::remove_file(segment.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // It still counts as taken; opening the store again finds it.
                inner.degrade("delete a segment", &error);
            }
            _ => lock(&inner.appender).freed(size),
        }
    }

    /// What is done now and then.
    fn maintain(&mut self) {
        let inner = self.inner.clone();
        inner.now.store((inner.options.clock)(), Ordering::Relaxed);
        inner.recover();
        self.expire();
        self.tidy();
        self.note_uses(NOTE_STEP);
    }

    fn note_uses(&mut self, step: u64) {
        let segments: Vec<_> = self.inner.segments().iter().cloned().collect();
        let mut latest = 0;
        for segment in segments {
            // A time that was not noted ages the segment early: not worth degrading for.
            let _ = segment.note_use(step);
            latest = latest.max(segment.last_used());
        }
        let now = self.inner.now();
        // The clock may have been set back.
        self.uses_noted = self.uses_noted.min(now);
        let due = now >= self.uses_noted.saturating_add(step) && latest >= self.uses_noted;
        if due && !self.inner.degraded.load(Ordering::Relaxed) {
            self.uses_noted = now;
            self.inner.write_uses();
        }
    }

    /// Gives segments up that cannot be read, and makes room.
    fn tidy(&mut self) {
        self.drop_unreadable();
        self.make_room();
        self.reserve_numbers();
        self.inner.tell();
    }

    /// Keeps numbers of segments in reserve.
    fn reserve_numbers(&self) {
        let inner = &self.inner;
        let appender = lock(&inner.appender);
        let (next, end) = (appender.next_number, appender.numbers_end);
        drop(appender);
        let enough = end - next > NUMBERS_AT_ONCE / 2;
        if enough || inner.degraded.load(Ordering::Relaxed) {
            return;
        }
        let new_end = next.saturating_add(NUMBERS_AT_ONCE);
        let superblock = Superblock {
            next_segment: new_end,
            ..inner.superblock
        };
        match write_superblock(&inner.options.folder, &superblock, &inner.key) {
            Ok(()) => lock(&inner.appender).numbers_end = new_end,
            Err(error) => inner.degrade(WRITE_SUPERBLOCK, &error),
        }
    }

    fn close(&mut self) {
        let inner = self.inner.clone();
        let mut appender = lock(&inner.appender);
        let open: Vec<_> = appender.open().cloned().collect();
        for segment in open {
            inner.close(&mut appender, &segment);
        }
        drop(appender);
        self.drain();
        self.note_uses(0);
        inner.tell();
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}
