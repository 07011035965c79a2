//! The store on disk when things break: processes, files and the disk itself.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource, OpenErrorKind, verify};
use skyferry_dedup::{DiskState, DomainKey, Hasher, PAGE_SIZE, PageStore};
use skyferry_tests::skip::lacks;

const MIB: u64 = 1 << 20;
const FOLDER: &str = "SKYFERRY_TEST_STORE";
const FIRST: &str = "SKYFERRY_TEST_FIRST";

fn hasher() -> Hasher {
    Hasher::new(&DomainKey::from_bytes([5; 32]))
}

fn key() -> KeySource {
    KeySource::secret(b"sixteen bytes or more").expect("long enough")
}

/// A folder in memory if possible: what is broken here is not the disk, which would have to sync.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    folder.expect("a folder")
}

fn options(folder: &Path) -> DiskOptions {
    DiskOptions {
        segment_bytes: MIB,
        chunk_bytes: 64 << 10,
        retry: Duration::from_millis(50),
        ..DiskOptions::new(folder, 32 * MIB)
    }
}

/// A process that another test has just started holds our lock, too, until it runs its own program.
fn open(folder: &Path) -> DiskStore {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match DiskStore::open(options(folder), &key()) {
            Err(error) if matches!(error.kind, OpenErrorKind::Locked) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => return opened.expect("a store"),
        }
    }
}

/// Contents that no other number gives, of any length.
fn value(n: u64) -> Vec<u8> {
    let length = if n.is_multiple_of(5) {
        1 + (n as usize * 977) % PAGE_SIZE
    } else {
        PAGE_SIZE
    };
    let mut value = vec![0; length];
    let mut output = blake3::Hasher::new_derive_key("test page");
    output.update(&n.to_le_bytes());
    output.finalize_xof().fill(&mut value);
    value
}

fn put(store: &DiskStore, n: u64) {
    let contents = value(n);
    store.put(hasher().domain(), &hasher().id(&contents), &contents);
}

/// Whether the store has `n`; what it returns has to be right.
fn has(store: &DiskStore, n: u64) -> bool {
    let expected = value(n);
    let mut out = [0; PAGE_SIZE];
    let found = store.get(&hasher().id(&expected).short(), &mut out);
    found.is_some_and(|length| {
        assert_eq!(out[..length], expected);
        true
    })
}

/// Not a test: what the next one starts in a process of its own, to kill it. It puts pages for ever and
/// tells from time to time up to where they have been written.
#[test]
fn child_that_writes() {
    let (Ok(folder), Ok(first)) = (std::env::var(FOLDER), std::env::var(FIRST)) else {
        return;
    };
    let store = open(Path::new(&folder));
    for n in first.parse().unwrap().. {
        assert!(store.wait_for_room(Duration::from_secs(60)));
        put(&store, n);
        if n % 211 == 210 {
            store.flush();
            println!("\nwritten {}", n + 1);
        }
    }
}

/// Starts the child, lets it write for a while, kills it; returns up to where it had written.
fn write_and_die(folder: &Path, first: u64, pause: Duration) -> u64 {
    let mut child = Command::new(std::env::current_exe().expect("a child"))
        .args(["--exact", "child_that_writes", "--nocapture"])
        .env(FOLDER, folder)
        .env(FIRST, first.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let lines = BufReader::new(child.stdout.take().expect("a child")).lines();
    let told = std::thread::spawn(move || {
        let told = lines.map_while(Result::ok);
        let told = told.filter_map(|line| line.strip_prefix("written ")?.parse().ok());
        told.last()
    });
    std::thread::sleep(pause);
    child.kill().expect("a child");
    child.wait().expect("a child");
    told.join().expect("a child").unwrap_or(first)
}

#[test]
fn a_kill_at_any_moment_loses_only_what_was_not_written() {
    let folder = folder();
    let mut first = 0;
    let mut seed = 88_172_645_463_325_252_u64;
    for trial in 0..24 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let pause = Duration::from_micros(5_000 + seed % 150_000);
        let written = write_and_die(folder.path(), first, pause);
        let store = open(folder.path());
        // The store holds about 7000 pages; what was written last is there.
        for n in written.saturating_sub(3000)..written {
            assert!(has(&store, n), "trial {trial}: {n} of {written}");
        }
        let stats = store.disk_stats();
        assert!(
            stats.bytes <= 32 * MIB && stats.read_errors == 0,
            "{stats:?}"
        );
        drop(store);
        // What was looked at would be kept before what is written next; if there was anything.
        let _ = std::fs::remove_file(folder.path().join("uses"));
        if trial % 8 == 7 {
            let verified = verify(folder.path(), &key(), 16 << 20, |_, _| true).unwrap();
            assert!(verified.damaged.is_empty(), "{verified:?}");
        }
        first = written;
    }
    assert!(first > 1000, "the child wrote {first} pages only");
}

