//! What tests and demo need from the system, and how it is got with apt.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use skyferry_tests::is_root;

/// A program and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    program: &'static str,
    package: &'static str,
    /// Whether a newer version from backports is preferred.
    backports: bool,
}

/// The hypervisor of the guests.
pub(crate) const QEMU: Need = Need {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
    backports: true,
};
/// Compiles the guest's agent (`libc6-dev` comes with Rust's needs).
pub(crate) const GCC: Need = Need {
    program: "gcc",
    package: "gcc",
    backports: false,
};
/// Has `promtool` as well, which checks metrics and rules.
pub(crate) const PROMETHEUS: Need = Need {
    program: "promtool",
    package: "prometheus",
    backports: false,
};

const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/skyferry-backports.list";

/// Installs what is missing.
///
/// # Errors
/// Without root or apt; the text says what to install.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<Need> = needs
        .iter()
        .copied()
        .filter(|need| !is_there(need))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let advice = format!(
        "please install: apt-get install --no-install-recommends {} (or run this as root)",
        packages.join(" ")
    );
    if !is_root() || !has("apt-get") {
        let programs: Vec<&str> = missing.iter().map(|need| need.program).collect();
        bail!("missing: {}; {advice}", programs.join(", "));
    }
    println!("installing {}", packages.join(" "));
    let suite = if missing.iter().any(|need| need.backports) {
        backports()
    } else {
        None
    };
    apt(&["update"]).context(advice.clone())?;
    for need in &missing {
        let install = ["install", "-y", "--no-install-recommends", need.package];
        let newer = match &suite {
            Some(suite) if need.backports => {
                let mut arguments = vec!["-t", suite];
                arguments.extend(install);
                apt(&arguments).is_ok()
            }
            _ => false,
        };
        if !newer {
            apt(&install).context(advice.clone())?;
        }
    }
    Ok(())
}

/// Gets the package lists if there are none, so that the guest's kernel can be downloaded.
pub(crate) fn ensure_package_lists() {
    let known = Command::new("apt-cache")
        .args(["show", skyferry_tests::guest::KERNEL_PACKAGE])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !known.is_ok_and(|status| status.success()) && is_root() {
        // If this fails, too, the guest's builder says what is missing.
        let _ = apt(&["update"]);
    }
}

fn is_there(need: &Need) -> bool {
    let own = std::env::var_os("SKYFERRY_QEMU").is_some();
    has(need.program) || (own && need.program == QEMU.program)
}

fn has(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The name of Debian's backports suite, which is added to apt's sources if it is not there.
fn backports() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok()?;
    let field = |key: &str| {
        release
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .map(|value| value.trim_matches('"'))
    };
    if field("ID=") != Some("debian") {
        return None;
    }
    let suite = format!("{}-backports", field("VERSION_CODENAME=")?);
    if !is_source(Path::new("/etc/apt"), &suite) {
        let mirror = "http://deb.debian.org/debian";
        fs::write(BACKPORTS_LIST, format!("deb {mirror} {suite} main\n")).ok()?;
    }
    Some(suite)
}

/// Whether a file of apt's sources names the suite.
fn is_source(dir: &Path, suite: &str) -> bool {
    let names = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.contains(suite));
    let more = fs::read_dir(dir.join("sources.list.d"))
        .into_iter()
        .flatten()
        .flatten();
    names(&dir.join("sources.list")) || more.map(|entry| entry.path()).any(|path| names(&path))
}

fn apt(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .arg("-q")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(Stdio::null())
        .status()
        .context("start apt-get")?;
    if !status.success() {
        bail!("apt-get {}: {status}", arguments.join(" "));
    }
    Ok(())
}
