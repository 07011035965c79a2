//! Addresses: what a gateway listens on, what it may be asked to dial, and the rules that allow it.
//!
//! An address is written `127.0.0.1:4444`, `[fd00::1]:4444`, `vm-host.example:4444` or
//! `unix:/run/skyferry/vm1.sock`. `Display` gives back what `FromStr` reads, so an [`Endpoint`] may
//! travel as text between gateways.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest path of a unix socket in bytes: `sun_path` of `unix(7)` less its closing zero.
pub const MAX_UNIX_PATH_BYTES: usize = 107;

/// Longest host name in bytes (RFC 1035, 2.3.4, without the dot at the end).
pub const MAX_HOST_NAME_BYTES: usize = 253;

/// Longest label of a host name in bytes (RFC 1035, 2.3.4).
const MAX_LABEL_BYTES: usize = 63;

/// Why an address, a name or a rule was refused; the text says what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AddressError(String);

impl AddressError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// A place to connect to: the destination VM's address, as the near gateway names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// TCP; a name is resolved where it is dialled.
    Tcp(HostPort),
    /// A unix socket by its absolute path without `..`.
    Unix(PathBuf),
}

/// Host and port of a TCP endpoint. The port is never 0.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Address or name.
    pub host: Host,
    /// 1 to 65535.
    pub port: u16,
}

/// An IP address or a name to be resolved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A literal address.
    Ip(IpAddr),
    /// A host name in lower case, checked by [`check_host_name`].
    Name(String),
}

/// What an ingress listens on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    /// A literal address and a port other than 0.
    Tcp(SocketAddr),
    /// A unix socket by its absolute path.
    Unix(PathBuf),
}

/// One entry of an egress allow list.
///
/// A target given by name is allowed by a rule with that very name; otherwise the address it resolves
/// to must be allowed, which only the side that dials can check ([`AllowRule::matches_address`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowRule {
    /// `10.0.0.5:4444`, `10.0.0.0/24:49152-49215`, `[fd00::/8]:4444`.
    Network {
        /// The network's first address; bits past the prefix are zero.
        network: IpAddr,
        /// Leading bits that must agree: up to 32, or 128 for IPv6.
        prefix_bits: u8,
        /// Ports allowed, both ends included.
        ports: RangeInclusive<u16>,
    },
    /// `host.name:4444`, compared without case.
    Name {
        /// The name in lower case.
        name: String,
        /// Ports allowed, both ends included.
        ports: RangeInclusive<u16>,
    },
    /// `unix:/run/vm/*.sock`; a `*` stands for any characters but `/`.
    Unix {
        /// Absolute path, perhaps with `*`.
        pattern: String,
    },
}

/// Checks that `name` is a host name of letters, digits and hyphens (RFC 1123, 2.1), with dots.
///
/// # Errors
/// Says which rule is broken.
pub fn check_host_name(name: &str) -> Result<(), AddressError> {
    if name.is_empty() || name.len() > MAX_HOST_NAME_BYTES {
        return Err(AddressError::new(format!(
            "a name has 1 to {MAX_HOST_NAME_BYTES} characters, this one has {}",
            name.len()
        )));
    }
    for label in name.split('.') {
        let fits = !label.is_empty()
            && label.len() <= MAX_LABEL_BYTES
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-');
        if !fits {
            return Err(AddressError::new(format!(
                "\"{name}\" is no host name: its parts between dots are 1 to {MAX_LABEL_BYTES} \
                 letters, digits and inner hyphens, such as edge-a or edge-a.example.net"
            )));
        }
    }
    Ok(())
}

/// Checks an absolute path for a unix socket and refuses `..`, which could lead out of what a rule
/// allows.
fn check_unix_path(path: &str) -> Result<(), AddressError> {
    if !path.starts_with('/') {
        return Err(AddressError::new(format!(
            "the path after unix: must be absolute, such as unix:/run/skyferry/vm1.sock, not {path:?}"
        )));
    }
    if path.len() > MAX_UNIX_PATH_BYTES {
        return Err(AddressError::new(format!(
            "the path of a unix socket has at most {MAX_UNIX_PATH_BYTES} bytes, this one has {}",
            path.len()
        )));
    }
    if path.contains(char::is_control) {
        return Err(AddressError::new(format!(
            "the path after unix: must not hold control characters, as {path:?} does"
        )));
    }
    if path.ends_with('/') {
        return Err(AddressError::new(
            "the path after unix: must name a socket, not a folder",
        ));
    }
    if path
        .split('/')
        .skip(1)
        .any(|part| part == ".." || part == "." || part.is_empty())
    {
        return Err(AddressError::new(
            "the path after unix: must not hold \"..\", \".\" or \"//\"; write it out",
        ));
    }
    Ok(())
}

