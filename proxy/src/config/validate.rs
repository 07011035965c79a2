//! Turns the file's text into a [`Config`], or into the list of all that is wrong with it.

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use super::error::ConfigErrors;
use super::reader::{Findings, Section, boolean, duration, integer, parsed, rate, size, string};
use super::store::read_store;
use super::tls::{TlsFiles, read_file};
use super::{
    AdminConfig, AllowRule, CompressionConfig, Config, Congestion, DEFAULT_TENANT, Egress, First,
    GatewayConfig, Ingress, LimitsConfig, ListenAddress, MAX_ALLOW_RULES, MAX_INGRESS, MAX_PEERS,
    MAX_TENANTS, MAX_UDP_PAYLOAD, MIN_UDP_PAYLOAD, Peer, Tenant, TenantSecret, WanConfig,
    check_host_name,
};

/// Largest configuration file that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Fewest bytes of a tenant's secret: 256 bits, were they all random.
const MIN_SECRET_BYTES: usize = 32;

const MILLIS_100: Duration = Duration::from_millis(100);
const MINUTE: Duration = Duration::from_secs(60);
/// Longest `egress.dial_timeout`: the near gateway gives a channel up that was not answered for 5 s.
const MAX_DIAL: Duration = Duration::from_secs(4);
const DAY: Duration = Duration::from_secs(24 * 3600);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Entries that others refer to by name.
struct Defined<T> {
    list: Vec<T>,
    /// Whether every entry was good. If not, a reference to something unknown may well mean one that
    /// was refused, and is not worth an error of its own.
    complete: bool,
}

impl Config {
    /// Reads and checks the file at `path` and the files it names.
    ///
    /// # Errors
    /// All that is wrong, each with file, key and what would be right.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        let failed = |message: String| ConfigErrors::whole_file(path, message);
        let metadata =
            fs::metadata(path).map_err(|error| failed(format!("cannot be read: {error}")))?;
        if metadata.len() > MAX_CONFIG_BYTES {
            return Err(failed(format!("is larger than {MAX_CONFIG_BYTES} bytes")));
        }
        let text =
            fs::read_to_string(path).map_err(|error| failed(format!("cannot be read: {error}")))?;
        Self::parse(path, &text)
    }

    /// As [`Config::load`], from text that stands for the file at `path`: its folder is where relative
    /// paths begin.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigErrors> {
        let table: Table = text
            .parse()
            .map_err(|error: toml::de::Error| syntax_error(path, text, &error))?;
        let base = path.parent().unwrap_or(Path::new(""));
        let mut findings = Findings::default();
        let config = read_config(Section::new("", table), path, base, &mut findings);
        match (config, ConfigErrors::from_list(path, findings.errors)) {
            (Some(mut config), None) => {
                config.warnings = findings.warnings;
                Ok(config)
            }
            (_, Some(errors)) => Err(errors),
            // Whoever returns None has said why; should that fail, refuse all the same.
            (None, None) => Err(ConfigErrors::whole_file(path, "is not valid")),
        }
    }
}

/// A file that is no TOML: line and column in the manner of compilers.
fn syntax_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigErrors {
    let place = error.span().map_or_else(String::new, |span| {
        let before = text.get(..span.start).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before
            .rsplit('\n')
            .next()
            .map_or(0, |last| last.chars().count())
            + 1;
        format!("line {line}, column {column}: ")
    });
    ConfigErrors::whole_file(
        path,
        format!("{place}{}", error.message().replace('\n', ", ")),
    )
}

