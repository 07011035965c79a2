//! Choice of real files for the guest's page cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::image::fnv1a;

/// Smaller files would fill the guest with directory entries, larger ones would be most of it.
const FILE_BYTES: std::ops::RangeInclusive<u64> = 8 << 10..=16 << 20;

/// Folders deeper than this below a root are left alone.
const MAX_DEPTH: usize = 8;

/// A file and how many of its bytes are taken.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

/// Programs, libraries and data of this machine, `bytes` in all (or what there is): the same on
/// every call as long as the machine's files are the same. Order and choice come from a hash of the
/// path, so that kinds of file are mixed as in a real page cache.
pub(crate) fn choose(bytes: u64) -> Vec<Chosen> {
    let mut found = Vec::new();
    for root in roots() {
        collect(&root, 0, &mut found);
    }
    found.sort_by_cached_key(|(path, _)| fnv1a(path.as_os_str().as_encoded_bytes()));
    found.dedup();
    let mut chosen = Vec::new();
    let mut left = bytes;
    for (path, size) in found {
        if left == 0 {
            break;
        }
        let bytes = size.min(left);
        left -= bytes;
        chosen.push(Chosen { path, bytes });
    }
    chosen
}

/// The system's folders, and the Rust toolchain, which is there and large on any machine that builds
/// this.
fn roots() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = ["/usr/lib", "/usr/bin", "/usr/share"]
        .map(PathBuf::from)
        .into();
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    if let Ok(output) = sysroot {
        roots.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    roots
}

fn collect(dir: &Path, depth: usize, found: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        // Symbolic links are not followed: their targets are found under their own names.
        let Ok(meta) = entry.metadata() else {
            continue;
        };
        if meta.is_dir() && depth < MAX_DEPTH {
            collect(&entry.path(), depth + 1, found);
        } else if meta.is_file() && FILE_BYTES.contains(&meta.len()) {
            let path = entry.path();
            if fs::File::open(&path).is_ok() {
                found.push((path, meta.len()));
            }
        }
    }
}
