//! The guest that is migrated, built once per machine and kept in a cache folder.
//!
//! A Debian cloud kernel, an initramfs with the agent (`tests/guest/agent.c`) as its only program
//! and real files as page cache. It is booted once and recorded with QEMU's `migrate exec:`; every
//! later source starts from the recording, so all runs start from the same memory.

pub(crate) mod corpus;
pub(crate) mod cpio;
pub(crate) mod disk_image;
pub(crate) mod image;
pub(crate) mod kernel;

pub use disk_image::write_disk_image;
pub use image::{Data, GuestImage, GuestSpec};
pub use kernel::KERNEL_PACKAGE;

use std::env;
use std::path::PathBuf;

/// Folder for kernels, images and recordings: `SKYFERRY_CACHE`, else inside cargo's target folder.
#[must_use]
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = env::var_os("SKYFERRY_CACHE") {
        return dir.into();
    }
    target_dir().join("skyferry-guest")
}

/// Cargo's target folder.
#[must_use]
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => dir.into(),
        None => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")),
    }
}
