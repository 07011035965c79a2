//! `skyferry pki`: a certificate authority of one folder, enough for gateways to know each other.
//!
//! A peer is known by the DNS name in its certificate's subject alternative names and by the CA that
//! issued it, nothing else; any PKI that issues such certificates does as well. Keys are ECDSA P-256,
//! written with mode 0600. Nothing is ever overwritten: a lost CA key means new certificates everywhere.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};

use crate::config::{AddressError, check_host_name};

/// Validity of a CA in days: ten years.
pub const CA_DAYS: u32 = 3650;

/// Validity of a gateway's certificate in days: what browsers once set as the longest.
pub const LEAF_DAYS: u32 = 825;

/// Longest validity that may be asked for, in days: a hundred years.
pub const MAX_DAYS: u32 = 36_500;

/// How far back a certificate's validity begins, for clocks that are a little slow.
const BACKDATE: Duration = Duration::from_secs(3600);

/// Bytes of a random serial number; RFC 5280, 4.1.2.2 allows 20.
const SERIAL_BYTES: usize = 16;

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";

/// The file that [`init`] makes for `[[tenant]] secret_file`.
pub const TENANT_KEY: &str = "tenant.key";

/// Random bytes of a tenant's secret.
const TENANT_SECRET_BYTES: usize = 32;

/// Why no certificate was made; the text says what would be right.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The name is no DNS name.
    #[error("{source}")]
    Name {
        /// As given.
        name: String,
        /// What is wrong.
        source: AddressError,
    },
    /// `ca.pem` and `ca.key` hold the CA; a gateway of that name would write over them.
    #[error("the name \"ca\" is taken by the CA's own files; choose another")]
    NameIsCa,
    /// Something is there that would be overwritten.
    #[error("{} exists and is not overwritten; move it away or choose another folder", .0.display())]
    Exists(PathBuf),
    /// No CA in the folder.
    #[error(
        "{} is missing; make a CA first: skyferry pki init --dir {}",
        .path.display(),
        .dir.display()
    )]
    NoCa {
        /// The file that is missing.
        path: PathBuf,
        /// The folder.
        dir: PathBuf,
    },
    /// The CA's files cannot be used.
    #[error("{}: {reason}", .path.display())]
    BadCa {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The certificate could not be made.
    #[error("cannot make the certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// No random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

/// A certificate and its key on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedFiles {
    /// The certificate (PEM).
    pub cert: PathBuf,
    /// The private key (PEM, PKCS #8), mode 0600.
    pub key: PathBuf,
    /// Whether the validity asked for was cut to the CA's own.
    pub cut_to_ca: bool,
}

