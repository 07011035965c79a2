//! Benchmarks of Skyferry.

pub mod pipeline;
