//! Gateways as processes: certificates, configuration, start, status, end.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::target_dir;
use crate::process::{POLL, Process, Surroundings, Usage, run, wait_for};
use crate::wan::netns::Netns;
use crate::wan::relay::UdpRelay;
use crate::wan::tun::{ADDRESS_A, ADDRESS_B, TunWan};
use crate::wan::{LinkControl, Shape};

pub use pki::Pki;

mod pki;

/// Time for a gateway to answer after its start, and for the link to come up.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long its addresses may stay taken: a child that is being started holds a copy of every socket
/// until it becomes another program.
const TAKEN_LIMIT: Duration = Duration::from_secs(3);
/// Time for an answer of the admin endpoint.
const ADMIN_LIMIT: Duration = Duration::from_secs(5);
/// UDP port of gateways that have a network namespace to themselves.
const WAN_PORT: u16 = 7700;

/// Where a gateway stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The site where sources are, mostly.
    A,
    /// The other one.
    B,
}

impl Side {
    /// The gateway's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "edge-a",
            Self::B => "edge-b",
        }
    }

    /// The far side.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// How the gateway program is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Build {
    /// For tests: quick to build, with the faults that tests inject.
    #[default]
    Faulty,
    /// Quick to build, as it is used.
    Plain,
    /// For benchmarks: optimised, as it is used.
    Release,
}

static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();

/// Builds the gateway program in a certain way, unless `SKYFERRY_BIN` names one. What is built first
/// in a process stays; without this call it is [`Build::Faulty`].
///
/// # Errors
/// When it does not compile.
pub fn build(how: Build) -> Result<&'static Path> {
    let built = BINARY.get_or_init(|| build_now(how).map_err(|error| format!("{error:#}")));
    built.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// The gateway program.
fn binary() -> Result<&'static Path> {
    build(Build::default())
}

fn build_now(how: Build) -> Result<PathBuf> {
    if let Some(path) = env::var_os("SKYFERRY_BIN") {
        return Ok(path.into());
    }
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--package", "skyferry", "--bin", "skyferry"]);
    command.arg("--manifest-path");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    match how {
        Build::Faulty => drop(command.args(["--features", "faults"])),
        Build::Plain => {}
        Build::Release => drop(command.arg("--release")),
    }
    run(&mut command).context("build the gateway")?;
    set_aside(how)
}

/// A copy of the gateway program that cargo has built in this way: the next build, perhaps with other
/// features, must not change what runs now.
///
/// # Errors
/// When there is none, or no room.
pub fn set_aside(how: Build) -> Result<PathBuf> {
    let profile = if how == Build::Release {
        "release"
    } else {
        "debug"
    };
    let built = target_dir().join(profile).join("skyferry");
    let copy = built.with_file_name(format!("skyferry-{how:?}").to_lowercase());
    let fresh = built.with_file_name(format!("skyferry-{}", std::process::id()));
    fs::copy(&built, &fresh).with_context(|| format!("copy {}", built.display()))?;
    fs::rename(&fresh, &copy)?;
    Ok(copy.canonicalize()?)
}

/// A way through the pair: an ingress at one side, its target at the other.
#[derive(Debug, Clone)]
pub struct Route {
    /// The side of the ingress.
    pub from: Side,
    /// Where sources connect, as in the configuration.
    pub listen: String,
    /// Where destinations listen, as in the configuration.
    pub target: String,
    /// Whether the far gateway's allow list has the target.
    pub allowed: bool,
    /// More lines for the `[[ingress]]`.
    pub more: String,
}

impl Route {
    /// Between free TCP ports of the loopback interface.
    ///
    /// # Errors
    /// When no port is free.
    pub fn tcp(from: Side) -> Result<Self> {
        Ok(Self::between(
            from,
            &free_tcp_address()?.to_string(),
            &free_tcp_address()?.to_string(),
        ))
    }

    /// Between the addresses given.
    #[must_use]
    pub fn between(from: Side, listen: &str, target: &str) -> Self {
        Self {
            from,
            listen: listen.to_owned(),
            target: target.to_owned(),
            allowed: true,
            more: String::new(),
        }
    }

    /// What a source's QEMU is told.
    #[must_use]
    pub fn source_uri(&self) -> String {
        uri(&self.listen)
    }

    /// What a destination's QEMU is told.
    #[must_use]
    pub fn destination_uri(&self) -> String {
        uri(&self.target)
    }
}

