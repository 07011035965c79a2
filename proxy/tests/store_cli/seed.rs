//! `skyferry seed`: with the gateway running and without, interrupted, refused, and in trouble.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use skyferry::config::Config;
use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource};
use skyferry_dedup::{DomainKey, Hasher, PAGE_SIZE, ShortId};
use skyferry_tests::skip::lacks;
use tempfile::TempDir;

use super::site::{KEY, close, folder, read, said, skyferry, start};

const KEYED: &str = "key_file = \"store.key\"\nsize = \"256MiB\"\n";

/// A page that no other number gives.
fn page(n: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0x5c; PAGE_SIZE];
    page[..4].copy_from_slice(&n.to_le_bytes());
    page
}

/// A raw disk: pages `from..from + count` behind a hole, then a page that is cut.
fn disk(path: &Path, from: u32, count: u32) {
    let file = File::create(path).unwrap();
    let mut at = 1 << 20;
    for n in from..from + count {
        file.write_all_at(&page(n), at).unwrap();
        at += PAGE_SIZE as u64;
    }
    file.write_all_at(b"tail", at).unwrap();
}

/// Runs `skyferry seed --json` with more arguments; returns its exit code and report.
fn seed(dir: &TempDir, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = skyferry(dir, &[&["seed", "--json"], arguments].concat());
    let report = serde_json::from_slice(&output.stdout);
    let report = report.unwrap_or_else(|_| panic!("{output:?}"));
    (output.status.code(), report)
}

fn counts(report: &Value) -> [u64; 3] {
    ["new_pages", "known_pages", "zero_pages"].map(|key| report[key].as_u64().unwrap())
}

/// The ids of all that the store holds of a tenant, in order; nobody else may have it open.
fn stored(dir: &TempDir, tenant: &str) -> Vec<ShortId> {
    let key = KeySource::secret(KEY.as_bytes()).unwrap();
    let options = DiskOptions::new(dir.path().join("store"), 256 << 20);
    let store = DiskStore::open(options, &key).unwrap();
    let domain = hasher(dir, tenant);
    let mut ids = Vec::new();
    for segment in store.segments(domain.domain()) {
        store.segment_ids(segment.number, 0, usize::MAX, &mut ids);
    }
    close(dir, store);
    ids
}

fn hasher(dir: &TempDir, tenant: &str) -> Hasher {
    let config = Config::load(&dir.path().join("gateway.toml")).unwrap();
    let secret = config.tenant(tenant).unwrap().secret.clone().unwrap();
    Hasher::new(&DomainKey::derive(secret.as_bytes(), tenant))
}

/// Pages `from..from + count` and the tail of [`disk`].
fn expected(dir: &TempDir, from: u32, count: u32) -> Vec<ShortId> {
    let hasher = hasher(dir, "blue");
    let mut tail = [0; PAGE_SIZE];
    tail[..4].copy_from_slice(b"tail");
    let pages = (from..from + count).map(page).chain([tail]);
    pages.map(|page| hasher.id(&page).short()).collect()
}

#[test]
fn a_store_is_filled_while_no_gateway_runs() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 600);
    let (code, first) = seed(&dir, &["disk.raw"]);
    assert_eq!(code, Some(0), "{first}");
    assert_eq!(counts(&first), [601, 0, 256]);
    assert_eq!(first["by_gateway"], false);
    assert_eq!(first["complete"], true);
    assert_eq!(stored(&dir, "blue"), expected(&dir, 0, 600));
    let (_, again) = seed(&dir, &["disk.raw"]);
    assert_eq!(counts(&again), [0, 601, 256]);
    let (code, text) = said(&dir, &["seed", "disk.raw"]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains("0 new, 601 already there, 256 zero"),
        "{text}"
    );
    assert!(text.contains("of 256.0 MiB"), "{text}");
    // Nothing is left to go on with.
    assert!(!dir.path().join("store/seed.state").exists());
}

#[test]
fn a_running_gateway_takes_the_pages() {
    let dir = folder(KEYED);
    let mut gateway = start(&dir);
    let socket = dir.path().join("store/seed.sock");
    let mode = socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    disk(&dir.path().join("disk.raw"), 0, 3000);
    let (code, first) = seed(&dir, &["disk.raw", "--tenant", "blue"]);
    assert_eq!(code, Some(0), "{first}");
    assert_eq!(counts(&first), [3001, 0, 256]);
    assert_eq!(first["by_gateway"], true);
    assert_eq!(counts(&seed(&dir, &["disk.raw"]).1), [0, 3001, 256]);
    let log = read(&dir.path().join("log"));
    assert!(
        log.contains("`skyferry seed` has ended") && log.contains("3001"),
        "{log}"
    );

    stop(&mut gateway.0);
    assert!(!socket.exists());
    assert_eq!(stored(&dir, "blue"), expected(&dir, 0, 3000));
}

