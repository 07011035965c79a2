//! The command itself: exit codes, messages, and the status of a stand-in gateway.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use skyferry::admin;
use skyferry::metrics::{Metrics, Registry};
use skyferry::status::{
    Direction, GatewayStatus, LinkStatus, MigrationState, MigrationStatus, StatusSource,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

fn skyferry(arguments: &[&str], dir: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skyferry"));
    command
        .args(arguments)
        .current_dir(dir)
        .env_remove("SKYFERRY_LOG")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

const CONFIG: &str = r#"
[gateway]
name = "edge-a"
[wan]
listen = "127.0.0.1:0"
[tls]
ca = "pki/ca.pem"
cert = "pki/edge-a.pem"
key = "pki/edge-a.key"
[[peer]]
name = "edge-b"
"#;

#[test]
fn from_nothing_to_a_checked_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| skyferry(arguments, dir.path());
    let init = run(&["pki", "init", "--dir", "pki"]);
    assert_eq!(init.status.code(), Some(0), "{init:?}");
    assert!(text(&init.stdout).contains("skyferry pki issue --dir pki --name edge-a"));
    let issue = run(&["pki", "issue", "--dir", "pki", "--name", "edge-a"]);
    assert_eq!(issue.status.code(), Some(0), "{issue:?}");
    assert!(text(&issue.stdout).contains("cert = \"edge-a.pem\""));
    fs::write(dir.path().join("gateway.toml"), CONFIG).unwrap();
    let check = run(&["check-config", "gateway.toml"]);
    assert_eq!(check.status.code(), Some(0), "{check:?}");
    assert!(text(&check.stdout).contains("gateway.toml: good: gateway edge-a, peers: 1"));
    assert!(text(&check.stderr).contains("warning: ingress: neither"));

    let again = run(&["pki", "init", "--dir", "pki"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("exists and is not overwritten"));
}

/// The reader of a service's log may die; the gateway must not die with it.
#[tokio::test]
async fn a_gateway_goes_on_when_its_stderr_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["pki", "init", "--dir", "pki"][..],
        &["pki", "issue", "--dir", "pki", "--name", "edge-a"][..],
    ] {
        assert!(skyferry(arguments, dir.path()).status.success());
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let config = format!("{CONFIG}[admin]\nlisten = \"{free}\"\n");
    fs::write(dir.path().join("gateway.toml"), config).unwrap();
    let mut gateway = Command::new(env!("CARGO_BIN_EXE_skyferry"))
        .args(["gateway", "--config", "gateway.toml"])
        .args(["--log-level", "debug"])
        .current_dir(dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(gateway.stderr.take());
    let address = free.to_string();
    let end = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(&address).await.is_err() {
        assert_eq!(gateway.try_wait().unwrap(), None, "the gateway has ended");
        assert!(Instant::now() < end, "the gateway does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // It has logged its start by now, and logs on.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let health = get(&address, "/healthz").await;
    let ended = gateway.try_wait().unwrap();
    gateway.kill().unwrap();
    gateway.wait().unwrap();
    assert!(health.starts_with("HTTP/1.0 200"), "{health}");
    assert_eq!(ended, None);
}

/// A service is told by its manager where to keep what the next process must know; where another gateway of
/// its name keeps that already, it says so and goes on.
#[test]
fn a_service_finds_its_runtime_folder() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
    for arguments in [
        &["pki", "init", "--dir", "pki"][..],
        &["pki", "issue", "--dir", "pki", "--name", "edge-a"][..],
    ] {
        assert!(skyferry(arguments, dir.path()).status.success());
    }
    fs::write(dir.path().join("gateway.toml"), CONFIG).unwrap();
    let own = runtime.path().join("ours");
    let start = || {
        let mut gateway = Command::new(env!("CARGO_BIN_EXE_skyferry"))
            .args(["gateway", "--config", "gateway.toml"])
            .env("RUNTIME_DIRECTORY", format!("{}:/run/other", own.display()))
            .current_dir(dir.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(gateway.stderr.take().unwrap()).lines();
        let mut log = String::new();
        while !log.contains("gateway ready") {
            log += &lines.next().unwrap().unwrap();
        }
        (gateway, log)
    };
    let ends = |(mut gateway, log): (std::process::Child, String)| {
        gateway.kill().unwrap();
        gateway.wait().unwrap();
        log
    };
    let first = start();
    let mode = fs::metadata(own.join("edge-a.releases")).unwrap().mode();
    let second = ends(start());
    let refused = "releases are not remembered across a restart";
    assert_eq!(mode & 0o777, 0o600);
    assert!(!ends(first).contains(refused));
    assert!(second.contains(refused) && second.contains("another gateway of this name"));
    assert!(!ends(start()).contains(refused));
}

/// What is done is done, and how it ended is told by the code, whoever reads the words.
#[test]
fn nobody_reads_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let unread = |arguments: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_skyferry"));
        command
            .args(arguments)
            .current_dir(dir.path())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .status()
            .unwrap()
            .code()
    };
    assert_eq!(unread(&["pki", "init", "--dir", "pki"]), Some(0));
    let issue = ["pki", "issue", "--dir", "pki", "--name", "edge-a"];
    assert_eq!(unread(&issue), Some(0));
    assert_eq!(unread(&issue), Some(1));
    fs::write(dir.path().join("gateway.toml"), CONFIG).unwrap();
    assert_eq!(unread(&["check-config", "gateway.toml"]), Some(0));
    assert_eq!(unread(&["gateway", "--config", "none.toml"]), Some(2));
    assert_eq!(unread(&["status", "--admin", "127.0.0.1:1"]), Some(1));
    assert_eq!(unread(&["status", "--admin", "nonsense"]), Some(2));
}

#[test]
fn a_bad_configuration_ends_with_code_2() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("gateway.toml"), "[gatway]\n").unwrap();
    for arguments in [
        &["check-config", "gateway.toml"][..],
        &["gateway", "--config", "gateway.toml"][..],
    ] {
        let refused = skyferry(arguments, dir.path());
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(text(&refused.stderr).contains("gateway.toml: gatway: is not a known key"));
        assert!(refused.stdout.is_empty());
    }
    let missing = skyferry(&["gateway", "--config", "none.toml"], dir.path());
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("none.toml: cannot be read"));
}

