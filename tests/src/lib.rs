//! Test kit: real guests, an emulated WAN and faults.
//!
//! What the end-to-end tests, `cargo xtask demo` and `cargo xtask bench` share:
//!
//! - [`guest`]: a Linux guest with page cache, a writer and a self-check, recorded once and started
//!   from the recording ever after;
//! - [`qemu`]: an unmodified QEMU as source or destination, driven over QMP;
//! - [`wan`]: a link of given delay, rate, queue and loss, between network namespaces (root) or
//!   between UDP sockets (anyone);
//! - [`process`]: children that die with their owner, and what they cost.
//!
//! Every wait here has a limit, and every failure carries the last lines of the logs that explain it.

pub mod guest;
pub mod process;
pub mod qemu;
pub mod wan;

mod sys;
