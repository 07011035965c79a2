//! The store on disk as its callers see it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use skyferry_dedup::disk::{
    DiskOptions, DiskStore, INDEX_BYTES_PER_PAGE, KeySource, OpenErrorKind, Purge, purge, stat,
    verify,
};
use skyferry_dedup::{
    Announced, Announcer, DomainKey, Hasher, MemoryStore, PAGE_SIZE, PageStore, TieredStore,
};

const MIB: u64 = 1 << 20;

fn hasher() -> Hasher {
    Hasher::new(&DomainKey::from_bytes([5; 32]))
}

fn key() -> KeySource {
    KeySource::secret(b"sixteen bytes or more").expect("long enough")
}

fn options(folder: &Path, capacity: u64) -> DiskOptions {
    DiskOptions {
        segment_bytes: MIB,
        chunk_bytes: 64 << 10,
        ..DiskOptions::new(folder, capacity)
    }
}

fn open(folder: &Path, capacity: u64) -> DiskStore {
    DiskStore::open(options(folder, capacity), &key()).expect("a store")
}

/// A page that no other number gives.
fn page(n: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new()
        .update(&n.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    page
}

fn put(store: &dyn PageStore, hasher: &Hasher, contents: &[u8]) {
    store.put(hasher.domain(), &hasher.id(contents), contents);
}

/// Whether the store has page `n`. What it returns has to be right.
fn has(store: &dyn PageStore, hasher: &Hasher, n: u64) -> bool {
    let mut out = [0; PAGE_SIZE];
    let expected = page(n);
    match store.get(&hasher.id(&expected).short(), &mut out) {
        Some(length) => {
            assert_eq!(out[..length], expected);
            true
        }
        None => false,
    }
}

fn put_pages(store: &DiskStore, hasher: &Hasher, numbers: impl Iterator<Item = u64>) {
    for n in numbers {
        assert!(store.wait_for_room(Duration::from_secs(60)));
        put(store, hasher, &page(n));
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let files = folder.read_dir().expect("a folder").flatten();
    // A file may go while the folder is listed.
    let sizes = files.filter_map(|file| file.metadata().ok());
    sizes.map(|file| file.len()).sum()
}

#[test]
fn pages_come_back_before_and_after_they_are_written_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let hasher = hasher();
    let store = open(folder.path(), 64 * MIB);
    let mut out = [0; PAGE_SIZE];
    for length in [1, 2, 1000, PAGE_SIZE - 1] {
        let contents = vec![length as u8 | 1; length];
        put(&store, &hasher, &contents);
        assert_eq!(
            store.get(&hasher.id(&contents).short(), &mut out),
            Some(length)
        );
        assert_eq!(out[..length], contents);
    }
    put(&store, &hasher, &[]);
    put(&store, &hasher, &[1; PAGE_SIZE + 1]);
    put_pages(&store, &hasher, 0..1000);
    assert!((0..1000).all(|n| has(&store, &hasher, n)));
    store.flush();
    assert!((0..1000).all(|n| has(&store, &hasher, n)));
    let stats = store.disk_stats();
    assert_eq!(
        (
            stats.pages,
            stats.insertions,
            stats.hits,
            stats.misses,
            stats.dropped_puts
        ),
        (1004, 1004, 2004, 0, 0)
    );
    let id = store.id();
    drop(store);
    let store = open(folder.path(), 64 * MIB);
    assert_eq!(store.id(), id);
    assert_eq!(store.disk_stats().pages, 1004);
    let ids: Vec<_> = (0..1000).map(|n| hasher.id(&page(n)).short()).collect();
    store.prefetch(&ids);
    assert!((0..1000).all(|n| has(&store, &hasher, n)));
    assert!(store.remove(&ids[7]));
    assert!(!store.remove(&ids[7]) && !store.contains(&ids[7]));
    assert!(!has(&store, &hasher, 7) && !has(&store, &hasher, 5000));
    // It may come again.
    put(&store, &hasher, &page(7));
    assert!(has(&store, &hasher, 7));
}

#[test]
fn keys_versions_locks_and_rubbish_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep").join("store");
    let store = open(&path, 8 * MIB);
    put(&store, &hasher(), &page(1));
    let kind = |key: &KeySource, capacity| {
        let error = DiskStore::open(options(&path, capacity), key).unwrap_err();
        assert!(error.to_string().contains("deep/store"), "{error}");
        error.kind
    };
    assert!(matches!(kind(&key(), 8 * MIB), OpenErrorKind::Locked));
    assert!(matches!(
        verify(&path, &key(), 16 << 20, |_, _| true)
            .unwrap_err()
            .kind,
        OpenErrorKind::Locked
    ));
    assert!(matches!(
        purge(&path, Purge::All).unwrap_err().kind,
        OpenErrorKind::Locked
    ));
    drop(store);
    let other = KeySource::secret(b"another sixteen bytes").unwrap();
    assert!(matches!(kind(&other, 8 * MIB), OpenErrorKind::WrongKey));
    assert!(matches!(kind(&key(), 1000), OpenErrorKind::TooSmall(1000)));
    let superblock = path.join("superblock");
    let good = std::fs::read(&superblock).unwrap();
    let with = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 2;
        std::fs::write(&superblock, bytes).unwrap();
    };
    with(8);
    assert!(matches!(
        kind(&key(), 8 * MIB),
        OpenErrorKind::Version { found: 3 }
    ));
    with(20);
    assert!(matches!(kind(&key(), 8 * MIB), OpenErrorKind::Damaged));
    std::fs::remove_file(&superblock).unwrap();
    assert!(matches!(kind(&key(), 8 * MIB), OpenErrorKind::Damaged));
    assert!(matches!(
        stat(&path).unwrap_err().kind,
        OpenErrorKind::NoStore
    ));
    std::fs::write(&superblock, &good).unwrap();
    assert!(has(&open(&path, 8 * MIB), &hasher(), 1));
}

