//! Build, test, demo and benchmark tasks.
fn main() {}
