//! Manifests on disk: what is whole is found again, all else is as if it had never been.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::disk::{DiskOptions, DiskStore, KeySource, Purge, Verified, purge};
use skyferry_dedup::disk::{stat, verify};
use skyferry_dedup::{
    ChannelEncoder, ChannelKind, DomainKey, EncodeOptions, Flush, Manifest, ManifestId,
};

fn domain(tenant: &str) -> DomainKey {
    DomainKey::derive(b"secret", tenant)
}

/// What a guest of so many pages held.
fn manifest(tenant: &str, pages: u64) -> Manifest {
    let blocks = [("pc.ram", pages), ("vga.vram", 16)];
    let stream = SyntheticStream::builder().blocks(&blocks).build();
    let options = EncodeOptions::default();
    let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, &domain(tenant), options);
    let mut rest = &stream.bytes[..];
    loop {
        let encoded = encoder.encode(rest, Flush::Hard, None, None).unwrap();
        if encoded.consumed == 0 && encoded.frame.is_none() {
            return encoder.take_table().into_manifest().unwrap();
        }
        rest = &rest[encoded.consumed..];
    }
}

fn key() -> KeySource {
    KeySource::secret(b"a key of the store's").unwrap()
}

fn open(folder: &Path) -> DiskStore {
    let options = DiskOptions {
        ttl: Some(Duration::from_secs(3600)),
        ..DiskOptions::new(folder, 16 << 20)
    };
    DiskStore::open(options, &key()).unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let is_one = |path: &PathBuf| path.to_string_lossy().contains("manifest");
    entries.filter(is_one).collect()
}

fn loaded(store: &DiskStore, most_bytes: u64) -> Vec<(String, ManifestId)> {
    let loaded = store.load_manifests(most_bytes).into_iter();
    loaded.map(|(peer, m)| (peer, m.id())).collect()
}

#[test]
fn manifests_are_found_again_the_latest_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (small, large) = (manifest("t", 600), manifest("t", 2000));
    store.save_manifest("edge-b", &small).unwrap();
    let before = SystemTime::now() - Duration::from_secs(60);
    let file = fs::File::open(&files(folder.path())[0]).unwrap();
    file.set_modified(before).unwrap();
    store.save_manifest("edge-c", &large).unwrap();
    drop(store);

    let store = open(folder.path());
    let both = [("edge-c".into(), large.id()), ("edge-b".into(), small.id())];
    assert_eq!(loaded(&store, 1 << 20), both);
    let again = store.load_manifests(1 << 20);
    assert_eq!(again[0].1.places(), large.places());
    assert_eq!(
        (again[0].1.domain(), again[0].1.bytes()),
        (large.domain(), large.bytes())
    );
    // Those for which there is no room are deleted.
    assert_eq!(loaded(&store, large.bytes() as u64), both[..1]);
    assert_eq!(files(folder.path()).len(), 1);
    store.delete_manifest("edge-c", large.id());
    assert!(files(folder.path()).is_empty());
}

#[test]
fn what_is_damaged_cut_or_too_old_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.save_manifest("edge-b", &manifest("t", 600)).unwrap();
    let path = files(folder.path()).pop().unwrap();
    let good = fs::read(&path).unwrap();
    let mut bad: Vec<Vec<u8>> = [0, 1, 95, 96, 111, 112, 4000, good.len() - 1]
        .map(|length| good[..length].to_vec())
        .into();
    bad.extend((0..130).chain([5000, good.len() - 1]).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x20;
        bytes
    }));
    bad.push([&good[..], b"x"].concat());
    for bytes in bad {
        fs::write(&path, &bytes).unwrap();
        assert_eq!(loaded(&store, 1 << 20), []);
        assert!(files(folder.path()).is_empty());
    }
    // Written before a crash that took the rest.
    fs::write(folder.path().join("manifest.new"), &good[..500]).unwrap();
    fs::write(&path, &good).unwrap();
    assert_eq!(loaded(&store, 1 << 20).len(), 1);
    assert_eq!(files(folder.path()), std::slice::from_ref(&path));
    let old = SystemTime::now() - Duration::from_secs(4000);
    fs::File::open(&path).unwrap().set_modified(old).unwrap();
    assert_eq!(loaded(&store, 1 << 20), []);
}

