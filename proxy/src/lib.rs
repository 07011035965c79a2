//! The Skyferry gateway.

pub mod admin;
pub mod cli;
pub mod config;
pub mod gateway;
pub mod logging;
pub mod metrics;
pub mod pki;
pub mod seed;
pub mod status;
pub mod transport;

pub mod session;
pub mod wire;
