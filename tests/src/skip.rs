//! Tests that cannot run everywhere: nobody is to overlook that they did not.

use std::env;
use std::fs::File;
use std::io::Write as _;
use std::thread;

/// Environment variable: where it is `1`, a test that lacks something which root can have fails instead
/// of being left out. `cargo xtask test` sets it for root.
pub const NO_SKIPS: &str = "SKYFERRY_NO_SKIPS";
/// Environment variable: a file to which tests that are left out are written, a line for each.
/// `cargo xtask test` sets it, and prints them at its end.
pub const SKIPPED: &str = "SKYFERRY_SKIPPED";

/// Says that the calling test is left out, and why.
pub fn skip(why: &str) {
    let current = thread::current();
    let line = format!("{}: {why}", current.name().unwrap_or("a test"));
    eprintln!("skipped: {line}");
    let Some(path) = env::var_os(SKIPPED) else {
        return;
    };
    let file = File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The same for want of what root can have: `what` says how.
///
/// # Panics
/// Where [`NO_SKIPS`] is `1`.
pub fn lacks(what: &str) {
    assert!(
        env::var_os(NO_SKIPS).is_none_or(|value| value != "1"),
        "this test needs {what}"
    );
    skip(&format!("needs {what}"));
}