fn uri(address: &str) -> String {
    if address.starts_with("unix:") {
        address.to_owned()
    } else {
        format!("tcp:{address}")
    }
}

/// A TCP address of the loopback interface that was free just now, and that no connection gets as
/// its own address: the kernel gives those ports out from 32768 on.
///
/// # Errors
/// When there is none.
pub fn free_tcp_address() -> Result<SocketAddr> {
    free_address(|address| TcpListener::bind(address)?.local_addr())
}

/// The same for UDP: other tests' sockets get their ports from the kernel.
pub(crate) fn free_udp_address() -> Result<SocketAddr> {
    free_address(|address| UdpSocket::bind(address)?.local_addr())
}

fn free_address(bind: impl Fn(SocketAddr) -> std::io::Result<SocketAddr>) -> Result<SocketAddr> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000;
    // Tests of several processes at once begin far apart.
    let start = std::process::id().wrapping_mul(7919);
    for _ in 0..COUNT {
        let next = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + next % COUNT)?;
        if let Ok(address) = bind((Ipv4Addr::LOCALHOST, port).into()) {
            return Ok(address);
        }
    }
    bail!("no port is free");
}

/// What a pair of gateways is to be like.
#[derive(Debug, Clone, Default)]
pub struct PairSetup {
    /// Ways through the pair.
    pub routes: Vec<Route>,
    /// Memory of each gateway's page store; `None` is the gateway's default.
    pub store_mib: Option<[u32; 2]>,
    /// More lines for `[wan]`, both sides.
    pub wan: String,
    /// Nothing is kept for the process that is started next.
    pub forgetful: bool,
    /// More lines for `[gateway]`, both sides.
    pub gateway: String,
    /// More sections, both sides.
    pub more: String,
    /// Whether the tenant `default` has one secret at both sides, so that its pages have the same names
    /// in every run.
    pub shared_secret: bool,
    /// `SKYFERRY_FAULTS` of each side.
    pub faults: [String; 2],
    /// `--log-level`; empty is `info`.
    pub log_level: String,
    /// Whether they log with `--log-format json`.
    pub log_json: bool,
}

/// Two gateways and what they need; everything ends on drop.
#[derive(Debug)]
pub struct GatewayPair {
    gateways: [Gateway; 2],
    routes: Vec<Route>,
    control: LinkControl,
    _relay: Option<UdpRelay>,
    _pki: Pki,
}

impl GatewayPair {
    /// On the loopback interface with the relay between them; ready, with the link up.
    ///
    /// # Errors
    /// When a gateway does not come up; the text has its log.
    pub fn over_relay(shape: Shape, setup: &PairSetup) -> Result<Self> {
        let pki = Pki::new()?;
        // The interface carries more than the relay, which is an Ethernet path.
        let setup = &PairSetup {
            wan: format!("max_udp_payload = 1452\n{}", setup.wan),
            ..setup.clone()
        };
        let [a, b] = [free_udp_address()?, free_udp_address()?];
        let relay = UdpRelay::new(shape, a, b)?;
        let place = |listen, peer| -> Result<Place> {
            Ok(Place {
                listen,
                peer,
                admin: free_tcp_address()?,
                netns: None,
            })
        };
        let places = [
            place(a, relay.address_for_a())?,
            place(b, relay.address_for_b())?,
        ];
        let control = relay.control().clone();
        Self::start(setup, &pki, places)?.finish(setup, control, Some(relay), pki)
    }

