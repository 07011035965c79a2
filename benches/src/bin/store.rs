//! Prints what the page store on disk does against bare files, and holds it against bars.
//!
//! `store [FOLDER [MEBIBYTES [RUNS]]]`: writes so much into the folder (by default 1 GiB, and the
//! system's folder for temporary files), three times over, and deletes it.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use skyferry_benches::store::measure;

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
    println!("{figures}");
    let times = &figures.times;
    // Times: what the bare file took, per what the store took.
    let speed = |[store, bare]: [f64; 2]| bare / store;
    let mut all = true;
    let mut bar = |name: &str, figure: f64, at_most: bool, bound: f64, unit: &str| {
        let met = if at_most {
            figure <= bound
        } else {
            figure >= bound
        };
        all &= met;
        let verdict = if met { "ok" } else { "MISS" };
        let sign = if at_most { "<=" } else { ">=" };
        println!("{verdict:4} {name:58} {figure:8.2} {sign} {bound:.2} {unit}");
    };
    let write = speed(times.write);
    bar("put / bare sequential write", write, false, 0.5, "x");
    let durable = speed(times.durable);
    bar(
        "put / bare sequential write, both synced",
        durable,
        false,
        0.5,
        "x",
    );
    bar(
        "get / bare random read, in memory",
        speed(times.warm),
        false,
        0.5,
        "x",
    );
    bar(
        "get / bare random read, on disk",
        speed(times.cold),
        false,
        0.5,
        "x",
    );
    let [warm, disk] = figures.open_10_gib();
    bar("opening 10 GiB", warm, true, 1.0, "s");
    bar("opening 10 GiB from disk", disk, true, 1.0, "s");
    bar(
        "memory of the index",
        figures.index_bytes_per_page,
        true,
        40.0,
        "bytes a page",
    );
    bar("write amplification", figures.amplification, true, 1.3, "x");
    let evicting = figures.amplification_evicting;
    bar(
        "write amplification while evicting",
        evicting,
        true,
        1.3,
        "x",
    );
    Ok(if all {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
