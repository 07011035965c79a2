//! A gateway process, and the other end of its link in the hands of a test.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener as StdListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quinn::{Connection, RecvStream, SendStream};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use skyferry::config::Config;
use skyferry::pki;
use skyferry::transport::{Identity, LinkEndpoint, TransportSettings, explain};
use skyferry::wire::control::{ChannelPosition, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, DataHeader, DataKind, InstanceId, MigrationId};
use skyferry_dedup::{ChannelEncoder, ChannelKind, DomainKey, EncodeOptions, Flush, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

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
/// The domain key of all channels here.
pub(crate) const DOMAIN: [u8; 32] = [7; 32];

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
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
        for name in ["edge-a", "edge-b", "edge-c"] {
            pki::issue(dir.path(), name, &[], pki::LEAF_DAYS).unwrap();
        }
        Self { dir }
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
            "[gateway]\nname = \"{name}\"\ndrain_timeout = \"{}s\"\n[wan]\nlisten = \"{wan}\"\n{wan_extra}\
             [tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\nkey = \"{name}.key\"\n\
             [store]\nmemory = \"16MiB\"\n{store_extra}\
             [admin]\nlisten = \"{admin}\"\n\
             [limits]\nmigrations = {migrations}\nchannels_per_migration = {MAX_CHANNELS}\n\
             in_flight = \"16MiB\"\n{extra}",
            DRAIN.as_secs()
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

/// An endpoint of the test's own.
pub(crate) fn endpoint(identity: &Identity) -> LinkEndpoint {
    endpoint_at("127.0.0.1", identity)
}

/// The same at another address of this machine.
pub(crate) fn endpoint_at(address: &str, identity: &Identity) -> LinkEndpoint {
    let address = format!("{address}:0").parse().unwrap();
    LinkEndpoint::bind(address, 256 << 10, identity, &TransportSettings::default()).unwrap()
}

/// A hello as a good gateway says it.
pub(crate) fn hello(name: &str, versions: (u16, u16), instance: InstanceId) -> Control {
    Control::Hello {
        version_min: versions.0,
        version_max: versions.1,
        instance,
        name: name.to_owned(),
        store_pages: 1024,
        receive_budget: 64 << 20,
        places: 1 << 20,
    }
}

/// One end of a connection, in the test's hands.
pub(crate) struct Peer {
    _endpoint: LinkEndpoint,
    pub(crate) quinn: Connection,
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
}

impl Peer {
    /// Connects to the far gateway and opens the control stream; says nothing.
    pub(crate) async fn connect(gateway: &Gateway, identity: &Identity) -> Result<Self, String> {
        let endpoint = endpoint(identity);
        let connecting = endpoint.connect(gateway.wan, "edge-b").unwrap();
        let quinn = soon("a handshake", connecting)
            .await
            .map_err(|e| explain(&e))?;
        let (send, recv) = quinn.open_bi().await.map_err(|e| explain(&e))?;
        Ok(Self {
            _endpoint: endpoint,
            quinn,
            send,
            recv,
        })
    }

    /// `edge-a`, greeted, in a new process as far as the gateway can tell.
    pub(crate) async fn good(gateway: &Gateway, site: &Site) -> Self {
        Self::with_instance(gateway, site, new_id()).await
    }

    /// `edge-a`, greeted.
    pub(crate) async fn with_instance(
        gateway: &Gateway,
        site: &Site,
        instance: InstanceId,
    ) -> Self {
        Self::back(gateway, site, instance, vec![]).await
    }

    /// A peer that has said hello and nothing else.
    pub(crate) async fn greeted(
        gateway: &Gateway,
        site: &Site,
        name: &str,
        instance: InstanceId,
    ) -> Self {
        let mut peer = Self::connect(gateway, &site.identity(name)).await.unwrap();
        peer.say(hello(name, (1, 1), instance)).await;
        peer.hear(|message| matches!(message, Control::Hello { .. }))
            .await;
        peer
    }

    /// The same process as `instance` on a new connection; it still has these migrations.
    pub(crate) async fn back(
        gateway: &Gateway,
        site: &Site,
        instance: InstanceId,
        migrations: Vec<MigrationId>,
    ) -> Self {
        let mut peer = Self::greeted(gateway, site, "edge-a", instance).await;
        peer.say(Control::Live { migrations }).await;
        peer
    }

    /// The connection is lost, and the gateway has noticed.
    pub(crate) async fn lose(self, gateway: &Gateway) {
        drop(self);
        gateway.expect_log(&["link from peer ended"]).await;
    }

    /// Resumes a migration, with channels at these positions. Returns whether it is known there, and
    /// where its channels stand.
    pub(crate) async fn resume(
        &mut self,
        migration: MigrationId,
        channels: Vec<ChannelPosition>,
    ) -> (bool, Vec<ChannelPosition>) {
        self.say(Control::Resume {
            migration,
            channels,
        })
        .await;
        let message = self.hear(|m| matches!(m, Control::Resumed { .. })).await;
        let Control::Resumed {
            migration: of,
            known,
            channels,
            ..
        } = message
        else {
            unreachable!()
        };
        assert_eq!(of, migration);
        (known, channels)
    }

    /// Waits for the next message of those that are `wanted`, up to where the gateway answers what is
    /// asked behind all messages so far. `None`: there was none.
    pub(crate) async fn hear_up_to_now(
        &mut self,
        wanted: impl Fn(&Control) -> bool,
    ) -> Option<Control> {
        const NOW: u64 = 4711;
        self.say(Control::Ping { nonce: NOW }).await;
        let answer = |m: &Control| matches!(m, Control::Pong { nonce: NOW, .. });
        let message = self.hear(|m| wanted(m) || answer(m)).await;
        (!answer(&message)).then_some(message)
    }

    /// Waits until the gateway asks for this side's clock, and says what it shows, until that is enough.
    pub(crate) async fn tell_clock(&mut self) {
        for _ in 0..2 {
            let question = self.hear(|m| matches!(m, Control::Ping { .. })).await;
            if let Control::Ping { nonce } = question {
                let clock = clock();
                self.say(Control::Pong { nonce, clock }).await;
            }
        }
    }

    /// Accepts a gateway that dials and takes its control stream and hello.
    pub(crate) async fn accept(endpoint: &LinkEndpoint, answer: &Control) -> Result<Self, String> {
        let incoming = soon("a dial", endpoint.accept()).await.unwrap();
        let quinn = soon("a handshake", incoming.accept().unwrap())
            .await
            .map_err(|e| explain(&e))?;
        let (mut send, recv) = quinn.accept_bi().await.map_err(|e| explain(&e))?;
        send.write_all(&encoded(answer))
            .await
            .map_err(|e| e.to_string())?;
        let mut peer = Self {
            _endpoint: endpoint.clone(),
            quinn,
            send,
            recv,
        };
        peer.hear(|message| matches!(message, Control::Hello { .. }))
            .await;
        Ok(peer)
    }

    /// Sends a message.
    pub(crate) async fn say(&mut self, message: Control) {
        self.raw(&encoded(&message)).await;
    }

    /// Sends bytes on the control stream. That the gateway may have closed it is no error.
    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        let _ = self.send.write_all(bytes).await;
    }

    /// Waits for a message and returns it; others are passed over.
    pub(crate) async fn hear(&mut self, wanted: impl Fn(&Control) -> bool) -> Control {
        soon("a message", async {
            loop {
                let message = self
                    .next()
                    .await
                    .unwrap_or_else(|e| panic!("no message: {e}"));
                if wanted(&message) {
                    return message;
                }
            }
        })
        .await
    }

    async fn next(&mut self) -> Result<Control, String> {
        let mut len = [0; 4];
        self.recv
            .read_exact(&mut len)
            .await
            .map_err(|e| format!("{e} {:?}", self.quinn.close_reason()))?;
        let mut body = vec![0; u32::from_le_bytes(len) as usize];
        self.recv
            .read_exact(&mut body)
            .await
            .map_err(|e| e.to_string())?;
        Control::decode(&body).map_err(|e| e.to_string())
    }

    /// Waits for the gateway to open the first channel of a migration, and says that it is.
    pub(crate) async fn take_open(&mut self) -> MigrationId {
        let message = self.hear(|m| matches!(m, Control::Open { .. })).await;
        let Control::Open { migration: id, .. } = message else {
            unreachable!()
        };
        self.say(Control::Opened {
            migration: id,
            channel: 0,
        })
        .await;
        id
    }

    /// Waits for a reset of the channel and returns why.
    pub(crate) async fn hear_reset(&mut self, id: MigrationId, no: u32) -> (ResetCode, String) {
        let message = self
            .hear(|message| {
                matches!(message, Control::Reset { migration, channel, .. }
                    if *migration == id && *channel == no)
            })
            .await;
        let Control::Reset { code, reason, .. } = message else {
            unreachable!()
        };
        (code, reason)
    }

    /// Waits until the gateway closes the connection and returns its words.
    pub(crate) async fn closed(&self) -> String {
        explain(&soon("a close", self.quinn.closed()).await)
    }

    /// Sends a data stream.
    pub(crate) async fn data(&self, header: [u8; 34], payload: &[u8]) {
        let mut stream = soon("a stream", self.quinn.open_uni()).await.unwrap();
        let _ = stream.write_all(&header).await;
        let _ = stream.write_all(payload).await;
        let _ = stream.finish();
    }

    /// Opens a channel to a listener of the test.
    pub(crate) async fn open_to_new_target(&mut self, kind: StreamKind) -> Channel {
        let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = target.local_addr().unwrap().to_string();
        let migration = MigrationId(new_id());
        self.say(open(migration, 0, kind, false, &address)).await;
        let kind = match kind {
            StreamKind::QemuMain => ChannelKind::QemuMain,
            StreamKind::Opaque => ChannelKind::Opaque,
        };
        Channel {
            migration,
            no: 0,
            target,
            encoder: encoder(kind),
            seq: 0,
        }
    }

    /// Opens a channel to a listener of the test, which gets these bytes and has been dialled for them.
    pub(crate) async fn open_and_send(&mut self, bytes: &[u8]) -> (Channel, TcpStream) {
        let mut channel = self.open_to_new_target(StreamKind::Opaque).await;
        channel.send(self, bytes, DataFlags::default()).await;
        let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
        let mut got = vec![0; bytes.len()];
        soon("the bytes", socket.read_exact(&mut got))
            .await
            .unwrap();
        assert_eq!(got, bytes);
        self.hear(|m| matches!(m, Control::Ack { next_seq: 1, .. }))
            .await;
        (channel, socket)
    }
}

