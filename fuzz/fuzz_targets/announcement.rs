//! Announcements of a peer's store, and what an encoder makes of them.
#![no_main]

#[path = "../entries/announcement.rs"]
#[allow(dead_code, reason = "each target runs one entry of the file")]
mod announcement;
#[path = "../entries/carry.rs"]
mod carry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| announcement::hostile(data));
