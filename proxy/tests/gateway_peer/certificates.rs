//! Who counts a certificate that was not accepted: the gateway that refused it, and no other.

use std::sync::Arc;

use skyferry::transport::Identity;

use crate::greeting::{expired, refusal};
use crate::peer::{Peer, endpoint};
use crate::rig::{Gateway, Site, soon};

/// Refusals with these labels.
fn refused(direction: &str, peer: &str, reason: &str) -> String {
    format!(
        "skyferry_refused_connections_total{{direction=\"{direction}\",peer=\"{peer}\",\
         reason=\"{reason}\"}}"
    )
}

/// A certificate of another CA by which this site's are trusted.
fn foreign(site: &Site, name: &str) -> Identity {
    Identity {
        authorities: site.identity(name).authorities,
        ..Site::new().identity(name)
    }
}

/// A certificate of the site, by which those of another CA are trusted.
fn distrusting(site: &Site, name: &str) -> Identity {
    Identity {
        authorities: Site::new().identity(name).authorities,
        ..site.identity(name)
    }
}

/// How a peer that speaks another protocol over QUIC with TLS is turned away.
async fn of_another_protocol(gateway: &Gateway, site: &Site) {
    let identity = site.identity("edge-a");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(identity.authorities)
        .with_client_auth_cert(identity.chain, identity.key)
        .unwrap();
    config.alpn_protocols = vec![b"h3".to_vec()];
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(config));
    let connecting = client.connect_with(config, gateway.wan, "edge-b").unwrap();
    assert!(soon("a handshake", connecting).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_dialled_counts_what_it_refused() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let certificate = refused("in", "", "certificate");
    let mut count = 0.0;
    // Of no configured peer, of another CA, and too old.
    for identity in [
        site.identity("edge-c"),
        foreign(&site, "edge-a"),
        expired(&site),
    ] {
        refusal(&gateway, &identity).await;
        count += 1.0;
        gateway.expect_metric(&certificate, |n| n == count).await;
    }
    // It is the peer that refuses here.
    let error = Peer::connect(&gateway, &distrusting(&site, "edge-a")).await;
    assert!(error.is_err());
    gateway
        .expect_log(&["handshake failed", "refused our certificate"])
        .await;
    // And here it is none of a certificate.
    of_another_protocol(&gateway, &site).await;
    gateway
        .expect_metric(&refused("in", "", "protocol"), |n| n == 1.0)
        .await;
    assert_eq!(gateway.metric(&certificate).await, count);
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_dials_counts_what_it_refused() {
    let site = Site::new();
    let certificate = refused("out", "edge-b", "certificate");
    let all = "skyferry_refused_connections_total";
    // Of another CA, and of another name.
    for identity in [foreign(&site, "edge-b"), site.identity("edge-c")] {
        let acceptor = endpoint(&identity);
        let gateway = Gateway::near(&site, acceptor.local_addr().unwrap());
        let incoming = soon("a dial", acceptor.accept()).await.unwrap();
        assert!(soon("a handshake", incoming.into_future()).await.is_err());
        gateway.expect_metric(&certificate, |n| n == 1.0).await;
        assert_eq!(gateway.metric(all).await, 1.0);
    }
    // A peer that refuses this gateway's certificate counts it itself.
    let acceptor = endpoint(&distrusting(&site, "edge-b"));
    let gateway = Gateway::near(&site, acceptor.local_addr().unwrap());
    let incoming = soon("a dial", acceptor.accept()).await.unwrap();
    assert!(soon("a handshake", incoming.into_future()).await.is_err());
    gateway
        .expect_log(&["no link", "the peer refused our certificate"])
        .await;
    assert_eq!(gateway.metric(all).await, 0.0);
}
