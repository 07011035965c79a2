//! Measures the page store on disk against bare files on the same disk.
//!
//! Both sides take the same pages in the same order and read the same number of them at random, in
//! turns, and the medians count. A bare file is written 1 MiB at a time and synced every 64 MiB, which
//! is what the store has to do, too; it knows no ids, keeps no index and encrypts nothing. Reads take
//! turns every few hundred pages, so that a machine that is slow for a while is so for both; what the
//! kernel has in memory is read without waiting for anything, so there the thread's processor time
//! counts, and other work on the machine little.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource};
use skyferry_dedup::{DomainId, DomainKey, Hasher, PAGE_SIZE, PageId, PageStore, ShortId};

use crate::pipeline::cpu_time;
use skyferry_tests::bars::Bars;

const MIB: usize = 1 << 20;
const SEGMENT: usize = 64 * MIB;
/// Distinct contents; a store does not look at them.
const POOL: usize = SEGMENT;
/// Pages read cold: more would take long on a slow disk.
const COLD_READS: usize = 2000;
/// Ids that are announced to the store before they are read, and pages that one side reads in a turn.
const BATCH: usize = 256;
/// Pages of the store that is opened.
const OPENED: usize = 1_000_000;
/// How often it is opened each way.
const OPENINGS: usize = 3;

/// What one run of both sides took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Run {
    /// Writing, until the kernel has everything: store, bare.
    pub write: [f64; 2],
    /// Writing, until the disk has everything.
    pub durable: [f64; 2],
    /// Reading at random what the kernel has in memory.
    pub warm: [f64; 2],
    /// Reading at random what is only on the disk, for [`COLD_READS`] pages.
    pub cold: [f64; 2],
    /// The same from the store, after it was told of a batch in advance.
    pub prefetched: f64,
}

/// Medians in seconds, and what the store says of itself.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Medians.
    pub times: Run,
    /// Pages written.
    pub pages: usize,
    /// Bytes of memory per page.
    pub index_bytes_per_page: f64,
    /// Bytes written per byte put, while nothing is evicted.
    pub amplification: f64,
    /// Opening a store of a million pages, with its tables in the kernel's memory and from the disk.
    pub open: [f64; 2],
    /// The same as `amplification` while a store a quarter as large as what passes through it keeps what is used.
    pub amplification_evicting: f64,
}

impl Figures {
    /// How long opening takes for 10 GiB of pages, in seconds: with the tables in memory, from disk.
    #[must_use]
    pub fn open_10_gib(&self) -> [f64; 2] {
        let bytes = (OPENED * PAGE_SIZE) as f64;
        self.open
            .map(|open| open * 10.0 * f64::from(1 << 30) / bytes)
    }

    /// Adds the bars.
    pub fn add_bars(&self, bars: &mut Bars) {
        // Times: what the bare file took, per what the store took.
        let times = &self.times;
        let speeds = [
            ("put / bare sequential write", times.write),
            ("put / bare sequential write, both synced", times.durable),
            ("get / bare random read, in memory", times.warm),
            ("get / bare random read, on disk", times.cold),
        ];
        for (name, [store, bare]) in speeds {
            bars.at_least(name, bare / store, 0.5, "x");
        }
        let [warm, disk] = self.open_10_gib();
        bars.at_most("opening a million pages, for 10 GiB", warm, 1.0, "s");
        bars.at_most("the same from disk", disk, 1.0, "s");
        let index = self.index_bytes_per_page;
        bars.at_most("memory of the index", index, 40.0, "bytes a page");
        bars.at_most("write amplification", self.amplification, 1.3, "x");
        let evicting = self.amplification_evicting;
        bars.at_most("write amplification while evicting", evicting, 1.3, "x");
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = (self.pages * PAGE_SIZE) as f64;
        let rate = |seconds: f64| bytes / seconds / 1e6;
        let each = |seconds: f64| seconds / self.pages as f64 * 1e6;
        let cold = |seconds: f64| seconds / self.cold_reads() as f64 * 1e6;
        let times = &self.times;
        writeln!(f, "{} pages; store / bare file", self.pages)?;
        let [store, bare] = times.write.map(rate);
        writeln!(f, "write            {store:7.0} / {bare:7.0} MB/s")?;
        let [store, bare] = times.durable.map(rate);
        writeln!(f, "write and sync   {store:7.0} / {bare:7.0} MB/s")?;
        let [store, bare] = times.warm.map(each);
        writeln!(f, "read, in memory  {store:7.2} / {bare:7.2} us a page")?;
        let [store, bare] = times.cold.map(cold);
        writeln!(f, "read, on disk    {store:7.1} / {bare:7.1} us a page")?;
        let ahead = cold(times.prefetched);
        writeln!(f, "  told in advance {ahead:6.1} us a page")?;
        let [warm, disk] = self.open_10_gib();
        writeln!(
            f,
            "open             {warm:7.3} s for 10 GiB, {disk:.3} s from disk"
        )
    }
}

