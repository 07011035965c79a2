//! Pairs of relays that copy a migration's bytes over the loopback interface, encrypted, and do nothing else:
//! the least that gateways could do.

use std::env;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::gateway::{Pki, Side, free_tcp_address, free_udp_address};
use crate::guest::target_dir;
use crate::process::{Process, Surroundings, run, wait_for};

/// Bytes that programs of pipes and relays copy at once.
pub(super) const COPY_BYTES: usize = 256 << 10;
/// Until a relay listens.
const START_LIMIT: Duration = Duration::from_secs(20);

/// What the bytes travel over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    /// The gateways' own transport, QUIC.
    Quic,
    /// TLS over TCP.
    Tls,
}

/// Both relays.
pub(super) struct Relays {
    /// Near first.
    pub(super) processes: Vec<Process>,
    /// Where the source connects to.
    pub(super) near: SocketAddr,
    /// What the far relay connects to.
    pub(super) target: SocketAddr,
    _pki: Pki,
    _logs: TempDir,
}

/// Starts both relays.
pub(super) fn start(over: Over) -> Result<Relays> {
    let pki = Pki::new()?;
    let logs = tempfile::tempdir()?;
    let (near, target) = (free_tcp_address()?, free_tcp_address()?);
    let (far_command, near_command) = match over {
        Over::Quic => quic(&pki, near, target)?,
        Over::Tls => tls(&pki, near, target)?,
    };
    let mut processes = Vec::new();
    for (name, mut command) in [("far", far_command), ("near", near_command)] {
        let log = logs.path().join(name);
        let relay = Process::start(name, &mut command, &log, Surroundings::default())?;
        let listens = || Ok(relay.log_tail().contains("listening on").then_some(()));
        wait_for("relay that listens", START_LIMIT, listens, || {
            relay.log_tail()
        })?;
        processes.insert(0, relay);
    }
    Ok(Relays {
        processes,
        near,
        target,
        _pki: pki,
        _logs: logs,
    })
}

/// The far relay and the near one.
fn quic(pki: &Pki, near: SocketAddr, target: SocketAddr) -> Result<(Command, Command)> {
    let program = build()?;
    let far = free_udp_address()?;
    let relay = |role: &str, listen: SocketAddr, to: SocketAddr| {
        let mut command = Command::new(&program);
        command.arg(role).arg(pki.dir());
        command.args([listen.to_string(), to.to_string()]);
        command
    };
    Ok((relay("far", far, target), relay("near", near, far)))
}

/// The example `plain_relay` of the gateway's package.
fn build() -> Result<PathBuf> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--release", "--package", "skyferry"]);
    command.args(["--example", "plain_relay", "--manifest-path"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    run(&mut command).context("build the relay")?;
    Ok(target_dir().join("release/examples/plain_relay"))
}

/// The far relay and the near one.
fn tls(pki: &Pki, near: SocketAddr, target: SocketAddr) -> Result<(Command, Command)> {
    let far = free_tcp_address()?;
    let name = Side::B.name();
    let identity = pki.dir().join(name).display().to_string();
    let socat = |listen: String, to: String| {
        let mut command = Command::new("socat");
        let size = COPY_BYTES.to_string();
        command.args(["-d", "-d", "-b", &size, &listen, &to]);
        command
    };
    let listen = format!(
        "OPENSSL-LISTEN:{},bind=127.0.0.1,reuseaddr,verify=0,cert={identity}.pem,key={identity}.key",
        far.port()
    );
    Ok((
        socat(listen, format!("TCP:{target}")),
        socat(
            format!("TCP-LISTEN:{},bind=127.0.0.1,reuseaddr", near.port()),
            format!("OPENSSL:{far},verify=0"),
        ),
    ))
}
