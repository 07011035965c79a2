//! Prints what the pipeline does on a recorded stream, for several ways to compress.
//!
//! `pipeline [FILE [LEVEL:WINDOW_LOG:MATCHING:BATCH_KIB | start]...]`, for example `pipeline
//! guest.migration start 1:24:1:256`; MATCHING is 0 as the level has it, 1 for
//! long distances, 2 for short matches. Without FILE a made-up stream is measured, without ways the
//! one in which a channel begins and level 1. Most bars are on the latter: the bare loop compresses at level 1 as well. Fails
//! when one is missed.

use std::error::Error;
use std::process::ExitCode;

use skyferry_benches::allocations::CountingAllocator;
use skyferry_benches::pipeline::{measure, synthetic_stream};
use skyferry_dedup::{Effort, EncodeOptions, Matching};
use skyferry_tests::bars::Bars;

const RUNS: usize = 3;

/// The way in which a channel between sites begins, and the least speed there, the bare loop's being 1.
const START: &str = "start";
const START_TO_BARE: f64 = 0.5;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let stream = match arguments.next() {
        Some(file) => std::fs::read(file)?,
        None => synthetic_stream(),
    };
    let mut ways: Vec<_> = arguments.map(|way| parse(&way)).collect::<Result<_, _>>()?;
    if ways.is_empty() {
        ways = vec![parse(START)?, parse("1:19:0:256")?];
    }
    println!("{} bytes", stream.len());
    let mut bars = Bars::default();
    for options in ways {
        let figures = measure(&stream, options, RUNS)?;
        println!("{options:?}\n    {figures}");
        if options.level == 1 {
            figures.add_bars(&mut bars);
        } else if options == start() {
            let name = "encode speed / bare loop";
            bars.at_least(name, figures.encode_to_bare(), START_TO_BARE, "x");
        }
    }
    Ok(if bars.print() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn start() -> EncodeOptions {
    EncodeOptions {
        level: Effort::START.level(),
        window_log: Effort::START.window_log(),
        matching: Effort::START.matching(),
        ..EncodeOptions::default()
    }
}

fn parse(way: &str) -> Result<EncodeOptions, Box<dyn Error>> {
    if way == START {
        return Ok(start());
    }
    let numbers: Vec<i32> = way.split(':').map(str::parse).collect::<Result<_, _>>()?;
    let [level, window_log, matching, batch_kib] = numbers[..] else {
        return Err(
            format!("{way}: expected LEVEL:WINDOW_LOG:MATCHING:BATCH_KIB or {START}").into(),
        );
    };
    let matching = match matching {
        0 => Matching::OfLevel,
        1 => Matching::LongDistance,
        2 => Matching::Short,
        other => return Err(format!("{way}: no matching {other}").into()),
    };
    Ok(EncodeOptions {
        level,
        window_log: window_log.try_into()?,
        matching,
        batch_bytes: usize::try_from(batch_kib)? * 1024,
        ..EncodeOptions::default()
    })
}
