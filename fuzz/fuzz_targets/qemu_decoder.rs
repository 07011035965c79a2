//! The decoder of QEMU's main channel. The first 16 bytes of the input say how the rest is cut.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skyferry_core::fuzz_entry::qemu_decoder(data));
