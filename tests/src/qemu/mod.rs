//! An unmodified QEMU as source or destination of a migration.

mod console;
mod launch;
mod migrate;
mod qmp;

pub use console::{Console, Line};
pub use launch::{Launch, Qemu, QemuBinary, Start};
pub use migrate::{MigrationSettings, Multifd, Outcome, Progress, blackout};
pub use qmp::{Event, Qmp};
