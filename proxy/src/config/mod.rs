//! The gateway's configuration: one TOML file, read and checked as a whole before anything is bound.
//!
//! [`Config::load`] reads the file and the files it names (certificates, keys, tenant secrets) and
//! gives either a [`Config`], whose types cannot hold a bad value, or *all* that is wrong with it,
//! each entry with file, key and what would be right. Relative paths are relative to the folder of the
//! configuration file. `docs/operation.md` is the reference for operators.

mod endpoint;
mod error;
mod reader;
mod store;
mod tls;
mod units;
mod validate;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use endpoint::{
    AddressError, AllowRule, Endpoint, Host, HostPort, ListenAddress, MAX_HOST_NAME_BYTES,
    MAX_UNIX_PATH_BYTES, check_host_name,
};
pub use error::{ConfigError, ConfigErrors};
pub use store::{DiskConfig, StoreConfig};
pub use tls::TlsFiles;
pub(crate) use units::parse_size;
pub(crate) use validate::is_in_memory;

/// Most `[[peer]]` entries.
pub const MAX_PEERS: usize = 256;
/// Most `[[ingress]]` entries: each holds a listening socket.
pub const MAX_INGRESS: usize = 4096;
/// Most rules in one `egress.allow`.
pub const MAX_ALLOW_RULES: usize = 4096;
/// Most `[[tenant]]` entries.
pub const MAX_TENANTS: usize = 1024;
/// Smallest `wan.max_udp_payload`: what QUIC asks of every path.
pub const MIN_UDP_PAYLOAD: u16 = 1200;
/// Largest `wan.max_udp_payload`. Ten segments of it pass through the kernel's segmentation offload in
/// one piece of 64 KiB; larger ones would be dropped without a word.
pub const MAX_UDP_PAYLOAD: u16 = 6500;
/// The tenant of an ingress that names none; it always exists.
pub const DEFAULT_TENANT: &str = "default";

/// A whole, valid configuration.
#[derive(Debug)]
pub struct Config {
    /// The file it came from, for messages.
    pub path: PathBuf,
    /// `[gateway]`.
    pub gateway: GatewayConfig,
    /// `[wan]`.
    pub wan: WanConfig,
    /// `[tls]`, with the files read and checked.
    pub tls: TlsFiles,
    /// `[[peer]]`; names are unique and none is our own.
    pub peers: Vec<Peer>,
    /// `[[tenant]]`; names are unique. [`DEFAULT_TENANT`] is always among them.
    pub tenants: Vec<Tenant>,
    /// `[[ingress]]`; listeners are unique, the peer exists and has an address, the tenant exists.
    pub ingress: Vec<Ingress>,
    /// `[[egress]]`; at most one per peer. A peer without an entry reaches nothing.
    pub egress: Vec<Egress>,
    /// `[store]`.
    pub store: StoreConfig,
    /// `[compression]`.
    pub compression: CompressionConfig,
    /// `[limits]`.
    pub limits: LimitsConfig,
    /// `[admin]`; `None`: no admin endpoint.
    pub admin: Option<AdminConfig>,
    /// What is allowed but deserves a look; logged at start, printed by `check-config`.
    pub warnings: Vec<String>,
}

/// `[gateway]`.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// This gateway's name: a DNS name that its certificate carries, by which peers know it.
    pub name: String,
    /// How long running migrations may take after SIGTERM (1 s to 24 h).
    pub drain_timeout: Duration,
    /// Where to keep what the next process on this machine must know.
    pub runtime_dir: Option<PathBuf>,
}

/// `[wan]`: the link to the peers.
#[derive(Debug, Clone)]
pub struct WanConfig {
    /// UDP address of the one QUIC endpoint. Port 0: any free one, for a gateway that only dials.
    pub listen: SocketAddr,
    /// Congestion control.
    pub congestion: Congestion,
    /// How much time's worth of guest bytes may be accepted and not yet delivered, plus one RTT
    /// (10 ms to 10 s).
    pub delay_budget: Duration,
    /// How long a migration may stand still while the peer is out of reach (1 s to 24 h).
    pub outage_budget: Duration,
    /// Interval of keep-alive packets; below half the idle time-out (100 ms to 60 s).
    pub keep_alive: Duration,
    /// Silence after which a QUIC connection is taken for dead and dialled anew (2 s to 10 min).
    pub idle_timeout: Duration,
    /// Size asked for the UDP socket's send and receive buffers, in bytes (64 KiB to 1 GiB).
    pub socket_buffer_bytes: usize,
    /// Largest UDP payload to send, if the path carries it, and to take, in bytes
    /// ([`MIN_UDP_PAYLOAD`] to [`MAX_UDP_PAYLOAD`]).
    pub max_udp_payload: u16,
    /// Cap on UDP payload sent on each connection to a peer, in bytes per second; `None`: no cap.
    pub max_rate_bytes_per_sec: Option<u64>,
}

