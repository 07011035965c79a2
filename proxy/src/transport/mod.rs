//! The link between two gateways: QUIC over UDP, mutual TLS 1.3, congestion control.
//!
//! ```text
//! tls.rs        who may speak to us, and who it is that speaks
//! endpoint.rs   the UDP socket, QUIC's windows, timers and limits
//! route.rs      how large packets may be on the way to a peer
//! congestion/   how fast to send: our own controller and the stock ones
//! simulated.rs  a link in virtual time for tests (cargo feature `simulation`)
//! ```
//!
//! This module knows no frames and no sessions: it hands out [`quinn::Connection`]s whose peer is
//! verified, set up so that one connection fills 1 Gbit/s at 150 ms, and says what it knows about
//! the path ([`congestion::estimate`]). Facts that callers rely on:
//!
//! - Every connection is mutually authenticated; there is no other mode, no 0-RTT data and no
//!   session resumption.
//! - With TLS 1.3 the *server* judges the client's certificate after the client believes the
//!   handshake is complete. A client learns of a refusal only when it reads: treat a connection as
//!   good once the peer has answered something.
//! - Streams are sent strictly by priority, packet by packet (see [`endpoint`] for what follows
//!   from that).

pub mod congestion;
pub mod endpoint;
mod route;
#[cfg(feature = "simulation")]
pub mod simulated;
pub mod tls;

pub use congestion::{Arrived, LinkEstimate, estimate};
pub use endpoint::{BindError, LinkEndpoint, TransportSettings};
pub use tls::{Identity, TlsError, explain, explain_connect, peer_of, refused_certificate};