/// Splits `host:port` at the last colon; an IPv6 address stands in brackets, which are removed.
fn split_host_port(text: &str) -> Result<(&str, &str), AddressError> {
    let bad = || {
        AddressError::new(format!(
            "\"{text}\" is no address; write HOST:PORT such as 10.0.0.5:4444, [fd00::1]:4444 or \
             unix:/path"
        ))
    };
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    if let Some(inner) = host.strip_prefix('[') {
        return Ok((inner.strip_suffix(']').ok_or_else(bad)?, port));
    }
    if host.contains(':') {
        return Err(AddressError::new(format!(
            "an IPv6 address stands in brackets, such as [fd00::1]:4444; got \"{text}\""
        )));
    }
    Ok((host, port))
}

fn parse_port(text: &str) -> Result<u16, AddressError> {
    // u16's own parser takes a leading plus sign.
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(port) if digits && port != 0 => Ok(port),
        _ => Err(AddressError::new(format!(
            "a port is 1 to 65535, not \"{text}\""
        ))),
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = split_host_port(text)?;
        let port = parse_port(port)?;
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(Self {
                host: Host::Ip(ip),
                port,
            });
        }
        // Digits and dots alone are a mistyped address; a resolver might still accept them.
        if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(AddressError::new(format!("\"{host}\" is no IP address")));
        }
        check_host_name(host)?;
        Ok(Self {
            host: Host::Name(host.to_ascii_lowercase()),
            port,
        })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Host::Ip(IpAddr::V4(ip)) => write!(f, "{ip}:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl FromStr for Endpoint {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.strip_prefix("unix:") {
            Some(path) => {
                check_unix_path(path)?;
                Ok(Self::Unix(PathBuf::from(path)))
            }
            None => Ok(Self::Tcp(text.parse()?)),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => host_port.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.parse()? {
            Endpoint::Unix(path) => Ok(Self::Unix(path)),
            Endpoint::Tcp(HostPort {
                host: Host::Ip(ip),
                port,
            }) => Ok(Self::Tcp(SocketAddr::new(ip, port))),
            Endpoint::Tcp(_) => Err(AddressError::new(format!(
                "a listener needs a literal address, such as 127.0.0.1:4444 or unix:/path, not the \
                 name in \"{text}\""
            ))),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl AllowRule {
    /// Whether this rule allows the target as it is written: a literal address, that very name, or a
    /// path. A name may also be allowed by what it resolves to; see [`Self::matches_address`].
    pub fn matches(&self, target: &Endpoint) -> bool {
        match (self, target) {
            (
                Self::Network { .. },
                Endpoint::Tcp(HostPort {
                    host: Host::Ip(ip),
                    port,
                }),
            ) => self.matches_address(SocketAddr::new(*ip, *port)),
            (
                Self::Name { name, ports },
                Endpoint::Tcp(HostPort {
                    host: Host::Name(n),
                    port,
                }),
            ) => name.eq_ignore_ascii_case(n) && ports.contains(port),
            (Self::Unix { pattern }, Endpoint::Unix(path)) => matches_path(pattern, path),
            _ => false,
        }
    }

    /// Whether this rule allows the address that is about to be dialled. An IPv4 address written as
    /// IPv6 (`::ffff:10.0.0.5`) is judged as the IPv4 address it reaches.
    pub fn matches_address(&self, address: SocketAddr) -> bool {
        let Self::Network {
            network,
            prefix_bits,
            ports,
        } = self
        else {
            return false;
        };
        let same = match (network, address.ip().to_canonical()) {
            (IpAddr::V4(n), IpAddr::V4(a)) => {
                let differing = u32::from(*n) ^ u32::from(a);
                differing.leading_zeros() >= u32::from(*prefix_bits)
            }
            (IpAddr::V6(n), IpAddr::V6(a)) => {
                let differing = u128::from(*n) ^ u128::from(a);
                differing.leading_zeros() >= u32::from(*prefix_bits)
            }
            _ => false,
        };
        same && ports.contains(&address.port())
    }
}

impl FromStr for AllowRule {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            check_unix_path(path)?;
            return Ok(Self::Unix {
                pattern: path.to_owned(),
            });
        }
        let (host, ports) = split_host_port(text)?;
        let ports = match ports.split_once('-') {
            None => parse_port(ports).map(|port| port..=port)?,
            Some((first, last)) => {
                let range = parse_port(first)?..=parse_port(last)?;
                if range.is_empty() {
                    return Err(AddressError::new(format!(
                        "the port range {ports} runs backwards; write the smaller port first"
                    )));
                }
                range
            }
        };
        let (ip_text, prefix_text) = match host.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix)),
            None => (host, None),
        };
        let Ok(ip) = ip_text.parse::<IpAddr>() else {
            if prefix_text.is_some() || host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
                return Err(AddressError::new(format!(
                    "\"{host}\" is no IP network; write one such as 10.0.0.0/24 or fd00::/8"
                )));
            }
            check_host_name(host)?;
            return Ok(Self::Name {
                name: host.to_ascii_lowercase(),
                ports,
            });
        };
        network_rule(ip, prefix_text, ports)
    }
}

