//! The `skyferry` command.
fn main() {}
