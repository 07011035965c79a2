//! `cargo xtask test`.

use std::env;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use skyferry_tests::gateway::{Build, build};
use skyferry_tests::guest::{GuestImage, GuestSpec};

use crate::install;

/// Runs every check; stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    install::ensure(&[install::QEMU, install::GCC, install::PROMETHEUS])?;
    install::ensure_package_lists();
    let clippy = ["clippy", "--workspace", "--all-targets", "--all-features"];
    cargo(&[&clippy[..], &["--", "-D", "warnings"]].concat())?;
    step("guest", || {
        GuestImage::prepare(&GuestSpec::SMALL).map(|_| ())
    })?;
    step("gateway", || build(Build::Faulty).map(|_| ()))?;
    cargo(&["test", "--workspace", "--no-fail-fast"])
}

fn cargo(arguments: &[&str]) -> Result<()> {
    let name = format!("cargo {}", arguments.join(" "));
    step(&name, || {
        let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(program)
            .args(arguments)
            .status()
            .context("start cargo")?;
        if !status.success() {
            bail!("{name}: {status}");
        }
        Ok(())
    })
}

fn step(name: &str, action: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("==> {name}");
    let start = Instant::now();
    action()?;
    println!("==> {name}: done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