#[test]
fn an_ephemeral_store_leaves_nothing_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let open = || {
        let options = options(folder.path(), 8 * MIB);
        DiskStore::open(options, &KeySource::ephemeral()).unwrap()
    };
    let store = open();
    put_pages(&store, &hasher(), 0..100);
    store.flush();
    let id = store.id();
    drop(store);
    assert!(stat(folder.path()).unwrap().segments.len() == 1);
    let store = open();
    assert_ne!(store.id(), id);
    assert_eq!(store.disk_stats().pages, 0);
    assert!(!has(&store, &hasher(), 1));
    assert!(stat(folder.path()).unwrap().segments.is_empty());
}

/// A key that is taken out of the configuration by mistake must not cost the store.
#[test]
fn a_store_with_a_key_is_not_emptied_for_want_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 8 * MIB);
    put_pages(&store, &hasher(), 0..100);
    store.flush();
    drop(store);
    let keyless = || DiskStore::open(options(folder.path(), 8 * MIB), &KeySource::ephemeral());
    let refused = keyless().unwrap_err();
    assert!(
        matches!(refused.kind, OpenErrorKind::KeyMissing),
        "{refused}"
    );
    assert!(has(&open(folder.path(), 8 * MIB), &hasher(), 1));
    // The other way round there is nothing to be lost.
    purge(folder.path(), Purge::All).unwrap();
    put_pages(&keyless().unwrap(), &hasher(), 0..100);
    let store = open(folder.path(), 8 * MIB);
    assert_eq!(store.disk_stats().pages, 0);
    put_pages(&store, &hasher(), 0..100);
    store.flush();
    drop(store);
    assert!(has(&open(folder.path(), 8 * MIB), &hasher(), 1));
}

