//! How large packets become, on loopback UDP, which carries all that IP can.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod sim;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use quinn::Connection;
use sim::Authority;
use skyferry::config::MAX_UDP_PAYLOAD;
use skyferry::transport::{LinkEndpoint, TransportSettings};
use tokio::time::{sleep, timeout};

/// What Ethernet carries.
const ETHERNET: u16 = 1452;
const SOCKET_BUFFER: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(10);

/// Two gateways that take packets so large; the connection that the first one has dialled.
struct Pair {
    connection: Connection,
    accepted: Connection,
    _endpoints: [LinkEndpoint; 2],
}

async fn pair(near: u16, far: u16) -> Pair {
    let authority = Authority::new();
    let endpoint = |name, max_udp_payload| {
        let settings = TransportSettings {
            max_udp_payload,
            ..TransportSettings::default()
        };
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        LinkEndpoint::bind(any, SOCKET_BUFFER, &authority.identity(name), &settings).unwrap()
    };
    let (near, far) = (endpoint("edge-a", near), endpoint("edge-b", far));
    let dial = near.connect(far.local_addr().unwrap(), "edge-b").unwrap();
    let accept = async { far.accept().await.unwrap().await };
    let (connection, accepted) = tokio::join!(dial, accept);
    Pair {
        connection: connection.unwrap(),
        accepted: accepted.unwrap(),
        _endpoints: [near, far],
    }
}

/// The size of packets once it has been what is expected, or at the end of the limit.
async fn settled(connection: &Connection, expected: u16) -> u16 {
    let size = || connection.stats().path.current_mtu;
    let reached = async {
        while size() != expected {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = timeout(LIMIT, reached).await;
    // One that is too large would come after it.
    sleep(Duration::from_millis(200)).await;
    size()
}

/// The largest packets pass through segmentation offload, and the peer's buffers have room for them.
#[tokio::test]
async fn packets_grow_to_what_is_configured_and_arrive() {
    const BYTES: usize = 8 << 20;
    let pair = pair(MAX_UDP_PAYLOAD, MAX_UDP_PAYLOAD).await;
    assert_eq!(
        settled(&pair.connection, MAX_UDP_PAYLOAD).await,
        MAX_UDP_PAYLOAD
    );
    let before = pair.connection.stats().udp_tx;
    let send = async {
        let mut stream = pair.connection.open_uni().await.unwrap();
        stream.write_all(&vec![0x5a; BYTES]).await.unwrap();
        stream.finish().unwrap();
    };
    let receive = async {
        let mut stream = pair.accepted.accept_uni().await.unwrap();
        stream.read_to_end(BYTES).await.unwrap()
    };
    let ((), received) = timeout(LIMIT, async { tokio::join!(send, receive) })
        .await
        .unwrap();
    assert!(received.len() == BYTES && received.iter().all(|byte| *byte == 0x5a));
    let after = pair.connection.stats().udp_tx;
    let mean = (after.bytes - before.bytes) / (after.datagrams - before.datagrams);
    assert!(mean > 5000, "{mean} bytes on average");
}

/// Neither side's limit is exceeded.
#[tokio::test]
async fn the_smaller_limit_counts() {
    for (near, far) in [(ETHERNET, MAX_UDP_PAYLOAD), (MAX_UDP_PAYLOAD, ETHERNET)] {
        let pair = pair(near, far).await;
        assert_eq!(
            settled(&pair.connection, ETHERNET).await,
            ETHERNET,
            "{near} {far}"
        );
    }
}
