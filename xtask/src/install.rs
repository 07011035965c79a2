//! What tests and demo need from the system, and how it is got with apt.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use skyferry_tests::debian::unpack;
use skyferry_tests::guest::cache_dir;
use skyferry_tests::is_root;
use skyferry_tests::qemu::QemuBinary;

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
/// Makes and serves the disk images of tests (`qemu-nbd` is in the same package).
pub(crate) const QEMU_UTILS: Need = Need {
    program: "qemu-img",
    package: "qemu-utils",
    backports: true,
};
/// Compiles the guest's agent (`libc6-dev` comes with Rust's needs).
pub(crate) const GCC: Need = Need {
    program: "gcc",
    package: "gcc",
    backports: false,
};
/// Compresses a migration that goes through a pipe.
pub(crate) const ZSTD: Need = Need {
    program: "zstd",
    package: "zstd",
    backports: false,
};
/// Carries it.
pub(crate) const SOCAT: Need = Need {
    program: "socat",
    package: "socat",
    backports: false,
};

/// Has `promtool` as well, which checks metrics and rules.
const PROMETHEUS: &str = "prometheus";

/// apt waits so long for another one that is at work, as on a machine that has just started.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

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
    // apt tells its sources only once it has their lists.
    update();
    let suite = if missing.iter().any(|need| need.backports) {
        backports()
    } else {
        None
    };
    for need in &missing {
        let install = ["install", "-y", "--no-install-recommends", need.package];
        let newer = match &suite {
            Some(suite) if need.backports => {
                let mut arguments = vec!["-t", suite];
                arguments.extend(install);
                let done = apt(&arguments).is_ok();
                if !done {
                    // A source that apt cannot use would be in the way of its user.
                    let _ = fs::remove_file(BACKPORTS_LIST);
                }
                done
            }
            _ => false,
        };
        if !newer {
            apt(&install).context(advice.clone())?;
        }
    }
    Ok(())
}

/// Says so where the guests run on a QEMU whose migrations damage them, so that nobody looks for the
/// reason in the gateways.
pub(crate) fn warn_of_old_qemu() {
    if let Ok(qemu) = QemuBinary::find()
        && qemu.major() == 7
    {
        println!(
            "note: QEMU {} without KVM damages guests that it migrates in several rounds, with and \
             without gateways: tests may fail with a panic of the guest. QEMU 10.0 does not",
            qemu.version()
        );
    }
}

/// Gets the package lists if there are none, so that the guest's kernel can be downloaded.
pub(crate) fn ensure_package_lists() {
    let known = Command::new("apt-cache")
        .args(["show", skyferry_tests::guest::KERNEL_PACKAGE])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !known.is_ok_and(|status| status.success()) && is_root() {
        update();
    }
}

/// A `PATH` in which `prometheus` and `promtool` are. Where they are not installed, the package is
/// unpacked into the cache: installed, it would run a service on this machine.
///
/// # Errors
/// When the package cannot be had; the text says what to do.
pub(crate) fn path_with_prometheus() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    if has(PROMETHEUS) && has("promtool") {
        return Ok(path);
    }
    let unpacked = cache_dir().join(PROMETHEUS);
    let programs = unpacked.join("usr/bin");
    if !programs.join(PROMETHEUS).is_file() {
        println!("unpacking {PROMETHEUS}");
        unpack(PROMETHEUS, &unpacked).with_context(|| {
            format!(
                "get {PROMETHEUS}: needs apt-get and dpkg with Debian's package lists (run \
                 `apt-get update`); or install it: apt-get install {PROMETHEUS}"
            )
        })?;
    }
    let programs = programs.canonicalize()?;
    let dirs = env::split_paths(&path).chain([programs]);
    Ok(env::join_paths(dirs)?)
}

fn is_there(need: &Need) -> bool {
    let own = env::var_os("SKYFERRY_QEMU").is_some();
    has(need.program) || (own && need.program == QEMU.program)
}

/// Whether a program is in one of the folders of `PATH`.
pub(crate) fn has(program: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(program).is_file()))
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
    let codename = field("VERSION_CODENAME=")?;
    let suite = format!("{codename}-backports");
    let sources = sources()?;
    if mirror_of(&sources, &suite).is_none() {
        let mirror = mirror_of(&sources, codename)?;
        fs::write(BACKPORTS_LIST, format!("deb {mirror} {suite} main\n")).ok()?;
        update();
    }
    Some(suite)
}

/// A line for each of apt's sources: its address, suite and component.
fn sources() -> Option<String> {
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", format, "Created-By: Packages"])
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()
}

/// Where a suite's component `main` comes from.
fn mirror_of<'a>(sources: &'a str, suite: &str) -> Option<&'a str> {
    sources.lines().find_map(|line| {
        let (mirror, rest) = line.split_once(' ')?;
        (rest == format!("{suite} main")).then_some(mirror)
    })
}

/// Gets the package lists. A source that is down must not keep us from the others: if the one that
/// is needed fails, the next step says so.
fn update() {
    if let Err(error) = apt(&["update"]) {
        println!("{error:#}; going on with the lists that are there");
    }
}

fn apt(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(["-q", "-o", LOCK_TIMEOUT])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("start apt-get")?;
    if !status.success() {
        bail!("apt-get {}: {status}", arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_of_a_suite_is_the_one_of_its_main_component() {
        let sources = "http://a/debian/ bookworm contrib\nhttp://b/debian/ bookworm main\n\
                       http://c/security/ bookworm-security main\n";
        assert_eq!(mirror_of(sources, "bookworm"), Some("http://b/debian/"));
        assert_eq!(mirror_of(sources, "bookworm-backports"), None);
    }
}