#[test]
fn a_gateway_that_was_killed_is_not_waited_for() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 10);
    drop(start(&dir));
    assert!(dir.path().join("store/seed.sock").exists());
    let (code, report) = seed(&dir, &["disk.raw"]);
    assert_eq!(
        (code, &report["by_gateway"]),
        (Some(0), &Value::Bool(false))
    );
    let _gateway = start(&dir);
    assert_eq!(counts(&seed(&dir, &["disk.raw"]).1), [0, 11, 256]);
}

/// Asks for an end, and waits for it.
fn stop(child: &mut Child) -> Option<i32> {
    let pid = child.id().to_string();
    let told = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(told.success());
    child.wait().unwrap().code()
}

/// Starts a slow `skyferry seed`, and waits until it has noted how far it is.
fn begin(dir: &TempDir, path: &str) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_skyferry"))
        .args(["seed", "--config", "gateway.toml", "--rate", "4MiB", path])
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .stderr(File::create(dir.path().join("seed.log")).unwrap())
        .spawn()
        .unwrap();
    let state = dir.path().join("store/seed.state");
    let end = Instant::now() + Duration::from_secs(20);
    while !state.exists() {
        assert!(
            Instant::now() < end,
            "{}",
            read(&dir.path().join("seed.log"))
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// What is read of 8000 pages and a tail by `skyferry seed` after an earlier run of it was ended by `end`.
fn interrupted(dir: &TempDir, end: impl FnOnce(&mut Child)) {
    disk(&dir.path().join("disk.raw"), 0, 8000);
    let mut child = begin(dir, "disk.raw");
    end(&mut child);
    let output = skyferry(dir, &["seed", "--json", "disk.raw"]);
    let complaints = String::from_utf8(output.stderr).unwrap();
    assert!(complaints.contains("resumed at"), "{complaints}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let read = report["read_bytes"].as_u64().unwrap();
    let all = 8001 * PAGE_SIZE as u64;
    assert!(read < all * 9 / 10, "{read} of {all} bytes");
    // The end is the end: once more means all of it, and all of it is there.
    assert_eq!(counts(&seed(dir, &["disk.raw"]).1), [0, 8001, 256]);
}

#[test]
fn what_was_killed_goes_on_where_it_was() {
    let dir = folder(KEYED);
    interrupted(&dir, |child| {
        child.kill().unwrap();
        child.wait().unwrap();
    });
    let ids: HashSet<_> = stored(&dir, "blue").into_iter().collect();
    assert_eq!(ids, expected(&dir, 0, 8000).into_iter().collect());
}

#[test]
fn what_was_interrupted_goes_on_where_it_was() {
    let dir = folder(KEYED);
    let _gateway = start(&dir);
    interrupted(&dir, |child| {
        assert_eq!(stop(child), Some(1));
        let log = read(&dir.path().join("seed.log"));
        assert!(log.contains("the same command goes on there"), "{log}");
    });
}

#[test]
fn a_gateway_that_ends_meanwhile_is_told_of() {
    let dir = folder(KEYED);
    let mut gateway = start(&dir);
    disk(&dir.path().join("disk.raw"), 0, 8000);
    let mut child = begin(&dir, "disk.raw");
    assert_eq!(stop(&mut gateway.0), Some(0));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let log = read(&dir.path().join("seed.log"));
    assert!(log.contains("the gateway stops"), "{log}");
    assert!(log.contains("goes on near there"), "{log}");
}

#[test]
fn a_changed_disk_or_an_emptied_store_is_begun_anew() {
    let dir = folder(KEYED);
    let path = dir.path().join("disk.raw");
    disk(&path, 0, 8000);
    let kill = |mut child: Child| {
        child.kill().unwrap();
        child.wait().unwrap();
    };
    kill(begin(&dir, "disk.raw"));
    let all = 8000 * PAGE_SIZE as u64 + 4;
    let read_bytes = |arguments: &[&str]| {
        let (_, report) = seed(&dir, arguments);
        report["read_bytes"].as_u64().unwrap()
    };
    disk(&path, 0, 8000);
    assert_eq!(read_bytes(&["disk.raw"]), all);

    kill(begin(&dir, "disk.raw"));
    assert_eq!(read_bytes(&["--restart", "disk.raw"]), all);

    kill(begin(&dir, "disk.raw"));
    let purged = said(&dir, &["store", "purge", "--tenant", "blue", "--yes"]);
    assert_eq!(purged.0, Some(0), "{purged:?}");
    let (_, report) = seed(&dir, &["disk.raw"]);
    assert_eq!(counts(&report)[0], 8001);

    kill(begin(&dir, "disk.raw"));
    fs::remove_dir_all(dir.path().join("store")).unwrap();
    assert_eq!(counts(&seed(&dir, &["disk.raw"]).1)[0], 8001);
}

#[test]
fn folders_are_read_and_what_cannot_be_is_named() {
    let dir = folder(KEYED);
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("lib/deep")).unwrap();
    for n in 0..50 {
        let file = tree.join(format!("lib/{n}"));
        fs::write(file, [page(2 * n), page(2 * n + 1)].concat()).unwrap();
    }
    fs::write(tree.join("lib/deep/last"), "a few bytes").unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    symlink("..", tree.join("lib/loop")).unwrap();
    let (code, report) = seed(&dir, &["tree"]);
    assert_eq!((code, counts(&report)), (Some(0), [101, 0, 0]));

    // Too deep is what even root cannot read.
    fs::create_dir_all(tree.join("d/".repeat(140))).unwrap();
    let output = skyferry(&dir, &["seed", "tree"]);
    assert_eq!(output.status.code(), Some(1));
    let complaints = String::from_utf8(output.stderr).unwrap();
    assert!(complaints.contains("tree/d/d"), "{complaints}");
    assert!(
        complaints.contains("1 files or folders could not be read"),
        "{complaints}"
    );
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("101 already there"), "{said}");
}

#[test]
fn orders_that_make_no_sense_are_refused() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 10);
    let refused = |arguments: &[&str], code: i32, expected: &str| {
        let (exit, text) = said(&dir, &[&["seed"], arguments].concat());
        assert_eq!(exit, Some(code), "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
    };
    refused(&["none"], 2, "none: No such file");
    refused(&["/dev/null"], 2, "it is no file, no folder and no disk");
    refused(
        &["--tenant", "green", "disk.raw"],
        2,
        "known: blue, default",
    );
    refused(
        &["--tenant", "default", "disk.raw"],
        2,
        "has no secret_file",
    );
    refused(
        &["--rate", "fast", "disk.raw"],
        2,
        "must be a size such as 50MiB",
    );
    refused(
        &["--rate", "0", "disk.raw"],
        2,
        "must be a size such as 50MiB",
    );
    fs::write(dir.path().join("vm.vmdk"), "KDMV and more").unwrap();
    refused(&["vm.vmdk"], 2, "say --format vmdk if you trust it");
    assert!(!dir.path().join("store").exists());

    let config = read(&dir.path().join("gateway.toml"));
    let write = |text: &str| fs::write(dir.path().join("gateway.toml"), text).unwrap();
    write(&config.replace("key_file = \"store.key\"", ""));
    refused(&["disk.raw"], 1, "set store.key_file");
    write(&config.replace("path = \"store\"", "").replace(KEYED, ""));
    refused(&["disk.raw"], 2, "store.path is missing");
    write(&config.replace("secret_file = \"blue.secret\"", ""));
    refused(&["disk.raw"], 2, "no tenant has a secret_file");
    let second = "[[tenant]]\nname = \"red\"\nsecret_file = \"store.key\"\n[store]";
    write(&config.replace("[store]", second));
    refused(&["disk.raw"], 2, "--tenant NAME, one of blue, red");
}

