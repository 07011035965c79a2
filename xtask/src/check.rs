//! `cargo xtask test`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use skyferry_tests::gateway::{Build, set_aside};
use skyferry_tests::guest::{GuestImage, GuestSpec, target_dir};
use skyferry_tests::is_root;
use skyferry_tests::skip::{NO_SKIPS, SKIPPED};

use crate::{deny, install};

/// Runs every check; stops at the first that fails.
///
/// All that runs is built with the same features: else half of all crates were compiled twice.
pub(crate) fn run() -> Result<()> {
    step(cargo(&["fmt", "--all", "--check"]))?;
    install::ensure(&[install::QEMU, install::QEMU_UTILS, install::GCC])?;
    install::warn_of_old_qemu();
    install::ensure_package_lists();
    let path = install::path_with_prometheus()?;
    let clippy = ["clippy", "--workspace", "--all-targets"];
    let deny = ["--", "-D", "warnings"];
    step(cargo(&[&clippy[..], &["--all-features"], &deny].concat()))?;
    // Once more as released, without faults.
    step(cargo(&[&clippy[..], &deny].concat()))?;
    released_without_faults()?;
    deny::run_if_there()?;
    timed("guest", || {
        GuestImage::prepare(&GuestSpec::SMALL).map(|_| ())
    })?;
    let test = ["test", "--workspace", "--all-features"];
    step(cargo(&[&test[..], &["--no-run"]].concat()))?;
    let mut tests = cargo(&[&test[..], &["--no-fail-fast"]].concat());
    tests.env("PATH", path);
    if env::var_os("SKYFERRY_BIN").is_none() {
        tests.env("SKYFERRY_BIN", set_aside(Build::Faulty)?);
    }
    // What root can have must be there; else the tests that want it are told of at the end.
    let skipped = target_dir().join("skipped-tests");
    // That of the run before.
    let _ = fs::remove_file(&skipped);
    tests.env(SKIPPED, &skipped);
    if is_root() {
        tests.env(NO_SKIPS, "1");
    }
    let outcome = step(tests);
    if let Ok(skipped) = fs::read_to_string(&skipped) {
        print!("==> tests that did not run here:\n{skipped}");
    }
    outcome
}

/// No package of the workspace turns features of the gateway on, nor does the gateway itself, tests
/// apart: what `cargo build` makes has no faults.
fn released_without_faults() -> Result<()> {
    let edges = "normal,build";
    let mut command = cargo(&["tree", "--workspace", "--edges", edges, "--prefix", "none"]);
    let output = command
        .args(["--format", "{p} features: {f}"])
        .output()
        .context("start cargo")?;
    let text = String::from_utf8(output.stdout)?;
    let mut gateways = text
        .lines()
        .filter(|line| line.starts_with("skyferry v"))
        .peekable();
    ensure!(gateways.peek().is_some(), "cargo tree: {}", output.status);
    for line in gateways {
        let features = line.split("features:").nth(1).unwrap_or(line);
        ensure!(features.trim().is_empty(), "released with features: {line}");
    }
    Ok(())
}

pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Runs a command as a step of its name.
pub(crate) fn step(mut command: Command) -> Result<()> {
    let program = Path::new(command.get_program()).file_name();
    let words: Vec<_> = program
        .into_iter()
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect();
    let name = words.join(" ");
    timed(&name, || {
        let status = command.status().with_context(|| format!("start {name}"))?;
        if !status.success() {
            bail!("{name}: {status}");
        }
        Ok(())
    })
}

fn timed(name: &str, action: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("==> {name}");
    let start = Instant::now();
    action()?;
    println!("==> {name}: done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
