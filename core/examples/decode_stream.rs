//! Decodes a recorded stream (a file written by `migrate "exec:cat > FILE"`) and prints what is in
//! it: pages, events, and how fast it was read.
//!
//! `cargo run --release -p skyferry-core --example decode_stream -- FILE...`

use std::time::Instant;

use skyferry_core::Piece;
use skyferry_core::qemu::{Decoder, Encoder, Step};

/// What a pass over a stream found, in bytes of the stream unless named otherwise.
#[derive(Debug, Default)]
struct Summary {
    pages: u64,
    page_bytes: u64,
    zero_pages: u64,
    zero_runs: u64,
    zero_bytes: u64,
    other_pieces: u64,
    other_bytes: u64,
}

fn main() -> std::io::Result<()> {
    for path in std::env::args_os().skip(1) {
        let input = std::fs::read(&path)?;
        println!("{}: {} bytes", path.display(), input.len());
        let summary = decode(&input, true);
        println!("  {summary:?}");
        let start = Instant::now();
        const PASSES: u32 = 5;
        for _ in 0..PASSES {
            std::hint::black_box(decode(&input, false));
        }
        let seconds = start.elapsed().as_secs_f64() / f64::from(PASSES);
        let guest = (summary.pages + summary.zero_pages) * 4096;
        println!(
            "  stream {:.0} MB/s, guest memory {:.0} MB/s",
            input.len() as f64 / 1e6 / seconds,
            guest as f64 / 1e6 / seconds
        );
        println!("  identical: {}", is_identical(&input));
    }
    Ok(())
}

fn decode(input: &[u8], print: bool) -> Summary {
    let mut decoder = Decoder::new();
    let mut summary = Summary::default();
    let mut done = 0;
    loop {
        match decoder.flush(&input[done..]) {
            Step::NeedMore => break summary,
            Step::Event(event) => {
                if print {
                    println!("  {done:>12} {event:?}");
                }
            }
            Step::Piece { piece, raw } => {
                done += raw.len();
                let len = raw.len() as u64;
                match piece {
                    Piece::Page { .. } => {
                        summary.pages += 1;
                        summary.page_bytes += len;
                    }
                    Piece::ZeroRun { count, .. } => {
                        summary.zero_pages += u64::from(count);
                        summary.zero_runs += 1;
                        summary.zero_bytes += len;
                    }
                    Piece::Other(_) => {
                        summary.other_pieces += 1;
                        summary.other_bytes += len;
                    }
                }
            }
        }
    }
}

fn is_identical(input: &[u8]) -> bool {
    let mut decoder = Decoder::new();
    let mut encoder = Encoder::new();
    let mut output = Vec::with_capacity(input.len());
    loop {
        match decoder.flush(&input[output.len()..]) {
            Step::NeedMore => return output == input,
            Step::Event(_) => {}
            Step::Piece { piece, .. } => {
                if let Piece::Page { block, .. } | Piece::ZeroRun { block, .. } = piece
                    && block.0 as usize == encoder.block_count()
                    && let Some(name) = decoder.block_name(block)
                {
                    encoder.define_block(name);
                }
                if !encoder.encode(&piece, &mut output) {
                    return false;
                }
            }
        }
    }
}
