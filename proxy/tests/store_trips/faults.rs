//! Disks that fail under a migration: it costs bytes, and nothing else.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use skyferry_tests::skip::lacks;

use super::rig::{Sites, guest};
use super::{ANNOUNCED, ON_DISK};

/// A file system in memory for a store, which goes with it.
struct Mount(PathBuf);

impl Mount {
    /// `None` without the right to mount.
    fn new(folder: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&folder).unwrap();
        let options = format!("size={size}");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "none"]);
        let status = command.arg(&folder).stderr(Stdio::null()).status();
        status
            .is_ok_and(|status| status.success())
            .then_some(Self(folder))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a gateway that a failed test leaves behind may have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Both gateways write what passes; both disks have room for a fourth of it.
#[test]
fn a_guest_arrives_whole_though_both_disks_are_full() {
    let sites = Sites::new(ON_DISK);
    let mounts = ["store-edge-a", "store-edge-b"].map(|name| Mount::new(sites.path(name), "4m"));
    if mounts.iter().any(Option::is_none) {
        lacks("the right to mount a file system (root; CAP_SYS_ADMIN in a container)");
        return;
    }
    let (a, b) = sites.start_both();
    let guest = guest(2);
    let cold = sites.carry(&a, &b, &guest.bytes);
    for gateway in [&a, &b] {
        sites.wait_for(gateway, "skyferry_store_degraded", |degraded| degraded == 1);
    }
    // Memory knows it all the same.
    let warm = sites.carry(&a, &b, &guest.bytes);
    assert!(warm * 10 <= cold, "{warm} bytes after {cold}");
    for gateway in [&a, &b] {
        assert!(sites.metric(gateway, "skyferry_store_write_errors_total") > Some(0));
        sites.expect_log(
            gateway,
            "the page store on disk takes no pages; migrations go on without",
        );
    }
    a.stop();
    b.stop();
}

/// Flips a byte in some places of each segment of a store, every so many bytes.
fn damage(store: &Path, every: usize) {
    for entry in fs::read_dir(store).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_string_lossy().starts_with("segment-") {
            continue;
        }
        let file = File::options()
            .read(true)
            .write(true)
            .open(entry.path())
            .unwrap();
        let length = file.metadata().unwrap().len();
        // Not in the header, nor in what the segment ends with.
        let records = (length / 2..length - length / 8).step_by(every);
        for at in records {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
    }
}

/// Carries a guest, damages the disk of the far gateway while nobody looks, and carries the guest twice
/// more. Returns what each time took, and how many pages were asked for.
fn carried_from_a_damaged_disk(every: usize) -> ([u64; 3], u64) {
    let sites = Sites::new(ON_DISK);
    let (a, b) = sites.start_both();
    let guest = guest(2);
    let cold = sites.carry(&a, &b, &guest.bytes);
    a.stop();
    b.stop();
    damage(&sites.path("store-edge-b"), every);

    let (a, b) = sites.start_both();
    sites.wait_for(&a, ANNOUNCED, |pages| pages >= 4000);
    let again = sites.carry(&a, &b, &guest.bytes);
    assert!(sites.metric(&b, "skyferry_store_read_errors_total") > Some(0));
    sites.expect_log(&b, "could not read pages; they cross the link again");
    let misses = sites.metric(&a, "skyferry_page_misses_total").unwrap();
    let warm = sites.carry(&a, &b, &guest.bytes);
    println!("cold: {cold} bytes, again: {again}, warm: {warm}; {misses} misses");
    assert_eq!(sites.metric(&a, "skyferry_page_misses_total"), Some(misses));
    ([cold, again, warm], misses)
}

/// The far gateway has announced pages that its disk has lost since: they are asked for, and no others.
#[test]
fn a_guest_arrives_whole_though_the_disk_has_lost_some_pages() {
    let ([cold, again, warm], misses) = carried_from_a_damaged_disk(3 << 20);
    assert!((1..60).contains(&misses), "{misses}");
    assert!(again * 20 <= cold, "{again} bytes after {cold}");
    assert!(warm * 50 <= cold, "{warm} bytes after {cold}");
}

/// A disk with many errors is given up, with what could still be read there.
#[test]
fn a_guest_arrives_whole_though_the_disk_has_lost_most_of_it() {
    let ([cold, again, warm], misses) = carried_from_a_damaged_disk(4096);
    assert!(misses > 1000, "{misses}");
    assert!(
        again <= cold && warm <= cold,
        "{again} and {warm} bytes after {cold}"
    );
}