fn read_config(
    mut file: Section,
    path: &Path,
    base: &Path,
    findings: &mut Findings,
) -> Option<Config> {
    let gateway = read_gateway(file.section("gateway", findings), base, findings);
    let wan = read_wan(file.section("wan", findings), findings);
    let own_name = gateway.as_ref().map(|gateway| gateway.name.as_str());
    let tls = TlsFiles::read(file.section("tls", findings), base, own_name, findings);
    let peers = read_peers(
        file.sections("peer", MAX_PEERS, findings),
        own_name,
        findings,
    );
    let tenants = read_tenants(
        file.sections("tenant", MAX_TENANTS, findings),
        base,
        findings,
    );
    let mut listeners = HashSet::new();
    let mut ingress = Vec::new();
    for section in file.sections("ingress", MAX_INGRESS, findings) {
        ingress.extend(read_ingress(
            section,
            &peers,
            &tenants,
            &mut listeners,
            findings,
        ));
    }
    let egress = read_egress(
        file.sections("egress", MAX_PEERS, findings),
        &peers,
        own_name,
        findings,
    );
    let store = read_store(file.section("store", findings), base, findings);
    let compression = read_compression(file.section("compression", findings), findings);
    let limits = read_limits(file.section("limits", findings), findings);
    let admin = match file.optional_section("admin", findings) {
        Some(section) => read_admin(section, &listeners, findings),
        None => None,
    };
    file.finish(findings);
    if peers.list.is_empty() && peers.complete {
        findings.error("peer", "is missing; a gateway needs at least one [[peer]]");
    } else if ingress.is_empty() && egress.is_empty() {
        findings.warn(
            "ingress",
            "neither [[ingress]] nor [[egress]]: this gateway carries nothing",
        );
    }
    Some(Config {
        path: path.to_owned(),
        gateway: gateway?,
        wan: wan?,
        tls: tls?,
        peers: peers.list,
        tenants: tenants.list,
        ingress,
        egress,
        store: store?,
        compression,
        limits,
        admin,
        warnings: Vec::new(),
    })
}

/// A name by which gateways or tenants are known.
fn host_name(value: &Value) -> Result<String, String> {
    let name = string(value)?;
    check_host_name(&name).map_err(|error| error.to_string())?;
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(format!(
            "is written in lower case: \"{}\"",
            name.to_ascii_lowercase()
        ));
    }
    Ok(name)
}

/// A literal socket address; `port_zero` says whether the system may choose the port.
fn socket_address(port_zero: bool) -> impl FnOnce(&Value) -> Result<SocketAddr, String> {
    move |value| {
        let text = string(value)?;
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 || port_zero => Ok(address),
            Ok(_) => Err("needs a port other than 0".into()),
            Err(_) => Err(format!(
                "must be an IP address and a port, such as \"127.0.0.1:9700\" or \"[::]:7700\", not \
                 \"{text}\""
            )),
        }
    }
}

/// Where such things lie on this machine: the folder that the service manager has made for this service
/// (`RuntimeDirectory=`), the first if there are several; else one of the user's, or of the system's for root.
fn default_runtime_dir() -> Option<PathBuf> {
    if let Some(dirs) = std::env::var_os("RUNTIME_DIRECTORY") {
        return std::env::split_paths(&dirs).next();
    }
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let is_root = rustix::process::geteuid().is_root();
    let base = of_user.or_else(|| is_root.then(|| PathBuf::from("/run")))?;
    Some(base.join("skyferry"))
}

/// A folder that was named, to be used as it is.
fn runtime_dir(dir: PathBuf) -> Result<PathBuf, String> {
    let shown = dir.display();
    if !dir.is_dir() {
        return Err(format!("needs a folder that exists: {shown} is none"));
    }
    if !is_in_memory(&dir) {
        return Err(format!(
            "needs a folder in memory (tmpfs), such as one in /run: {shown} is none"
        ));
    }
    Ok(dir)
}

/// What is in there outlives the process, and nothing waits for a disk.
pub(crate) fn is_in_memory(dir: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    let kind = rustix::fs::statfs(dir).map(|fs| fs.f_type);
    matches!(kind, Ok(TMPFS_MAGIC | RAMFS_MAGIC))
}

fn read_gateway(
    mut section: Section,
    base: &Path,
    findings: &mut Findings,
) -> Option<GatewayConfig> {
    let name = section.required("name", "\"edge-a\"", findings, host_name);
    let drain_timeout = section
        .optional(
            "drain_timeout",
            findings,
            duration(Duration::from_secs(1)..=DAY),
        )
        .unwrap_or(10 * MINUTE);
    let runtime_dir = section.optional("runtime_dir", findings, |value| {
        runtime_dir(base.join(string(value)?))
    });
    section.finish(findings);
    Some(GatewayConfig {
        name: name?,
        drain_timeout,
        runtime_dir: runtime_dir.or_else(default_runtime_dir),
    })
}

