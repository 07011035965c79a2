//! The guest's kernel: Debian's cloud kernel, downloaded and unpacked, not installed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::debian;
use crate::process::run;

/// Debian's metapackage that depends on the newest cloud kernel.
pub const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// Path of a bzImage: `SKYFERRY_KERNEL`, else from the cache, else from Debian's archive.
pub(crate) fn kernel(cache: &Path) -> Result<PathBuf> {
    if let Some(path) = env::var_os("SKYFERRY_KERNEL") {
        return Ok(path.into());
    }
    let unpacked = cache.join("kernel");
    if let Some(path) = find(&unpacked) {
        return Ok(path);
    }
    download(&unpacked).with_context(|| {
        format!(
            "get a guest kernel: needs apt-get and dpkg with Debian's package lists (run \
             `apt-get update`) for {KERNEL_PACKAGE}; or name a bzImage in SKYFERRY_KERNEL"
        )
    })?;
    find(&unpacked).context("the kernel package holds no boot/vmlinuz")
}

fn find(unpacked: &Path) -> Option<PathBuf> {
    fs::read_dir(unpacked.join("boot"))
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz"))
        })
}

fn download(unpacked: &Path) -> Result<()> {
    let depends = run(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends:"))
        .map(str::trim)
        .filter(|name| name.starts_with("linux-image-"))
        .context("the metapackage names no kernel")?;
    debian::unpack(package, unpacked)
}