/// Makes a CA: `ca.pem` and `ca.key` in `dir`, which is made with mode 0700 if it is missing; and
/// [`TENANT_KEY`], a tenant's secret for all gateways that shall know each other's pages.
///
/// # Errors
/// When one of the files exists, or cannot be written.
pub fn init(dir: &Path, common_name: Option<&str>, days: u32) -> Result<IssuedFiles, PkiError> {
    let serial = random_serial()?;
    // Several CAs may meet in one trust store; a name of its own tells them apart.
    let default_name = format!("Skyferry CA {}", hex(&serial[..4]));
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name_only(common_name.unwrap_or(&default_name));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    set_validity(&mut params, days);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.self_signed(&key)?;

    let builder = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    builder.map_err(|source| PkiError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let files = IssuedFiles {
        cert: dir.join(CA_CERT),
        key: dir.join(CA_KEY),
        cut_to_ca: false,
    };
    let tenant_key = dir.join(TENANT_KEY);
    write_new(&tenant_key, &tenant_secret()?, 0o600)?;
    write_pair(&files, &certificate.pem(), &key.serialize_pem()).inspect_err(|_| {
        // Without a CA it would block the next attempt.
        let _ = fs::remove_file(&tenant_key);
    })?;
    Ok(files)
}

/// Issues a certificate for the gateway `name`: `NAME.pem` and `NAME.key` in `dir`, signed by the CA
/// there. `extra_names` are further DNS names or IP addresses to be carried.
///
/// # Errors
/// When a name is no host name, a file exists, or the CA is missing or cannot be used.
pub fn issue(
    dir: &Path,
    name: &str,
    extra_names: &[String],
    days: u32,
) -> Result<IssuedFiles, PkiError> {
    let name = name.to_ascii_lowercase();
    if name == "ca" {
        return Err(PkiError::NameIsCa);
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name_only(&name);
    params.subject_alt_names.push(dns_name(&name)?);
    for extra in extra_names {
        let san = match extra.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => dns_name(&extra.to_ascii_lowercase())?,
        };
        if !params.subject_alt_names.contains(&san) {
            params.subject_alt_names.push(san);
        }
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // A gateway dials peers and is dialled by them.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
    set_validity(&mut params, days);

    let ca = Ca::read(dir)?;
    let mut cut_to_ca = false;
    if params.not_after.unix_timestamp() > ca.expires_at {
        let lifetime = Duration::from_secs(u64::try_from(ca.expires_at).unwrap_or(0));
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + lifetime;
        cut_to_ca = true;
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.signed_by(&key, &ca.issuer)?;
    let files = IssuedFiles {
        cert: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
        cut_to_ca,
    };
    write_pair(&files, &certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

/// A CA read back from its folder.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    expires_at: i64,
}

impl Ca {
    fn read(dir: &Path) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (dir.join(CA_CERT), dir.join(CA_KEY));
        let cert_pem = read_ca_file(dir, &cert_path)?;
        let key_pem = read_ca_file(dir, &key_path)?;
        let bad = |path: &Path, reason: String| PkiError::BadCa {
            path: path.to_owned(),
            reason,
        };
        let key = KeyPair::from_pem(&key_pem)
            .map_err(|error| bad(&key_path, format!("holds no private key of use: {error}")))?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(cert_pem.as_bytes())
            .map_err(|error| bad(&cert_path, format!("is no PEM certificate: {error}")))?;
        let certificate = pem
            .parse_x509()
            .map_err(|error| bad(&cert_path, format!("is no certificate: {error}")))?;
        if !certificate.is_ca() {
            return Err(bad(&cert_path, "is not a CA's certificate".into()));
        }
        if certificate.public_key().raw != key.subject_public_key_info() {
            let reason = format!("does not belong to the key in {}", key_path.display());
            return Err(bad(&cert_path, reason));
        }
        let expires_at = certificate.validity().not_after.timestamp();
        if expires_at <= unix_now().as_secs().try_into().unwrap_or(i64::MAX) {
            return Err(bad(
                &cert_path,
                "has expired; make a new CA in another folder".into(),
            ));
        }
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key)
            .map_err(|error| bad(&cert_path, format!("cannot be used: {error}")))?;
        Ok(Self { issuer, expires_at })
    }
}

fn read_ca_file(dir: &Path, path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PkiError::NoCa {
            path: path.to_owned(),
            dir: dir.to_owned(),
        },
        _ => PkiError::Io {
            path: path.to_owned(),
            source,
        },
    })
}

fn dns_name(name: &str) -> Result<SanType, PkiError> {
    let refused = |source| PkiError::Name {
        name: name.to_owned(),
        source,
    };
    check_host_name(name).map_err(refused)?;
    Ok(SanType::DnsName(name.try_into()?))
}

fn common_name_only(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, days: u32) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = unix_now();
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + Duration::from_secs(u64::from(days.min(MAX_DAYS)) * 24 * 3600);
}

/// Time since 1970 in whole seconds: certificates hold no fractions.
fn unix_now() -> Duration {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Duration::from_secs(since.as_secs())
}

/// A serial number that nobody can guess; its first bit is clear, so that it is positive, and the next
/// is set, so that it never begins with a zero byte.
fn random_serial() -> Result<[u8; SERIAL_BYTES], PkiError> {
    let mut serial: [u8; SERIAL_BYTES] = random()?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

/// The contents of a new [`TENANT_KEY`].
fn tenant_secret() -> Result<String, PkiError> {
    let secret: [u8; TENANT_SECRET_BYTES] = random()?;
    Ok(format!("{}\n", hex(&secret)))
}

fn random<const N: usize>() -> Result<[u8; N], PkiError> {
    let mut bytes = [0; N];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| PkiError::Random)?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes key and certificate, or neither.
fn write_pair(files: &IssuedFiles, cert_pem: &str, key_pem: &str) -> Result<(), PkiError> {
    if files.cert.exists() {
        return Err(PkiError::Exists(files.cert.clone()));
    }
    write_new(&files.key, key_pem, 0o600)?;
    write_new(&files.cert, cert_pem, 0o644).inspect_err(|_| {
        // A key without its certificate is of no use and would block the next attempt.
        let _ = fs::remove_file(&files.key);
    })
}

fn write_new(path: &Path, contents: &str, mode: u32) -> Result<(), PkiError> {
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        file.write_all(contents.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_owned()),
        _ => PkiError::Io {
            path: path.to_owned(),
            source,
        },
    })
}
