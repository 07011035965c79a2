//! One life of the process that keeps the store: from its start until it has lived through the day or is
//! killed.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource};
use skyferry_dedup::{
    Announced, Announcer, DiskStats, MAX_ANNOUNCEMENT, MemoryStore, PAGE_SIZE, PageStore, ShortId,
    TieredStore,
};

use super::traffic::{Content, Origin, Pages, Tenant, Traffic};
use super::{Plan, Report};

const MIB: u64 = 1 << 20;
/// Pages that are announced to the store at once, as a decoder does with those of a frame.
const BATCH: usize = 64;
/// What the table of a peer may take that is told of the store.
const PEER_TABLE_BYTES: usize = 8 << 20;
/// Pages after which is looked whether the disk keeps up: far fewer than may wait for it.
const STRIDE: usize = 16;
/// A disk that does not take half of what waits in this time is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the store was seen to do since the last report.
#[derive(Default)]
struct Seen {
    shared: [u64; 2],
    own: [u64; 2],
    believed: [u64; 2],
    most_bytes: u64,
    open_micros: u64,
}

struct Life<'a> {
    plan: &'a Plan,
    folder: &'a Path,
    clock: Arc<AtomicU64>,
    pages: Pages,
    store: TieredStore,
    /// What the counters of the store said at the last report.
    before: DiskStats,
    peer: Announced,
    announcer: Announcer,
    seen: Seen,
}

/// Lives through the day from move `first` on, with the store in `folder`, and gives `tell` a report at
/// the end of every hour, and one before a moment at which it is to be killed: then the second value
/// says so, and it goes on until it is.
pub(super) fn live(
    plan: &Plan,
    folder: &Path,
    first: u32,
    mut tell: impl FnMut(&Report, bool) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let mut traffic = Traffic::new(plan);
    let clock = Arc::new(AtomicU64::new(plan.time_of(first)));
    let (store, open_micros) = open(plan, folder, &clock)?;
    let peer = Announced::new(PEER_TABLE_BYTES);
    let mut life = Life {
        plan,
        folder,
        announcer: Announcer::new(store.disk().id(), &peer.position()),
        clock,
        pages: Pages::new(),
        store,
        before: DiskStats::default(),
        peer,
        seen: Seen {
            open_micros,
            ..Seen::default()
        },
    };
    for step in 0..plan.hours * plan.moves_per_hour {
        let guest = traffic.advance(step);
        if step < first {
            continue;
        }
        life.clock.store(plan.time_of(step), Ordering::Relaxed);
        let tenant = traffic.tenant(guest);
        if plan.kills.contains(&step) {
            // In the middle of a move.
            let half = traffic.pages(guest).step_by(2);
            life.carry(tenant, half)?;
            tell(&life.report(step), true)?;
        }
        life.carry(tenant, traffic.pages(guest))?;
        if step == plan.scan_hour * plan.moves_per_hour {
            life.carry(Tenant::Busy, traffic.once())?;
        }
        life.store.disk().flush();
        life.announce()?;
        if (step + 1).is_multiple_of(plan.moves_per_hour) {
            tell(&life.report(step), false)?;
            if plan.restarts.contains(&plan.hour_of(step)) {
                life = life.restart()?;
            }
        }
    }
    Ok(())
}

/// The store, and how long opening took.
fn open(
    plan: &Plan,
    folder: &Path,
    clock: &Arc<AtomicU64>,
) -> Result<(TieredStore, u64), Box<dyn Error>> {
    let clock = clock.clone();
    let options = DiskOptions {
        ttl: Some(plan.ttl),
        clock: Arc::new(move || clock.load(Ordering::Relaxed)),
        ..DiskOptions::new(folder, plan.store_bytes)
    };
    let key = KeySource::secret(b"the key of a replay").ok_or("a short key")?;
    let start = Instant::now();
    let disk = DiskStore::open(options, &key)?;
    let micros = start.elapsed().as_micros() as u64;
    let memory = MemoryStore::new(plan.memory_bytes);
    Ok((TieredStore::new(memory, disk), micros))
}

