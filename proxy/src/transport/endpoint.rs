//! The QUIC endpoint of a gateway: one UDP socket for all peers, accepting and connecting.
//!
//! # How streams share a connection
//!
//! Frames travel one per unidirectional stream. quinn chooses anew for each packet: the stream of
//! the highest priority that has something to send, and among equals the one that has waited
//! longest (round robin). So give every stream a priority of its own
//! ([`quinn::SendStream::set_priority`] before the first write), falling within a class of traffic:
//!
//! - Older frames are complete before newer ones begin, and what is sent *again* of an older frame
//!   goes before everything newer. With equal priorities, frames share the link and all finish
//!   late, and a lost packet queues behind everything that waits.
//! - An urgent stream overtakes at the next packet. quinn's alternative, `send_fairness(false)`,
//!   first finishes the stream that it has begun: at 20 Mbit/s and 1 MiB per frame an urgent
//!   message then took 280 ms instead of 120 ms (RTT 150 ms, simulated).
//!
//! Priorities order what quinn holds and nothing else. A *write* waits while quinn holds as many
//! unacknowledged bytes as the send window, whatever its priority: the scheduler must keep what it
//! has written well below [`CONNECTION_WINDOW`], or urgent data waits for bulk to be acknowledged.
//!
//! # Windows
//!
//! The windows below allow 64 MiB under way: 1 Gbit/s at 500 ms, 3.5 Gbit/s at 150 ms. They bound
//! the memory that one connection can hold in each direction.
//!
//! # Packets
//!
//! What a packet costs hardly depends on its size, so packets are as large as the path carries. quinn
//! finds out (from 1200 bytes, RFC 8899), and is told how far to look: to what the interface carries
//! by which the peer is reached ([`route`]), and in any case no further than
//! [`TransportSettings::max_udp_payload`].

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, ConnectError, Connecting, Endpoint, EndpointConfig,
    IdleTimeout, MtuDiscoveryConfig, Runtime, TokioRuntime, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tracing::warn;

use super::congestion;
use super::route;
use super::tls::{self, Identity, TlsError};
use crate::config::{Congestion, MAX_UDP_PAYLOAD, MIN_UDP_PAYLOAD, WanConfig};

/// Bytes that a peer may send on one stream before we have read them. A frame travels on a stream
/// of its own and is at most about 1 MiB, so a frame never waits for credit.
pub const STREAM_WINDOW: u32 = 2 << 20;

/// Bytes that a peer may send on all streams of a connection before we have read them, and bytes
/// that we keep until they are acknowledged.
pub const CONNECTION_WINDOW: u32 = 64 << 20;

/// Unidirectional streams that a peer may have open at once: at 32 KiB per frame this is the
/// connection window.
pub const MAX_UNI_STREAMS: u32 = 2048;

/// Bidirectional streams that a peer may have open at once; for control conversations.
pub const MAX_BIDI_STREAMS: u32 = 16;

/// Packets by which a later packet may overtake before the earlier one counts as lost. Parallel
/// paths between clouds reorder by a few; time (9/8 RTT) decides anyway soon after, so a high
/// number delays a retransmission by an eighth of an RTT at most.
const PACKET_THRESHOLD: u32 = 32;

/// Packets for which the peer sends one acknowledgement, within the 25 ms that it has for any. One for every two,
/// as by default, is 2 to 3 % of all bytes where packets arrive one by one. With one for every ten the
/// controller's estimates suffer: 0.5 % loss at 100 Mbit/s and 80 ms is no longer filled.
const PACKETS_PER_ACK: u32 = 4;

/// Handshakes that may wait for [`LinkEndpoint::accept`] at once.
const MAX_INCOMING: usize = 64;

/// Bytes buffered for one waiting handshake, and for all of them.
const INCOMING_BUFFER: u64 = 64 << 10;
const INCOMING_BUFFER_TOTAL: u64 = 1 << 20;

/// Largest UDP payload of an Ethernet path with IPv6: what is looked for on a path of which nothing
/// is known.
pub const ETHERNET_UDP_PAYLOAD: u16 = 1452;

/// How a connection behaves on the path; one set per endpoint.
#[derive(Clone, Debug)]
pub struct TransportSettings {
    /// The congestion controller.
    pub congestion: Congestion,
    /// Average rate that one connection does not exceed, in bytes of UDP payload per second. Only
    /// [`Congestion::Auto`] and [`Congestion::Fixed`] can keep it.
    pub max_rate_bytes_per_sec: Option<u64>,
    /// The RTT assumed before the first measurement. Too high delays the retransmission of a lost
    /// first packet, too low repeats it needlessly.
    pub initial_rtt: Duration,
    /// Silence after which a packet is sent to keep the connection and NAT entries alive. Must be
    /// shorter than both sides' idle timeout. `None`: never.
    pub keep_alive: Option<Duration>,
    /// Silence after which the connection is given up; the smaller of both sides' counts.
    pub idle_timeout: Duration,
    /// Largest UDP payload to take, and to look for where the path may carry it; 1200
    /// to [`MAX_UDP_PAYLOAD`].
    pub max_udp_payload: u16,
    /// Hand the kernel batches of packets (GSO). Halves the CPU cost per byte; shallow policers
    /// may drop from the bursts.
    pub segmentation_offload: bool,
}

