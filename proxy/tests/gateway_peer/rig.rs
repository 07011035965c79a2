//! A gateway process.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener as StdListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use skyferry::config::Config;
use skyferry::pki;
use skyferry::transport::Identity;
use skyferry::wire::control::StreamKind;
use skyferry::wire::{Control, DataFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::peer::Peer;

/// Longest wait for anything that should happen at once.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// `gateway.drain_timeout` of the gateway under test.
pub(crate) const DRAIN: Duration = Duration::from_secs(1);
/// `limits.migrations` of the gateway under test.
pub(crate) const MAX_MIGRATIONS: usize = 4;
/// `limits.channels_per_migration` of the gateway under test.
pub(crate) const MAX_CHANNELS: usize = 8;
/// What a gateway may hold beyond its page store (16 MiB here), whatever its peer does.
pub(crate) const MEMORY_ALLOWED: u64 = (16 + 96) << 20;

/// Fails the test when `what` takes too long.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match timeout(SOON, work).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {SOON:?}"),
    }
}

/// Certificates of one CA.
pub(crate) struct Site {
    pub(crate) dir: tempfile::TempDir,
    /// What a gateway leaves to the next one of its name.
    runtime: tempfile::TempDir,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
        for name in ["edge-a", "edge-b", "edge-c"] {
            pki::issue(dir.path(), name, &[], pki::LEAF_DAYS).unwrap();
        }
        let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { dir, runtime }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Certificate and key of `name`, trusting this CA.
    pub(crate) fn identity(&self, name: &str) -> Identity {
        let mut authorities = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(self.file("ca.pem")).unwrap();
        authorities.add(ca).unwrap();
        let chain = CertificateDer::from_pem_file(self.file(&format!("{name}.pem"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.file(&format!("{name}.key"))).unwrap();
        Identity {
            authorities,
            chain: vec![chain],
            key,
        }
    }
}

/// A running gateway; ends with the test.
pub(crate) struct Gateway {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    pub(crate) wan: SocketAddr,
    pub(crate) ingress: SocketAddr,
    admin: SocketAddr,
}

impl Gateway {
    /// Sends a signal such as `-STOP`.
    pub(crate) fn signal(&self, signal: &str) {
        let mut kill = Command::new("kill");
        let status = kill.arg(signal).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success(), "kill {signal}");
    }

    /// Takes no more of the log while `work` is done, and then asks the gateway whether it is well.
    pub(crate) fn is_well_unread(&self, work: impl FnOnce()) -> String {
        let _unread = self.log.lock().unwrap();
        work();
        let mut admin = std::net::TcpStream::connect(self.admin).unwrap();
        admin.set_read_timeout(Some(SOON)).unwrap();
        let request = b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        admin.write_all(request).unwrap();
        let mut answer = String::new();
        admin.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Stops the process, and waits until it stands still: a signal stops its threads one after the
    /// other, and until then the others work on.
    pub(crate) fn stop(&self) {
        self.signal("-STOP");
        let tasks = PathBuf::from(format!("/proc/{}/task", self.child.id()));
        let deadline = Instant::now() + SOON;
        let stopped = |stat: String| stat.rsplit(") ").next().is_some_and(|s| s.starts_with('T'));
        while !fs::read_dir(&tasks)
            .unwrap()
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok())
            .all(stopped)
        {
            assert!(Instant::now() < deadline, "not stopped");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The far side: `edge-b`, to which `edge-a` may come and reach any port of 127.0.0.1.
    pub(crate) fn far(site: &Site) -> Self {
        let extra = "[[peer]]\nname = \"edge-a\"\n\
                     [[egress]]\npeer = \"edge-a\"\nallow = [\"127.0.0.1/32:1024-65535\"]\n";
        Self::start(site, "edge-b", extra, free_tcp(), MAX_MIGRATIONS, "", None)
    }

    /// The far side, with `edge-c` as a second peer that may do the same.
    pub(crate) fn far_of_two(site: &Site) -> Self {
        let extra = ["edge-a", "edge-c"].map(|name| {
            format!(
                "[[peer]]\nname = \"{name}\"\n\
                 [[egress]]\npeer = \"{name}\"\nallow = [\"127.0.0.1/32:1024-65535\"]\n"
            )
        });
        Self::start(
            site,
            "edge-b",
            &extra.concat(),
            free_tcp(),
            MAX_MIGRATIONS,
            "",
            None,
        )
    }

    /// The near side: `edge-a` with a listener, dialling `edge-b` at `acceptor`.
    pub(crate) fn near(site: &Site, acceptor: SocketAddr) -> Self {
        Self::near_with_migrations(site, acceptor, MAX_MIGRATIONS)
    }

    /// The near side with another `limits.migrations`.
    pub(crate) fn near_with_migrations(
        site: &Site,
        acceptor: SocketAddr,
        migrations: usize,
    ) -> Self {
        Self::near_with(site, acceptor, migrations, "")
    }

    /// The near side with another `limits.migrations` and more settings in its table `[wan]`.
    pub(crate) fn near_with(
        site: &Site,
        acceptor: SocketAddr,
        migrations: usize,
        wan: &str,
    ) -> Self {
        let (extra, ingress) = Self::ingress_to(acceptor);
        Self::start(site, "edge-a", &extra, ingress, migrations, wan, None)
    }

    /// The near side with a store on disk, which `remember` has filled.
    pub(crate) fn near_that_remembers(
        site: &Site,
        acceptor: SocketAddr,
        remember: &dyn Fn(&Config),
    ) -> Self {
        fs::write(site.file("store.key"), "a key of the store's own").unwrap();
        let (mut extra, ingress) = Self::ingress_to(acceptor);
        extra += "[[tenant]]\nname = \"default\"\nsecret_file = \"tenant.key\"\n";
        let remember = Some(remember);
        Self::start(
            site,
            "edge-a",
            &extra,
            ingress,
            MAX_MIGRATIONS,
            "",
            remember,
        )
    }

    /// A peer `edge-b` at `acceptor`, and a listener for what goes to it.
    fn ingress_to(acceptor: SocketAddr) -> (String, SocketAddr) {
        let ingress = free_tcp();
        let tables = format!(
            "[[peer]]\nname = \"edge-b\"\naddress = \"{acceptor}\"\n\
             [[ingress]]\nlisten = \"{ingress}\"\npeer = \"edge-b\"\ntarget = \"127.0.0.1:4444\"\n"
        );
        (tables, ingress)
    }

    fn start(
        site: &Site,
        name: &str,
        extra: &str,
        ingress: SocketAddr,
        migrations: usize,
        wan_extra: &str,
        remember: Option<&dyn Fn(&Config)>,
    ) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let wan = socket.local_addr().unwrap();
        drop(socket);
        let admin = free_tcp();
        let store_extra = if remember.is_some() {
            "path = \"store\"\nsize = \"256MiB\"\nkey_file = \"store.key\"\n"
        } else {
            ""
        };
        let config = format!(
            "[gateway]\nname = \"{name}\"\ndrain_timeout = \"{}s\"\nruntime_dir = \"{}\"\n[wan]\nlisten = \"{wan}\"\n{wan_extra}\
             [tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\nkey = \"{name}.key\"\n\
             [store]\nmemory = \"16MiB\"\n{store_extra}\
             [admin]\nlisten = \"{admin}\"\n\
             [limits]\nmigrations = {migrations}\nchannels_per_migration = {MAX_CHANNELS}\n\
             in_flight = \"16MiB\"\n{extra}",
            DRAIN.as_secs(),
            site.runtime.path().display()
        );
        let path = site.file(&format!("{name}.toml"));
        fs::write(&path, config).unwrap();
        if let Some(remember) = remember {
            remember(&Config::load(&path).unwrap());
        }
        // A descriptor for each source, where the shell that runs the tests allows fewer.
        let mut child = Command::new("sh")
            .args(["-c", "ulimit -S -n 4096; exec \"$0\" \"$@\""])
            .arg(env!("CARGO_BIN_EXE_skyferry"))
            .args(["gateway", "--config"])
            .arg(&path)
            .env_remove("SKYFERRY_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, into) = (
            BufReader::new(child.stderr.take().unwrap()).lines(),
            log.clone(),
        );
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                into.lock().unwrap().push(line);
            }
        });
        let gateway = Self {
            child,
            log,
            wan,
            ingress,
            admin,
        };
        gateway.expect_log_blocking(&["gateway ready"]);
        gateway
    }

    /// Whether one line has all of `parts`.
    fn logged(&self, parts: &[&str]) -> bool {
        let log = self.log.lock().unwrap();
        log.iter()
            .any(|line| parts.iter().all(|part| line.contains(part)))
    }

    pub(crate) fn expect_log_blocking(&self, parts: &[&str]) {
        let start = Instant::now();
        while !self.logged(parts) {
            assert!(
                start.elapsed() < SOON,
                "no log line with {parts:?}:\n{}",
                self.whole_log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until one line of the log has all of `parts`.
    pub(crate) async fn expect_log(&self, parts: &[&str]) {
        let start = Instant::now();
        while !self.logged(parts) {
            assert!(
                start.elapsed() < SOON,
                "no log line with {parts:?}:\n{}",
                self.whole_log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn whole_log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    /// The largest resident memory over a time.
    pub(crate) async fn peak_over(&self, time: Duration) -> u64 {
        let (start, mut peak) = (Instant::now(), 0);
        while start.elapsed() < time {
            peak = peak.max(self.resident());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        peak
    }

    /// The sum of a metric over all its labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let mut admin = soon("the admin endpoint", TcpStream::connect(self.admin))
            .await
            .unwrap();
        let request = "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
        admin.write_all(request.as_bytes()).await.unwrap();
        let (answer, _) = read_to_end(&mut admin).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        answer
            .lines()
            .filter(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
            })
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    /// Waits until a metric is as wanted.
    pub(crate) async fn expect_metric(&self, name: &str, wanted: impl Fn(f64) -> bool) {
        let start = Instant::now();
        loop {
            let value = self.metric(name).await;
            if wanted(value) {
                return;
            }
            assert!(start.elapsed() < SOON, "{name} stays at {value}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The process lives, and a peer that keeps to the protocol is served.
    pub(crate) async fn expect_good(&mut self, site: &Site) {
        let ended = self.child.try_wait().unwrap();
        assert!(
            ended.is_none(),
            "the gateway ended: {ended:?}\n{}",
            self.whole_log()
        );
        let mut peer = Peer::good(self, site).await;
        let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
        let sent = channel
            .send(&peer, b"are you well?", DataFlags::default())
            .await;
        let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
        let mut got = vec![0; sent];
        soon("the bytes", socket.read_exact(&mut got))
            .await
            .unwrap();
        assert_eq!(got, b"are you well?");
        let no = channel.no;
        peer.hear(|message| matches!(message, Control::Ack { channel, next_seq: 1, .. } if *channel == no))
            .await;
        peer.say(Control::Close {
            migration: channel.migration,
        })
        .await;
        assert!(!self.logged(&["panicked"]), "{}", self.whole_log());
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the gateway's log:\n{}", self.whole_log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody listens at, and that no other gateway of this process was given.
fn free_tcp() -> SocketAddr {
    static GIVEN: Mutex<Vec<SocketAddr>> = Mutex::new(Vec::new());
    loop {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut given = GIVEN.lock().unwrap();
        if !given.contains(&address) {
            given.push(address);
            return address;
        }
    }
}

/// Reads a target's connection to its end. False: it was reset.
pub(crate) async fn read_to_end(socket: &mut TcpStream) -> (Vec<u8>, bool) {
    let (mut bytes, mut buf) = (Vec::new(), [0; 4096]);
    loop {
        match soon("the end of a connection", socket.read(&mut buf)).await {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend_from_slice(&buf[..count]),
            Err(_) => return (bytes, false),
        }
    }
}
