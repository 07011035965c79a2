//! Mutual TLS 1.3: the only way two gateways speak.
//!
//! Both sides present a certificate of the configured authorities. The client checks that the
//! server's certificate names the peer it meant to reach; the server accepts any certificate of the
//! authorities and then looks up *which* configured peer it names ([`peer_of`]). A peer is known by
//! a DNS name in its certificate's subject alternative names, nothing else: the address it comes
//! from does not matter.
//!
//! The cryptography provider is handed over explicitly, so no process-wide default is read or set.
//! Session resumption and 0-RTT are off: 0-RTT data can be replayed by anyone who recorded it, and
//! a resumed session would outlive a change of the authorities.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectError, ConnectionError};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, DnsName, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use thiserror::Error;

/// The application protocol that gateways offer and require (ALPN, RFC 7301).
pub const ALPN: &[u8] = b"skyferry";

/// TLS alert: a certificate could not be accepted, for a reason without its own number.
const ALERT_BAD_CERTIFICATE: u8 = 42;
/// TLS alert: a certificate of an unsuitable type or purpose.
const ALERT_UNSUPPORTED_CERTIFICATE: u8 = 43;
/// TLS alert: the certificate was revoked by its authority.
const ALERT_CERTIFICATE_REVOKED: u8 = 44;
/// TLS alert: the certificate's validity is over or has not begun.
const ALERT_CERTIFICATE_EXPIRED: u8 = 45;
/// TLS alert: some other problem with the certificate.
const ALERT_CERTIFICATE_UNKNOWN: u8 = 46;
/// TLS alert: no chain to a trusted authority.
const ALERT_UNKNOWN_CA: u8 = 48;
/// TLS alert: a signature does not fit. For a certificate this is what an authority with the same
/// name but another key looks like: two runs of `skyferry pki init`, for example.
const ALERT_DECRYPT_ERROR: u8 = 51;
/// TLS alert: the peers share no TLS version.
const ALERT_PROTOCOL_VERSION: u8 = 70;
/// TLS alert: the client sent no certificate.
const ALERT_CERTIFICATE_REQUIRED: u8 = 116;
/// TLS alert: the peers share no application protocol.
const ALERT_NO_APPLICATION_PROTOCOL: u8 = 120;
/// QUIC error codes from here to `+ 0xff` carry a TLS alert (RFC 9001, 4.8).
const CRYPTO_ERROR_BASE: u64 = 0x100;
/// QUIC error code CONNECTION_REFUSED (RFC 9000, 20.1).
const CONNECTION_REFUSED: u64 = 0x2;

/// What a gateway proves its own identity with, and whom it believes.
///
/// Files are read and decoded elsewhere; this holds DER.
#[derive(Debug)]
pub struct Identity {
    /// The authorities whose certificates are accepted, for both directions.
    pub authorities: RootCertStore,
    /// Our certificate first, then the intermediates up to (without) an authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key of the first certificate of `chain`.
    pub key: PrivateKeyDer<'static>,
}

/// Why an [`Identity`] cannot be used. All are faults of our own configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The list of authorities is empty or unusable.
    #[error("the certificate authorities cannot be used: {0}")]
    Authorities(#[source] rustls::server::VerifierBuilderError),
    /// Our certificate or key is malformed, or they do not belong together.
    #[error("our certificate or key cannot be used: {0}")]
    Identity(#[source] rustls::Error),
    /// The cryptography provider lacks the cipher suite that QUIC needs.
    #[error("the cryptography provider cannot protect QUIC's first packets")]
    Provider,
}

/// The one cryptography provider in use.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The server side: demands a client certificate of `identity`'s authorities.
///
/// # Errors
/// When the authorities, the chain or the key cannot be used.
pub fn server_crypto(identity: &Identity) -> Result<Arc<QuicServerConfig>, TlsError> {
    let roots = Arc::new(identity.authorities.clone());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(TlsError::Authorities)?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Identity)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(TlsError::Identity)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    let config = QuicServerConfig::try_from(config).map_err(|_| TlsError::Provider)?;
    Ok(Arc::new(config))
}

