//! Benchmarks of Skyferry.

pub mod pipeline;
pub mod store;