impl Default for TransportSettings {
    fn default() -> Self {
        Self {
            congestion: Congestion::Auto,
            max_rate_bytes_per_sec: None,
            initial_rtt: Duration::from_millis(100),
            keep_alive: Some(Duration::from_secs(5)),
            idle_timeout: Duration::from_secs(30),
            max_udp_payload: ETHERNET_UDP_PAYLOAD,
            segmentation_offload: true,
        }
    }
}

impl From<&WanConfig> for TransportSettings {
    fn from(wan: &WanConfig) -> Self {
        Self {
            congestion: wan.congestion,
            max_rate_bytes_per_sec: wan.max_rate_bytes_per_sec,
            keep_alive: Some(wan.keep_alive),
            idle_timeout: wan.idle_timeout,
            max_udp_payload: wan.max_udp_payload,
            ..Self::default()
        }
    }
}

impl TransportSettings {
    /// The settings in quinn's terms, for a path that may carry UDP payloads of `udp_payload` bytes.
    fn to_quinn(&self, udp_payload: u16) -> TransportConfig {
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(udp_payload);
        // quinn keeps milliseconds in 62 bits, which no configured timeout reaches.
        let idle_timeout = IdleTimeout::try_from(self.idle_timeout).ok();
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(PACKETS_PER_ACK - 1));
        let mut config = TransportConfig::default();
        config
            .ack_frequency_config(Some(acks))
            .max_concurrent_uni_streams(VarInt::from_u32(MAX_UNI_STREAMS))
            .max_concurrent_bidi_streams(VarInt::from_u32(MAX_BIDI_STREAMS))
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
            .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
            .send_window(u64::from(CONNECTION_WINDOW))
            // Equal priorities take turns; what the alternative costs is told above.
            .send_fairness(true)
            .packet_threshold(PACKET_THRESHOLD)
            .initial_rtt(self.initial_rtt)
            .max_idle_timeout(idle_timeout)
            .keep_alive_interval(self.keep_alive)
            .mtu_discovery_config(Some(mtu))
            .datagram_receive_buffer_size(None)
            .enable_segmentation_offload(self.segmentation_offload)
            .congestion_controller_factory(congestion::factory(
                self.congestion,
                self.max_rate_bytes_per_sec,
            ));
        config
    }
}

