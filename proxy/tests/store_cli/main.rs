//! The page store on disk as operators meet it: its section of the configuration, the gateway that opens
//! it, `skyferry store` and `skyferry seed`.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

mod seed;
mod site;

use std::fs;
use std::process::Command;
use std::time::Duration;

use skyferry::config::Config;

use site::{CONFIG, KEY, fill, folder, read, remember, said, skyferry, start};

#[test]
fn the_section_is_read_with_its_defaults() {
    let dir = folder("key_file = \"store.key\"\n");
    let config = Config::load(&dir.path().join("gateway.toml")).unwrap();
    let disk = config.store.disk.as_ref().unwrap();
    assert_eq!(disk.path, dir.path().join("store"));
    assert_eq!(disk.size_bytes, 20 << 30);
    assert_eq!(disk.ttl, Duration::from_secs(30 * 24 * 3600));
    assert_eq!(config.store.peer_index_bytes, 64 << 20);
    assert!(!format!("{config:?}").contains(KEY));
    assert!(!config.warnings.iter().any(|w| w.contains("store")));

    let dir = folder("ttl = \"36h\"\nsize = \"1GiB\"\npeer_index = \"8MiB\"\n");
    let config = Config::load(&dir.path().join("gateway.toml")).unwrap();
    let warned = config.warnings.iter().find(|w| w.starts_with("store.path"));
    assert!(warned.unwrap().contains("each start makes a fresh key"));
}

#[test]
fn bad_sections_are_refused() {
    let cases = [
        (
            "size = \"100MiB\"\n",
            "store.size: must be 256MiB to 64TiB, not 100MiB",
        ),
        ("ttl = \"5m\"\n", "store.ttl: must be 1h to 3650d, not 5m"),
        ("key_file = \"none\"\n", "none: cannot be read"),
        (
            "key_file = \"short\"\n",
            "short: holds 5 bytes; a key has at least 16",
        ),
        (
            "credential = \"store-key\"\n",
            "store.credential: CREDENTIALS_DIRECTORY is not set",
        ),
        (
            "credential = \"../key\"\n",
            "store.credential: must be the name of a credential",
        ),
        (
            "credential = \"a\"\nkey_file = \"store.key\"\n",
            "store.credential: there can be one key only",
        ),
        (
            "pth = \"x\"\n",
            "store.pth: is not a known key; known here: memory, peer_index, path",
        ),
    ];
    for (store, expected) in cases {
        let dir = folder(store);
        fs::write(dir.path().join("short"), "short").unwrap();
        let (code, said) = said(&dir, &["store", "stat"]);
        assert_eq!(code, Some(2), "{store}: {said}");
        assert!(said.contains(expected), "{store}: {said}");
    }
    let dir = folder("");
    let without = CONFIG.replace("path = \"store\"", "ttl = \"2d\"");
    fs::write(dir.path().join("gateway.toml"), without).unwrap();
    let (code, said) = said(&dir, &["store", "stat"]);
    assert_eq!(code, Some(2));
    assert!(
        said.contains("store.ttl: goes with store.path only"),
        "{said}"
    );
}

#[test]
fn a_credential_is_a_key_like_any_other() {
    let dir = folder("credential = \"store.key\"\n");
    let checked = Command::new(env!("CARGO_BIN_EXE_skyferry"))
        .args(["check-config", "gateway.toml"])
        .current_dir(dir.path())
        .env("CREDENTIALS_DIRECTORY", dir.path())
        .output()
        .unwrap();
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
}