#[test]
fn nothing_lies_in_the_files_in_clear() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 8 * MIB);
    let page = [0x5a; PAGE_SIZE];
    put(&store, &hasher(), &page);
    drop(store);
    let id = hasher().id(&page).short();
    for file in folder.path().read_dir().unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let id = &id.as_bytes()[..8];
        assert!(
            !bytes
                .windows(8)
                .any(|window| window == id || window == &page[..8])
        );
    }
}

#[test]
fn the_folder_never_grows_beyond_the_capacity() {
    let folder = tempfile::tempdir().unwrap();
    let capacity = 10 * MIB;
    let store = open(folder.path(), capacity);
    for round in 0..20 {
        put_pages(&store, &hasher(), round * 500..(round + 1) * 500);
        assert!(folder_bytes(folder.path()) <= capacity);
    }
    store.flush();
    let stats = store.disk_stats();
    assert!(stats.bytes <= capacity && stats.evictions > 0);
    assert!(folder_bytes(folder.path()) <= stats.bytes);
    assert!(stats.pages * PAGE_SIZE as u64 > capacity / 2);
    assert_eq!(stats.dropped_puts, 0);
    // The newest are there.
    assert!((9_000..10_000).all(|n| has(&store, &hasher(), n)));
    drop(store);
    let store = open(folder.path(), 4 * MIB);
    assert!(folder_bytes(folder.path()) <= 4 * MIB);
    assert!((9_900..10_000).all(|n| has(&store, &hasher(), n)));
}

#[test]
fn what_many_guests_share_survives_a_scan_of_ten_times_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let capacity = 16 * MIB;
    let store = open(folder.path(), capacity);
    let hasher = hasher();
    let shared = 0..1000;
    // Shared pages come between others.
    put_pages(&store, &hasher, shared.clone().chain(10_000..11_000));
    for _ in 0..3 {
        for n in shared.clone() {
            assert!(has(&store, &hasher, n));
        }
    }
    let scan = 10 * capacity / PAGE_SIZE as u64;
    put_pages(&store, &hasher, 100_000..100_000 + scan);
    store.flush();
    let kept = shared.filter(|&n| has(&store, &hasher, n)).count();
    assert!(kept >= 990, "{kept} of 1000");
    let stats = store.disk_stats();
    let amplification = stats.written_bytes as f64 / stats.put_bytes as f64;
    assert!(amplification <= 1.3, "{amplification}");
}

/// Records cost the same however short they are, and all that goes was used, so that as much is copied
/// as may be.
#[test]
fn short_chunks_are_not_written_more_often_than_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 16 * MIB);
    let hasher = hasher();
    let mut out = [0; PAGE_SIZE];
    for n in 0..100_000 {
        assert!(store.wait_for_room(Duration::from_secs(60)));
        let contents = &page(n)[..1024];
        put(&store, &hasher, contents);
        if n.is_multiple_of(3) && n >= 100 {
            let id = hasher.id(&page(n - 100)[..1024]).short();
            store.get(&id, &mut out);
        }
    }
    store.flush();
    let stats = store.disk_stats();
    let amplification = stats.written_bytes as f64 / stats.put_bytes as f64;
    assert!(amplification <= 1.3, "{amplification}");
    assert!(amplification > 1.2, "nothing was copied: {amplification}");
}

/// A store of 16 MiB of which every sixth of 3000 pages was used: few enough to be copied when their
/// segments go.
struct Used {
    folder: tempfile::TempDir,
    time: Arc<AtomicU64>,
    store: DiskStore,
}