/// However late in the file the mistake stands: a gateway that is about to refuse touches nothing.
#[test]
fn nothing_is_bound_by_a_bad_configuration() {
    let dir = tempfile::tempdir().unwrap();
    // The port is taken: whoever tried to bind it would say so.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let listeners = format!(
        "[[ingress]]\nlisten = \"unix:{}/vm1.sock\"\npeer = \"edge-b\"\ntarget = \"10.0.0.5:4444\"\n\
         [[ingress]]\nlisten = \"{address}\"\npeer = \"edge-b\"\ntarget = \"10.0.0.5:4445\"\n\
         [limits]\nmigrations = 0\n",
        dir.path().display()
    );
    fs::write(
        dir.path().join("gateway.toml"),
        format!("{CONFIG}{listeners}"),
    )
    .unwrap();
    let refused = skyferry(&["gateway", "--config", "gateway.toml"], dir.path());
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let said = text(&refused.stderr);
    assert!(said.contains("limits.migrations"), "{said}");
    assert!(!said.contains("cannot listen"), "{said}");
    assert!(!dir.path().join("vm1.sock").exists());
}

#[test]
fn a_bad_command_line_ends_with_code_2() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &[][..],
        &["fly"][..],
        &["gateway"][..],
        &["pki", "issue", "--dir", "x"][..],
        &["pki", "init", "--dir", "x", "--days", "0"][..],
        &["status", "--admin", "nonsense"][..],
        &["status", "--config", "none.toml"][..],
        &["status", "--once", "--watch"][..],
    ] {
        let refused = skyferry(arguments, dir.path());
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {refused:?}");
        assert!(!refused.stderr.is_empty());
    }
    let help = skyferry(&["--help"], dir.path());
    assert_eq!(help.status.code(), Some(0));
    for word in ["gateway", "check-config", "pki", "status", "five commands"] {
        assert!(
            text(&help.stdout).contains(word),
            "{word} is not in the help"
        );
    }
}