/// Builds a network rule and refuses an address with bits set past its prefix: whoever writes
/// `10.0.0.5/24` means either one host or the whole network, and the rule cannot know which.
fn network_rule(
    ip: IpAddr,
    prefix_text: Option<&str>,
    ports: RangeInclusive<u16>,
) -> Result<AllowRule, AddressError> {
    if ip != ip.to_canonical() {
        return Err(AddressError::new(format!(
            "write {} as {}",
            ip,
            ip.to_canonical()
        )));
    }
    let max_bits = if ip.is_ipv4() { 32 } else { 128 };
    let prefix_bits = match prefix_text {
        None => max_bits,
        Some(text) => match text.parse::<u8>() {
            Ok(bits) if bits <= max_bits && !text.starts_with('+') => bits,
            _ => {
                return Err(AddressError::new(format!(
                    "the prefix after / is 0 to {max_bits} for this address, not \"{text}\""
                )));
            }
        },
    };
    let network = match ip {
        IpAddr::V4(v4) => {
            let mask = u32::MAX
                .checked_shl(32 - u32::from(prefix_bits))
                .unwrap_or(0);
            IpAddr::from(std::net::Ipv4Addr::from(u32::from(v4) & mask))
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX
                .checked_shl(128 - u32::from(prefix_bits))
                .unwrap_or(0);
            IpAddr::from(std::net::Ipv6Addr::from(u128::from(v6) & mask))
        }
    };
    if network != ip {
        return Err(AddressError::new(format!(
            "{ip}/{prefix_bits} has bits beyond its prefix; write {network}/{prefix_bits} for the \
             network or {ip} for the one host"
        )));
    }
    Ok(AllowRule::Network {
        network,
        prefix_bits,
        ports,
    })
}

/// Compares part by part, so that a `*` never crosses a `/`.
fn matches_path(pattern: &str, path: &Path) -> bool {
    let Some(path) = path.to_str() else {
        return false;
    };
    if check_unix_path(path).is_err() {
        return false;
    }
    let mut pattern_parts = pattern.split('/');
    let mut path_parts = path.split('/');
    loop {
        match (pattern_parts.next(), path_parts.next()) {
            (None, None) => return true,
            (Some(pattern), Some(part)) if matches_part(pattern.as_bytes(), part.as_bytes()) => {}
            _ => return false,
        }
    }
}