impl Used {
    const CAPACITY: u64 = 16 * MIB;

    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let time = Arc::new(AtomicU64::new(1_700_000_000));
        let store = Self::open(folder.path(), &time);
        put_pages(&store, &hasher(), 0..3000);
        // What is still on its way to the disk is found, and that is no use of it.
        store.flush();
        assert!(
            Self::pages()
                .chain(Self::pages())
                .all(|n| has(&store, &hasher(), n))
        );
        Self {
            folder,
            time,
            store,
        }
    }

    fn open(folder: &Path, time: &Arc<AtomicU64>) -> DiskStore {
        let clock = time.clone();
        let options = DiskOptions {
            clock: Arc::new(move || clock.load(Ordering::Relaxed)),
            ..options(folder, Self::CAPACITY)
        };
        DiskStore::open(options, &key()).expect("a store")
    }

    fn pages() -> impl Iterator<Item = u64> {
        (0..3000).step_by(6)
    }

    /// Closes the store, does something to its folder, opens it.
    fn restarted(self, meanwhile: impl FnOnce(&Path)) -> Self {
        drop(self.store);
        meanwhile(self.folder.path());
        let store = Self::open(self.folder.path(), &self.time);
        Self { store, ..self }
    }

    /// How many of the used pages are left after a scan of ten times the store.
    fn left_after_a_scan(self) -> usize {
        let scan = 10 * Self::CAPACITY / PAGE_SIZE as u64;
        put_pages(&self.store, &hasher(), 100_000..100_000 + scan);
        self.store.flush();
        assert!(folder_bytes(self.folder.path()) <= Self::CAPACITY);
        let stats = self.store.disk_stats();
        let amplification = stats.written_bytes as f64 / stats.put_bytes as f64;
        assert!(amplification <= 1.3, "{amplification}");
        assert_eq!(stats.write_errors, 0);
        Self::pages()
            .filter(|&n| has(&self.store, &hasher(), n))
            .count()
    }
}

#[test]
fn what_was_used_is_known_after_a_restart() {
    let left = Used::new()
        .restarted(|_| {})
        .restarted(|_| {})
        .left_after_a_scan();
    assert!(left >= 492, "{left} of 500");
}