fn read_wan(mut section: Section, findings: &mut Findings) -> Option<WanConfig> {
    let listen = section.required("listen", "\"0.0.0.0:7700\"", findings, socket_address(true));
    let congestion = read_congestion(&mut section, findings);
    let mut time = |key, low, high, default| {
        section
            .optional(key, findings, duration(low..=high))
            .unwrap_or(default)
    };
    let second = Duration::from_secs(1);
    let delay_budget = time("delay_budget", second / 100, 10 * second, MILLIS_100);
    let outage_budget = time("outage_budget", second, DAY, 10 * MINUTE);
    let keep_alive = time("keep_alive", MILLIS_100, MINUTE, 3 * second);
    let idle_timeout = time("idle_timeout", 2 * second, 10 * MINUTE, 10 * second);
    if keep_alive * 2 > idle_timeout {
        findings.error(
            section.key("keep_alive"),
            "must be at most half of wan.idle_timeout, or one lost packet ends the connection",
        );
    }
    let socket_buffer_bytes = section
        .optional("socket_buffer", findings, size(64 * KIB..=GIB))
        .unwrap_or(8 * MIB);
    let max_udp_payload = section.optional(
        "max_udp_payload",
        findings,
        integer(MIN_UDP_PAYLOAD.into()..=MAX_UDP_PAYLOAD.into()),
    );
    let max_rate = section.optional("max_rate", findings, rate(1_000_000..=400_000_000_000));
    section.finish(findings);
    Some(WanConfig {
        listen: listen?,
        congestion,
        delay_budget,
        outage_budget,
        keep_alive,
        idle_timeout,
        socket_buffer_bytes: usize::try_from(socket_buffer_bytes).unwrap_or(usize::MAX),
        max_udp_payload: max_udp_payload
            .and_then(|bytes| u16::try_from(bytes).ok())
            .unwrap_or(MAX_UDP_PAYLOAD),
        max_rate_bytes_per_sec: max_rate.map(|bits| bits / 8),
    })
}

fn read_congestion(section: &mut Section, findings: &mut Findings) -> Congestion {
    let name = section.optional("congestion", findings, string);
    let fixed_rate = section.optional("fixed_rate", findings, rate(1_000_000..=400_000_000_000));
    let is_fixed = name.as_deref() == Some("fixed");
    if fixed_rate.is_some() && !is_fixed {
        findings.error(
            section.key("fixed_rate"),
            "goes with congestion = \"fixed\" only",
        );
    }
    match name.as_deref() {
        None | Some("auto") => Congestion::Auto,
        Some("bbr") => Congestion::Bbr,
        Some("cubic") => Congestion::Cubic,
        Some("new-reno") => Congestion::NewReno,
        Some("fixed") => match fixed_rate {
            Some(bits_per_sec) => Congestion::Fixed { bits_per_sec },
            None => {
                findings.error(
                    section.key("fixed_rate"),
                    "is missing or bad; congestion = \"fixed\" needs fixed_rate = \"900Mbit/s\"",
                );
                Congestion::Auto
            }
        },
        Some(other) => {
            findings.error(
                section.key("congestion"),
                format!("must be \"auto\", \"bbr\", \"cubic\", \"new-reno\" or \"fixed\", not \"{other}\""),
            );
            Congestion::Auto
        }
    }
}

fn read_peers(
    sections: Vec<Section>,
    own_name: Option<&str>,
    findings: &mut Findings,
) -> Defined<Peer> {
    let errors_before = findings.errors.len();
    let mut peers: Vec<Peer> = Vec::with_capacity(sections.len());
    for mut section in sections {
        let key = section.key("name");
        let name = section.required("name", "\"edge-b\"", findings, host_name);
        let address = section.optional("address", findings, parsed);
        section.finish(findings);
        let Some(name) = name else { continue };
        if own_name == Some(name.as_str()) {
            findings.error(
                key,
                format!("\"{name}\" is this gateway's own name (gateway.name)"),
            );
        } else if peers.iter().any(|peer| peer.name == name) {
            findings.error(
                key,
                format!("\"{name}\" is already a [[peer]]; each needs its own name"),
            );
        } else {
            peers.push(Peer { name, address });
        }
    }
    Defined {
        list: peers,
        complete: findings.errors.len() == errors_before,
    }
}

