//! Prints what the pipeline does on a recorded stream, for several ways to compress.
//!
//! `pipeline [FILE [LEVEL:WINDOW_LOG:LONG:BATCH_KIB]...]`, for example `pipeline guest.migration
//! 1:19:0:256 1:24:1:256`. Without FILE a made-up stream is measured, without ways the default and level
//! 1, on which the bars are: the bare loop compresses at level 1 as well. Fails when one is missed.

use std::error::Error;
use std::process::ExitCode;

use skyferry_benches::allocations::CountingAllocator;
use skyferry_benches::bars::Bars;
use skyferry_benches::pipeline::{measure, synthetic_stream};
use skyferry_dedup::EncodeOptions;

const RUNS: usize = 3;

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
        ways.push(EncodeOptions::default());
        ways.push(EncodeOptions {
            level: 1,
            window_log: 19,
            ..EncodeOptions::default()
        });
    }
    println!("{} bytes", stream.len());
    let mut bars = Bars::default();
    for options in ways {
        let figures = measure(&stream, options, RUNS)?;
        println!("{options:?}\n    {figures}");
        if options.level == 1 {
            figures.add_bars(&mut bars);
        }
    }
    Ok(if bars.print() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn parse(way: &str) -> Result<EncodeOptions, Box<dyn Error>> {
    let numbers: Vec<i32> = way.split(':').map(str::parse).collect::<Result<_, _>>()?;
    let [level, window_log, long, batch_kib] = numbers[..] else {
        return Err(format!("{way}: expected LEVEL:WINDOW_LOG:LONG:BATCH_KIB").into());
    };
    Ok(EncodeOptions {
        level,
        window_log: window_log.try_into()?,
        long_distance: long != 0,
        batch_bytes: usize::try_from(batch_kib)? * 1024,
        ..EncodeOptions::default()
    })
}
