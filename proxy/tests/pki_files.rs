//! What `skyferry pki` writes: modes, refusals, and certificates that rustls accepts.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, Error, RootCertStore};
use skyferry::pki::{self, PkiError};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn certificate(path: &Path) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(path).unwrap()
}

#[test]
fn a_chain_is_accepted_in_both_roles_under_its_names_only() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("new/pki");
    let ca = pki::init(&dir, Some("Test CA"), pki::CA_DAYS).unwrap();
    let extra = [
        "gw.example.net".to_owned(),
        "192.0.2.7".to_owned(),
        "Edge-A".to_owned(),
    ];
    let leaf = pki::issue(&dir, "edge-a", &extra, pki::LEAF_DAYS).unwrap();
    assert!(!leaf.cut_to_ca);
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&ca.key), 0o600);
    assert_eq!(mode(&dir.join(pki::TENANT_KEY)), 0o600);
    assert_eq!(mode(&leaf.key), 0o600);

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&ca.cert)).unwrap();
    let roots = Arc::new(roots);
    let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
    let server = server.build().unwrap();
    let verify = |name: &str| {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        server.verify_server_cert(&certificate(&leaf.cert), &[], &name, &[], UnixTime::now())
    };
    for name in ["edge-a", "gw.example.net", "192.0.2.7"] {
        verify(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let refused = verify("edge-b").unwrap_err();
    assert!(
        matches!(
            refused,
            Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. })
        ),
        "{refused}"
    );
    let client = WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .unwrap();
    client
        .verify_client_cert(&certificate(&leaf.cert), &[], UnixTime::now())
        .unwrap();
}

#[test]
fn nothing_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let ca = pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    let leaf = pki::issue(dir.path(), "edge-a", &[], 30).unwrap();
    let files = [&ca.cert, &ca.key, &leaf.cert, &leaf.key];
    let before = files.map(|path| fs::read(path).unwrap());
    assert!(matches!(
        pki::init(dir.path(), None, 30),
        Err(PkiError::Exists(_))
    ));
    assert!(matches!(
        pki::issue(dir.path(), "edge-a", &[], 30),
        Err(PkiError::Exists(_))
    ));
    assert_eq!(files.map(|path| fs::read(path).unwrap()), before);
    // One of the two is enough to refuse, and then the other is not made.
    fs::remove_file(&leaf.key).unwrap();
    assert!(matches!(
        pki::issue(dir.path(), "edge-a", &[], 30),
        Err(PkiError::Exists(_))
    ));
    assert!(!leaf.key.exists());
}

#[test]
fn certificates_differ_in_serial_number_and_key() {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    let serial = |name: &str| {
        let files = pki::issue(dir.path(), name, &[], 30).unwrap();
        let der = certificate(&files.cert);
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(parsed.raw_serial().len() <= 20 && parsed.raw_serial()[0] & 0x80 == 0);
        (
            parsed.raw_serial().to_vec(),
            parsed.public_key().raw.to_vec(),
        )
    };
    let (one, two) = (serial("one"), serial("two"));
    assert_ne!(one.0, two.0);
    assert_ne!(one.1, two.1);
}

#[test]
fn bad_names_and_bad_cas_are_refused_and_explained() {
    let dir = tempfile::tempdir().unwrap();
    let missing = pki::issue(dir.path(), "edge-a", &[], 30)
        .unwrap_err()
        .to_string();
    assert!(missing.contains("ca.pem is missing") && missing.contains("skyferry pki init --dir"));
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    for name in ["", "edge_a", "a/b", "../a", "a b", "-a", "a.", "ca", "CA"] {
        let refused = pki::issue(dir.path(), name, &[], 30).unwrap_err();
        assert!(
            matches!(refused, PkiError::Name { .. } | PkiError::NameIsCa),
            "{name}: {refused}"
        );
    }
    assert!(pki::issue(dir.path(), "edge-a", &["a/b".into()], 30).is_err());
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        3,
        "a refusal left files behind"
    );

    let other = tempfile::tempdir().unwrap();
    let other_ca = pki::init(other.path(), None, pki::CA_DAYS).unwrap();
    let secret = |dir: &tempfile::TempDir| fs::read(dir.path().join(pki::TENANT_KEY)).unwrap();
    assert_ne!(secret(&dir), secret(&other));
    fs::copy(other_ca.key, dir.path().join("ca.key")).unwrap();
    let refused = pki::issue(dir.path(), "edge-a", &[], 30)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("does not belong to the key"), "{refused}");
    fs::write(dir.path().join("ca.key"), "no key").unwrap();
    assert!(matches!(
        pki::issue(dir.path(), "edge-a", &[], 30),
        Err(PkiError::BadCa { .. })
    ));
}
