//! The file of uses of a page store, cut and changed. The first 50 bytes of the input say where.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skyferry_dedup::disk::fuzz_entry::uses(data));