    /// In the two namespaces of `wan`; ready, with the link up.
    ///
    /// # Errors
    /// When a gateway does not come up; the text has its log.
    pub fn over_tun(wan: &TunWan, setup: &PairSetup) -> Result<Self> {
        let pki = Pki::new()?;
        let place = |own, peer, netns: &Netns| Place {
            listen: SocketAddr::from((own, WAN_PORT)),
            peer: SocketAddr::from((peer, WAN_PORT)),
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 9700)),
            netns: Some(netns.clone()),
        };
        let places = [
            place(ADDRESS_A, ADDRESS_B, wan.a()),
            place(ADDRESS_B, ADDRESS_A, wan.b()),
        ];
        Self::start(setup, &pki, places)?.finish(setup, wan.control().clone(), None, pki)
    }

    /// On the loopback interface with nothing between them; ready, with the link up. There is no link
    /// to steer, and its counters stay at nothing.
    ///
    /// # Errors
    /// When a gateway does not come up; the text has its log.
    pub fn over_loopback(setup: &PairSetup) -> Result<Self> {
        let pki = Pki::new()?;
        let [a, b] = [free_udp_address()?, free_udp_address()?];
        let place = |listen, peer| -> Result<Place> {
            Ok(Place {
                listen,
                peer,
                admin: free_tcp_address()?,
                netns: None,
            })
        };
        let control = LinkControl::new(Shape::wan(10_000, 0));
        Self::start(setup, &pki, [place(a, b)?, place(b, a)?])?.finish(setup, control, None, pki)
    }

    /// Both in one network namespace with nothing between them; ready, with the link up. What their
    /// targets are reached over is the caller's to steer; the pair's own link is not.
    ///
    /// # Errors
    /// When a gateway does not come up; the text has its log.
    pub fn inside(netns: &Netns, setup: &PairSetup) -> Result<Self> {
        let pki = Pki::new()?;
        let wan = |side| SocketAddr::from((Ipv4Addr::LOCALHOST, WAN_PORT + side as u16));
        let place = |side: Side| Place {
            listen: wan(side),
            peer: wan(side.other()),
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 9700 + side as u16)),
            netns: Some(netns.clone()),
        };
        let control = LinkControl::new(Shape::wan(10_000, 0));
        Self::start(setup, &pki, [Side::A, Side::B].map(place))?.finish(setup, control, None, pki)
    }

    fn start(setup: &PairSetup, pki: &Pki, places: [Place; 2]) -> Result<Started> {
        let [a, b] = places;
        Ok(Started([
            Gateway::start(Side::A, a, setup, pki.dir())?,
            Gateway::start(Side::B, b, setup, pki.dir())?,
        ]))
    }

    /// The gateway of a side.
    #[must_use]
    pub fn gateway(&self, side: Side) -> &Gateway {
        &self.gateways[side as usize]
    }

    /// The gateway of a side, to be ended or started again.
    pub fn gateway_mut(&mut self, side: Side) -> &mut Gateway {
        &mut self.gateways[side as usize]
    }

    /// A way through the pair, as numbered in the setup.
    #[must_use]
    pub fn route(&self, index: usize) -> &Route {
        &self.routes[index]
    }

    /// Steers the link and reads its counters.
    #[must_use]
    pub fn control(&self) -> &LinkControl {
        &self.control
    }

    /// Waits until both sides see the link up.
    ///
    /// # Errors
    /// When it does not come up; the text has both logs.
    pub fn wait_link(&self) -> Result<()> {
        for gateway in &self.gateways {
            gateway.wait_link_up()?;
        }
        Ok(())
    }

    /// Both logs' tails, for error messages.
    #[must_use]
    pub fn explain(&self) -> String {
        self.gateways.iter().map(Gateway::log_tail).collect()
    }
}

/// Two gateways that may not be ready yet.
struct Started([Gateway; 2]);

impl Started {
    fn finish(
        self,
        setup: &PairSetup,
        control: LinkControl,
        relay: Option<UdpRelay>,
        pki: Pki,
    ) -> Result<GatewayPair> {
        let mut gateways = self.0;
        for gateway in &mut gateways {
            gateway.wait_ready()?;
        }
        let routes = setup.routes.clone();
        let pair = GatewayPair {
            gateways,
            routes,
            control,
            _relay: relay,
            _pki: pki,
        };
        pair.wait_link()?;
        Ok(pair)
    }
}

/// Addresses of a gateway.
#[derive(Debug, Clone)]
struct Place {
    listen: SocketAddr,
    peer: SocketAddr,
    admin: SocketAddr,
    netns: Option<Netns>,
}

/// One running gateway.
#[derive(Debug)]
pub struct Gateway {
    process: Process,
    side: Side,
    place: Place,
    faults: String,
    arguments: Vec<String>,
    dir: TempDir,
    runtime: TempDir,
    forgetful: bool,
}

