//! Packages of Debian that are unpacked into a folder instead of being installed: neither root nor
//! the machine's state is needed, and no service starts.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::run;

/// Downloads the newest version of a package that the machine's lists have, without those that it
/// depends on, and unpacks it as `folder`; all of it or nothing.
///
/// # Errors
/// When apt has no such package or cannot get it; what apt says is in the text.
pub fn unpack(package: &str, folder: &Path) -> Result<()> {
    let parent = folder.parent().context("a folder in the cache")?;
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let dir = tempfile::tempdir_in(parent)?;
    // apt as root would hand the download to a user that may not write here.
    let sandbox = ["-o", "APT::Sandbox::User=root", "download"];
    run(Command::new("apt-get")
        .args(sandbox)
        .arg(package)
        .current_dir(dir.path()))?;
    let file = fs::read_dir(dir.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ext| ext == "deb"))
        .context("apt-get download left no package")?;
    let tree = dir.path().join("tree");
    run(Command::new("dpkg").arg("-x").arg(&file).arg(&tree))?;
    // What another version left there.
    let _ = fs::remove_dir_all(folder);
    fs::rename(&tree, folder)?;
    Ok(())
}
