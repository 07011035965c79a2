//! The reader of QEMU's return path.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skyferry_core::fuzz_entry::return_path(data));
