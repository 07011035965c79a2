//! Messages of the control stream.
#![no_main]

#[path = "../entries/wire.rs"]
#[allow(dead_code, reason = "each target runs one entry of the file")]
mod wire;

libfuzzer_sys::fuzz_target!(|data: &[u8]| wire::control(data));