#[test]
fn a_gateway_with_other_tenants_refuses() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 10);
    let _gateway = start(&dir);
    let config = read(&dir.path().join("gateway.toml"));
    let write = |text: &str| fs::write(dir.path().join("gateway.toml"), text).unwrap();
    write(&config.replace("name = \"blue\"", "name = \"red\""));
    let (code, text) = said(&dir, &["seed", "disk.raw"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("it has no tenant \"red\""), "{text}");
    write(&config.replace("blue.secret", "other.secret"));
    fs::write(dir.path().join("other.secret"), "x".repeat(32)).unwrap();
    let (code, text) = said(&dir, &["seed", "disk.raw"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("has another secret there"), "{text}");
}

#[test]
fn a_store_that_is_in_use_otherwise_is_left_alone() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 10);
    let key = KeySource::secret(KEY.as_bytes()).unwrap();
    let options = DiskOptions::new(dir.path().join("store"), 256 << 20);
    let _store = DiskStore::open(options, &key).unwrap();
    let (code, text) = said(&dir, &["seed", "disk.raw"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("by no gateway that takes pages"), "{text}");
}

#[test]
fn more_than_the_store_holds_is_warned_of_and_takes_no_more_than_that() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 80_000);
    let (code, text) = said(&dir, &["seed", "disk.raw"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.contains("what is read last throws out what was read first"),
        "{text}"
    );
    assert!(text.contains("80001 new"), "{text}");
    let files = fs::read_dir(dir.path().join("store")).unwrap();
    let bytes: u64 = files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(bytes <= 256 << 20, "{bytes}");
}

