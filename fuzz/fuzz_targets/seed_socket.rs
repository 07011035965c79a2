//! Frames of the socket between `skyferry seed` and a gateway.
#![no_main]

#[path = "../entries/wire.rs"]
#[allow(dead_code, reason = "each target runs one entry of the file")]
mod wire;

libfuzzer_sys::fuzz_target!(|data: &[u8]| wire::seed(data));
