//! A gateway that comes back under its old address and key is noticed at once.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod sim;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use quinn::ConnectionError;
use sim::Authority;
use skyferry::transport::{Identity, LinkEndpoint, TransportSettings};

const SOCKET_BUFFER: usize = 64 << 10;

fn endpoint(address: SocketAddr, identity: &Identity) -> LinkEndpoint {
    let settings = TransportSettings {
        idle_timeout: Duration::from_secs(60),
        keep_alive: Some(Duration::from_millis(100)),
        ..TransportSettings::default()
    };
    LinkEndpoint::bind(address, SOCKET_BUFFER, identity, &settings).unwrap()
}

/// The process at the far end dies without a word; the next one at its address knows nothing of the
/// connection. The near end learns so with its next packet, not after the idle timeout.
#[tokio::test]
async fn a_restarted_peer_is_noticed_by_its_stateless_reset() {
    let authority = Authority::new();
    let (near, far) = (authority.identity("edge-a"), authority.identity("edge-b"));
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let client = endpoint(any, &near);

    // The first process has a runtime of its own, which takes its socket along when it dies.
    let (address, connection) = {
        let first = tokio::runtime::Runtime::new().unwrap();
        let server = {
            let _inside = first.enter();
            endpoint(any, &far)
        };
        let address = server.local_addr().unwrap();
        let accepting = server.clone();
        let accepted = first.spawn(async move { accepting.accept().await.unwrap().await });
        let connection = client.connect(address, "edge-b").unwrap().await.unwrap();
        let held = accepted.await.unwrap().unwrap();
        // With its runtime gone, nothing can tell the peer of the connection's end. Its threads are waited for,
        // which must not be done on a runtime's own.
        std::thread::spawn(move || drop(first)).join().unwrap();
        drop((held, server));
        (address, connection)
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    let _second = endpoint(address, &far);

    let reason = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
    assert_eq!(reason, Ok(ConnectionError::Reset));
}