/// The clock of the tests' gateways in microseconds.
pub(crate) fn clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_micros()).unwrap()
}

/// Another one each time.
fn new_id() -> [u8; 16] {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut id = [128; 16];
    id[..8].copy_from_slice(&COUNT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    id
}

/// A message as it goes on the wire.
pub(crate) fn encoded(message: &Control) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// An open message.
pub(crate) fn open(
    migration: MigrationId,
    channel: u32,
    kind: StreamKind,
    dial_now: bool,
    target: &str,
) -> Control {
    let target = target.to_owned();
    Control::Open {
        migration,
        channel,
        kind,
        dial_now,
        target,
        domain: DOMAIN,
    }
}

/// An encoder for a channel of these tests.
pub(crate) fn encoder(kind: ChannelKind) -> ChannelEncoder {
    ChannelEncoder::new(
        kind,
        &DomainKey::from_bytes(DOMAIN),
        EncodeOptions::default(),
    )
}

/// The header of a data stream.
pub(crate) fn header(
    kind: DataKind,
    flags: DataFlags,
    migration: MigrationId,
    seq: u64,
    len: u32,
) -> [u8; 34] {
    DataHeader {
        kind,
        flags,
        migration,
        channel: 0,
        seq,
        len,
    }
    .encode()
}

/// A channel of the test to a target of the test.
pub(crate) struct Channel {
    pub(crate) migration: MigrationId,
    pub(crate) no: u32,
    pub(crate) target: TcpListener,
    pub(crate) encoder: ChannelEncoder,
    pub(crate) seq: u64,
}

impl Channel {
    /// Sends bytes as the next frame; returns how many.
    pub(crate) async fn send(&mut self, peer: &Peer, bytes: &[u8], flags: DataFlags) -> usize {
        let frame = frame_of(&mut self.encoder, bytes);
        self.send_payload(peer, &frame.payload, flags).await;
        bytes.len()
    }

    /// Sends a payload as the next frame.
    pub(crate) async fn send_payload(&mut self, peer: &Peer, payload: &[u8], flags: DataFlags) {
        let len = u32::try_from(payload.len()).unwrap();
        let header = header(DataKind::Frame, flags, self.migration, self.seq, len);
        peer.data(header, payload).await;
        self.seq += 1;
    }

    /// Where the stream stands behind the frames made so far.
    pub(crate) fn position(&self, next_seq: u64) -> ChannelPosition {
        ChannelPosition {
            channel: self.no,
            next_seq,
        }
    }
}

/// One frame of these bytes.
pub(crate) fn frame_of(encoder: &mut ChannelEncoder, bytes: &[u8]) -> Frame {
    let mut rest = bytes;
    loop {
        let encoded = encoder.encode(rest, Flush::Hard, None, None).unwrap();
        rest = &rest[encoded.consumed..];
        if let Some(frame) = encoded.frame {
            assert!(rest.is_empty(), "one frame was to be enough");
            return frame;
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
