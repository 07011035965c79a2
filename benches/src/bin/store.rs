//! Prints what the page store on disk does against bare files, and holds it against bars.
//!
//! `store [FOLDER [MEBIBYTES [RUNS]]]`: writes so much into the folder (by default 1 GiB, and the
//! system's folder for temporary files), three times over, then a million pages, and deletes it all. Fails
//! when a bar is missed.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use skyferry_benches::store::measure;
use skyferry_tests::bars::Bars;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let mebibytes = arguments.next().map_or(Ok(1024), |text| text.parse())?;
    let runs = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let folder = folder.join(format!("store-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let measured = measure(&folder, mebibytes, runs);
    std::fs::remove_dir_all(&folder)?;
    let figures = measured?;
    print!("{figures}");
    let mut bars = Bars::default();
    figures.add_bars(&mut bars);
    Ok(if bars.print() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
