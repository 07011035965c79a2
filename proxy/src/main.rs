//! The `skyferry` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    skyferry::cli::run()
}