/// Why an endpoint could not be set up. All are faults of our own configuration or host.
#[derive(Debug, Error)]
pub enum BindError {
    /// The UDP socket could not be opened on the address.
    #[error("cannot listen on UDP {address}: {source}")]
    Socket {
        /// The configured address.
        address: SocketAddr,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The socket was opened but cannot be worked with.
    #[error("cannot use the UDP socket: {0}")]
    Endpoint(#[source] io::Error),
    /// Our certificate, key or authorities cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// One UDP socket that connects to and is reached by all peers.
#[derive(Clone, Debug)]
pub struct LinkEndpoint {
    endpoint: Endpoint,
    settings: TransportSettings,
    client: quinn::ClientConfig,
    /// Of connections that peers begin.
    server_transport: Arc<TransportConfig>,
    /// The address of the UDP socket, by which routes are looked up; `None` on a socket that is
    /// none of the kernel's.
    routed_from: Option<IpAddr>,
}

impl LinkEndpoint {
    /// Opens a UDP socket on `address` with kernel buffers of `socket_buffer` bytes and starts an
    /// endpoint on it. An IPv6 wildcard address serves IPv4 as well. Must run inside tokio.
    ///
    /// Warns when the kernel grants smaller buffers, and names the setting that limits them.
    ///
    /// # Errors
    /// When the address cannot be bound or the identity cannot be used.
    pub fn bind(
        address: SocketAddr,
        socket_buffer: usize,
        identity: &Identity,
        settings: &TransportSettings,
    ) -> Result<Self, BindError> {
        let socket = udp_socket(address, socket_buffer)
            .and_then(|socket| TokioRuntime.wrap_udp_socket(socket))
            .map_err(|source| BindError::Socket { address, source })?;
        let mut endpoint = Self::on_socket(socket, endpoint_config(identity), identity, settings)?;
        endpoint.routed_from = Some(address.ip());
        Ok(endpoint)
    }

    /// Starts an endpoint on a socket of any kind, such as a simulated one. Must run inside tokio.
    /// There is no route to ask what it carries, so [`TransportSettings::max_udp_payload`] is looked
    /// for on every path.
    ///
    /// # Errors
    /// When the identity cannot be used, or the socket does not know its address.
    pub fn on_socket(
        socket: Arc<dyn AsyncUdpSocket>,
        mut config: EndpointConfig,
        identity: &Identity,
        settings: &TransportSettings,
    ) -> Result<Self, BindError> {
        let mut settings = settings.clone();
        let payload = &mut settings.max_udp_payload;
        *payload = (*payload).clamp(MIN_UDP_PAYLOAD, MAX_UDP_PAYLOAD);
        // The bounds are those of QUIC, and the kernel gives the receive buffer's memory as it is used.
        let _ = config.max_udp_payload_size(*payload);
        // Where a peer begins the connection, what we send are answers.
        let answers = settings.max_udp_payload.min(ETHERNET_UDP_PAYLOAD);
        let server_transport = Arc::new(settings.to_quinn(answers));
        let client = client_config(identity)?;
        let server = server_config(identity, &server_transport)?;
        let endpoint = Endpoint::new_with_abstract_socket(
            config,
            Some(server),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(BindError::Endpoint)?;
        Ok(Self {
            endpoint,
            settings,
            client,
            server_transport,
            routed_from: None,
        })
    }

    /// Starts connecting to the peer called `name` at `address`. The future it returns ends when
    /// the server has proved that it is `name`; whether the server accepts *us* shows on the first
    /// read (see the [module above](super)).
    ///
    /// # Errors
    /// When no attempt can be made; see [`tls::explain_connect`].
    pub fn connect(&self, address: SocketAddr, name: &str) -> Result<Connecting, ConnectError> {
        let mut client = self.client.clone();
        let transport = self.settings.to_quinn(self.udp_payload_towards(address));
        client.transport_config(Arc::new(transport));
        self.endpoint.connect_with(client, address, name)
    }

    /// The largest UDP payload worth looking for on the way to `peer`: what our end of the route
    /// carries. How quinn searches, a path behind it that carries less costs two dozen round trips of
    /// small packets; a bound that the route already gives costs nothing.
    fn udp_payload_towards(&self, peer: SocketAddr) -> u16 {
        let max = self.settings.max_udp_payload;
        match self.routed_from {
            None => max,
            Some(source) => route::udp_payload(source, peer)
                .unwrap_or(ETHERNET_UDP_PAYLOAD)
                .clamp(MIN_UDP_PAYLOAD, max),
        }
    }

    /// Waits for the next peer that wants to connect; `None` once the endpoint is closed.
    pub fn accept(&self) -> quinn::Accept<'_> {
        self.endpoint.accept()
    }

    /// Uses another identity for all connections from now on; existing ones go on.
    ///
    /// # Errors
    /// When the identity cannot be used; nothing is changed then.
    pub fn replace_identity(&mut self, identity: &Identity) -> Result<(), TlsError> {
        let client = client_config(identity)?;
        let server = server_config(identity, &self.server_transport)?;
        self.client = client;
        self.endpoint.set_server_config(Some(server));
        Ok(())
    }

    /// The address in use, with the port that the kernel chose if 0 was configured.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The endpoint itself, to close it or to wait until it is idle.
    #[must_use]
    pub fn quinn(&self) -> &Endpoint {
        &self.endpoint
    }
}

/// An endpoint that peers recognise after a restart: asked about a connection that the process before
/// it had, it answers with a stateless reset (RFC 9000, 10.3) that the peer can check, so the peer
/// connects anew at once instead of waiting for its idle timeout. For that, connection ids and reset
/// tokens come from keys that only depend on our private key.
fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let secret = identity.key.secret_der();
    let reset_key = blake3::derive_key("skyferry 2026 QUIC stateless reset key v1", secret);
    let id_key = blake3::derive_key("skyferry 2026 QUIC connection id key v1", secret);
    let (id_key, _) = id_key.split_first_chunk().expect("32 bytes have a first 8");
    let id_key = u64::from_le_bytes(*id_key);
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &reset_key);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    config
}

/// Without what depends on the path.
fn client_config(identity: &Identity) -> Result<quinn::ClientConfig, TlsError> {
    Ok(quinn::ClientConfig::new(tls::client_crypto(identity)?))
}

fn server_config(
    identity: &Identity,
    transport: &Arc<TransportConfig>,
) -> Result<quinn::ServerConfig, TlsError> {
    let mut config = quinn::ServerConfig::with_crypto(tls::server_crypto(identity)?);
    config
        .transport_config(Arc::clone(transport))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL);
    Ok(config)
}

/// A UDP socket bound to `address`, alone on it, with buffers of `buffer` bytes as far as the
/// kernel grants them.
fn udp_socket(address: SocketAddr, buffer: usize) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(buffer)?;
    socket.set_send_buffer_size(buffer)?;
    warn_if_clipped(
        "receive",
        "net.core.rmem_max",
        buffer,
        socket.recv_buffer_size()?,
    );
    warn_if_clipped(
        "send",
        "net.core.wmem_max",
        buffer,
        socket.send_buffer_size()?,
    );
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Linux grants at most the sysctl's value without an error, and reports twice what it granted.
fn warn_if_clipped(direction: &str, sysctl: &str, wanted: usize, reported: usize) {
    let granted = reported / 2;
    if granted < wanted {
        warn!(
            wanted_bytes = wanted,
            granted_bytes = granted,
            "the kernel limits the UDP {direction} buffer, which costs packets at high rates; \
             raise {sysctl} to {wanted} (sysctl -w {sysctl}={wanted})"
        );
    }
}