/// A qcow2 image of `raw`; `None`, with a word about it, where QEMU's tools are missing.
fn qcow2(dir: &TempDir, raw: &str) -> Option<String> {
    let name = raw.replace(".raw", ".qcow2");
    let converted = Command::new("qemu-img")
        .args(["convert", "-c", "-f", "raw", "-O", "qcow2", raw, &name])
        .current_dir(dir.path())
        .status();
    if !converted.is_ok_and(|status| status.success()) {
        lacks("qemu-img (apt-get install qemu-utils)");
        return None;
    }
    Some(name)
}

/// Command lines of processes that have `text` in them.
fn processes_with(text: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .filter(|line| line.contains(text))
        .collect()
}

#[test]
fn an_image_gives_the_pages_of_its_disk_and_leaves_no_process_behind() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 8000);
    let Some(image) = qcow2(&dir, "disk.raw") else {
        return;
    };
    let path = fs::canonicalize(dir.path().join(&image)).unwrap();
    let path = path.to_str().unwrap();
    let mut child = begin(&dir, &image);
    assert_eq!(processes_with(path).len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while !processes_with(path).is_empty() {
        assert!(Instant::now() < end, "qemu-nbd lives on");
        std::thread::sleep(Duration::from_millis(20));
    }

    let output = skyferry(&dir, &["seed", &image]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let complaints = String::from_utf8(output.stderr).unwrap();
    assert!(complaints.contains("resumed at"), "{complaints}");
    assert!(processes_with(path).is_empty());
    // The disk, and the image of it, are the same pages.
    assert_eq!(counts(&seed(&dir, &["disk.raw"]).1), [0, 8001, 256]);
    // As bytes they are not.
    let (_, raw) = seed(&dir, &["--format", "raw", &image]);
    assert!(counts(&raw)[0] > 0, "{raw}");
}

#[test]
fn an_image_needs_its_reader() {
    let dir = folder(KEYED);
    fs::write(dir.path().join("disk.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_skyferry"))
        .args(["seed", "--config", "gateway.toml", "disk.qcow2"])
        .current_dir(dir.path())
        .env("PATH", dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complaints = String::from_utf8(output.stderr).unwrap();
    assert!(complaints.contains("qemu-nbd is missing"), "{complaints}");
    assert!(complaints.contains("qemu-utils"), "{complaints}");
}

/// A file system of 8 MiB for a store that may take 256. Needs the right to mount.
#[test]
fn a_disk_that_fills_up_is_told_of_and_with_room_it_goes_on() {
    let dir = folder(KEYED);
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    let mount = |options: &str| {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "none"]);
        let status = command.arg(&store).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if !mount("size=8m") {
        lacks("the right to mount a file system (root; CAP_SYS_ADMIN in a container)");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        disk(&dir.path().join("disk.raw"), 0, 8000);
        let (code, text) = said(&dir, &["seed", "disk.raw"]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("No space left"), "{text}");
        assert!(mount("remount,size=64m"));
        let (code, report) = seed(&dir, &["disk.raw"]);
        assert_eq!(code, Some(0), "{report}");
        let [new, known, _] = counts(&report);
        assert!(new > 0 && new + known == 8001, "{report}");
    });
    let unmounted = Command::new("umount").arg(&store).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    result.unwrap();
}

/// What root writes while the gateway is away, the gateway could not open.
#[test]
fn a_store_of_another_user_is_left_to_that_user() {
    let dir = folder(KEYED);
    disk(&dir.path().join("disk.raw"), 0, 10);
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    if std::os::unix::fs::chown(&store, Some(65_534), None).is_err() {
        lacks("the right to give a folder away (root)");
        return;
    }
    let (code, text) = said(&dir, &["seed", "disk.raw"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("belongs to user 65534"), "{text}");
    assert_eq!(fs::read_dir(&store).unwrap().count(), 0);
}
