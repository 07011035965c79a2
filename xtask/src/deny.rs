//! `cargo xtask deny`: licences, banned crates and sources of all that is linked (`deny.toml`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use skyferry_tests::guest::target_dir;

use crate::check::{cargo, step};
use crate::install;

/// The version that is installed where there is none.
const VERSION: &str = "0.20.2";
const PROGRAM: &str = "cargo-deny";

/// Runs the check; builds cargo-deny first where it is missing, into cargo's target folder, which
/// takes some minutes.
pub(crate) fn run() -> Result<()> {
    if let Some(command) = check() {
        return step(command);
    }
    let mut install = cargo(&[
        "install",
        "--locked",
        "--version",
        VERSION,
        PROGRAM,
        "--root",
    ]);
    install.arg(root());
    step(install)?;
    step(check().context("cargo install has left no cargo-deny")?)
}

/// Runs the check if cargo-deny is there; says so if it is not.
pub(crate) fn run_if_there() -> Result<()> {
    match check() {
        Some(command) => step(command),
        None => {
            println!(
                "==> cargo deny: left out, as it is not installed; `cargo xtask deny` does so"
            );
            Ok(())
        }
    }
}

fn root() -> PathBuf {
    target_dir().join("xtask")
}

fn check() -> Option<Command> {
    let own = root().join("bin").join(PROGRAM);
    let program = if install::has(PROGRAM) {
        PathBuf::from(PROGRAM)
    } else if own.is_file() {
        own
    } else {
        return None;
    };
    let mut command = Command::new(program);
    command.args(["check", "licenses", "bans", "sources"]);
    Some(command)
}
