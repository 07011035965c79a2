//! The Skyferry gateway.

pub mod config;
pub mod metrics;
pub mod status;
pub mod transport;
pub mod gateway;
mod session;
mod wire;
