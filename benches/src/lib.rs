//! Benchmarks of Skyferry.