/// The only segment of a store that holds values 0 to 300, and the store's folder. Not sealed when
/// `cut`.
fn segment_of_300(cut: bool) -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let wide = DiskOptions {
        segment_bytes: 2 * MIB,
        ..options(folder.path())
    };
    let store = DiskStore::open(wide, &key()).expect("a store");
    for n in 0..300 {
        assert!(store.wait_for_room(Duration::from_secs(60)));
        put(&store, n);
    }
    store.flush();
    let path = folder.path().join("segment-00000001");
    let open = std::fs::read(&path).expect("a store");
    drop(store);
    if cut {
        std::fs::write(&path, open).expect("a store");
    }
    (folder, path)
}

#[test]
fn a_torn_end_costs_the_chunks_it_hits() {
    for cut in [false, true] {
        let (folder, path) = segment_of_300(cut);
        let good = std::fs::read(&path).unwrap();
        let mut most = 300;
        // A cut in the footer costs no page, one in the records those behind it.
        for length in (0..good.len()).rev().step_by(37_123) {
            std::fs::write(&path, &good[..length]).unwrap();
            let store = open(folder.path());
            let held = (0..300).take_while(|&n| has(&store, n)).count();
            assert!((held..300).all(|n| !has(&store, n as u64)), "a hole");
            assert!(held <= most);
            most = held;
            // 16 pages and more for a chunk of 64 KiB.
            assert!(held + 70 >= 300 * length / good.len(), "{held} at {length}");
            drop(store);
        }
        assert_eq!(most, 0);
    }
}

#[test]
fn no_changed_bit_gives_other_contents() {
    for cut in [false, true] {
        let (folder, path) = segment_of_300(cut);
        let good = std::fs::read(&path).unwrap();
        let places = [
            0, 9, 13, 40, 60, 90, 100, 130, 135, 150, 200, 1000, 70_000, 500_000,
        ];
        let from_end = [1, 9, 20, 30, 40, 100, 2000].map(|back| good.len() - back);
        for at in places.into_iter().chain(from_end) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x20;
            std::fs::write(&path, &bytes).unwrap();
            let store = open(folder.path());
            let held = (0..300).filter(|&n| has(&store, n)).count();
            // Damage of a header takes the segment, else a chunk's table what is behind it.
            assert!(at < 80_000 || held >= 100, "{held} after byte {at}");
            drop(store);
        }
    }
}

/// Damage while the store is open: a miss, and a segment that fails again and again is given up.
#[test]
fn a_segment_of_no_use_is_deleted_and_counted_and_an_empty_one_is_none() {
    let (folder, path) = segment_of_300(false);
    let mut segment = std::fs::read(&path).unwrap();
    segment[20] ^= 1;
    std::fs::write(&path, &segment).unwrap();
    let empty = path.with_file_name("segment-00000077");
    std::fs::write(&empty, &segment[..10]).unwrap();
    let stats = open(folder.path()).disk_stats();
    assert_eq!((stats.read_errors, stats.pages), (1, 0));
    assert!(!path.exists() && !empty.exists());
    assert_eq!(open(folder.path()).disk_stats().read_errors, 0);
}