/// Matches one path part with `*`. On a mismatch the last `*` takes one byte more, so the work is at
/// most the product of the two lengths, both of which are below [`MAX_UNIX_PATH_BYTES`].
fn matches_part(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(byte) if *byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match retry {
                Some((after_star, taken)) => {
                    p = after_star;
                    t = taken + 1;
                    retry = Some((after_star, taken + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = match self {
            Self::Network {
                network,
                prefix_bits,
                ports,
            } => {
                let single = *prefix_bits == if network.is_ipv4() { 32 } else { 128 };
                match (network, single) {
                    (IpAddr::V4(ip), true) => write!(f, "{ip}:")?,
                    (IpAddr::V4(ip), false) => write!(f, "{ip}/{prefix_bits}:")?,
                    (IpAddr::V6(ip), true) => write!(f, "[{ip}]:")?,
                    (IpAddr::V6(ip), false) => write!(f, "[{ip}/{prefix_bits}]:")?,
                }
                ports
            }
            Self::Name { name, ports } => {
                write!(f, "{name}:")?;
                ports
            }
            Self::Unix { pattern } => return write!(f, "unix:{pattern}"),
        };
        if ports.start() == ports.end() {
            write!(f, "{}", ports.start())
        } else {
            write!(f, "{}-{}", ports.start(), ports.end())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> AllowRule {
        text.parse().unwrap()
    }

    fn target(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    #[test]
    fn text_form_is_read_back() {
        for text in [
            "127.0.0.1:4444",
            "[fd00::1]:4444",
            "vm-host.example:1",
            "unix:/run/skyferry/vm1.sock",
        ] {
            assert_eq!(target(text).to_string(), text);
        }
        for text in [
            "10.0.0.5:4444",
            "10.0.0.0/24:49152-49215",
            "[fd00::/8]:4444",
            "[fd00::1]:1-2",
            "host.name:4444",
            "unix:/run/vm/*.sock",
            "0.0.0.0/0:1-65535",
        ] {
            assert_eq!(rule(text).to_string(), text);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "4444",
            ":4444",
            "10.0.0.5",
            "10.0.0.5:0",
            "10.0.0.5:+1",
            "10.0.0.5:65536",
            "10.0.0.300:1",
            "fd00::1:4444",
            "[fd00::1:4444",
            "a_b:1",
            "-a:1",
            "a..b:1",
            "unix:",
            "unix:relative",
            "unix:/a/../b",
            "unix:/a\nb",
            "unix:/a/",
            "unix:/a//b",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?} was taken");
            assert!(
                text.parse::<AllowRule>().is_err(),
                "{text:?} was taken as a rule"
            );
        }
        for text in [
            "10.0.0.5/24:1",
            "10.0.0.0/33:1",
            "10.0.0.0/24:2-1",
            "host/24:1",
            "[::ffff:10.0.0.1]:1",
        ] {
            assert!(
                text.parse::<AllowRule>().is_err(),
                "{text:?} was taken as a rule"
            );
        }
        assert!("host:1".parse::<ListenAddress>().is_err());
    }

    #[test]
    fn rules_match_what_they_say() {
        let table = [
            ("10.0.0.5:4444", "10.0.0.5:4444", true),
            ("10.0.0.5:4444", "10.0.0.5:4445", false),
            ("10.0.0.5:4444", "10.0.0.6:4444", false),
            ("10.0.0.0/24:49152-49215", "10.0.0.255:49215", true),
            ("10.0.0.0/24:49152-49215", "10.0.1.0:49152", false),
            ("10.0.0.0/24:49152-49215", "10.0.0.1:49216", false),
            ("10.0.0.5:4444", "[::ffff:10.0.0.5]:4444", true),
            ("0.0.0.0/0:1-65535", "1.2.3.4:9", true),
            ("0.0.0.0/0:1-65535", "[fd00::1]:9", false),
            ("[fd00::/8]:4444", "[fdff::1]:4444", true),
            ("[fd00::/8]:4444", "[fe00::1]:4444", false),
            ("vm.example:4444", "VM.example:4444", true),
            ("vm.example:4444", "vm.example:4445", false),
            ("10.0.0.0/8:1-65535", "vm.example:4444", false),
            ("unix:/run/vm/*.sock", "unix:/run/vm/1.sock", true),
            ("unix:/run/vm/*.sock", "unix:/run/vm/a/1.sock", false),
            ("unix:/run/vm/*.sock", "unix:/run/vm/1.sock2", false),
            ("unix:/run/*/q*m*u", "unix:/run/7/qemmu", true),
            ("unix:/run/vm/a", "unix:/run/vm/a", true),
            ("unix:/run/vm/a", "10.0.0.5:4444", false),
        ];
        for (allow, to, expected) in table {
            assert_eq!(
                rule(allow).matches(&target(to)),
                expected,
                "{allow} against {to}"
            );
        }
    }

    #[test]
    fn a_path_that_climbs_is_never_matched() {
        let climbing = Endpoint::Unix(PathBuf::from("/run/vm/../x.sock"));
        assert!(!rule("unix:/run/vm/*/x.sock").matches(&climbing));
    }
}
