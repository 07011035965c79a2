//! Benchmarks of Skyferry.

pub mod allocations;
pub mod pipeline;
pub mod replay;
pub mod store;
