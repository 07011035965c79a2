//! Who may speak to a gateway, and what an operator is told when one may not. On loopback UDP.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod sim;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sim::Authority;
use skyferry::transport::{Identity, LinkEndpoint, TransportSettings, explain, peer_of};

const SOCKET_BUFFER: usize = 64 << 10;

fn endpoint(identity: &Identity) -> LinkEndpoint {
    let settings = TransportSettings {
        idle_timeout: Duration::from_secs(2),
        keep_alive: None,
        ..TransportSettings::default()
    };
    LinkEndpoint::bind(loopback(), SOCKET_BUFFER, identity, &settings).unwrap()
}

fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

/// Connects as `client` to a gateway with the identity `server`, which should be called `name`.
/// Returns what either side gets: a connection on which something was read, or the reason.
async fn attempt(
    client: &Identity,
    server: &Identity,
    name: &str,
) -> (Result<Connection, String>, Result<Connection, String>) {
    let (client, server) = (endpoint(client), endpoint(server));
    let address = server.local_addr().unwrap();
    let server_side = async {
        let connection = server.accept().await.unwrap().await?;
        let mut stream = connection.open_uni().await?;
        // Fails only when the connection has failed, which closed() tells better.
        stream.write_all(b"hello").await.ok();
        stream.finish().ok();
        stream.stopped().await.ok();
        connection.close_reason().map_or(Ok(connection), Err)
    };
    let client_side = async {
        let connection = client.connect(address, name).unwrap().await?;
        let mut stream = connection.accept_uni().await?;
        stream.read_to_end(16).await.ok();
        Ok::<_, ConnectionError>(connection)
    };
    let (client_side, server_side) = tokio::join!(client_side, server_side);
    let told = |error: ConnectionError| explain(&error);
    (client_side.map_err(told), server_side.map_err(told))
}

/// Both sides' explanations of a refusal; each says what it must.
async fn refused(client: &Identity, server: &Identity, client_told: &str, server_told: &str) {
    let (client_side, server_side) = attempt(client, server, "edge-b").await;
    let (client_side, server_side) = (client_side.unwrap_err(), server_side.unwrap_err());
    println!("client: {client_side}\nserver: {server_side}");
    assert!(client_side.contains(client_told), "{client_side}");
    assert!(server_side.contains(server_told), "{server_side}");
}

#[tokio::test]
async fn peers_of_one_authority_know_each_other() {
    let authority = Authority::new();
    let (near, far) = (authority.identity("edge-a"), authority.identity("edge-b"));
    let (client, server) = attempt(&near, &far, "edge-b").await;
    let (client, server) = (client.unwrap(), server.unwrap());
    let names = ["edge-c", "edge-a", "edge-b"];
    assert_eq!(peer_of(&server, &names), Some("edge-a"));
    assert_eq!(peer_of(&client, &names), Some("edge-b"));
    assert_eq!(peer_of(&server, &["edge-b"]), None);
}

#[tokio::test]
async fn a_certificate_for_two_peers_is_nobody() {
    let authority = Authority::new();
    let both = authority.issue(&["edge-a", "edge-c"], |_| {});
    let (_, server) = attempt(&both, &authority.identity("edge-b"), "edge-b").await;
    let server = server.unwrap();
    assert_eq!(peer_of(&server, &["edge-a", "edge-c"]), None);
    assert_eq!(peer_of(&server, &["edge-a"]), Some("edge-a"));
}

/// An authority of another name, and one of the same name with another key, which looks different
/// to TLS.
#[tokio::test]
async fn a_foreign_authority_is_refused_by_the_client() {
    let ours = Authority::new();
    for theirs in [Authority::named("another"), Authority::new()] {
        refused(
            &ours.identity("edge-a"),
            &theirs.identity("edge-b"),
            "the peer's certificate is not from a known authority",
            "the peer refused our certificate: it is not from a known authority",
        )
        .await;
    }
}

/// The client trusts the server, but not the other way round.
#[tokio::test]
async fn a_foreign_authority_is_refused_by_the_server() {
    let ours = Authority::new();
    for theirs in [Authority::named("another"), Authority::new()] {
        let mut client = ours.identity("edge-a");
        client.authorities = theirs.roots();
        refused(
            &client,
            &theirs.identity("edge-b"),
            "the peer refused our certificate: it is not from a known authority",
            "the peer's certificate is not from a known authority",
        )
        .await;
    }
}