#[test]
fn read_errors_are_misses_and_take_bad_segments_away() {
    let (folder, path) = segment_of_300(false);
    let store = open(folder.path());
    assert!(has(&store, 0));
    let file = File::options().write(true).open(&path).unwrap();
    let size = file.metadata().unwrap().len();
    // The first half of the records.
    file.write_all_at(&vec![0; size as usize / 2], 3000)
        .unwrap();
    // From the end: the writer takes the segment away while its front is read.
    let held = (0..300).rev().filter(|&n| has(&store, n)).count();
    assert!((100..200).contains(&held), "{held}");
    store.flush();
    assert!(!path.exists());
    let stats = store.disk_stats();
    assert!(stats.read_errors >= 8 && stats.pages == 0, "{stats:?}");
    put(&store, 0);
    assert!(has(&store, 0));
}

/// Puts until the store's state is as wanted.
fn put_until(store: &DiskStore, first: &mut u64, degraded: bool) {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        put(store, *first);
        *first += 1;
        if first.is_multiple_of(16) {
            store.flush();
        }
        let state = store.disk_stats().state;
        if matches!(state, DiskState::Degraded(_)) == degraded {
            return;
        }
        assert!(Instant::now() < end, "still {state:?}");
    }
}

#[test]
fn a_folder_that_goes_away_degrades_the_store_until_it_is_back() {
    let parent = folder();
    let folder = parent.path().join("store");
    let store = open(&folder);
    let mut next = 0;
    for _ in 0..300 {
        put(&store, next);
        next += 1;
    }
    store.flush();
    let away = parent.path().join("away");
    std::fs::rename(&folder, &away).unwrap();
    put_until(&store, &mut next, true);
    let DiskState::Degraded(reason) = store.disk_stats().state else {
        unreachable!("it was degraded");
    };
    assert!(reason.contains("No such file"), "{reason}");
    // What is there is served, and nobody waits.
    assert!((0..50).any(|n| has(&store, n)));
    let stats = store.disk_stats();
    assert!(stats.write_errors > 0 && stats.dropped_puts > 0);
    std::fs::rename(&away, &folder).unwrap();
    put_until(&store, &mut next, false);
    let back = next;
    put(&store, next);
    store.flush();
    assert!(has(&store, back));
    drop(store);
    let store = open(&folder);
    assert!(has(&store, back));
    assert_eq!(store.disk_stats().read_errors, 0);
}

/// A file system of 4 MiB for a store that may take 32. Needs the right to mount.
#[test]
fn a_full_disk_degrades_the_store_and_harms_nothing() {
    let folder = folder();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "none"])
        .arg(folder.path())
        .stderr(Stdio::null())
        .status();
    if !mount.is_ok_and(|status| status.success()) {
        lacks("the right to mount a file system (root; CAP_SYS_ADMIN in a container)");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let store = open(folder.path());
        let mut next = 0;
        put_until(&store, &mut next, true);
        let DiskState::Degraded(reason) = store.disk_stats().state else {
            unreachable!("it was degraded");
        };
        assert!(reason.contains("No space left"), "{reason}");
        let held = (0..next).filter(|&n| has(&store, n)).count();
        assert!(held > 500, "{held} of {next}");
        // After a restart, too, although not even the superblock can be written.
        drop(store);
        let store = open(folder.path());
        assert!(matches!(store.disk_stats().state, DiskState::Degraded(_)));
        assert!((0..next).filter(|&n| has(&store, n)).count() > 500);
        assert_eq!(store.disk_stats().read_errors, 0);
    });
    let unmounted = Command::new("umount").arg(folder.path()).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    result.unwrap();
}

/// More segments than files may be open.
#[test]
fn files_are_opened_and_closed_as_needed() {
    let folder = folder();
    let small = DiskOptions {
        segment_bytes: 64 << 10,
        ..options(folder.path())
    };
    let store = DiskStore::open(small, &key()).unwrap();
    for n in 0..6000 {
        assert!(store.wait_for_room(Duration::from_secs(60)));
        put(&store, n);
    }
    store.flush();
    assert!(store.disk_stats().segments > 300);
    for round in 0..3 {
        for n in 0..2000 {
            assert!(has(&store, (n * 1009 + round) % 6000));
        }
    }
    let open = Path::new("/proc/self/fd").read_dir().unwrap().count();
    assert!(open < 400, "{open} files are open");
}