/// Congestion control of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Congestion {
    /// The gateway's own choice, which survives random loss.
    Auto,
    /// quinn's BBR.
    Bbr,
    /// quinn's CUBIC: slow on any link that loses packets.
    Cubic,
    /// quinn's NewReno.
    NewReno,
    /// A set rate that yields to nothing: for dedicated capacity only.
    Fixed {
        /// UDP payload in bits per second, 1 Mbit/s to 400 Gbit/s.
        bits_per_sec: u64,
    },
}

/// `[[peer]]`: a gateway that may connect to us, and to which we may connect.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The name its certificate must carry.
    pub name: String,
    /// Where to dial it over UDP; `None`: it dials us.
    pub address: Option<HostPort>,
}

/// `[[tenant]]`: a domain within which pages may be referred to.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Unique name.
    pub name: String,
    /// Key material that only the tenant's gateways know; `None`: the sending gateway makes a new key
    /// each time it starts.
    pub secret: Option<TenantSecret>,
}

/// A key made from a tenant's `secret_file` (BLAKE3 in key derivation mode). Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct TenantSecret([u8; 32]);

impl TenantSecret {
    /// Context string of the derivation; a change makes every stored page unknown.
    const CONTEXT: &str = "skyferry 2026-11 tenant secret file";

    /// Derives the key from the file's bytes; white space around them does not count.
    pub fn derive(contents: &[u8]) -> Self {
        Self(blake3::derive_key(Self::CONTEXT, contents.trim_ascii()))
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for TenantSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantSecret(..)")
    }
}

/// `[[ingress]]`: a listener for hypervisors.
#[derive(Debug, Clone)]
pub struct Ingress {
    /// Where hypervisors connect.
    pub listen: ListenAddress,
    /// The peer through which the target is reached; it is in [`Config::peers`] and has an address.
    pub peer: String,
    /// What the far gateway dials.
    pub target: Endpoint,
    /// Which side speaks first.
    pub first: First,
    /// Carry sources that open no return path, though they report success before it is known.
    pub allow_no_return_path: bool,
    /// The dedup domain; it is in [`Config::tenants`].
    pub tenant: String,
}

/// Which side of a channel speaks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum First {
    /// The client (QEMU's migration): the target is dialled once the first bytes have come, so that a
    /// stray connection never reaches it.
    #[default]
    Client,
    /// The server (NBD): the target is dialled at once.
    Server,
}

/// `[[egress]]`: what one peer may reach from here.
#[derive(Debug, Clone)]
pub struct Egress {
    /// The peer; it is in [`Config::peers`].
    pub peer: String,
    /// At least one rule.
    pub allow: Vec<AllowRule>,
    /// How long dialling a target may take (100 ms to 4 s).
    pub dial_timeout: Duration,
}

impl Egress {
    /// Whether the target is allowed as written. For a name that no rule lists, each address it
    /// resolves to must pass [`Self::allows_address`] before it is dialled.
    pub fn allows(&self, target: &Endpoint) -> bool {
        self.allow.iter().any(|rule| rule.matches(target))
    }

    /// Whether this address may be dialled.
    pub fn allows_address(&self, address: SocketAddr) -> bool {
        self.allow.iter().any(|rule| rule.matches_address(address))
    }
}

/// `[compression]`.
#[derive(Debug, Clone)]
pub struct CompressionConfig {
    /// zstd level, 1 to 19; `None`: what link and processor leave time for.
    pub level: Option<i32>,
    /// Memory for compressors, over all channels, where the level is not given (1 MiB to 1 GiB).
    pub memory_bytes: u64,
}

/// `[limits]`: what the gateway never goes beyond.
#[derive(Debug, Clone)]
pub struct LimitsConfig {
    /// Migrations at once, both directions together (1 to 4096).
    pub migrations: usize,
    /// Channels of one migration (1 to 1024; QEMU's multifd alone may open 255).
    pub channels_per_migration: usize,
    /// Memory for frames accepted from VMs and not yet delivered, and as much again for frames
    /// received and not yet decoded, over all migrations (1 MiB to 64 GiB).
    pub in_flight_bytes: u64,
    /// Memory of one migration for what its pages held when they were last sent, in bytes (0 to 256
    /// MiB). The smaller of both sites' limits counts.
    pub places_bytes: u64,
    /// Memory for what is kept of guests that moved, for their return, in bytes (0 to 16 GiB).
    pub manifests_bytes: u64,
}

/// `[admin]`: metrics, health and status over HTTP.
#[derive(Debug, Clone)]
pub struct AdminConfig {
    /// TCP address; one that is not a loopback address is worth a warning.
    pub listen: SocketAddr,
}

impl Config {
    /// The peer of that name.
    pub fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// What the peer may reach from here.
    pub fn egress_for(&self, peer: &str) -> Option<&Egress> {
        self.egress.iter().find(|egress| egress.peer == peer)
    }

    /// The tenant of that name.
    pub fn tenant(&self, name: &str) -> Option<&Tenant> {
        self.tenants.iter().find(|tenant| tenant.name == name)
    }
}
