//! Who may say hello, and how: certificates, names and protocol versions.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use skyferry::transport::Identity;
use skyferry::wire::Control;
use tokio::net::UdpSocket;

use crate::peer::{Peer, endpoint, endpoint_at, hello};
use crate::rig::{Gateway, Site};

const INSTANCE: [u8; 16] = [1; 16];

/// What the gateway says to a peer that it does not take.
pub(crate) async fn refusal(gateway: &Gateway, identity: &Identity) -> String {
    match Peer::connect(gateway, identity).await {
        // With TLS 1.3 the client believes the handshake done before the server has judged.
        Ok(peer) => peer.closed().await,
        Err(text) => text,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_without_overlap_are_named_by_both_sides() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::connect(&gateway, &site.identity("edge-a"))
        .await
        .unwrap();
    peer.say(hello("edge-a", (2, 3), INSTANCE)).await;
    let text = peer.closed().await;
    assert!(text.contains("2 to 3") && text.contains("1 to 1"), "{text}");
    gateway
        .expect_log(&["edge-a", "2 to 3", "1 to 1", "upgrade"])
        .await;

    // A range that includes ours is taken, however new its other end.
    let mut peer = Peer::connect(&gateway, &site.identity("edge-a"))
        .await
        .unwrap();
    peer.say(hello("edge-a", (1, 9), INSTANCE)).await;
    peer.hear(|message| matches!(message, Control::Hello { .. }))
        .await;
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dialling_gateway_names_the_versions_too() {
    let site = Site::new();
    let acceptor = endpoint(&site.identity("edge-b"));
    let gateway = Gateway::near(&site, acceptor.local_addr().unwrap());
    let peer = Peer::accept(&acceptor, &hello("edge-b", (2, 3), INSTANCE))
        .await
        .unwrap();
    let text = peer.closed().await;
    assert!(text.contains("2 to 3") && text.contains("1 to 1"), "{text}");
    gateway
        .expect_log(&["edge-b", "2 to 3", "1 to 1", "upgrade"])
        .await;
    // Our own version comes back: the gateway keeps trying.
    let _peer = Peer::accept(&acceptor, &hello("edge-b", (1, 1), INSTANCE))
        .await
        .unwrap();
    gateway.expect_log(&["link up", "edge-b"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_in_hello_must_be_the_certificates() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::connect(&gateway, &site.identity("edge-a"))
        .await
        .unwrap();
    peer.say(hello("edge-c\n2026 INFO forged", (1, 1), INSTANCE))
        .await;
    let text = peer.closed().await;
    assert!(text.contains("edge-c") && text.contains("edge-a"), "{text}");
    gateway
        .expect_log(&["edge-a", "edge-c", "certificate"])
        .await;
    assert!(
        !gateway.whole_log().contains("\n2026 INFO forged"),
        "{}",
        gateway.whole_log()
    );
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn words_of_a_peer_cannot_forge_log_lines() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let peer = Peer::good(&gateway, &site).await;
    peer.quinn.close(
        quinn::VarInt::from_u32(9),
        b"bye\n2026 INFO forged \x1b[31m",
    );
    gateway.expect_log(&["edge-a", "bye", "forged"]).await;
    let log = gateway.whole_log();
    assert!(
        !log.contains("\n2026 INFO forged") && !log.contains("\x1b[31m"),
        "{log}"
    );
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_says_nothing_or_no_hello_is_closed() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut silent = Peer::connect(&gateway, &site.identity("edge-a"))
        .await
        .unwrap();
    // The stream exists for the other side from its first byte on.
    silent.raw(&[60]).await;
    let mut pinging = Peer::connect(&gateway, &site.identity("edge-a"))
        .await
        .unwrap();
    pinging.say(Control::Ping { nonce: 1 }).await;
    let text = pinging.closed().await;
    assert!(text.contains("no hello"), "{text}");
    let text = silent.closed().await;
    assert!(text.contains("did not say hello in time"), "{text}");
    gateway
        .expect_log(&["edge-a", "did not say hello in time"])
        .await;
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);

    let text = refusal(&gateway, &site.identity("edge-c")).await;
    assert!(text.contains("not a peer of this gateway"), "{text}");
    gateway
        .expect_log(&["none of the configured peers", "127.0.0.1"])
        .await;

    // The peer trusts the gateway's CA, but is certified by another.
    let other = Site::new();
    let mut foreign = other.identity("edge-a");
    foreign.authorities = site.identity("edge-a").authorities;
    let text = refusal(&gateway, &foreign).await;
    assert!(text.contains("not from a known authority"), "{text}");
    gateway
        .expect_log(&["peer refused", "not from a known authority", "127.0.0.1"])
        .await;

    let text = refusal(&gateway, &expired(&site)).await;
    assert!(text.contains("expired"), "{text}");
    gateway
        .expect_log(&["peer refused", "has expired", "127.0.0.1"])
        .await;

    gateway.expect_good(&site).await;
}

/// Passes packets on to a gateway, and nothing back: as if their senders' addresses were invented.
async fn one_way_to(gateway: SocketAddr) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut packet = vec![0; 65536];
        while let Ok((len, from)) = socket.recv_from(&mut packet).await {
            if from != gateway {
                let _ = socket.send_to(&packet[..len], gateway).await;
            }
        }
    });
    address
}

/// More of them than the gateway has room for handshakes.
#[tokio::test(flavor = "multi_thread")]
async fn invented_addresses_keep_no_peer_out() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let relay = one_way_to(gateway.wan).await;
    let flood = endpoint(&site.identity("edge-c"));
    let connect = |_| flood.connect(relay, "edge-b").unwrap();
    let handshakes: Vec<_> = (0..100).map(connect).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    gateway.expect_good(&site).await;
    drop(handshakes);
}

/// It has an address of its own and a valid certificate, and is silent on as many connections as it gets.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_says_no_hello_keeps_no_other_out() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let silent = endpoint_at("127.0.0.2", &site.identity("edge-a"));
    let connect = |_| silent.connect(gateway.wan, "edge-b").unwrap();
    let connecting: Vec<_> = (0..100).map(connect).collect();
    let mut connected = Vec::new();
    for connecting in connecting {
        connected.extend(connecting.await.ok());
    }
    assert!((1..=16).contains(&connected.len()), "{}", connected.len());
    gateway.expect_good(&site).await;
}

/// `edge-a` of the site's CA, a day too old.
pub(crate) fn expired(site: &Site) -> Identity {
    let read = |name: &str| std::fs::read_to_string(site.dir.path().join(name)).unwrap();
    let ca_key = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).unwrap();
    let mut params = CertificateParams::new(vec!["edge-a".to_owned()]).unwrap();
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(3 * 86_400)).into();
    params.not_after = (now - Duration::from_secs(86_400)).into();
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Identity {
        chain: vec![certificate.der().clone()],
        key,
        ..site.identity("edge-a")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dialling_gateway_checks_the_name_it_dials() {
    let site = Site::new();
    let acceptor = endpoint(&site.identity("edge-c"));
    let gateway = Gateway::near(&site, acceptor.local_addr().unwrap());
    let error = Peer::accept(&acceptor, &hello("edge-b", (1, 1), INSTANCE)).await;
    assert!(error.is_err());
    gateway
        .expect_log(&["no link", "edge-b", "carries another name"])
        .await;
}
