//! Frames over a link that loses, repeats and breaks.
#![no_main]

#[path = "../entries/sequence.rs"]
#[allow(dead_code, reason = "each target runs one entry of the file")]
mod sequence;

libfuzzer_sys::fuzz_target!(|data: &[u8]| sequence::operations(data));
