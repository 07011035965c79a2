//! The Skyferry gateway.
