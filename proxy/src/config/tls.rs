//! `[tls]`: reads the certificate files and proves, before anything is bound, that a peer with the same
//! CA would accept us under our own name.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};

use super::reader::{Findings, Section, string};

/// Largest certificate, key or secret file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Most certificates in one file.
const MAX_CERTIFICATES: usize = 64;

/// Time left below which a certificate is warned about.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);

/// The certificate files, read and checked: the key belongs to the certificate, the certificate chains
/// to the CA, is valid now for both roles and carries the gateway's name.
#[derive(Debug)]
pub struct TlsFiles {
    /// File of the CA's certificates, absolute or relative to the working directory.
    pub ca_path: PathBuf,
    /// File of our certificate, then any intermediates.
    pub cert_path: PathBuf,
    /// File of our private key.
    pub key_path: PathBuf,
    /// CA certificates; at least one.
    pub ca: Vec<CertificateDer<'static>>,
    /// Our certificate first, then intermediates.
    pub cert_chain: Vec<CertificateDer<'static>>,
    /// Our private key (`clone_key` makes a copy). rustls prints no key in `Debug`.
    pub key: PrivateKeyDer<'static>,
    /// When our certificate or a CA's expires, whichever is soonest: seconds since 1970.
    pub expires_at: i64,
}

impl TlsFiles {
    /// The CA's certificates as trust anchors.
    pub fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        // All were accepted one by one when they were read.
        roots.add_parsable_certificates(self.ca.iter().cloned());
        roots
    }

    /// Reads `[tls]` and its files; `name` is the gateway's, where that is valid.
    pub(super) fn read(
        mut section: Section,
        base: &Path,
        name: Option<&str>,
        findings: &mut Findings,
    ) -> Option<Self> {
        let hint = |file: &str| format!("\"{file}\" (skyferry pki makes one)");
        let mut path = |key: &'static str, example: &str, findings: &mut Findings| {
            let full_key = section.key(key);
            let path = section.required(key, &hint(example), findings, string)?;
            Some((full_key, base.join(path)))
        };
        let ca = path("ca", "ca.pem", findings);
        let cert = path("cert", "edge-a.pem", findings);
        let key = path("key", "edge-a.key", findings);
        section.finish(findings);

        let ca = ca.and_then(|(k, path)| Some((read_certificates(&k, &path, findings)?, k, path)));
        let cert =
            cert.and_then(|(k, path)| Some((read_certificates(&k, &path, findings)?, k, path)));
        let key = key.and_then(|(k, path)| Some((read_key(&k, &path, findings)?, k, path)));
        let ((ca, ca_key, ca_path), (cert_chain, cert_key, cert_path), (key, key_key, key_path)) =
            (ca?, cert?, key?);

        let files = Self {
            ca_path,
            cert_path,
            key_path,
            ca,
            cert_chain,
            key,
            expires_at: 0,
        };
        files.check(&[&ca_key, &cert_key, &key_key], name, findings)
    }

    /// The checks that need all three files; `keys` are the names of `ca`, `cert` and `key`.
    fn check(
        mut self,
        [ca_key, cert_key, key_key]: &[&str; 3],
        name: Option<&str>,
        findings: &mut Findings,
    ) -> Option<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        if let Err(error) =
            CertifiedKey::from_der(self.cert_chain.clone(), self.key.clone_key(), &provider)
        {
            let message = match error {
                rustls::Error::InconsistentKeys(_) => format!(
                    "the key in {} does not belong to the certificate in {}; give the pair that was \
                     made together",
                    self.key_path.display(),
                    self.cert_path.display()
                ),
                other => format!("{}: cannot be used: {other}", self.key_path.display()),
            };
            findings.error(*key_key, message);
            return None;
        }
        let mut roots = RootCertStore::empty();
        for certificate in &self.ca {
            if let Err(error) = roots.add(certificate.clone()) {
                let path = self.ca_path.display();
                findings.error(
                    *ca_key,
                    format!("{path}: holds a certificate that cannot be a CA: {error}"),
                );
                return None;
            }
        }
        if let Err(message) = self.verify(&Arc::new(roots), &provider, name) {
            findings.error(
                *cert_key,
                format!("{}: {message}", self.cert_path.display()),
            );
            return None;
        }
        let expiry = |certificates: &[CertificateDer<'_>]| {
            certificates.iter().filter_map(|der| not_after(der)).min()
        };
        let cert_expiry = expiry(&self.cert_chain[..1]);
        let ca_expiry = expiry(&self.ca);
        for (key, path, expiry) in [
            (*cert_key, &self.cert_path, cert_expiry),
            (*ca_key, &self.ca_path, ca_expiry),
        ] {
            warn_of_expiry(key, path, expiry, findings);
        }
        self.expires_at = cert_expiry
            .into_iter()
            .chain(ca_expiry)
            .min()
            .unwrap_or(i64::MAX);
        Some(self)
    }

    /// Judges our certificate as a peer will: as a server under our name, and as a client.
    fn verify(
        &self,
        roots: &Arc<RootCertStore>,
        provider: &Arc<CryptoProvider>,
        name: Option<&str>,
    ) -> Result<(), String> {
        let (leaf, intermediates) = self
            .cert_chain
            .split_first()
            .ok_or("holds no certificate")?;
        let now = UnixTime::now();
        let client = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| format!("the CA cannot be used: {error}"))?;
        client
            .verify_client_cert(leaf, intermediates, now)
            .map_err(|error| self.explain(&error, "client", name))?;
        let Some(name) = name else { return Ok(()) };
        let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| format!("the CA cannot be used: {error}"))?;
        let server_name = ServerName::try_from(name.to_owned())
            .map_err(|_| format!("the name {name} is no DNS name"))?;
        server
            .verify_server_cert(leaf, intermediates, &server_name, &[], now)
            .map_err(|error| self.explain(&error, "server", Some(name)))?;
        Ok(())
    }

    /// Says what a peer would object to and what would be right.
    fn explain(&self, error: &rustls::Error, role: &str, name: Option<&str>) -> String {
        let name = name.unwrap_or("NAME");
        let rustls::Error::InvalidCertificate(error) = error else {
            return error.to_string();
        };
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("has expired; issue a new one: skyferry pki issue --dir DIR --name {name}")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "is not valid yet; check this machine's clock".into()
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                format!(
                    "was not issued by the CA in {}; give the CA that did",
                    self.ca_path.display()
                )
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!(
                    "does not carry the name {name} (gateway.name) as a DNS name in its subject \
                     alternative names; it carries: {}",
                    self.names().join(", ")
                )
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                format!(
                    "may not be used as a {role}; a gateway's certificate needs the extended key \
                     usages serverAuth and clientAuth"
                )
            }
            other => format!("would be refused by a peer: {other}"),
        }
    }

    /// DNS names in our certificate.
    fn names(&self) -> Vec<String> {
        let Some(Ok((_, certificate))) = self
            .cert_chain
            .first()
            .map(|der| x509_parser::parse_x509_certificate(der))
        else {
            return Vec::new();
        };
        let Ok(Some(extension)) = certificate.subject_alternative_name() else {
            return vec!["none".into()];
        };
        let names = extension.value.general_names.iter();
        names.map(|name| name.to_string()).collect()
    }
}