/// Ten minutes after they were used, without an orderly end.
#[test]
fn what_was_used_is_known_after_a_kill() {
    let used = Used::new();
    used.store.flush();
    let copy = tempfile::tempdir().unwrap();
    let copied = |what: &str| {
        for file in used.folder.path().read_dir().unwrap() {
            let path = file.unwrap().path();
            std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        assert_eq!(copy.path().join("uses").exists(), what == "noted");
    };
    copied("not yet noted");
    used.time.fetch_add(601, Ordering::Relaxed);
    used.store.flush();
    copied("noted");
    let store = Used::open(copy.path(), &used.time);
    let time = used.time.clone();
    let left = Used {
        folder: copy,
        time,
        store,
    }
    .left_after_a_scan();
    assert!(left >= 492, "{left} of 500");
}

/// What is of no use costs what was used its place, and nothing else.
#[test]
fn a_lost_or_damaged_file_of_uses_is_none() {
    let uses = |folder: &Path| folder.join("uses");
    let lost = Used::new().restarted(|folder| std::fs::remove_file(uses(folder)).unwrap());
    let changed = Used::new().restarted(|folder| {
        let mut bytes = std::fs::read(uses(folder)).unwrap();
        bytes[40] ^= 1;
        std::fs::write(uses(folder), bytes).unwrap();
    });
    let of_another = Used::new().restarted(|folder| {
        let other = Used::new();
        let theirs = other.folder.path().to_owned();
        drop(other.store);
        std::fs::copy(uses(&theirs), uses(folder)).unwrap();
    });
    assert!(!uses(of_another.folder.path()).exists());
    let large = Used::new().restarted(|folder| {
        let file = std::fs::File::options().append(true).open(uses(folder));
        file.unwrap().set_len(8 * MIB).unwrap();
    });
    assert!(!uses(large.folder.path()).exists());
    for used in [lost, changed, of_another, large] {
        let left = used.left_after_a_scan();
        assert!(left < 250, "{left} of 500");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("uses.new"), b"cut").unwrap();
    drop(open(folder.path(), 8 * MIB));
    assert!(!folder.path().join("uses.new").exists());
    purge(folder.path(), Purge::All).unwrap();
    assert!(!uses(folder.path()).exists());
}

#[test]
fn domains_have_segments_of_their_own_and_tell_what_is_in_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 64 * MIB);
    let (a, b) = (hasher(), Hasher::new(&DomainKey::from_bytes([6; 32])));
    let before = store.changes();
    put_pages(&store, &a, 0..400);
    put_pages(&store, &b, 0..10);
    assert!(store.changes() > before);
    let check = |store: &DiskStore, open: bool| {
        let of_a = store.segments(a.domain());
        assert!(of_a.len() >= 2 && of_a.is_sorted_by_key(|segment| segment.number));
        assert_eq!(of_a.iter().map(|segment| segment.records).sum::<u32>(), 400);
        assert_eq!(of_a.last().unwrap().sealed, !open);
        let (mut ids, mut pages) = (Vec::new(), 0_u64);
        for segment in &of_a {
            let from = ids.len();
            store.segment_ids(segment.number, 0, 100, &mut ids);
            store.segment_ids(segment.number, 100, usize::MAX, &mut ids);
            assert_eq!(ids.len() - from, segment.records as usize);
            let given = store.read_run(segment.number, 3, 100_000, |id, contents| {
                let n = from as u64 + 3 + (pages - from as u64);
                assert_eq!(contents, page(n));
                assert_eq!(*id, ids[n as usize]);
                pages += 1;
            });
            assert_eq!(given, segment.records - 3);
            pages += 3;
        }
        let expected: Vec<_> = (0..400).map(|n| a.id(&page(n)).short()).collect();
        assert_eq!(ids, expected);
        let of_b = store.segments(b.domain());
        assert_eq!((of_b.len(), of_b[0].records), (1, 10));
        let mut out = [0; PAGE_SIZE];
        let found = store.record(of_b[0].number, 9, &mut out);
        assert_eq!(found, Some((b.id(&page(9)).short(), PAGE_SIZE)));
        assert_eq!(out, page(9));
        assert_eq!(store.record(of_b[0].number, 10, &mut out), None);
        assert_eq!(store.record(9999, 0, &mut out), None);
    };
    check(&store, true);
    store.flush();
    check(&store, true);
    drop(store);
    let store = open(folder.path(), 64 * MIB);
    check(&store, false);
    // Numbers go on.
    let last = store.segments(b.domain())[0].number;
    put_pages(&store, &b, 10..20);
    assert!(store.segments(b.domain())[1].number > last);
    drop(store);
    let purged = purge(folder.path(), Purge::Domain(*a.domain())).unwrap();
    assert!(purged.segments >= 2 && purged.bytes > 400 * PAGE_SIZE as u64);
    let store = open(folder.path(), 64 * MIB);
    assert!(store.segments(a.domain()).is_empty());
    assert!((0..20).all(|n| has(&store, &b, n)));
    put_pages(&store, &a, 0..1);
    assert!(store.segments(a.domain())[0].number > last + 1);
}

#[test]
fn a_peer_learns_what_the_store_holds() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 64 * MIB);
    let hasher = hasher();
    let nothing = Announced::new(1 << 20);
    let mut announcer = Announcer::new(store.id(), &nothing.position());
    let mut told = 0;
    for step in 0..4 {
        put_pages(&store, &hasher, step * 200..(step + 1) * 200);
        let mut message = Vec::new();
        while announcer.next(&store.feed(*hasher.domain()), 700, &mut message) {
            nothing.apply(&message).unwrap();
            message.clear();
        }
        nothing.apply(&message).unwrap();
        told = (step + 1) * 200;
    }
    for n in 0..told {
        let id = hasher.id(&page(n)).short();
        let place = nothing.find(&id).unwrap();
        let mut out = [0; PAGE_SIZE];
        let found = store.record(place.segment, place.record, &mut out);
        assert_eq!(found, Some((id, PAGE_SIZE)));
    }
}

