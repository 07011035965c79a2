//! The superblock of a page store.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skyferry_dedup::disk::fuzz_entry::superblock(data));