#[test]
fn stat_verify_and_purge() {
    let dir = folder("key_file = \"store.key\"\n");
    let (code, nothing) = said(&dir, &["store", "stat"]);
    assert_eq!(code, Some(1));
    assert!(
        nothing.contains("there is no page store in this folder"),
        "{nothing}"
    );

    fill(&dir, KEY, 300);
    let output = skyferry(&dir, &["store", "stat", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["format_version"], 1);
    assert_eq!(report["tenants"][0]["tenant"], "blue");
    assert_eq!(report["tenants"][0]["sealed_pages"], 300);
    let (_, plain) = said(&dir, &["store", "stat"]);
    assert!(
        plain.contains("tenant blue: 1.2 MiB, 1 segments, 300 pages"),
        "{plain}"
    );

    let output = skyferry(&dir, &["store", "verify", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["pages"], 300);
    assert_eq!(report["damaged"].as_array().unwrap().len(), 0);

    // A flipped bit is found, and the exit code says so.
    let segment = fs::read_dir(dir.path().join("store"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let (code, verified) = said(&dir, &["store", "verify"]);
    assert_eq!(code, Some(1), "{verified}");
    assert!(verified.contains("1 pages cannot be read"), "{verified}");

    let purge = |arguments: &[&str]| said(&dir, &[&["store", "purge"], arguments].concat());
    let (code, unsure) = purge(&["--all"]);
    assert_eq!(code, Some(2));
    assert!(unsure.contains("say --yes if you mean it"), "{unsure}");
    assert_eq!(purge(&["--yes"]).0, Some(2), "all, or whose?");
    let (code, unknown) = purge(&["--tenant", "green", "--yes"]);
    assert_eq!(code, Some(2));
    assert!(
        unknown.contains("there is no tenant \"green\"; known: blue, default"),
        "{unknown}"
    );
    let (code, nameless) = purge(&["--tenant", "default", "--yes"]);
    assert_eq!(code, Some(2));
    assert!(nameless.contains("has no secret_file"), "{nameless}");
    let (code, purged) = purge(&["--tenant", "blue", "--yes"]);
    assert_eq!(code, Some(0), "{purged}");
    assert!(
        purged.contains("deleted 1 segments and 0 remembered guests, 1.2 MiB"),
        "{purged}"
    );
    assert_eq!(purge(&["--all", "--yes"]).0, Some(0));
}

#[test]
fn remembered_guests_are_listed_and_checked() {
    let dir = folder("key_file = \"store.key\"\n");
    fill(&dir, KEY, 1);
    let (code, none) = said(&dir, &["store", "stat"]);
    assert_eq!(code, Some(0));
    assert!(!none.contains("guests remembered: "), "{none}");
    remember(&dir, KEY);
    let store = dir.path().join("store");
    let is_one = |path: &std::path::PathBuf| path.to_string_lossy().contains("manifest-");
    let mut files = fs::read_dir(store)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let file = files.find(is_one).unwrap();
    let size = file.metadata().unwrap().len();
    let written = std::time::SystemTime::now() - Duration::from_secs(3 * 24 * 3600 + 60);
    let times = fs::File::options().write(true).open(&file).unwrap();
    times.set_modified(written).unwrap();

    let json = |arguments: &[&str]| {
        let output = skyferry(&dir, arguments);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), report)
    };
    let (_, report) = json(&["store", "stat", "--json"]);
    let since = written
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert_eq!(report["manifests"]["count"], 1);
    assert_eq!(report["manifests"]["bytes"], size);
    assert_eq!(report["manifests"]["oldest_unix_seconds"], since);
    assert_eq!(report["tenants"][0]["manifests"], 1);
    let (_, plain) = said(&dir, &["store", "stat"]);
    assert!(
        plain.contains("1 in 0.0 MiB, the oldest for 3 days"),
        "{plain}"
    );

    let (code, report) = json(&["store", "verify", "--json"]);
    assert_eq!((code, &report["manifests"]), (Some(0), &1.into()));
    assert_eq!(report["manifest_bytes"], size);
    let mut bytes = fs::read(&file).unwrap();
    bytes[200] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (code, report) = json(&["store", "verify", "--json"]);
    assert_eq!((code, &report["manifests"]), (Some(1), &0.into()));
    let damaged = report["damaged_manifests"][0].as_str().unwrap();
    assert!(file.to_string_lossy().ends_with(damaged), "{damaged}");
    let (code, verified) = said(&dir, &["store", "verify"]);
    assert_eq!(code, Some(1), "{verified}");
    assert!(verified.contains(": cannot be read"), "{verified}");
}

#[test]
fn a_gateway_refuses_a_store_that_it_cannot_use() {
    let dir = folder("key_file = \"store.key\"\n");
    fill(&dir, "another key of some length", 1);
    let (code, wrong) = said(&dir, &["gateway"]);
    assert_eq!(code, Some(2), "{wrong}");
    assert!(wrong.contains("it was written with another key"), "{wrong}");

    // Nor does a gateway without a key empty a store that has one.
    let dir = folder("");
    fill(&dir, KEY, 1);
    let (code, keyless) = said(&dir, &["gateway"]);
    assert_eq!(code, Some(2), "{keyless}");
    let what_to_do =
        "give it (store.key_file, store.credential), or let `skyferry store purge --all --yes`";
    assert!(keyless.contains(what_to_do), "{keyless}");

    // Another version of the format.
    let dir = folder("key_file = \"store.key\"\n");
    fill(&dir, KEY, 1);
    let superblock = dir.path().join("store/superblock");
    let mut bytes = fs::read(&superblock).unwrap();
    bytes[8] = 2;
    fs::write(&superblock, bytes).unwrap();
    let (code, newer) = said(&dir, &["gateway"]);
    assert_eq!(code, Some(2), "{newer}");
    assert!(
        newer.contains("version 2, this program reads version 1"),
        "{newer}"
    );

    let dir = folder("key_file = \"store.key\"\n");
    fs::write(dir.path().join("store"), "a file").unwrap();
    let (code, no_folder) = said(&dir, &["gateway"]);
    assert_eq!(code, Some(2), "{no_folder}");
    assert!(no_folder.contains("page store"), "{no_folder}");
}

#[test]
fn a_running_gateway_has_the_store_to_itself_and_leaves_it_whole() {
    let dir = folder("key_file = \"store.key\"\n");
    fill(&dir, KEY, 10);
    let mut gateway = start(&dir);
    assert!(read(&dir.path().join("log")).contains("page store open"));
    let (code, second) = said(&dir, &["gateway"]);
    assert_eq!(code, Some(2), "{second}");
    assert!(second.contains("another process has it open"), "{second}");
    assert_eq!(said(&dir, &["store", "verify"]).0, Some(1));
    assert_eq!(said(&dir, &["store", "purge", "--all", "--yes"]).0, Some(1));
    assert_eq!(said(&dir, &["store", "stat"]).0, Some(0));

    let pid = gateway.0.id().to_string();
    let told = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(told.success());
    assert_eq!(gateway.0.wait().unwrap().code(), Some(0));
    let (code, verified) = said(&dir, &["store", "verify"]);
    assert_eq!(code, Some(0), "{verified}");
    assert!(verified.contains("10 pages"), "{verified}");
}
