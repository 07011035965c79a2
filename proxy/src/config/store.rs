//! `[store]`: the page store, in memory and on disk.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use skyferry_dedup::disk::{KeySource, MIN_SECRET};

use super::reader::{Findings, Section, duration, size, string};
use super::tls::read_file;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Environment variable in which systemd names the folder of a service's credentials.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// `[store]`.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Memory for stored pages, in bytes (1 MiB to 1 TiB).
    pub memory_bytes: u64,
    /// The tier on disk; `None`: memory only.
    pub disk: Option<DiskConfig>,
    /// Memory for what each peer has announced of its store, in bytes (1 MiB to 64 GiB); 30 bytes hold
    /// one page.
    pub peer_index_bytes: u64,
}

/// The store's tier on disk.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The folder, which is the store's alone.
    pub path: PathBuf,
    /// Bytes that all files in it may take (256 MiB to 64 TiB). The index takes 1 % of that as memory.
    pub size_bytes: u64,
    /// What it is encrypted with.
    pub key: Arc<KeySource>,
    /// Pages that nobody used for so long are deleted (1 hour to 10 years).
    pub ttl: Duration,
}

pub(super) fn read_store(
    mut section: Section,
    base: &Path,
    findings: &mut Findings,
) -> Option<StoreConfig> {
    let memory_bytes = section
        .optional("memory", findings, size(MIB..=TIB))
        .unwrap_or(512 * MIB);
    let peer_index_bytes = section
        .optional("peer_index", findings, size(MIB..=64 * GIB))
        .unwrap_or(64 * MIB);
    let path = section.optional("path", findings, string);
    let size_bytes = section.optional("size", findings, size(256 * MIB..=64 * TIB));
    let key_file = section.optional("key_file", findings, string);
    let credential = section.optional("credential", findings, credential_name);
    let ttl = section.optional("ttl", findings, duration(HOUR..=3650 * DAY));
    let on_disk = [
        ("size", size_bytes.is_some()),
        ("key_file", key_file.is_some()),
        ("credential", credential.is_some()),
        ("ttl", ttl.is_some()),
    ];
    let keys = ["path", "key_file", "credential"].map(|key| section.key(key));
    let [path_key, file_key, credential_key] = &keys;
    if path.is_none() {
        for (key, _) in on_disk.iter().filter(|(_, given)| *given) {
            findings.error(
                section.key(key),
                format!("goes with {path_key} only, the folder of a store on disk"),
            );
        }
    }
    section.finish(findings);
    let disk = match path {
        None => None,
        Some(path) => {
            let key = match (key_file, credential) {
                (Some(_), Some(_)) => {
                    let message = format!("there can be one key only; leave {file_key} out");
                    findings.error(credential_key, message);
                    return None;
                }
                (Some(file), None) => read_key(file_key, &base.join(file), findings)?,
                (None, Some(name)) => {
                    let folder = std::env::var_os(CREDENTIALS);
                    let file = credential_file(credential_key, folder, &name, findings)?;
                    read_key(credential_key, &file, findings)?
                }
                (None, None) => {
                    findings.warn(
                        path_key,
                        format_args!(
                            "without {file_key} or {credential_key} each start makes a fresh key: \
                             what is stored is deleted at the next start"
                        ),
                    );
                    KeySource::ephemeral()
                }
            };
            Some(DiskConfig {
                path: base.join(path),
                size_bytes: size_bytes.unwrap_or(20 * GIB),
                key: Arc::new(key),
                ttl: ttl.unwrap_or(30 * DAY),
            })
        }
    };
    Some(StoreConfig {
        memory_bytes,
        disk,
        peer_index_bytes,
    })
}

/// A credential is a file in the folder of credentials, not a path.
fn credential_name(value: &toml::Value) -> Result<String, String> {
    let name = string(value)?;
    if name.contains('/') || name == "." || name == ".." {
        return Err(format!(
            "must be the name of a credential, as in LoadCredential=NAME:FILE, not \"{name}\""
        ));
    }
    Ok(name)
}

fn credential_file(
    key: &str,
    folder: Option<OsString>,
    name: &str,
    findings: &mut Findings,
) -> Option<PathBuf> {
    let Some(folder) = folder else {
        findings.error(
            key,
            format!(
                "{CREDENTIALS} is not set; systemd sets it for a unit with \
                 LoadCredential={name}:FILE"
            ),
        );
        return None;
    };
    Some(Path::new(&folder).join(name))
}

fn read_key(key: &str, path: &Path, findings: &mut Findings) -> Option<KeySource> {
    let contents = read_file(key, path, true, findings)?;
    let secret = contents.trim_ascii();
    let source = KeySource::secret(secret);
    if source.is_none() {
        findings.error(
            key,
            format!(
                "{}: holds {} bytes; a key has at least {MIN_SECRET}, made for example with: openssl \
                 rand -hex 32",
                path.display(),
                secret.len()
            ),
        );
    }
    source
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_lies_in_the_folder_of_credentials() {
        let mut findings = Findings::default();
        let mut file = |folder: Option<&str>| {
            let folder = folder.map(OsString::from);
            credential_file("store.credential", folder, "store-key", &mut findings)
        };
        assert_eq!(file(Some("/run/c")), Some("/run/c/store-key".into()));
        assert_eq!(file(None), None);
        assert!(
            findings.errors[0]
                .message
                .contains("LoadCredential=store-key:FILE")
        );
    }
}
