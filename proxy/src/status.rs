//! What a gateway tells about itself: the types of the status API and their source.
//!
//! The JSON form is the contract of `/api/v1/status` and `/api/v1/migrations`: fields may be added,
//! never renamed. Times are seconds, sizes bytes, rates bytes per second.

use serde::{Deserialize, Serialize};

/// Most finished migrations kept in [`GatewayStatus::recent`].
pub const MAX_RECENT_MIGRATIONS: usize = 64;

/// Which way a migration, or a link's migrations, go, seen from this gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From this site to the peer: the source VM is here.
    Out,
    /// From the peer to this site: the destination VM is here.
    In,
}

impl Direction {
    /// The value of the metrics label `direction`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }
}

/// Where a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// The destination is being dialled through the peer.
    Connecting,
    /// The stream's header and RAM block list.
    Setup,
    /// RAM is copied while the guest runs.
    Precopy,
    /// The source guest has stopped; the rest of its RAM is on the way.
    Switchover,
    /// Device state is on the way.
    DeviceState,
    /// At the destination's site: bytes arrive. Phases are known at the source's site only.
    Receiving,
    /// The commit has been asked for (out) or released (in); the destination's verdict is awaited.
    AwaitingVerdict,
    /// The link is down; the migration goes on when it is back.
    Paused,
    /// The stream is of no kind the gateway knows; it is carried as it is.
    Opaque,
    /// The destination runs the guest.
    Completed,
    /// The migration broke off; the guest is at the source.
    Failed,
    /// The source called it off.
    Cancelled,
    /// A gateway refused it, or the target did.
    Refused,
    /// It ended after the commit was asked for (out) or released (in), without a verdict.
    Unknown,
}

impl MigrationState {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Refused | Self::Unknown
        )
    }

    /// The word for tables and logs, the same as in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Setup => "setup",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::DeviceState => "device-state",
            Self::Receiving => "receiving",
            Self::AwaitingVerdict => "awaiting-verdict",
            Self::Paused => "paused",
            Self::Opaque => "opaque",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }
}

/// One migration, running or finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// The id that both gateways' logs carry in the field `migration`.
    pub id: String,
    /// The other gateway.
    pub peer: String,
    /// Which way it goes.
    pub direction: Direction,
    /// The ingress listener it came in by; `None` at the far gateway.
    pub ingress: Option<String>,
    /// The destination VM's address.
    pub target: String,
    /// Where it stands.
    pub state: MigrationState,
    /// Precopy rounds begun; 0 before the first, and at the far gateway.
    pub round: u32,
    /// Channels open now.
    pub channels: u32,
    /// Bytes read from the source VM (out) or written to the destination VM (in).
    pub guest_bytes: u64,
    /// Bytes of our frames for them.
    pub wire_bytes: u64,
    /// `guest_bytes / wire_bytes`; `None` before the first wire byte.
    pub ratio: Option<f64>,
    /// Guest bytes per second over the last seconds.
    pub guest_bytes_per_sec: f64,
    /// Wire bytes per second over the last seconds.
    pub wire_bytes_per_sec: f64,
    /// Size of the guest's RAM, once the stream has told it; `None` at the far gateway.
    pub ram_total_bytes: Option<u64>,
    /// Estimate of what is left, `None` where there is no ground for one.
    pub remaining_seconds: Option<f64>,
    /// Start, as seconds since 1970 (UTC).
    pub started_at: f64,
    /// Age, or how long it took.
    pub elapsed_seconds: f64,
    /// From the end of RAM seen in the stream to the destination's verdict, once known; `None` at the
    /// far gateway.
    pub blackout_seconds: Option<f64>,
    /// Why it failed or was refused.
    pub error: Option<String>,
}

/// One link. There may be two to a peer: the one that this gateway dials carries migrations out, the
/// one that the peer dials carries them in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The other gateway.
    pub peer: String,
    /// Which way the migrations on it go.
    pub direction: Direction,
    /// The peer's address in use or, where this gateway dials, as configured; `None` while a peer
    /// that dials is away.
    pub address: Option<String>,
    /// Whether a connection stands.
    pub up: bool,
    /// Smoothed round-trip time; `None` while down.
    pub rtt_seconds: Option<f64>,
    /// Share of packets lost in the current connection, 0 to 1; `None` while down.
    pub loss: Option<f64>,
    /// Congestion window; `None` while down.
    pub congestion_window_bytes: Option<u64>,
    /// UDP payload sent over all connections of this link.
    pub sent_bytes: u64,
    /// UDP payload received over all connections of this link.
    pub received_bytes: u64,
    /// Why the last attempt to connect failed, while down.
    pub error: Option<String>,
}

/// The whole of `/api/v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// The gateway's configured name.
    pub name: String,
    /// The program's version.
    pub version: String,
    /// Whether a drain is under way: no new migrations are taken.
    pub draining: bool,
    /// The links that the configuration has a use for, a peer's one after the other: `out` where an
    /// ingress leads to the peer, `in` where an egress lets it in.
    pub links: Vec<LinkStatus>,
    /// Running migrations, oldest first.
    pub migrations: Vec<MigrationStatus>,
    /// Finished ones, latest first, at most [`MAX_RECENT_MIGRATIONS`].
    pub recent: Vec<MigrationStatus>,
}

/// Who knows the gateway's state; asked by the admin endpoint, so answers must not block.
pub trait StatusSource: Send + Sync {
    /// A snapshot.
    fn status(&self) -> GatewayStatus;

    /// Whether the gateway takes new migrations.
    ///
    /// # Errors
    /// Says why not, such as `draining`.
    fn ready(&self) -> Result<(), String>;

    /// Brings gauges that are only sampled (link, store) up to date; called before each scrape.
    fn refresh_metrics(&self);
}