/// What many guests share is the oldest there is.
#[test]
fn what_is_used_is_announced_first_when_a_peer_has_no_room_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 64 * MIB);
    let (hasher, other) = (hasher(), Hasher::new(&DomainKey::from_bytes([6; 32])));
    put_pages(&store, &other, 0..10);
    put_pages(&store, &hasher, 0..3000);
    store.flush();
    let all = store.segments(hasher.domain());
    assert!(all.len() >= 4, "{all:?}");
    let useful = |most_pages, most_segments| {
        let mut out = Vec::new();
        store.most_useful(&[*hasher.domain()], most_pages, most_segments, &mut out);
        out.iter().map(|state| state.segment).collect::<Vec<_>>()
    };
    let newest_first: Vec<u32> = all.iter().rev().map(|info| info.number).collect();
    assert_eq!(useful(u64::MAX, usize::MAX), newest_first);
    let last_two = all.iter().rev().take(2).map(|info| info.records);
    let room = u64::from(last_two.sum::<u32>());
    assert_eq!(useful(room, usize::MAX), newest_first[..2]);
    // Its first pages are used, by one more guest: they take the place of the second newest.
    for n in 0..u64::from(all[0].records) / 4 {
        assert!(has(&store, &hasher, n));
    }
    let room = u64::from(all[0].records + all[all.len() - 1].records);
    assert_eq!(useful(room, usize::MAX), [all[0].number, newest_first[0]]);
    assert_eq!(useful(u64::MAX, 1), [all[0].number]);
    assert_eq!(useful(u64::from(all[0].records) - 1, usize::MAX), []);
}

#[test]
fn old_segments_expire_by_their_last_use() {
    let folder = tempfile::tempdir().unwrap();
    let time = Arc::new(AtomicU64::new(1_700_000_000));
    let open = || {
        let clock = time.clone();
        let options = DiskOptions {
            ttl: Some(Duration::from_secs(1000)),
            clock: Arc::new(move || clock.load(Ordering::Relaxed)),
            ..options(folder.path(), 64 * MIB)
        };
        DiskStore::open(options, &key()).unwrap()
    };
    let store = open();
    let (a, b) = (hasher(), Hasher::new(&DomainKey::from_bytes([6; 32])));
    put_pages(&store, &a, 0..10);
    put_pages(&store, &b, 0..10);
    time.fetch_add(900, Ordering::Relaxed);
    store.flush();
    assert!(has(&store, &b, 3));
    drop(store);
    // The use is known after a restart, too.
    time.fetch_add(200, Ordering::Relaxed);
    let store = open();
    store.flush();
    assert!(!has(&store, &a, 3) && store.segments(a.domain()).is_empty());
    assert!(has(&store, &b, 4));
    assert_eq!(store.disk_stats().expired, 10);
    time.fetch_add(1001, Ordering::Relaxed);
    store.flush();
    assert_eq!(store.disk_stats().pages, 0);
}

#[test]
fn verify_finds_every_damaged_record_and_purge_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 64 * MIB);
    put_pages(&store, &hasher(), 0..600);
    drop(store);
    let mut last = (0, 0);
    let verified = verify(folder.path(), &key(), 16 << 20, |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
        true
    })
    .unwrap();
    assert!(last.0 == last.1 && last.1 > 600 * PAGE_SIZE as u64);
    assert_eq!(
        (verified.records, verified.bytes),
        (600, 600 * PAGE_SIZE as u64)
    );
    assert!(verified.damaged.is_empty() && verified.segments >= 3);
    let summary = stat(folder.path()).unwrap();
    let records = summary
        .segments
        .iter()
        .map(|segment| segment.records.unwrap());
    assert_eq!(records.sum::<u32>(), 600);
    let file = folder.path().join("segment-00000002");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[300_000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let verified = verify(folder.path(), &key(), 16 << 20, |_, _| true).unwrap();
    assert_eq!((verified.records, verified.damaged.len()), (599, 1));
    assert_eq!(
        (verified.damaged[0].number, verified.damaged[0].records),
        (2, Some(1))
    );
    // The store reads it as a miss.
    let store = open(folder.path(), 64 * MIB);
    let missing = (0..600).filter(|&n| !has(&store, &hasher(), n)).count();
    assert_eq!((missing, store.disk_stats().read_errors), (1, 1));
    assert_eq!(store.disk_stats().pages, 599);
    drop(store);
    assert!(purge(folder.path(), Purge::All).unwrap().segments >= 3);
    assert!(matches!(
        stat(folder.path()).unwrap_err().kind,
        OpenErrorKind::NoStore
    ));
    let other = KeySource::secret(b"another sixteen bytes").unwrap();
    drop(DiskStore::open(options(folder.path(), 8 * MIB), &other).unwrap());
}

