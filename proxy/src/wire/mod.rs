//! The gateway protocol: what two gateways say to each other (`docs/protocol.md`).
//!
//! One QUIC connection carries one *control stream* (bidirectional, opened by the dialling
//! gateway) with the messages of [`control`], and one unidirectional stream per frame of channel
//! data, whose header is in [`data`]. All integers are little-endian. Zero is never a valid
//! type. This module turns bytes into values and back; it holds no state and does no I/O.

pub mod control;
pub mod data;
mod reader;

pub use control::Control;
pub use data::{DataFlags, DataHeader, DataKind};
pub use reader::WireError;

/// The protocol version this build speaks.
pub const VERSION: u16 = 1;

/// The oldest protocol version this build still speaks.
pub const VERSION_MIN: u16 = 1;

/// Identifies a migration between two gateways; drawn at random by the near gateway.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId(pub [u8; 16]);

impl std::fmt::Display for MigrationId {
    /// The first eight bytes in hex: enough to tell migrations apart in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..8]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// One run of a gateway process; a new one after every start.
pub type InstanceId = [u8; 16];

/// The number of a channel inside its migration.
pub type ChannelNo = u32;
