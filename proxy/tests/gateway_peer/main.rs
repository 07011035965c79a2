//! Hostile and foreign peers against the real gateway.
//!
//! The peer is this test: it holds a certificate, speaks the wire format by hand, and breaks it in
//! every way that the format forbids. After each breach the gateway must have said in its log what
//! was wrong and with whom, and must carry a good exchange as if nothing had been.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy exempts test functions, not their helpers"
)]

mod certificates;
mod commit;
mod control;
mod data;
mod ends;
mod flow;
mod greeting;
mod leaving;
mod limits;
mod log;
mod manifests;
mod near;
mod opened;
mod peer;
mod races;
mod rig;
mod sources;
mod successor;