/// A gateway's stand-in.
#[derive(Default)]
struct StandIn {
    draining: AtomicBool,
    refreshed: AtomicU64,
}

impl StatusSource for StandIn {
    fn status(&self) -> GatewayStatus {
        let migration = MigrationStatus {
            id: "7f3a".into(),
            peer: "edge-b".into(),
            direction: Direction::Out,
            ingress: Some("127.0.0.1:4444".into()),
            target: "10.0.0.5:4444".into(),
            state: MigrationState::AwaitingVerdict,
            round: 2,
            channels: 5,
            guest_bytes: 1 << 30,
            wire_bytes: 1 << 26,
            ratio: Some(16.0),
            guest_bytes_per_sec: 0.0,
            wire_bytes_per_sec: 0.0,
            ram_total_bytes: None,
            remaining_seconds: None,
            started_at: 1.0,
            elapsed_seconds: 9.0,
            blackout_seconds: None,
            error: None,
        };
        GatewayStatus {
            name: "edge-a".into(),
            version: "0.1.0".into(),
            draining: self.draining.load(Ordering::Relaxed),
            links: vec![LinkStatus {
                peer: "edge-b".into(),
                direction: Direction::Out,
                address: None,
                up: false,
                rtt_seconds: None,
                loss: None,
                congestion_window_bytes: None,
                sent_bytes: 0,
                received_bytes: 0,
                error: Some("timed out".into()),
            }],
            migrations: vec![migration],
            recent: Vec::new(),
        }
    }

    fn ready(&self) -> Result<(), String> {
        if self.draining.load(Ordering::Relaxed) {
            Err("draining".into())
        } else {
            Ok(())
        }
    }

    fn refresh_metrics(&self) {
        self.refreshed.fetch_add(1, Ordering::Relaxed);
    }
}

struct Served {
    address: String,
    source: Arc<StandIn>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

async fn serve() -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let registry = Registry::new();
    Metrics::register(&registry, 1).unwrap();
    let source = Arc::new(StandIn::default());
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    let task = tokio::spawn(admin::serve(listener, registry, source.clone(), shutdown));
    Served {
        address,
        source,
        stop,
        task,
    }
}

async fn exchange(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // A server that refuses may close before all of a long request has been read.
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

async fn get(address: &str, path: &str) -> String {
    exchange(address, &format!("GET {path} HTTP/1.0\r\n\r\n")).await
}

#[tokio::test]
async fn the_admin_endpoint_answers() {
    let served = serve().await;
    let address = &served.address;
    let metrics = get(address, "/metrics").await;
    assert!(metrics.starts_with("HTTP/1.0 200"), "{metrics}");
    assert!(metrics.contains("text/plain; version=0.0.4"));
    assert!(metrics.contains("skyferry_build_info{protocol=\"1\""));
    assert_eq!(served.source.refreshed.load(Ordering::Relaxed), 1);
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.0 200"));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.0 200"));
    served.source.draining.store(true, Ordering::Relaxed);
    let ready = get(address, "/readyz").await;
    assert!(
        ready.starts_with("HTTP/1.0 503") && ready.ends_with("draining\n"),
        "{ready}"
    );
    let status = get(address, "/api/v1/status").await;
    assert!(status.contains("\"state\":\"awaiting-verdict\"") && status.contains("no-store"));
    assert!(
        get(address, "/api/v1/migrations")
            .await
            .contains("\"recent\":[]")
    );
    assert!(get(address, "/none").await.starts_with("HTTP/1.0 404"));
}