#[test]
fn a_key_that_is_gone_and_a_purge_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (one, other) = (manifest("t", 600), manifest("u", 600));
    store.save_manifest("edge-b", &one).unwrap();
    store.save_manifest("edge-b", &other).unwrap();
    drop(store);
    purge(folder.path(), Purge::Domain(domain("t").id())).unwrap();
    let store = open(folder.path());
    assert_eq!(loaded(&store, 1 << 20), [("edge-b".into(), other.id())]);
    drop(store);
    purge(folder.path(), Purge::All).unwrap();
    assert!(files(folder.path()).is_empty());

    let fresh = || {
        DiskStore::open(
            DiskOptions::new(folder.path(), 16 << 20),
            &KeySource::ephemeral(),
        )
    };
    fresh().unwrap().save_manifest("edge-b", &one).unwrap();
    assert_eq!(loaded(&fresh().unwrap(), 1 << 20), []);
    assert!(files(folder.path()).is_empty());
}

fn verified(folder: &Path) -> Verified {
    let (mut last, mut all) = (0, 0);
    let verified = verify(folder, &key(), 16 << 20, |read, total| {
        (last, all) = (read, total);
        true
    });
    assert_eq!(last, all);
    verified.unwrap()
}

#[test]
fn stat_lists_them_and_verify_opens_each() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let kept = [("t", 600), ("u", 2000), ("t", 900)].map(|(tenant, pages)| {
        store
            .save_manifest("edge-b", &manifest(tenant, pages))
            .unwrap();
        let of_tenant = domain(tenant).id();
        let is_it = |path: &PathBuf| fs::read(path).unwrap()[32..48] == *of_tenant.as_bytes();
        (
            of_tenant,
            files(folder.path()).into_iter().filter(is_it).count(),
        )
    });
    assert_eq!(kept.map(|(_, count)| count), [1, 1, 2]);
    // A second between each and the next, the largest file being the oldest.
    let mut by_size: Vec<(u64, PathBuf)> = files(folder.path())
        .into_iter()
        .map(|path| (path.metadata().unwrap().len(), path))
        .collect();
    by_size.sort_unstable_by(|a, b| b.cmp(a));
    for (second, (_, path)) in (1..).zip(&by_size) {
        let written = UNIX_EPOCH + Duration::from_secs(1_700_000_000 + second);
        fs::File::open(path).unwrap().set_modified(written).unwrap();
    }
    // One that is being written is none yet.
    fs::write(folder.path().join("manifest.new"), b"SKYFMANI").unwrap();
    let listed = stat(folder.path()).unwrap().manifests;
    let of = |tenant| domain(tenant).id();
    let told: Vec<_> = listed
        .iter()
        .map(|m| (m.domain, m.bytes, m.written))
        .collect();
    let expected: Vec<_> = [of("u"), of("t"), of("t")]
        .into_iter()
        .zip(&by_size)
        .zip(1_700_000_001..)
        .map(|((domain, (bytes, _)), written)| (domain, *bytes, written))
        .collect();
    assert_eq!(told, expected);
    drop(store);

    let good = verified(folder.path());
    let all = by_size.iter().map(|(bytes, _)| bytes).sum::<u64>();
    assert_eq!((good.manifests, good.manifest_bytes), (3, all));
    assert_eq!(good.damaged_manifests, Vec::<PathBuf>::new());
    // One bit, the end, another's name.
    let [flipped, cut, renamed] = [0, 1, 2].map(|n| by_size[n].1.clone());
    let mut bytes = fs::read(&flipped).unwrap();
    bytes[5000] ^= 1;
    fs::write(&flipped, bytes).unwrap();
    let bytes = fs::read(&cut).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let another = folder.path().join(format!("manifest-{:032x}-00000000", 1));
    fs::rename(&renamed, &another).unwrap();
    let bad = verified(folder.path());
    assert_eq!(bad.manifests, 0);
    let mut damaged = bad.damaged_manifests;
    damaged.sort_unstable();
    let mut expected = vec![flipped, cut, another];
    expected.sort_unstable();
    assert_eq!(damaged, expected);
    assert_eq!(loaded(&open(folder.path()), 1 << 20), []);
}

/// Whoever can write to the folder can make a file that takes no room and all memory.
#[test]
fn a_file_of_any_size_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.save_manifest("edge-b", &manifest("t", 600)).unwrap();
    drop(store);
    let path = files(folder.path()).pop().unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let found = verified(folder.path());
    assert_eq!(found.oversized_manifests, [path]);
    assert_eq!((found.manifests, found.damaged_manifests), (0, Vec::new()));
    assert_eq!(loaded(&open(folder.path()), 1 << 20), []);
    assert!(files(folder.path()).is_empty());
}