fn read_tenants(sections: Vec<Section>, base: &Path, findings: &mut Findings) -> Defined<Tenant> {
    let errors_before = findings.errors.len();
    let mut tenants: Vec<Tenant> = Vec::with_capacity(sections.len() + 1);
    for mut section in sections {
        let key = section.key("name");
        let secret_key = section.key("secret_file");
        let name = section.required("name", "\"blue\"", findings, host_name);
        let secret_file = section.optional("secret_file", findings, string);
        section.finish(findings);
        let secret =
            secret_file.and_then(|file| read_secret(&secret_key, &base.join(file), findings));
        let Some(name) = name else { continue };
        if tenants.iter().any(|tenant| tenant.name == name) {
            findings.error(
                key,
                format!("\"{name}\" is already a [[tenant]]; each needs its own name"),
            );
        } else {
            tenants.push(Tenant { name, secret });
        }
    }
    if !tenants.iter().any(|tenant| tenant.name == DEFAULT_TENANT) {
        tenants.push(Tenant {
            name: DEFAULT_TENANT.into(),
            secret: None,
        });
    }
    Defined {
        list: tenants,
        complete: findings.errors.len() == errors_before,
    }
}

fn read_secret(key: &str, path: &Path, findings: &mut Findings) -> Option<TenantSecret> {
    let contents = read_file(key, path, true, findings)?;
    let length = contents.trim_ascii().len();
    if length < MIN_SECRET_BYTES {
        findings.error(
            key,
            format!(
                "{}: holds {length} bytes; a secret has at least {MIN_SECRET_BYTES}, made for example \
                 with: openssl rand -hex 32",
                path.display()
            ),
        );
        return None;
    }
    Some(TenantSecret::derive(&contents))
}

fn read_ingress(
    mut section: Section,
    peers: &Defined<Peer>,
    tenants: &Defined<Tenant>,
    listeners: &mut HashSet<ListenAddress>,
    findings: &mut Findings,
) -> Option<Ingress> {
    let listen: Option<ListenAddress> = section.required(
        "listen",
        "\"127.0.0.1:4444\" or \"unix:/path\"",
        findings,
        parsed,
    );
    if let Some(listen) = &listen
        && !listeners.insert(listen.clone())
    {
        findings.error(
            section.key("listen"),
            format!("{listen} is already taken by another [[ingress]]; each needs its own"),
        );
    }
    let peer = section.required("peer", "\"edge-b\"", findings, |value| {
        let name = peer_name(value, peers)?;
        match peers.list.iter().find(|peer| peer.name == name) {
            Some(peer) if peer.address.is_none() && peers.complete => Err(format!(
                "the [[peer]] \"{name}\" has no address, so it cannot be dialled; give it one"
            )),
            _ => Ok(name),
        }
    });
    let target = section.required("target", "\"10.0.0.5:4444\"", findings, parsed);
    let first = section.optional("first", findings, |value| match string(value)?.as_str() {
        "client" => Ok(First::Client),
        "server" => Ok(First::Server),
        other => Err(format!("must be \"client\" or \"server\", not \"{other}\"")),
    });
    let allow_no_return_path = section
        .optional("allow_no_return_path", findings, boolean)
        .unwrap_or(false);
    let tenant = section.optional("tenant", findings, |value| {
        let name = string(value)?;
        if tenants.list.iter().any(|tenant| tenant.name == name) || !tenants.complete {
            Ok(name)
        } else {
            Err(unknown(
                &name,
                "tenant",
                tenants.list.iter().map(|tenant| tenant.name.as_str()),
            ))
        }
    });
    section.finish(findings);
    Some(Ingress {
        listen: listen?,
        peer: peer?,
        target: target?,
        first: first.unwrap_or_default(),
        allow_no_return_path,
        tenant: tenant.unwrap_or_else(|| DEFAULT_TENANT.into()),
    })
}

/// The name of a peer that the file defines.
fn peer_name(value: &Value, peers: &Defined<Peer>) -> Result<String, String> {
    let name = string(value)?;
    if peers.list.iter().any(|peer| peer.name == name) || !peers.complete {
        return Ok(name);
    }
    Err(unknown(
        &name,
        "peer",
        peers.list.iter().map(|peer| peer.name.as_str()),
    ))
}

/// A reference to something that the file does not define.
fn unknown<'a>(name: &str, what: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    if known.is_empty() {
        format!("there is no [[{what}]] \"{name}\"; add one")
    } else {
        format!(
            "there is no [[{what}]] \"{name}\"; known: {}",
            known.join(", ")
        )
    }
}

