//! What the tests of the transport share: identities, and two endpoints on a simulated link.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::time::Duration;

use quinn::{Connection, EndpointConfig};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use skyferry::transport::simulated::{LinkModel, SimNet};
use skyferry::transport::{Identity, LinkEndpoint, TransportSettings};

/// A certificate authority made for one test.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("Skyferry test authority")
    }

    pub(crate) fn named(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().clone();
        Self {
            issuer: Issuer::new(params, key),
            der,
        }
    }

    /// The authority as what a gateway trusts.
    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        roots
    }

    /// A certificate for `key` as `params` describe it.
    pub(crate) fn sign(
        &self,
        params: &CertificateParams,
        key: &KeyPair,
    ) -> CertificateDer<'static> {
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }

    /// An identity with `names`, changed by `change` before it is signed.
    pub(crate) fn issue(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Identity {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        Identity {
            authorities: self.roots(),
            chain: vec![self.sign(&params, &key)],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        }
    }

    /// An identity with one name.
    pub(crate) fn identity(&self, name: &str) -> Identity {
        self.issue(&[name], |_| {})
    }
}

/// Two connected gateways on a simulated link: `near` has dialled `far`.
pub(crate) struct Pair {
    pub(crate) net: SimNet,
    pub(crate) near: LinkEndpoint,
    pub(crate) far: LinkEndpoint,
    pub(crate) near_connection: Connection,
    pub(crate) far_connection: Connection,
}

impl Pair {
    pub(crate) async fn connect(
        model: &LinkModel,
        settings: &TransportSettings,
        seed: u64,
    ) -> Self {
        let authority = Authority::new();
        let net = SimNet::new(model, seed);
        let near = LinkEndpoint::on_socket(
            net.near(),
            endpoint_config(seed),
            &authority.identity("edge-a"),
            settings,
        )
        .unwrap();
        let far = LinkEndpoint::on_socket(
            net.far(),
            endpoint_config(!seed),
            &authority.identity("edge-b"),
            settings,
        )
        .unwrap();
        let (near_connection, far_connection) = join(&net, &near, &far).await;
        Self {
            net,
            near,
            far,
            near_connection,
            far_connection,
        }
    }

    /// One more connection between the two.
    pub(crate) async fn another(&self) -> (Connection, Connection) {
        join(&self.net, &self.near, &self.far).await
    }
}

async fn join(net: &SimNet, near: &LinkEndpoint, far: &LinkEndpoint) -> (Connection, Connection) {
    let dial = async {
        near.connect(net.far_addr(), "edge-b")
            .unwrap()
            .await
            .unwrap()
    };
    let accept = async { far.accept().await.unwrap().await.unwrap() };
    tokio::time::timeout(Duration::from_secs(60), async {
        tokio::join!(dial, accept)
    })
    .await
    .unwrap()
}

fn endpoint_config(seed: u64) -> EndpointConfig {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut config = EndpointConfig::default();
    config.rng_seed(Some(bytes));
    config
}

/// Sends frames of `frame_bytes`, each on its own stream, older streams first, until stopped.
/// At most `frames` streams are unfinished at once.
pub(crate) fn send_bulk(connection: &Connection, frame_bytes: usize, frames: usize) {
    let data = bytes::Bytes::from(vec![0x5a; frame_bytes]);
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(frames));
    let connection = connection.clone();
    tokio::spawn(async move {
        let mut priority = 0;
        while let Ok(mut stream) = connection.open_uni().await {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                break;
            };
            stream.set_priority(priority).unwrap();
            priority -= 1;
            if stream.write_chunk(data.clone()).await.is_err() || stream.finish().is_err() {
                break;
            }
            tokio::spawn(async move {
                stream.stopped().await.ok();
                drop(slot);
            });
        }
    });
}

/// Reads and forgets all streams.
pub(crate) fn receive_all(connection: &Connection) {
    let connection = connection.clone();
    tokio::spawn(async move {
        while let Ok(mut stream) = connection.accept_uni().await {
            tokio::spawn(async move {
                while let Ok(Some(_)) = stream.read_chunk(1 << 20, false).await {}
            });
        }
    });
}
