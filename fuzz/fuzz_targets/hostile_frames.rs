//! Page frames that no encoder made.
#![no_main]

#[path = "../entries/carry.rs"]
mod carry;
#[path = "../entries/frames.rs"]
#[allow(dead_code, reason = "each target runs one entry of the file")]
mod frames;

libfuzzer_sys::fuzz_target!(|data: &[u8]| frames::hostile(data));
