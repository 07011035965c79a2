//! Build, test, demo and benchmark tasks.

mod bench;
mod bench_wan;
mod check;
mod demo;
mod deny;
mod install;
mod streams;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Tasks of the Skyferry workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check formatting and lints, and run all tests, those with real guests included. Installs QEMU
    /// where it is missing (as root, with apt), and unpacks Prometheus into the target folder
    Test,
    /// Check licences and origin of all dependencies with cargo-deny, which is built where it is
    /// missing
    Deny,
    /// Move a running guest through two gateways and natively over the same emulated WAN, side by side
    Demo(demo::Options),
    /// Run a benchmark and compare its figures with what the project promises; exit code 1 on a miss
    Bench(bench::Options),
    /// Record migration streams of real guests for the micro-benchmarks, and print their paths
    RecordStreams(streams::Options),
}

fn main() -> ExitCode {
    let result: Result<bool> = match Cli::parse().task {
        Task::Test => check::run().map(|()| true),
        Task::Deny => deny::run().map(|()| true),
        Task::Demo(options) => demo::run(&options).map(|()| true),
        Task::Bench(options) => bench::run(&options),
        Task::RecordStreams(options) => streams::run(&options).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