fn read_egress(
    sections: Vec<Section>,
    peers: &Defined<Peer>,
    own_name: Option<&str>,
    findings: &mut Findings,
) -> Vec<Egress> {
    let mut list: Vec<Egress> = Vec::with_capacity(sections.len());
    for mut section in sections {
        let peer_key = section.key("peer");
        let peer = section.required("peer", "\"edge-a\"", findings, |value| {
            let name = match own_name {
                Some(own) if value.as_str() == Some(own) => own.to_owned(),
                _ => peer_name(value, peers)?,
            };
            if list.iter().any(|egress| egress.peer == name) {
                return Err(format!(
                    "\"{name}\" already has an [[egress]]; put all its rules into one allow list"
                ));
            }
            Ok(name)
        });
        let allow_key = section.key("allow");
        let entries = section.required("allow", "[\"10.0.0.5:4444\"]", findings, |value| {
            let entries = value
                .as_array()
                .ok_or("must be a list such as [\"10.0.0.5:4444\"]")?;
            match entries.len() {
                0 => Err(
                    "must hold at least one rule; leave the [[egress]] out to allow nothing".into(),
                ),
                n if n > MAX_ALLOW_RULES => Err(format!(
                    "has {n} rules; at most {MAX_ALLOW_RULES} are allowed"
                )),
                _ => Ok(entries.clone()),
            }
        });
        let dial_timeout = section
            .optional("dial_timeout", findings, duration(MILLIS_100..=MAX_DIAL))
            .unwrap_or(Duration::from_secs(2));
        section.finish(findings);
        let mut allow: Vec<AllowRule> = Vec::new();
        for (index, entry) in entries.into_iter().flatten().enumerate() {
            match parsed(&entry) {
                Ok(rule) => allow.push(rule),
                Err(message) => findings.error(format!("{allow_key}[{index}]"), message),
            }
        }
        if let Some(peer) = peer {
            if own_name == Some(peer.as_str()) {
                findings.warn(
                    &peer_key,
                    format_args!(
                        "\"{peer}\" is this gateway's own name, so this [[egress]] has no effect: it \
                         belongs into the file of the gateway that {peer} sends to"
                    ),
                );
                continue;
            }
            list.push(Egress {
                peer,
                allow,
                dial_timeout,
            });
        }
    }
    list
}

fn read_compression(mut section: Section, findings: &mut Findings) -> CompressionConfig {
    let level = section
        .optional("level", findings, |value| match value.as_str() {
            Some("auto") => Ok(None),
            Some(other) => Err(format!("must be \"auto\" or 1 to 19, not \"{other}\"")),
            None => integer(1..=19)(value).map(Some),
        })
        .flatten()
        .and_then(|level| i32::try_from(level).ok());
    let memory_bytes = section
        .optional("memory", findings, size(MIB..=GIB))
        .unwrap_or(22 * MIB);
    section.finish(findings);
    CompressionConfig {
        level,
        memory_bytes,
    }
}

fn read_limits(mut section: Section, findings: &mut Findings) -> LimitsConfig {
    let mut count = |key, high, default| {
        let read = section.optional(key, findings, integer(1..=high));
        read.and_then(|number| usize::try_from(number).ok())
            .unwrap_or(default)
    };
    let migrations = count("migrations", 4096, 64);
    let channels_per_migration = count("channels_per_migration", 1024, 300);
    let in_flight_bytes = section
        .optional("in_flight", findings, size(MIB..=64 * GIB))
        .unwrap_or(64 * MIB);
    let places_bytes = section
        .optional("places", findings, size(0..=256 * MIB))
        .unwrap_or(8 * MIB);
    let manifests_bytes = section
        .optional("manifests", findings, size(0..=16 * GIB))
        .unwrap_or(16 * MIB);
    section.finish(findings);
    LimitsConfig {
        migrations,
        channels_per_migration,
        in_flight_bytes,
        places_bytes,
        manifests_bytes,
    }
}

fn read_admin(
    mut section: Section,
    listeners: &HashSet<ListenAddress>,
    findings: &mut Findings,
) -> Option<AdminConfig> {
    let key = section.key("listen");
    let listen = section.required(
        "listen",
        "\"127.0.0.1:9700\"",
        findings,
        socket_address(false),
    );
    section.finish(findings);
    let listen = listen?;
    if listeners.contains(&ListenAddress::Tcp(listen)) {
        findings.error(key, format!("{listen} is already taken by an [[ingress]]"));
        return None;
    }
    if !listen.ip().is_loopback() {
        findings.warn(
            &key,
            format_args!(
                "{listen} is not a loopback address: whoever reaches it sees names, addresses and \
                 sizes of migrations (no guest memory, no keys)"
            ),
        );
    }
    Some(AdminConfig { listen })
}
