//! Replays a day of a site against the page store and holds it against bars.
//!
//! `replay [FOLDER [SEED]]`: needs 512 MiB in the folder (by default the system's folder for temporary
//! files). Fails when a bar is missed.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use skyferry_benches::replay::{self, Plan};
use skyferry_tests::bars::Bars;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    if replay::live_if_asked()? {
        return Ok(ExitCode::SUCCESS);
    }
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let mut plan = Plan::DAY;
    if let Some(seed) = arguments.next() {
        plan = plan.with_seed(seed.parse()?);
    }
    let folder = folder.join(format!("store-replay-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let program = std::env::current_exe()?;
    let day = replay::run(&plan, &folder, || Command::new(&program));
    std::fs::remove_dir_all(&folder)?;
    let day = day?;
    day.print();
    let mut bars = Bars::default();
    day.add_bars(&mut bars);
    Ok(if bars.print() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