/// The end of a certificate's validity in seconds since 1970; `None` when it cannot be read, which
/// the verification has then found already.
fn not_after(der: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

fn warn_of_expiry(key: &str, path: &Path, expiry: Option<i64>, findings: &mut Findings) {
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
    let Some(left) = expiry.map(|at| at.saturating_sub(now)) else {
        return;
    };
    if left < EXPIRY_WARNING.as_secs() as i64 {
        let days = left.div_euclid(24 * 3600);
        findings.warn(
            key,
            format_args!("{}: expires in {days} days", path.display()),
        );
    }
}

/// Reads a small file in full. What others may read is warned about where it is `secret`.
pub(super) fn read_file(
    key: &str,
    path: &Path,
    secret: bool,
    findings: &mut Findings,
) -> Option<Vec<u8>> {
    let mut contents = Vec::new();
    let read = File::open(path).and_then(|file| {
        let metadata = file.metadata()?;
        if secret && metadata.mode() & 0o077 != 0 {
            findings.warn(
                key,
                format_args!(
                    "{}: others may read it; run chmod 600 on it",
                    path.display()
                ),
            );
        }
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut contents)
    });
    match read {
        Err(error) => {
            let made_by = if key.starts_with("tls.") {
                "; skyferry pki makes such files"
            } else {
                ""
            };
            findings.error(
                key,
                format!(
                    "{}: cannot be read: {error}; a relative path begins at the folder of the \
                     configuration file{made_by}",
                    path.display()
                ),
            );
            None
        }
        Ok(read) if read as u64 > MAX_FILE_BYTES => {
            findings.error(
                key,
                format!("{}: is larger than {MAX_FILE_BYTES} bytes", path.display()),
            );
            None
        }
        Ok(_) => Some(contents),
    }
}

fn read_certificates(
    key: &str,
    path: &Path,
    findings: &mut Findings,
) -> Option<Vec<CertificateDer<'static>>> {
    let contents = read_file(key, path, false, findings)?;
    let message = match CertificateDer::pem_slice_iter(&contents)
        .take(MAX_CERTIFICATES + 1)
        .collect::<Result<Vec<_>, _>>()
    {
        Ok(list) if list.is_empty() => {
            "holds no certificate; it must hold PEM blocks that begin -----BEGIN CERTIFICATE-----"
                .to_owned()
        }
        Ok(list) if list.len() > MAX_CERTIFICATES => {
            format!("holds more than {MAX_CERTIFICATES} certificates")
        }
        Ok(list) => return Some(list),
        Err(error) => format!("is no PEM file: {error}"),
    };
    findings.error(key, format!("{}: {message}", path.display()));
    None
}

fn read_key(key: &str, path: &Path, findings: &mut Findings) -> Option<PrivateKeyDer<'static>> {
    let contents = read_file(key, path, true, findings)?;
    match PrivateKeyDer::from_pem_slice(&contents) {
        Ok(private) => Some(private),
        Err(error) => {
            findings.error(
                key,
                format!(
                    "{}: holds no private key that can be used ({error}); it must hold one PEM block \
                     that begins -----BEGIN PRIVATE KEY-----, without a password",
                    path.display()
                ),
            );
            None
        }
    }
}