impl Gateway {
    fn start(side: Side, place: Place, setup: &PairSetup, pki: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("skyferry-gateway-")
            .tempdir()?;
        // In memory, as gateways want it.
        let runtime = tempfile::tempdir_in("/dev/shm")?;
        fs::write(
            dir.path().join("gateway.toml"),
            configuration(side, &place, setup, pki, runtime.path()),
        )?;
        // For stores that are to outlive a gateway: `key_file = "store.key"`.
        let key = dir.path().join("store.key");
        fs::write(&key, "the key of a store in a test\n")?;
        fs::set_permissions(&key, PermissionsExt::from_mode(0o600))?;
        let faults = setup.faults[side as usize].clone();
        let log_level = match setup.log_level.as_str() {
            "" => "info",
            level => level,
        };
        let log_format = if setup.log_json { "json" } else { "text" };
        let arguments = ["--log-level", log_level, "--log-format", log_format];
        let arguments = arguments.map(str::to_owned).to_vec();
        let process = spawn(side, &place, dir.path(), &faults, &arguments)?;
        Ok(Self {
            process,
            side,
            place,
            faults,
            arguments,
            dir,
            runtime,
            forgetful: setup.forgetful,
        })
    }

    /// Starts it again with the same configuration, after its end.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill();
        self.spawn_again()?;
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let end = Instant::now() + TAKEN_LIMIT;
        loop {
            let outcome = self.wait_answer();
            let taken =
                |error: &anyhow::Error| format!("{error:#}").contains("Address already in use");
            if !outcome.as_ref().is_err_and(taken) || Instant::now() > end {
                return outcome;
            }
            thread::sleep(POLL);
            self.spawn_again()?;
        }
    }

    fn spawn_again(&mut self) -> Result<()> {
        if self.forgetful {
            for file in fs::read_dir(self.runtime.path())? {
                fs::remove_file(file?.path())?;
            }
        }
        let dir = self.dir.path();
        self.process = spawn(self.side, &self.place, dir, &self.faults, &self.arguments)?;
        Ok(())
    }

    fn wait_answer(&mut self) -> Result<()> {
        let log = self.process.log_path().to_owned();
        let Self {
            process,
            place,
            side,
            ..
        } = self;
        wait_for(
            &format!("answer of {} on /readyz", side.name()),
            READY_LIMIT,
            || {
                if let Some(status) = process.exited() {
                    bail!(
                        "{} has ended: {status}\n{}",
                        side.name(),
                        process.log_tail()
                    );
                }
                Ok(get(place, "/readyz").ok())
            },
            || crate::process::log_tail(side.name(), &log),
        )
        .map(|_| ())
    }

    fn wait_link_up(&self) -> Result<()> {
        wait_for(
            &format!("link of {}", self.side.name()),
            READY_LIMIT,
            || {
                let status = self.status()?;
                let links = status["links"].as_array();
                let up = links.is_some_and(|links| links.iter().all(|link| link["up"] == true));
                Ok(up.then_some(()))
            },
            || self.log_tail(),
        )
    }

    /// `/api/v1/status`.
    ///
    /// # Errors
    /// When the gateway does not answer.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&get(&self.place, "/api/v1/status")?)?)
    }

    /// The latest migration that this gateway knows, running or finished.
    ///
    /// # Errors
    /// When the gateway does not answer.
    pub fn latest_migration(&self) -> Result<Option<Value>> {
        let status = self.status()?;
        let running = status["migrations"].as_array().and_then(|list| list.last());
        let finished = status["recent"].as_array().and_then(|list| list.first());
        Ok(running.or(finished).cloned())
    }

    /// `/metrics`.
    ///
    /// # Errors
    /// When the gateway does not answer.
    pub fn metrics(&self) -> Result<String> {
        get(&self.place, "/metrics")
    }

    /// Its configuration file.
    #[must_use]
    pub fn configuration(&self) -> PathBuf {
        self.dir.path().join("gateway.toml")
    }

    /// Fills its store from `path` with `skyferry seed`; it may be running. Gives back what that says.
    ///
    /// # Errors
    /// When that fails.
    pub fn seed(&self, path: &Path) -> Result<Value> {
        let mut command = Command::new(binary()?);
        command.args(["seed", "--json", "--config"]);
        let output = run(command.arg(self.configuration()).arg(path))?;
        Ok(serde_json::from_str(&output)?)
    }

    /// Its process, as long as it is not started again.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The address of the admin endpoint.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.place.admin
    }

    /// Sum of all series of a metric, or of those whose labels contain `labels`.
    ///
    /// # Errors
    /// When the gateway does not answer.
    pub fn metric(&self, name: &str, labels: &str) -> Result<f64> {
        let text = self.metrics()?;
        let series = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (labelled, value) = rest.rsplit_once(' ')?;
            let whole = labelled.is_empty() || labelled.starts_with('{');
            (whole && labelled.contains(labels)).then(|| value.parse::<f64>().ok())?
        });
        Ok(series.sum())
    }

    /// Asks it to drain and end (SIGTERM).
    pub fn terminate(&mut self) {
        self.process.terminate();
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops or continues the process, as a machine that hangs.
    pub fn freeze(&mut self, frozen: bool) {
        self.process.freeze(frozen);
    }

    /// Exit status if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.process.exited()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.wait_exit(limit)
    }

    /// CPU time and memory so far.
    ///
    /// # Errors
    /// When it has ended.
    pub fn usage(&self) -> Result<Usage> {
        self.process.usage()
    }

    /// The whole log so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.process.log_path()).unwrap_or_default()
    }

    /// Waits for words in the log.
    ///
    /// # Errors
    /// When they do not come.
    pub fn wait_log(&self, words: &str) -> Result<()> {
        wait_for(
            &format!("{words:?} in the log of {}", self.side.name()),
            READY_LIMIT,
            || Ok(self.log().contains(words).then_some(())),
            || self.log_tail(),
        )
    }

    /// The log's last lines, with a heading.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