impl Figures {
    fn cold_reads(&self) -> usize {
        self.pages.min(COLD_READS)
    }
}

struct Bench {
    folder: PathBuf,
    pages: usize,
    pool: Vec<u8>,
    domain: DomainId,
    ids: Vec<PageId>,
    /// Numbers of pages in random order.
    order: Vec<u32>,
}

/// Writes and reads `mebibytes` of pages in `folder`, `runs` times.
///
/// # Errors
/// When files cannot be written or read.
pub fn measure(folder: &Path, mebibytes: usize, runs: usize) -> Result<Figures, Box<dyn Error>> {
    let bench = Bench::new(folder, mebibytes * MIB / PAGE_SIZE);
    let mut figures = Figures {
        pages: bench.pages,
        ..Figures::default()
    };
    let mut taken = Vec::new();
    for _ in 0..runs {
        taken.push(bench.run(&mut figures)?);
    }
    let pair = |pick: fn(&Run) -> [f64; 2]| {
        [0, 1].map(|side| median(taken.iter().map(|run| pick(run)[side])))
    };
    figures.times = Run {
        write: pair(|run| run.write),
        durable: pair(|run| run.durable),
        warm: pair(|run| run.warm),
        cold: pair(|run| run.cold),
        prefetched: median(taken.iter().map(|run| run.prefetched)),
    };
    figures.amplification_evicting = bench.churn()?;
    drop(bench);
    figures.open = Bench::new(folder, OPENED).openings()?;
    Ok(figures)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn key() -> Result<KeySource, &'static str> {
    KeySource::secret(b"the key of a benchmark").ok_or("a short key")
}