#[tokio::test]
async fn the_admin_endpoint_takes_no_orders_and_no_floods() {
    let served = serve().await;
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let request = format!("{method} /api/v1/status HTTP/1.0\r\nContent-Length: 0\r\n\r\n");
        let answer = exchange(&served.address, &request).await;
        assert!(answer.starts_with("HTTP/1.0 405"), "{method}: {answer}");
    }
    let long = format!(
        "GET /healthz HTTP/1.0\r\nX: {}\r\n\r\n",
        "a".repeat(1 << 20)
    );
    let answer = exchange(&served.address, &long).await;
    assert!(!answer.contains(" 200 "), "{answer}");
    let answer = exchange(&served.address, "\x16\x03\x01 no HTTP\r\n\r\n").await;
    assert!(!answer.contains(" 200 "), "{answer}");
    assert!(
        get(&served.address, "/healthz")
            .await
            .starts_with("HTTP/1.0 200")
    );
}

/// A port scanner that connects and says nothing, as often as there are places.
#[tokio::test]
async fn silent_clients_do_not_keep_the_admin_endpoint_from_others() {
    let served = serve().await;
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(TcpStream::connect(&served.address).await.unwrap());
    }
    let answered = tokio::time::timeout(Duration::from_secs(15), get(&served.address, "/healthz"));
    assert!(answered.await.unwrap().starts_with("HTTP/1.0 200"));
}

#[tokio::test]
async fn the_admin_endpoint_stops_though_a_client_hangs_on() {
    let served = serve().await;
    let mut idle = TcpStream::connect(&served.address).await.unwrap();
    idle.write_all(b"GET /healthz HT").await.unwrap();
    assert!(
        get(&served.address, "/healthz")
            .await
            .starts_with("HTTP/1.0 200")
    );
    served.stop.send(()).unwrap();
    served.task.await.unwrap();
    assert!(TcpStream::connect(&served.address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_a_plain_table_or_json() {
    let served = serve().await;
    let address = served.address.clone();
    let run = move |extra: &'static [&'static str]| {
        let url = format!("http://{address}");
        let mut arguments = vec!["status", "--admin", url.as_str()];
        arguments.extend(extra);
        skyferry(&arguments, Path::new("."))
    };
    let (plain, json) = tokio::task::spawn_blocking(move || (run(&[]), run(&["--json"])))
        .await
        .unwrap();
    assert_eq!(plain.status.code(), Some(0), "{plain:?}");
    let table = text(&plain.stdout);
    assert!(
        !table.contains('\x1b'),
        "control sequences without a terminal: {table:?}"
    );
    for word in [
        "gateway edge-a",
        "DOWN",
        "timed out",
        "awaiting-verdict",
        "1.0 GiB",
        "16.0",
    ] {
        assert!(table.contains(word), "{word} is not in\n{table}");
    }
    assert_eq!(json.status.code(), Some(0), "{json:?}");
    let status: GatewayStatus = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(status, served.source.status());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_when_its_reader_goes() {
    let served = serve().await;
    for format in [&["--watch"][..], &["--watch", "--json"][..]] {
        let mut watch = Command::new(env!("CARGO_BIN_EXE_skyferry"))
            .args(["status", "--admin", &served.address])
            .args(format)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut reader = watch.stdout.take().unwrap();
        let ended = tokio::task::spawn_blocking(move || {
            let mut first = [0; 16];
            std::io::Read::read_exact(&mut reader, &mut first).unwrap();
            drop(reader);
            watch.wait_with_output().unwrap()
        });
        let ended = tokio::time::timeout(Duration::from_secs(10), ended);
        let ended = ended.await.unwrap().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        assert!(ended.stderr.is_empty(), "{ended:?}");
    }
}

#[test]
fn status_of_nobody_is_an_error_that_helps() {
    // A port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("http://{free}");
    let failed = skyferry(&["status", "--admin", &url], Path::new("."));
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    assert!(text(&failed.stderr).contains("cannot be reached: Connection refused"));
    assert!(text(&failed.stderr).contains("Is the gateway running"));
}