#[tokio::test]
async fn expired_and_early_certificates_are_refused() {
    let authority = Authority::new();
    let good = authority.identity("edge-a");
    let expired = authority.issue(&["edge-b"], |params| {
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    refused(
        &good,
        &expired,
        "the peer's certificate has expired",
        "refused our certificate: it has expired",
    )
    .await;
    let early = authority.issue(&["edge-a"], |params| {
        params.not_before = date_time_ymd(2900, 1, 1);
        params.not_after = date_time_ymd(2901, 1, 1);
    });
    let server = authority.identity("edge-b");
    refused(
        &early,
        &server,
        "refused our certificate: it is not valid yet",
        "the peer's certificate is not valid yet",
    )
    .await;
}

#[tokio::test]
async fn a_wrong_name_is_refused() {
    let authority = Authority::new();
    refused(
        &authority.identity("edge-a"),
        &authority.identity("edge-x"),
        "the peer's certificate carries another name",
        "refused our certificate: it carries another name",
    )
    .await;
}

#[tokio::test]
async fn a_certificate_for_servers_only_cannot_dial() {
    let authority = Authority::new();
    let server_only = authority.issue(&["edge-a"], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    refused(
        &server_only,
        &authority.identity("edge-b"),
        "refused our certificate: it is not made for this purpose",
        "the peer's certificate is not made for this purpose",
    )
    .await;
}

/// An authority that signs through an intermediate, as companies have it.
#[tokio::test]
async fn chains_with_an_intermediate_work() {
    let authority = Authority::new();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let intermediate_key = KeyPair::generate().unwrap();
    let intermediate = authority.sign(&params, &intermediate_key);
    let issuer = Issuer::new(params, intermediate_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["edge-b".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let far = Identity {
        authorities: authority.roots(),
        chain: vec![leaf.der().clone(), intermediate],
        key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
    };
    let near = authority.identity("edge-a");
    let (client, server) = attempt(&near, &far, "edge-b").await;
    assert!(client.is_ok() && server.is_ok());
    // And in the other direction, where the server judges the chain.
    let (client, server) = attempt(&far, &near, "edge-a").await;
    assert!(client.is_ok() && server.is_ok());
}

/// A client that does not use our code: `change` alters what rustls would do.
async fn stranger(
    change: impl FnOnce(&mut rustls::ClientConfig),
    with_certificate: bool,
) -> (String, String) {
    let authority = Authority::new();
    let identity = authority.identity("edge-a");
    let server = endpoint(&authority.identity("edge-b"));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(authority.roots());
    let mut config = if with_certificate {
        config
            .with_client_auth_cert(identity.chain, identity.key)
            .unwrap()
    } else {
        config.with_no_client_auth()
    };
    config.alpn_protocols = vec![b"skyferry".to_vec()];
    change(&mut config);
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let client = quinn::Endpoint::client(loopback()).unwrap();
    let dial = client.connect_with(
        quinn::ClientConfig::new(Arc::new(config)),
        server.local_addr().unwrap(),
        "edge-b",
    );
    let client_side = async {
        match dial.unwrap().await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    };
    let server_side = async { server.accept().await.unwrap().await.unwrap_err() };
    let (client_side, server_side) = tokio::join!(client_side, server_side);
    (explain(&client_side), explain(&server_side))
}

#[tokio::test]
async fn without_a_certificate_nothing_is_possible() {
    let (client, server) = stranger(|_| {}, false).await;
    println!("client: {client}\nserver: {server}");
    assert!(client.contains("demands a certificate"), "{client}");
    assert!(server.contains("presented no certificate"), "{server}");
}

#[tokio::test]
async fn another_protocol_is_refused() {
    let (client, server) =
        stranger(|config| config.alpn_protocols = vec![b"h3".to_vec()], true).await;
    println!("client: {client}\nserver: {server}");
    for told in [client, server] {
        assert!(told.contains("another protocol than skyferry"), "{told}");
    }
}

#[tokio::test]
async fn silence_is_explained() {
    let authority = Authority::new();
    let client = endpoint(&authority.identity("edge-a"));
    // A socket that nobody reads.
    let deaf = std::net::UdpSocket::bind(loopback()).unwrap();
    let error = client
        .connect(deaf.local_addr().unwrap(), "edge-b")
        .unwrap()
        .await
        .unwrap_err();
    assert!(explain(&error).contains("no answer"), "{}", explain(&error));
}

/// A new identity serves new connections while old ones go on.
#[tokio::test]
async fn an_identity_can_be_replaced() {
    let (old, new) = (Authority::new(), Authority::new());
    let mut server = endpoint(&old.identity("edge-b"));
    let address = server.local_addr().unwrap();
    let client = endpoint(&old.identity("edge-a"));
    let accepting = server.clone();
    let accept = async { accepting.accept().await.unwrap().await };
    let dial = async { client.connect(address, "edge-b").unwrap().await };
    let (before, kept) = tokio::join!(dial, accept);
    let (before, _kept) = (before.unwrap(), kept.unwrap());
    server.replace_identity(&new.identity("edge-b")).unwrap();
    let newcomer = endpoint(&new.identity("edge-a"));
    let accept = async { server.accept().await.unwrap().await };
    let dial = async { newcomer.connect(address, "edge-b").unwrap().await };
    let (after, accepted) = tokio::join!(dial, accept);
    assert!(after.is_ok() && accepted.is_ok());
    assert!(before.close_reason().is_none());
}
