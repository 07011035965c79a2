//! A site: a folder with all that a gateway needs, and the command run in it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use skyferry::config::Config;
use skyferry::pki;
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource};
use skyferry_dedup::{
    ChannelEncoder, ChannelKind, DomainKey, EncodeOptions, Flush, Hasher, PageStore,
};
use tempfile::TempDir;

pub(crate) const CONFIG: &str = r#"
[gateway]
name = "edge-a"
[wan]
listen = "127.0.0.1:0"
[tls]
ca = "ca.pem"
cert = "edge-a.pem"
key = "edge-a.key"
[[peer]]
name = "edge-b"
[[tenant]]
name = "blue"
secret_file = "blue.secret"
[store]
path = "store"
"#;

pub(crate) const KEY: &str = "0123456789abcdef0123456789abcdef";

/// A folder with certificates, a tenant's secret and a key, and the configuration with `store` added.
pub(crate) fn folder(store: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    pki::issue(dir.path(), "edge-a", &[], pki::LEAF_DAYS).unwrap();
    for file in ["blue.secret", "store.key"] {
        let file = dir.path().join(file);
        fs::write(&file, KEY).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    fs::write(dir.path().join("gateway.toml"), format!("{CONFIG}{store}")).unwrap();
    dir
}

pub(crate) fn skyferry(dir: &TempDir, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skyferry"));
    command
        .args(arguments)
        .args(["--config", "gateway.toml"])
        .current_dir(dir.path())
        .env_remove("SKYFERRY_LOG")
        .env_remove("CREDENTIALS_DIRECTORY")
        .output()
        .unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

/// Runs the command and returns its exit code and all that it said.
pub(crate) fn said(dir: &TempDir, arguments: &[&str]) -> (Option<i32>, String) {
    let output = skyferry(dir, arguments);
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    (output.status.code(), said)
}

/// Closes a store that this process had open, for another process to open. A child that another test is just
/// starting has the lock, too, until it runs its own program.
pub(crate) fn close(dir: &TempDir, store: DiskStore) {
    drop(store);
    let lock = fs::File::open(dir.path().join("store/lock")).unwrap();
    lock.lock().unwrap();
}

fn open(dir: &TempDir, key: &str) -> DiskStore {
    let key = KeySource::secret(key.as_bytes()).unwrap();
    let options = DiskOptions::new(dir.path().join("store"), 256 << 20);
    DiskStore::open(options, &key).unwrap()
}

/// The key of tenant blue.
fn blue(dir: &TempDir) -> DomainKey {
    let config = Config::load(&dir.path().join("gateway.toml")).unwrap();
    let secret = config.tenant("blue").unwrap().secret.clone().unwrap();
    DomainKey::derive(secret.as_bytes(), "blue")
}

/// Keeps in the store with this key what a guest of tenant blue held.
pub(crate) fn remember(dir: &TempDir, key: &str) {
    let stream = SyntheticStream::builder().blocks(&[("pc.ram", 20)]).build();
    let options = EncodeOptions::default();
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &blue(dir), options);
    let encoded = encoder.encode(&stream.bytes, Flush::Hard, None, None);
    assert!(encoded.unwrap().frame.is_some());
    let manifest = encoder.take_table().into_manifest().unwrap();
    let store = open(dir, key);
    store.save_manifest("edge-b", &manifest).unwrap();
    close(dir, store);
}

/// Puts `pages` pages of tenant blue into the store with this key.
pub(crate) fn fill(dir: &TempDir, key: &str, pages: u32) {
    let store = open(dir, key);
    let hasher = Hasher::new(&blue(dir));
    for n in 0..pages {
        let mut page = [7; 4096];
        page[..4].copy_from_slice(&n.to_le_bytes());
        store.put(hasher.domain(), &hasher.id(&page), &page);
    }
    store.flush();
    close(dir, store);
}

pub(crate) struct Gateway(pub(crate) Child);

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a gateway and waits until it is ready.
pub(crate) fn start(dir: &TempDir) -> Gateway {
    let log = fs::File::create(dir.path().join("log")).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_skyferry"))
        .args(["gateway", "--config", "gateway.toml"])
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut gateway = Gateway(child);
    let end = Instant::now() + Duration::from_secs(20);
    while !read(&dir.path().join("log")).contains("gateway ready") {
        assert_eq!(gateway.0.try_wait().unwrap(), None, "the gateway has ended");
        assert!(Instant::now() < end, "the gateway does not get ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    gateway
}

pub(crate) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}
