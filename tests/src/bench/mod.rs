//! The side-by-side benchmark over the emulated WAN: guests, ways to move them, what a move costs, and
//! how that is kept, judged and shown.
//!
//! - [`guests`]: the guests that are moved;
//! - [`way`]: the ways, QEMU's own and ours;
//! - [`scene`]: moves a guest in one or several ways and measures;
//! - `relays`: programs that only copy, as a measure;
//! - [`results`]: the figures, kept in a file as they come;
//! - [`stats`]: medians over runs;
//! - [`bars`]: what the project promises;
//! - [`report`], [`chart`]: Markdown and SVG;
//! - [`machine`]: where the figures are from;
//! - [`streams`]: the same guests as files, for micro-benchmarks.

pub mod bars;
pub mod chart;
pub mod guests;
pub mod machine;
pub mod report;
pub mod results;
pub mod scene;
pub mod stats;
pub mod streams;
pub mod way;

mod cost;
mod relays;