impl Life<'_> {
    /// The pages of a guest come by: what is there is read, what is not is kept.
    fn carry(
        &mut self,
        tenant: Tenant,
        contents: impl Iterator<Item = Content>,
    ) -> Result<(), Box<dyn Error>> {
        let mut contents = contents.peekable();
        let (mut batch, mut ids) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        while contents.peek().is_some() {
            batch.clear();
            batch.extend(contents.by_ref().take(BATCH));
            ids.clear();
            ids.extend(batch.iter().map(|page| self.pages.short_id(tenant, *page)));
            self.store.prefetch(&ids);
            for (n, (content, id)) in batch.iter().zip(&ids).enumerate() {
                if n.is_multiple_of(STRIDE) && !self.store.disk().wait_for_room(PATIENCE) {
                    return Err("the disk is stuck".into());
                }
                self.take(tenant, *content, id)?;
            }
        }
        let bytes = folder_bytes(self.folder)?;
        self.seen.most_bytes = self.seen.most_bytes.max(bytes);
        Ok(())
    }

    fn take(
        &mut self,
        tenant: Tenant,
        content: Content,
        id: &ShortId,
    ) -> Result<(), Box<dyn Error>> {
        let (mut page, mut out) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        self.pages.write(content, &mut page);
        let believed = self.peer.find(id).is_some();
        let found = self.store.get(id, &mut out);
        match found {
            Some(length) if out[..length] != page => return Err("another page came back".into()),
            Some(_) => {}
            None => {
                let domain = self.pages.hasher(tenant).domain();
                let id = self.pages.id(tenant, content);
                self.store.put(domain, &id, &page);
            }
        }
        let count = |[hits, all]: &mut [u64; 2]| {
            *hits += u64::from(found.is_some());
            *all += 1;
        };
        match content.origin {
            // The other tenant's were away for long, and have the right to be gone.
            Origin::Shared if tenant == Tenant::Busy => count(&mut self.seen.shared),
            Origin::Own => count(&mut self.seen.own),
            Origin::Shared | Origin::Once => {}
        }
        if believed {
            count(&mut self.seen.believed);
        }
        Ok(())
    }

    /// Tells a peer what there is of the busy tenant.
    fn announce(&mut self) -> Result<(), Box<dyn Error>> {
        let domain = *self.pages.hasher(Tenant::Busy).domain();
        let feed = self.store.disk().feed(domain);
        let mut message = Vec::new();
        loop {
            message.clear();
            let more = self.announcer.next(&feed, MAX_ANNOUNCEMENT, &mut message);
            self.peer.apply(&message)?;
            if !more {
                return Ok(());
            }
        }
    }

    fn report(&mut self, step: u32) -> Report {
        let seen = std::mem::take(&mut self.seen);
        let now = self.store.disk().disk_stats();
        let tiers = self.store.stats();
        let before = std::mem::replace(&mut self.before, now.clone());
        Report {
            hour: u64::from(self.plan.hour_of(step)),
            pages: now.pages,
            bytes: now.bytes.max(seen.most_bytes),
            index_bytes: now.index_bytes,
            own_bytes: now.index_bytes + tiers.bytes + self.peer.bytes() as u64,
            resident_bytes: resident_bytes(),
            put_bytes: now.put_bytes - before.put_bytes,
            written_bytes: now.written_bytes - before.written_bytes,
            dropped: now.dropped_puts - before.dropped_puts,
            errors: now.write_errors + now.read_errors - before.write_errors - before.read_errors,
            evictions: now.evictions - before.evictions,
            expired: now.expired - before.expired,
            copied: now.copied - before.copied,
            shared: seen.shared,
            own: seen.own,
            believed: seen.believed,
            open_micros: seen.open_micros,
        }
    }

    /// The store is closed and opened again.
    fn restart(self) -> Result<Self, Box<dyn Error>> {
        drop(self.store);
        let (store, open_micros) = open(self.plan, self.folder, &self.clock)?;
        Ok(Self {
            announcer: Announcer::new(store.disk().id(), &self.peer.position()),
            store,
            before: DiskStats::default(),
            seen: Seen {
                open_micros,
                ..self.seen
            },
            ..self
        })
    }
}

fn folder_bytes(folder: &Path) -> Result<u64, Box<dyn Error>> {
    let mut bytes = 0;
    for file in folder.read_dir()? {
        // A file may go while the folder is listed.
        bytes += file?.metadata().map_or(0, |file| file.len());
    }
    Ok(bytes)
}

/// What the process has in memory; 0 if the system does not tell.
fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * (MIB / 1024)
}