fn xorshift(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

impl Bench {
    fn new(folder: &Path, pages: usize) -> Self {
        let hasher = Hasher::new(&DomainKey::from_bytes([1; 32]));
        let mut pool = vec![0; POOL];
        blake3::Hasher::new().finalize_xof().fill(&mut pool);
        let mut order: Vec<u32> = (0..pages as u32).collect();
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        for at in (1..pages).rev() {
            order.swap(at, xorshift(&mut seed) as usize % (at + 1));
        }
        Self {
            folder: folder.to_owned(),
            pages,
            pool,
            domain: *hasher.domain(),
            ids: (0..pages).map(|n| hasher.id(&n.to_le_bytes())).collect(),
            order,
        }
    }

    fn contents(&self, n: usize) -> &[u8] {
        &self.pool[n * PAGE_SIZE % POOL..][..PAGE_SIZE]
    }

    fn run(&self, figures: &mut Figures) -> Result<Run, Box<dyn Error>> {
        let mut run = Run::default();
        let bare = self.folder.join("bare");
        std::fs::create_dir_all(&bare)?;
        [run.write[1], run.durable[1]] = self.write_bare(&bare)?;
        let folder = self.folder.join("store");
        let store = self.open()?;
        let start = Instant::now();
        self.fill(&store)?;
        run.write[0] = start.elapsed().as_secs_f64();
        let stats = store.disk_stats();
        figures.index_bytes_per_page = stats.index_bytes as f64 / stats.pages as f64;
        figures.amplification = stats.written_bytes as f64 / stats.put_bytes as f64;
        drop(store);
        run.durable[0] = start.elapsed().as_secs_f64();

        let store = self.open()?;
        let files = self.bare_files(&bare)?;
        run.warm = self.read_both(&store, &files, self.pages, cpu_time)?;
        drop(store);

        forget(&bare)?;
        forget(&folder)?;
        let store = self.open()?;
        forget(&folder)?;
        let reads = figures.cold_reads();
        let begin = Instant::now();
        run.cold = self.read_both(&store, &files, reads, || begin.elapsed())?;
        forget(&folder)?;
        let start = Instant::now();
        for batch in self.order[..reads].chunks(BATCH) {
            let ids: Vec<ShortId> = self.ids_of(batch).collect();
            store.prefetch(&ids);
            self.read_store(&store, batch)?;
        }
        run.prefetched = start.elapsed().as_secs_f64();
        drop(store);
        std::fs::remove_dir_all(&bare)?;
        std::fs::remove_dir_all(&folder)?;
        Ok(run)
    }

    /// The store of a run, with room for everything.
    fn open(&self) -> Result<DiskStore, Box<dyn Error>> {
        let capacity = (self.pages * PAGE_SIZE * 2 + 16 * SEGMENT) as u64;
        let options = DiskOptions::new(self.folder.join("store"), capacity);
        Ok(DiskStore::open(options, &key()?)?)
    }

    /// Puts all pages and waits until they are written.
    fn fill(&self, store: &DiskStore) -> Result<(), Box<dyn Error>> {
        for (n, id) in self.ids.iter().enumerate() {
            // Look and wait now and then: a chunk at a time keeps far below the limit.
            if n.is_multiple_of(MIB / PAGE_SIZE) && !store.wait_for_room(Duration::from_secs(60)) {
                return Err("the disk is stuck".into());
            }
            store.put(&self.domain, id, self.contents(n));
        }
        store.flush();
        let stats = store.disk_stats();
        if stats.dropped_puts + stats.evictions > 0 {
            return Err(format!("pages were lost: {stats:?}").into());
        }
        Ok(())
    }

    /// How long opening takes, with the tables in the kernel's memory and from the disk.
    fn openings(&self) -> Result<[f64; 2], Box<dyn Error>> {
        self.fill(&self.open()?)?;
        let folder = self.folder.join("store");
        let mut taken = [const { Vec::new() }; 2];
        for _ in 0..OPENINGS {
            forget(&folder)?;
            // From the disk first; then the tables are in memory.
            for way in [1, 0] {
                let start = Instant::now();
                let store = self.open()?;
                taken[way].push(start.elapsed().as_secs_f64());
                if store.disk_stats().pages != self.pages as u64 {
                    return Err("pages are missing".into());
                }
            }
        }
        std::fs::remove_dir_all(&folder)?;
        Ok(taken.map(|taken| median(taken.into_iter())))
    }

    fn write_bare(&self, folder: &Path) -> Result<[f64; 2], Box<dyn Error>> {
        let start = Instant::now();
        let mut waited = Duration::ZERO;
        let total = self.pages * PAGE_SIZE;
        for (number, at) in (0..total).step_by(SEGMENT).enumerate() {
            let mut file = File::create(folder.join(number.to_string()))?;
            for block in self.pool[..SEGMENT.min(total - at)].chunks(MIB) {
                file.write_all(block)?;
            }
            let sync = Instant::now();
            file.sync_data()?;
            waited += sync.elapsed();
        }
        let durable = start.elapsed();
        Ok([(durable - waited).as_secs_f64(), durable.as_secs_f64()])
    }

    fn bare_files(&self, folder: &Path) -> Result<Vec<File>, Box<dyn Error>> {
        let files = (self.pages * PAGE_SIZE).div_ceil(SEGMENT);
        let open = |number: usize| File::open(folder.join(number.to_string()));
        Ok((0..files).map(open).collect::<Result<_, _>>()?)
    }

    /// What store and bare files take for `pages` pages, by `clock`.
    fn read_both(
        &self,
        store: &DiskStore,
        files: &[File],
        pages: usize,
        clock: impl Fn() -> Duration,
    ) -> Result<[f64; 2], Box<dyn Error>> {
        let mut taken = [Duration::ZERO; 2];
        // Each side reads what the other one does not: a disk may keep what lies near.
        let half = self.order.len() / 2 / BATCH * BATCH;
        for at in (0..pages).step_by(BATCH) {
            let batch = |from: usize| {
                let at = (from + at) % self.order.len();
                &self.order[at..self.order.len().min(at + BATCH)]
            };
            let begin = clock();
            self.read_bare(files, batch(half))?;
            let middle = clock();
            self.read_store(store, batch(0))?;
            taken[0] += clock() - middle;
            taken[1] += middle - begin;
        }
        Ok(taken.map(|taken| taken.as_secs_f64()))
    }

    fn read_bare(&self, files: &[File], pages: &[u32]) -> Result<(), Box<dyn Error>> {
        let mut out = [0; PAGE_SIZE];
        for n in pages {
            let at = *n as usize * PAGE_SIZE;
            files[at / SEGMENT].read_exact_at(&mut out, (at % SEGMENT) as u64)?;
            black_box(&out);
        }
        Ok(())
    }

    fn ids_of(&self, pages: &[u32]) -> impl Iterator<Item = ShortId> {
        pages.iter().map(|n| self.ids[*n as usize].short())
    }

    fn read_store(&self, store: &DiskStore, pages: &[u32]) -> Result<(), Box<dyn Error>> {
        let mut out = [0; PAGE_SIZE];
        for id in self.ids_of(pages) {
            if store.get(&id, &mut out) != Some(PAGE_SIZE) {
                return Err(format!("page {id} is missing").into());
            }
            black_box(&out);
        }
        let last = pages.last().map(|n| self.contents(*n as usize));
        if last.is_some_and(|last| out != last) {
            return Err("other contents came back".into());
        }
        Ok(())
    }

    /// Write amplification while four times the capacity passes through a store, three tenths of it
    /// pages that are asked for again and again.
    fn churn(&self) -> Result<f64, Box<dyn Error>> {
        let folder = self.folder.join("churn");
        let capacity = (self.pages * PAGE_SIZE / 4) as u64;
        let options = DiskOptions::new(&folder, capacity);
        let store = DiskStore::open(options, &key()?)?;
        let shared = self.pages / 8;
        let mut seed = 88_172_645_463_325_252;
        let mut out = [0; PAGE_SIZE];
        for n in shared..self.pages {
            let random = xorshift(&mut seed) as usize;
            let n = if random % 10 < 3 {
                random / 10 % shared
            } else {
                n
            };
            if store.get(&self.ids[n].short(), &mut out).is_none() {
                if !store.wait_for_room(Duration::from_secs(60)) {
                    return Err("the disk is stuck".into());
                }
                store.put(&self.domain, &self.ids[n], self.contents(n));
            }
        }
        store.flush();
        let stats = store.disk_stats();
        drop(store);
        std::fs::remove_dir_all(&folder)?;
        Ok(stats.written_bytes as f64 / stats.put_bytes as f64)
    }
}

/// Has the kernel forget what it keeps of the files in `folder`.
fn forget(folder: &Path) -> Result<(), Box<dyn Error>> {
    for file in folder.read_dir()? {
        let file = File::open(file?.path())?;
        // Only what is on the disk can be forgotten.
        file.sync_data()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}