#[test]
fn many_threads_may_put_and_get() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), 12 * MIB);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                let hasher = hasher();
                for n in 0..3000 {
                    put_pages(store, &hasher, std::iter::once(n + thread % 2 * 1500));
                    has(store, &hasher, n.wrapping_mul(7919) % 4500);
                    if n.is_multiple_of(97) {
                        store.remove(&hasher.id(&page(n / 2)).short());
                    }
                }
            });
        }
    });
    store.flush();
    let stats = store.disk_stats();
    assert_eq!(stats.read_errors + stats.write_errors, 0, "{stats:?}");
    assert!(stats.bytes <= 12 * MIB);
}

#[test]
fn a_slow_disk_drops_pages_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let options = DiskOptions {
        pending_bytes: 64 << 10,
        ..options(folder.path(), 64 * MIB)
    };
    let store = DiskStore::open(options, &key()).unwrap();
    for n in 0..5000 {
        put(&store, &hasher(), &page(n));
    }
    let stats = store.disk_stats();
    assert!(stats.dropped_puts > 0 && stats.pending_bytes <= 64 << 10);
    assert_eq!(stats.dropped_puts + stats.insertions, 5000);
    store.flush();
    let held = (0..5000).filter(|&n| has(&store, &hasher(), n)).count() as u64;
    assert_eq!(held, stats.insertions);
}

/// Who waits for room waits for the writer's work, not for the moments at which it looks for some, and
/// loses nothing.
#[test]
fn a_caller_that_waits_for_room_waits_for_nothing_else() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let folder = folder.unwrap();
    let options = DiskOptions {
        segment_bytes: 2 * MIB,
        ..DiskOptions::new(folder.path(), 32 * MIB)
    };
    let store = DiskStore::open(options, &key()).unwrap();
    let (mut long, pages) = (0, 30_000);
    for n in 0..pages {
        if n % 16 == 0 {
            let start = std::time::Instant::now();
            assert!(store.wait_for_room(Duration::from_secs(60)));
            // The writer looks around once a second.
            long += u32::from(start.elapsed() > Duration::from_millis(300));
        }
        put(&store, &hasher(), &page(n));
    }
    assert!(long <= 3, "{long} long waits");
    let stats = store.disk_stats();
    assert_eq!((stats.insertions, stats.dropped_puts), (pages, 0));
}

#[test]
fn two_tiers_serve_what_either_has() {
    let folder = tempfile::tempdir().unwrap();
    let store = TieredStore::new(MemoryStore::new(MIB), open(folder.path(), 64 * MIB));
    let hasher = hasher();
    for n in 0..1000 {
        assert!(store.disk().wait_for_room(Duration::from_secs(60)));
        put(&store, &hasher, &page(n));
    }
    assert!((0..1000).all(|n| has(&store, &hasher, n)));
    let stats = store.stats();
    let disk = stats.disk.unwrap();
    assert_eq!(stats.hits + disk.hits, 1000);
    assert!(disk.hits > 700);
    // What only the disk has is not to be had at once, and is not read for that.
    let at_once = |n: u64| {
        let mut out = [0; PAGE_SIZE];
        store.get_at_once(&hasher.id(&page(n)).short(), &mut out) == Some(PAGE_SIZE)
            && out == page(n)
    };
    assert!(!at_once(0) && at_once(999));
    assert_eq!(store.disk().disk_stats().hits, disk.hits);
    // What came from the disk is in memory now.
    assert!(has(&store, &hasher, 999));
    assert_eq!(store.disk().disk_stats().hits, disk.hits);
    let id = hasher.id(&page(999)).short();
    assert!(store.remove(&id) && !store.contains(&id));
    assert!(store.capacity_pages() >= 64 * MIB / 4200);
}

