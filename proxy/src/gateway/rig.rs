//! For the tests of this module: a connection in virtual time, and a near migration with a channel.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use quinn::{Connection, EndpointConfig};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use skyferry_dedup::DomainKey;

use super::{
    channel::Channel,
    link::{Link, Role},
    migration::{Migration, direction},
    peer::PeerKnowledge,
};
use crate::{
    config::{Congestion, WanConfig},
    metrics::{Metrics, Registry},
    pki,
    transport::{
        Identity, LinkEndpoint, TransportSettings,
        simulated::{LinkModel, SimNet},
    },
    wire::{MigrationId, control::StreamKind},
};

/// Two ends of a connection; it stands as long as this does.
pub(super) struct Pair {
    pub(super) near: Connection,
    pub(super) _far: Connection,
    _endpoints: [LinkEndpoint; 2],
}

impl Pair {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
        let file = |name: &str| dir.path().join(name);
        let mut authorities = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(file("ca.pem")).unwrap();
        authorities.add(ca).unwrap();
        let identity = |name: &str| {
            pki::issue(dir.path(), name, &[], pki::LEAF_DAYS).unwrap();
            let chain = CertificateDer::from_pem_file(file(&format!("{name}.pem"))).unwrap();
            Identity {
                authorities: authorities.clone(),
                chain: vec![chain],
                key: PrivateKeyDer::from_pem_file(file(&format!("{name}.key"))).unwrap(),
            }
        };
        let net = SimNet::new(&LinkModel::new(100, Duration::from_millis(10), 1.0), 1);
        let endpoint = |socket, name| {
            let settings = TransportSettings::default();
            let config = EndpointConfig::default();
            LinkEndpoint::on_socket(socket, config, &identity(name), &settings).unwrap()
        };
        let near = endpoint(net.near(), "edge-a");
        let far = endpoint(net.far(), "edge-b");
        let dial = near.connect(net.far_addr(), "edge-b").unwrap();
        let accept = async { far.accept().await.unwrap().await };
        let (dialled, accepted) = tokio::join!(dial, accept);
        Self {
            near: dialled.unwrap(),
            _far: accepted.unwrap(),
            _endpoints: [near, far],
        }
    }
}

/// A link to `edge-b` without a connection.
pub(super) fn near_link() -> Arc<Link> {
    let knowledge = Arc::new(PeerKnowledge::new(0));
    Arc::new(Link::new("edge-b".into(), Role::Near, 0, knowledge))
}

/// A migration that begins here, without channels; the link does not know it yet.
pub(super) fn near_migration(link: &Arc<Link>) -> Arc<Migration> {
    let metrics = Metrics::register(&Registry::new(), 1).unwrap();
    Arc::new(Migration::new(
        MigrationId([1; 16]),
        link.clone(),
        "127.0.0.1:4444".into(),
        None,
        DomainKey::from_bytes([7; 32]),
        metrics.migration.for_peer("edge-b", direction(Role::Near)),
        false,
    ))
}

/// A first channel of a migration.
pub(super) fn join(migration: &Migration) -> Arc<Channel> {
    let wan = WanConfig {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        congestion: Congestion::Auto,
        delay_budget: Duration::from_millis(100),
        outage_budget: Duration::from_secs(600),
        keep_alive: Duration::from_secs(3),
        idle_timeout: Duration::from_secs(10),
        socket_buffer_bytes: 1 << 16,
        max_udp_payload: 1200,
        max_rate_bytes_per_sec: None,
    };
    let channel = Arc::new(Channel::new(0, StreamKind::Opaque, &wan));
    assert!(migration.add_channel(channel.clone(), 1));
    channel
}