fn spawn(
    side: Side,
    place: &Place,
    dir: &Path,
    faults: &str,
    arguments: &[String],
) -> Result<Process> {
    let mut command = Command::new(binary()?);
    command
        .arg("gateway")
        .arg("--config")
        .arg(dir.join("gateway.toml"));
    command.args(arguments);
    if !faults.is_empty() {
        command.env("SKYFERRY_FAULTS", faults);
    }
    let surroundings = Surroundings {
        netns: place.netns.as_ref(),
        inherit: Vec::new(),
    };
    Process::start(side.name(), &mut command, &dir.join("log"), surroundings)
}

fn configuration(
    side: Side,
    place: &Place,
    setup: &PairSetup,
    pki: &Path,
    runtime: &Path,
) -> String {
    let (name, peer, pki) = (side.name(), side.other().name(), pki.display());
    // What the process leaves behind is for this gateway of this test alone.
    let kept = format!("runtime_dir = \"{}\"", runtime.display());
    let mut toml = format!(
        "[gateway]\nname = \"{name}\"\n{kept}\n{}\n[wan]\nlisten = \"{}\"\n{}\n[tls]\nca = \
         \"{pki}/ca.pem\"\ncert = \"{pki}/{name}.pem\"\nkey = \"{pki}/{name}.key\"\n[[peer]]\nname \
         = \"{peer}\"\naddress = \"{}\"\n[admin]\nlisten = \"{}\"\n{}\n",
        setup.gateway, place.listen, setup.wan, place.peer, place.admin, setup.more
    );
    if setup.shared_secret {
        let _ = writeln!(
            toml,
            "[[tenant]]\nname = \"default\"\nsecret_file = \"{pki}/tenant.key\""
        );
    }
    if let Some(mib) = setup.store_mib {
        let _ = writeln!(toml, "[store]\nmemory = \"{}MiB\"", mib[side as usize]);
    }
    let mut allow = Vec::new();
    for route in &setup.routes {
        if route.from == side {
            let Route {
                listen,
                target,
                more,
                ..
            } = route;
            let _ = writeln!(
                toml,
                "[[ingress]]\nlisten = \"{listen}\"\npeer = \"{peer}\"\ntarget = \
                 \"{target}\"\n{more}"
            );
        } else if route.allowed {
            allow.push(format!("\"{}\"", route.target));
        }
    }
    if !allow.is_empty() {
        let _ = writeln!(
            toml,
            "[[egress]]\npeer = \"{peer}\"\nallow = [{}]",
            allow.join(", ")
        );
    }
    toml
}

/// Body of a successful answer of the admin endpoint.
fn get(place: &Place, path: &str) -> Result<String> {
    let fetch = || -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&place.admin, ADMIN_LIMIT)?;
        stream.set_read_timeout(Some(ADMIN_LIMIT))?;
        let address = place.admin;
        // Version 1.0: the answer is not chunked, and ends with the connection.
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("cut HTTP answer")?;
        if head.split_whitespace().nth(1) != Some("200") {
            bail!("{path}: {} {body}", head.lines().next().unwrap_or_default());
        }
        Ok(body.to_owned())
    };
    match &place.netns {
        Some(netns) => netns.run(fetch),
        None => fetch(),
    }
}