/// The client side: presents our certificate and checks the server's chain and name.
///
/// The name is given per connection, see [`quinn::Endpoint::connect`].
///
/// # Errors
/// When the chain or the key cannot be used.
pub fn client_crypto(identity: &Identity) -> Result<Arc<QuicClientConfig>, TlsError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Identity)?
        .with_root_certificates(identity.authorities.clone())
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(TlsError::Identity)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    let config = QuicClientConfig::try_from(config).map_err(|_| TlsError::Provider)?;
    Ok(Arc::new(config))
}

/// The one name among `names` that the peer's verified certificate carries in its subject
/// alternative names.
///
/// `None` when no certificate was presented (the server side never lets that pass), when it names
/// none of `names`, or when it names more than one: a certificate that speaks for two configured
/// peers would let either pose as the other. Matching follows the rules of TLS server names, so
/// wildcards in the certificate count and letter case does not.
pub fn peer_of<'n, N>(connection: &quinn::Connection, names: &'n [N]) -> Option<&'n str>
where
    N: AsRef<str>,
{
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    named_in(chain.first()?, names)
}

/// [`peer_of`] for a certificate in hand.
fn named_in<'n, N: AsRef<str>>(
    certificate: &CertificateDer<'_>,
    names: &'n [N],
) -> Option<&'n str> {
    let certificate = ParsedCertificate::try_from(certificate).ok()?;
    let mut found = None;
    for name in names.iter().map(AsRef::as_ref) {
        let Ok(dns_name) = DnsName::try_from(name) else {
            continue;
        };
        let dns_name = ServerName::DnsName(dns_name);
        if rustls::client::verify_server_name(&certificate, &dns_name).is_ok()
            && found.replace(name).is_some()
        {
            return None;
        }
    }
    found
}

/// Says to an operator why a connection could not be opened or has ended.
///
/// The text names the side at fault and what to look at; it contains no secret.
#[must_use]
pub fn explain(error: &ConnectionError) -> String {
    match error {
        ConnectionError::VersionMismatch => {
            "the peer speaks no QUIC version that we know; is it a Skyferry gateway?".to_owned()
        }
        ConnectionError::TransportError(error) => {
            explain_code(u64::from(error.code), &error.reason, Judge::Us)
        }
        ConnectionError::ConnectionClosed(close) => explain_code(
            u64::from(close.error_code),
            &String::from_utf8_lossy(&close.reason),
            Judge::Peer,
        ),
        ConnectionError::ApplicationClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason);
            if reason.is_empty() {
                format!("the peer closed the connection (code {})", close.error_code)
            } else {
                format!("the peer closed the connection: {reason}")
            }
        }
        ConnectionError::Reset => {
            "the peer no longer knows this connection; it was probably restarted".to_owned()
        }
        ConnectionError::TimedOut => {
            "no answer from the peer within the idle timeout; check its address, that it is \
             running, and that UDP passes both ways"
                .to_owned()
        }
        ConnectionError::LocallyClosed => "the connection was closed by this gateway".to_owned(),
        ConnectionError::CidsExhausted => {
            "no connection identifiers are left; too many connections".to_owned()
        }
    }
}

/// Whether a connection failed because *we* did not accept the peer's certificate, or were shown none.
///
/// That the peer refused ours is its own refusal, and any other end of a handshake (no common
/// application protocol, a time-out, a reset) is none of a certificate.
#[must_use]
pub fn refused_certificate(error: &ConnectionError) -> bool {
    // What the peer found wrong comes as `ConnectionClosed`.
    let ConnectionError::TransportError(error) = error else {
        return false;
    };
    match alert_of(u64::from(error.code)) {
        Some(
            ALERT_BAD_CERTIFICATE
            | ALERT_UNSUPPORTED_CERTIFICATE
            | ALERT_CERTIFICATE_REVOKED
            | ALERT_CERTIFICATE_EXPIRED
            | ALERT_CERTIFICATE_UNKNOWN
            | ALERT_UNKNOWN_CA
            | ALERT_CERTIFICATE_REQUIRED,
        ) => true,
        // Of records that cannot be decrypted as well.
        Some(ALERT_DECRYPT_ERROR) => error.reason.contains("peer certificate"),
        _ => false,
    }
}

