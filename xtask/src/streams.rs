//! `cargo xtask record-streams`.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use skyferry_tests::bench::guests::{Guest, Scale};
use skyferry_tests::bench::streams::record;

use crate::{bench_wan, install};

/// Whose streams.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// These guests of the side-by-side benchmark
    #[arg(long, value_delimiter = ',', value_parser = bench_wan::guest, default_value = "writer-500")]
    guests: Vec<Guest>,
    /// How long a guest works between its first and its later stream, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=3600))]
    work: u64,
    /// Small guests
    #[arg(long)]
    quick: bool,
}

/// Records what is not there yet and prints all paths.
pub(crate) fn run(options: &Options) -> Result<()> {
    install::ensure(&[install::QEMU, install::GCC])?;
    install::ensure_package_lists();
    let scale = if options.quick {
        Scale::Quick
    } else {
        Scale::Full
    };
    for guest in &options.guests {
        for path in record(guest, scale, Duration::from_secs(options.work))? {
            println!("{}", path.display());
        }
    }
    Ok(())
}
