//! The Skyferry gateway.

pub mod transport;