/// The TLS alert that a QUIC error code carries.
fn alert_of(code: u64) -> Option<u8> {
    let alert = code.checked_sub(CRYPTO_ERROR_BASE)?;
    u8::try_from(alert).ok()
}

/// Says to an operator why a connection could not even be attempted.
#[must_use]
pub fn explain_connect(error: &ConnectError) -> String {
    match error {
        ConnectError::EndpointStopping => "this gateway is shutting down".to_owned(),
        ConnectError::CidsExhausted => {
            "no connection identifiers are left; too many connections".to_owned()
        }
        ConnectError::InvalidServerName(name) => {
            format!("the peer's name {name:?} is not a valid DNS name")
        }
        ConnectError::InvalidRemoteAddress(address) => format!(
            "the peer's address {address} cannot be reached from the local listen address; an \
             IPv6 peer needs an IPv6 listen address such as [::]:7700"
        ),
        ConnectError::NoDefaultClientConfig | ConnectError::UnsupportedVersion => {
            format!("internal fault while connecting: {error}")
        }
    }
}

/// Which side refused.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Judge {
    Us,
    Peer,
}

/// Explains a QUIC transport close code with the refusing side's own text.
fn explain_code(code: u64, reason: &str, judge: Judge) -> String {
    if code == CONNECTION_REFUSED {
        return match judge {
            Judge::Us => "this gateway takes no new connections at the moment".to_owned(),
            Judge::Peer => "the peer takes no new connections at the moment: it has too many of \
                            them, or is ending"
                .to_owned(),
        };
    }
    let Some(alert) = alert_of(code) else {
        let who = match judge {
            Judge::Us => "the peer broke the QUIC protocol",
            Judge::Peer => "the peer says that we broke the QUIC protocol",
        };
        return format!("{who} (code {code:#x}): {reason}");
    };
    // The party whose certificate is in question, and who looked at it.
    let (whose, fix) = match judge {
        Judge::Us => ("the peer's certificate", "on the peer"),
        Judge::Peer => ("the peer refused our certificate: it", "here"),
    };
    match alert {
        ALERT_UNKNOWN_CA => format!(
            "{whose} is not from a known authority; compare tls.ca and tls.cert on both gateways"
        ),
        ALERT_DECRYPT_ERROR if reason.contains("BadSignature") => format!(
            "{whose} is not from a known authority, but perhaps from another one of the same name; \
             compare tls.ca and tls.cert on both gateways"
        ),
        ALERT_CERTIFICATE_EXPIRED if reason.contains("not valid yet") => {
            format!("{whose} is not valid yet; check the clocks of both hosts ({reason})")
        }
        ALERT_CERTIFICATE_EXPIRED => {
            format!("{whose} has expired; issue a new one {fix}, or check the clocks ({reason})")
        }
        ALERT_CERTIFICATE_REVOKED => format!("{whose} has been revoked"),
        ALERT_CERTIFICATE_REQUIRED => match judge {
            Judge::Us => "the peer presented no certificate".to_owned(),
            Judge::Peer => "the peer demands a certificate and received none from us".to_owned(),
        },
        ALERT_BAD_CERTIFICATE | ALERT_CERTIFICATE_UNKNOWN if is_wrong_name(reason) => {
            format!("{whose} carries another name than the one configured ({reason})")
        }
        ALERT_UNSUPPORTED_CERTIFICATE => {
            format!("{whose} is not made for this purpose (client and server use) ({reason})")
        }
        ALERT_BAD_CERTIFICATE | ALERT_CERTIFICATE_UNKNOWN => {
            format!("{whose} is not acceptable ({reason})")
        }
        ALERT_NO_APPLICATION_PROTOCOL => {
            "the peer speaks another protocol than skyferry, or another version of it".to_owned()
        }
        ALERT_PROTOCOL_VERSION => "the peer does not speak TLS 1.3".to_owned(),
        _ => {
            let who = match judge {
                Judge::Us => "the TLS handshake failed",
                Judge::Peer => "the peer ended the TLS handshake",
            };
            format!("{who} (alert {alert}): {reason}")
        }
    }
}

/// Whether rustls' text speaks of the certificate's names; TLS has no alert number for that.
fn is_wrong_name(reason: &str) -> bool {
    reason.contains("not valid for name") || reason.contains("NotValidForName")
}
