//! What a newcomer copies out of the help, the README or the manual brings two gateways up; and a gateway
//! leaves nothing behind.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use skyferry::config::Config;

/// Longest wait for anything that should happen at once.
const SOON: Duration = Duration::from_secs(20);

fn read(path: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(file).unwrap()
}

fn skyferry(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skyferry"));
    command.current_dir(dir).env_remove("SKYFERRY_LOG");
    command
}

/// A gateway whose log goes to a file; ends with the test.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let log = dir.join(format!("{}.log", arguments.last().unwrap()));
        let file = fs::File::create(&log).unwrap();
        let mut command = skyferry(dir);
        let child = command.args(arguments).stderr(Stdio::from(file)).spawn();
        Self {
            child: child.unwrap(),
            log,
        }
    }

    fn wait_log(&self, words: &str) {
        let start = Instant::now();
        loop {
            let log = fs::read_to_string(&self.log).unwrap();
            if log.contains(words) {
                return;
            }
            assert!(start.elapsed() < SOON, "no {words:?} in the log:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it as systemd would.
    fn terminate(mut self) {
        let pid = self.child.id().to_string();
        let kill = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(kill.unwrap().success());
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(status.code(), Some(0));
                return;
            }
            assert!(start.elapsed() < SOON, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The two files with other ports, as those in them may be taken on this machine.
fn with_free_ports(files: [String; 2]) -> [String; 2] {
    let listens = files
        .iter()
        .flat_map(|text| text.lines())
        .filter_map(|line| {
            let address = line.strip_prefix("listen = \"")?.split('"').next()?;
            address.rsplit(':').next()?.parse::<u16>().ok()
        });
    let mut ports = BTreeMap::new();
    for port in listens {
        ports.entry(port).or_insert_with(|| {
            loop {
                let tcp = TcpListener::bind("0.0.0.0:0").unwrap();
                let free = tcp.local_addr().unwrap();
                if let Ok(udp) = UdpSocket::bind(free) {
                    return (tcp, udp, free.port());
                }
            }
        });
    }
    files.map(|mut text| {
        // In two steps: a free port may be one of those that are replaced.
        for port in ports.keys() {
            text = text.replace(&format!(":{port}\""), &format!(":free-{port}\""));
        }
        for (port, (_, _, free)) in &ports {
            text = text.replace(&format!(":free-{port}\""), &format!(":{free}\""));
        }
        text
    })
}

/// Does what `text` says, in an empty folder with these two files in it.
fn follow(text: &str, files: [String; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (name, text) in ["gateway-a.toml", "gateway-b.toml"]
        .iter()
        .zip(with_free_ports(files))
    {
        fs::write(dir.join(name), text).unwrap();
    }
    let commands: Vec<Vec<&str>> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("skyferry "))
        .filter(|line| line.starts_with("pki ") || line.starts_with("gateway "))
        .map(|line| line.split('#').next().unwrap().split_whitespace().collect())
        .collect();
    assert_eq!(commands.len(), 5, "{commands:?}");
    let mut running = Vec::new();
    for command in &commands {
        if command[0] == "pki" {
            let output = skyferry(dir).args(command).output().unwrap();
            assert!(output.status.success(), "{command:?}: {output:?}");
        } else {
            running.push(Running::start(dir, command));
        }
    }
    for gateway in &running {
        gateway.wait_log("gateway ready");
        gateway.wait_log("link up");
    }
    let config = Config::load(&dir.join("gateway-a.toml")).unwrap();
    let ingress = &config.ingress[0];
    let destination = TcpListener::bind(ingress.target.to_string()).unwrap();
    let mut source = TcpStream::connect(ingress.listen.to_string()).unwrap();
    source.write_all(b"through both").unwrap();
    let (mut arrived, _) = destination.accept().unwrap();
    arrived.set_read_timeout(Some(SOON)).unwrap();
    let mut bytes = [0; 12];
    arrived.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"through both");
    drop((source, arrived));
    running.into_iter().for_each(Running::terminate);
}

/// The chapter of a text that has the five commands.
fn chapter(path: &str) -> String {
    let text = read(path);
    let mut parts = text.split("\n## ");
    let found = parts.find(|part| part.starts_with("Two gateways in five commands"));
    found.unwrap().to_owned()
}

fn examples() -> [String; 2] {
    ["configs/gateway-a.toml", "configs/gateway-b.toml"].map(read)
}

#[test]
fn the_help_brings_two_gateways_up() {
    let dir = tempfile::tempdir().unwrap();
    let help = skyferry(dir.path()).arg("--help").output().unwrap();
    follow(str::from_utf8(&help.stdout).unwrap(), examples());
}

#[test]
fn the_manual_brings_two_gateways_up() {
    follow(&chapter("docs/operation.md"), examples());
}

#[test]
fn the_readme_brings_two_gateways_up() {
    let text = chapter("README.md");
    let blocks = text.split("```toml\n").skip(1);
    let mut files = blocks.map(|part| part.split("```").next().unwrap().to_owned());
    follow(&text, [(); 2].map(|()| files.next().unwrap()));
}

#[test]
fn a_gateway_that_is_drained_leaves_no_socket_behind() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vm1.sock");
    for arguments in [
        &["pki", "init", "--dir", "pki"][..],
        &["pki", "issue", "--dir", "pki", "--name", "edge-a"],
    ] {
        let output = skyferry(dir.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let config = format!(
        "[gateway]\nname = \"edge-a\"\n[wan]\nlisten = \"127.0.0.1:0\"\n[tls]\nca = \"pki/ca.pem\"\n\
         cert = \"pki/edge-a.pem\"\nkey = \"pki/edge-a.key\"\n[[peer]]\nname = \"edge-b\"\n\
         address = \"127.0.0.1:9\"\n[[ingress]]\nlisten = \"unix:{}\"\npeer = \"edge-b\"\n\
         target = \"unix:/run/vm/vm1.sock\"\n",
        socket.display()
    );
    fs::write(dir.path().join("gateway.toml"), config).unwrap();
    let gateway = Running::start(dir.path(), &["gateway", "--config", "gateway.toml"]);
    gateway.wait_log("gateway ready");
    assert!(socket.exists());
    gateway.terminate();
    assert!(!socket.exists());
}
