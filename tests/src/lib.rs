//! Test kit: real guests, an emulated WAN and faults.
//!
//! What the end-to-end tests, `cargo xtask demo` and `cargo xtask bench` share:
//!
//! - [`guest`]: a Linux guest with page cache, a writer and a self-check, recorded once and started
//!   from the recording ever after;
//! - [`qemu`]: an unmodified QEMU as source or destination, driven over QMP;
//! - [`wan`]: a link of given delay, rate, queue and loss, between network namespaces (root) or
//!   between UDP sockets (anyone);
//! - [`gateway`]: a pair of gateways as processes;
//! - [`scenario`]: a guest moved from A to B, and what it cost;
//! - [`bench`]: many guests moved in many ways, side by side;
//! - [`bars`]: figures against the bounds that are promised;
//! - [`prometheus`]: a real Prometheus that scrapes them;
//! - [`random`]: numbers that a seed repeats;
//! - [`debian`]: packages unpacked into a folder;
//! - [`skip`]: tests that cannot run everywhere;
//! - [`process`]: children that die with their owner, and what they cost.
//!
//! Every wait here has a limit, and every failure carries the last lines of the logs that explain it.

pub mod bars;
pub mod bench;
pub mod debian;
pub mod fake_vm;
pub mod gateway;
pub mod guest;
pub mod process;
pub mod prometheus;
pub mod qemu;
pub mod random;
pub mod scenario;
pub mod skip;
pub mod wan;

mod sys;

pub use sys::is_root;