/// A day of use in small: many guests that share pages, change some and come back, on a store far
/// smaller than what passes through it.
#[test]
fn a_day_of_use_keeps_every_bound() {
    let folder = tempfile::tempdir().unwrap();
    let capacity = 24 * MIB;
    let store = open(folder.path(), capacity);
    let hasher = hasher();
    let mut seed = 0x1234_5678_9abc_def0_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (mut known, mut asked, mut most_memory) = (0_u64, 0_u64, 0);
    for migration in 0..150_u64 {
        let image = next() % 3 * 1_000_000;
        for step in 0..400 {
            let shared = next() % 10 < 4;
            let n = if shared {
                image + next() % 800
            } else {
                10_000_000 + migration * 1000 + step
            };
            assert!(store.wait_for_room(Duration::from_secs(60)));
            asked += u64::from(shared);
            if has(&store, &hasher, n) {
                known += u64::from(shared);
            } else {
                put(&store, &hasher, &page(n));
            }
        }
        let stats = store.disk_stats();
        assert!(stats.bytes <= capacity && folder_bytes(folder.path()) <= capacity);
        if migration >= 100 {
            most_memory = most_memory.max(stats.index_bytes);
        } else if migration == 99 {
            most_memory = 0;
        }
    }
    store.flush();
    let stats = store.disk_stats();
    let amplification = stats.written_bytes as f64 / stats.put_bytes as f64;
    println!("amplification {amplification:.3}, shared {known} of {asked}, {stats:?}");
    assert!(amplification <= 1.3, "{amplification}");
    assert!(known * 100 >= asked * 75, "{known} of {asked}");
    assert_eq!(
        stats.dropped_puts + stats.read_errors + stats.write_errors,
        0
    );
    // Tables do not grow with what has passed through; small stores have a fixed part.
    assert!(most_memory <= stats.pages * INDEX_BYTES_PER_PAGE as u64 + 512 * 1024);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// The store is a map that may forget, and forgets only what it evicts.
    #[test]
    fn behaves_like_a_map(
        operations in prop::collection::vec((0..12_u8, 0..300_u16), 1..600),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let hasher = hasher();
        let value = |n: u16| {
            let length = if n.is_multiple_of(3) { PAGE_SIZE } else { 1 + usize::from(n) * 13 % PAGE_SIZE };
            page(u64::from(n))[..length].to_vec()
        };
        let mut store = open(folder.path(), 64 * MIB);
        let mut model: HashMap<u16, Vec<u8>> = HashMap::new();
        let mut out = [0; PAGE_SIZE];
        for (operation, n) in operations {
            let contents = value(n);
            let id = hasher.id(&contents);
            match operation {
                0..=4 => {
                    store.put(hasher.domain(), &id, &contents);
                    model.insert(n, contents);
                }
                5..=8 => {
                    let found = store.get(&id.short(), &mut out).map(|length| &out[..length]);
                    prop_assert_eq!(found, model.get(&n).map(|value| &value[..]));
                }
                9 => prop_assert_eq!(store.remove(&id.short()), model.remove(&n).is_some()),
                10 => store.flush(),
                _ if n < 20 => {
                    // What was removed may come back: removal is not written down.
                    drop(store);
                    store = open(folder.path(), 64 * MIB);
                    for n in 0..300 {
                        let id = hasher.id(&value(n));
                        if !model.contains_key(&n) {
                            store.remove(&id.short());
                        }
                    }
                }
                _ => {}
            }
            prop_assert_eq!(store.contains(&id.short()), model.contains_key(&n));
        }
    }
}
