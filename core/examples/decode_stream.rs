//! Decodes a recorded stream (a file written by `migrate "exec:cat > FILE"`) and prints what is in
//! it: pages, events, and how fast it was read.
//!
//! `cargo run --release -p skyferry-core --example decode_stream -- [FILE...]`; without a file it
//! makes up a stream.

use std::time::Instant;

use skyferry_core::Piece;
use skyferry_core::qemu::synthetic::SyntheticStream;
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
    let mut paths = std::env::args_os().skip(1).peekable();
    if paths.peek().is_none() {
        const PAGES: u64 = 65_536;
        let stream = SyntheticStream::builder()
            .blocks(&[("pc.ram", PAGES)])
            .rounds(3)
            .build();
        println!("a made-up guest of {} MiB", PAGES >> 8);
        report(&stream.bytes);
    }
    for path in paths {
        let input = std::fs::read(&path)?;
        println!("{}", path.display());
        report(&input);
    }
    Ok(())
}

fn report(input: &[u8]) {
    const PASSES: u32 = 5;
    let summary = decode(input, true);
    println!("  {} bytes: {summary:?}", input.len());
    let guest = (summary.pages + summary.zero_pages) * 4096;
    let mut output = Vec::with_capacity(input.len());
    let start = Instant::now();
    for _ in 0..PASSES {
        std::hint::black_box(decode(input, false));
    }
    let decoding = start.elapsed().as_secs_f64() / f64::from(PASSES);
    let start = Instant::now();
    for _ in 0..PASSES {
        output.clear();
        encode(input, &mut output);
    }
    let both = start.elapsed().as_secs_f64() / f64::from(PASSES);
    let rate = |bytes: f64, seconds: f64| bytes / 1e6 / seconds;
    println!(
        "  decoding {:.0} MB/s of stream ({:.0} MB/s of guest memory), and encoding {:.0} MB/s",
        rate(input.len() as f64, decoding),
        rate(guest as f64, decoding),
        rate(input.len() as f64, both)
    );
    println!("  identical: {}", output == input);
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

/// Decodes and appends the encoded pieces to `output`.
fn encode(input: &[u8], output: &mut Vec<u8>) {
    let mut decoder = Decoder::new();
    let mut encoder = Encoder::new();
    loop {
        match decoder.flush(&input[output.len()..]) {
            Step::NeedMore => return,
            Step::Event(_) => {}
            Step::Piece { piece, .. } => {
                if let Piece::Page { block, .. } | Piece::ZeroRun { block, .. } = piece
                    && block.0 as usize == encoder.block_count()
                    && let Some(name) = decoder.block_name(block)
                {
                    encoder.define_block(name);
                }
                assert!(
                    encoder.encode(&piece, output),
                    "a decoder's piece is accepted"
                );
            }
        }
    }
}
