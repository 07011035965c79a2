//! Two gateways that send to each other, and guests made of sockets.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use skyferry::pki;
use skyferry_core::qemu::synthetic::SyntheticStream;

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);
/// Pages of a guest's RAM.
const PAGES: u64 = 6000;

/// A guest of 23 MiB, a third of it zeroes, that goes over in so many rounds.
pub(crate) fn guest(rounds: u32) -> SyntheticStream {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", PAGES)])
        .rounds(rounds)
        .zero_percent(33)
        .repeated_percent(0)
        .random_percent(30)
        .return_path(false)
        .build()
}

/// The guest works: one of so many pages changes a little.
pub(crate) fn worked(guest: &mut SyntheticStream, of: usize) {
    let pages = guest.records.iter().filter(|record| !record.zero);
    for record in pages.step_by(of) {
        let end = record.at + record.len;
        for byte in &mut guest.bytes[end - 1000..end - 980] {
            *byte ^= 0x5a;
        }
    }
}

/// Bytes of the guest's pages that are not zero.
pub(crate) fn non_zero_bytes(guest: &SyntheticStream) -> u64 {
    guest.records.iter().filter(|record| !record.zero).count() as u64 * 4096
}

/// One site's addresses.
struct Site {
    name: &'static str,
    wan: SocketAddr,
    ingress: SocketAddr,
    admin: SocketAddr,
    /// Where guests arrive.
    target: TcpListener,
}

/// Both sites, with all their files in one folder.
pub(crate) struct Sites {
    dir: tempfile::TempDir,
    sites: [Site; 2],
}

/// A running gateway.
pub(crate) struct Gateway {
    child: Child,
    site: usize,
    log: PathBuf,
}

impl Sites {
    /// Sites whose gateways have these further lines in `[store]`. `{name}` becomes the gateway's.
    pub(crate) fn new(store: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
        let sites = ["edge-a", "edge-b"].map(|name| {
            pki::issue(dir.path(), name, &[], pki::LEAF_DAYS).unwrap();
            Site {
                name,
                wan: free(UdpSocket::bind),
                ingress: free(TcpListener::bind),
                admin: free(TcpListener::bind),
                target: TcpListener::bind("127.0.0.1:0").unwrap(),
            }
        });
        fs::write(dir.path().join("store.key"), "a key of the store's own").unwrap();
        for (own, other) in [(0, 1), (1, 0)] {
            let (own, other) = (&sites[own], &sites[other]);
            let name = own.name;
            let config = format!(
                "[gateway]\nname = \"{name}\"\n[wan]\nlisten = \"{}\"\n\
                 [tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\nkey = \"{name}.key\"\n\
                 [[tenant]]\nname = \"default\"\nsecret_file = \"tenant.key\"\n\
                 [admin]\nlisten = \"{}\"\n[store]\nmemory = \"64MiB\"\n{}\n\
                 [[peer]]\nname = \"{}\"\naddress = \"{}\"\n\
                 [[ingress]]\nlisten = \"{}\"\npeer = \"{}\"\ntarget = \"{}\"\n\
                 allow_no_return_path = true\n\
                 [[egress]]\npeer = \"{}\"\nallow = [\"{}\"]\n",
                own.wan,
                own.admin,
                store.replace("{name}", name),
                other.name,
                other.wan,
                own.ingress,
                other.name,
                other.target.local_addr().unwrap(),
                other.name,
                own.target.local_addr().unwrap(),
            );
            fs::write(dir.path().join(format!("{name}.toml")), config).unwrap();
        }
        Self { dir, sites }
    }

    /// A file or folder of the gateways.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until a gateway has logged this.
    pub(crate) fn expect_log(&self, gateway: &Gateway, words: &str) {
        let start = Instant::now();
        loop {
            let log = fs::read_to_string(&gateway.log).unwrap();
            if log.contains(words) {
                return;
            }
            assert!(start.elapsed() < LIMIT, "{words:?} is not in\n{log}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(&self, site: usize) -> Gateway {
        let name = self.sites[site].name;
        let log = self.dir.path().join(format!("{name}.log"));
        let child = Command::new(env!("CARGO_BIN_EXE_skyferry"))
            .args(["gateway", "--config", &format!("{name}.toml")])
            .current_dir(self.dir.path())
            .env_remove("SKYFERRY_LOG")
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Gateway { child, site, log }
    }

    /// Starts both and waits until their links stand.
    pub(crate) fn start_both(&self) -> (Gateway, Gateway) {
        let (a, b) = (self.start(0), self.start(1));
        for gateway in [&a, &b] {
            self.wait_for(gateway, "skyferry_link_up", |up| up >= 2);
        }
        (a, b)
    }

    /// Empties the store of a gateway that is stopped.
    pub(crate) fn purge(&self, name: &str) {
        let purged = Command::new(env!("CARGO_BIN_EXE_skyferry"))
            .args(["store", "purge", "--all", "--yes", "--config"])
            .arg(format!("{name}.toml"))
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        assert!(purged.status.success(), "{purged:?}");
    }

    /// Starts a gateway that was stopped and waits until its links to `other` stand.
    pub(crate) fn start_again(&self, other: &Gateway, name: &str) -> Gateway {
        let site = self.sites.iter().position(|site| site.name == name);
        let gateway = self.start(site.unwrap());
        for gateway in [&gateway, other] {
            self.wait_for(gateway, "skyferry_link_up", |up| up >= 2);
        }
        gateway
    }

    /// The sum of a metric over all its labels; `None` while the gateway does not answer.
    pub(crate) fn metric(&self, gateway: &Gateway, name: &str) -> Option<u64> {
        let mut admin = TcpStream::connect(self.sites[gateway.site].admin).ok()?;
        admin
            .write_all(b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n")
            .ok()?;
        let mut answer = String::new();
        admin.read_to_string(&mut answer).ok()?;
        let of_name = answer.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let values = of_name.map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Some(values.sum::<Option<f64>>()? as u64)
    }

    /// Waits until a metric is as wanted.
    pub(crate) fn wait_for(&self, gateway: &Gateway, name: &str, wanted: impl Fn(u64) -> bool) {
        let start = Instant::now();
        loop {
            let value = self.metric(gateway, name);
            if value.is_some_and(&wanted) {
                return;
            }
            let log = || fs::read_to_string(&gateway.log).unwrap();
            assert!(start.elapsed() < LIMIT, "{name} is {value:?}:\n{}", log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// All that a gateway has sent and received on its links, overheads included.
    fn link_bytes(&self, gateway: &Gateway) -> u64 {
        let both = [
            "skyferry_link_sent_bytes_total",
            "skyferry_link_received_bytes_total",
        ];
        let bytes = both.map(|name| self.metric(gateway, name).unwrap());
        bytes.iter().sum()
    }

    /// Carries a guest's stream from one site to the other, which must get all of it; returns the
    /// bytes that crossed the link meanwhile in both directions, overheads included.
    pub(crate) fn carry(&self, from: &Gateway, to: &Gateway, stream: &[u8]) -> u64 {
        let before = self.link_bytes(from);
        let done = self
            .metric(from, "skyferry_migrations_finished_total")
            .unwrap();
        let target = self.sites[to.site].target.try_clone().unwrap();
        let arrives = thread::spawn(move || {
            let (mut socket, _) = target.accept().unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            let mut got = Vec::new();
            socket.read_to_end(&mut got).unwrap();
            got
        });
        let mut source = TcpStream::connect(self.sites[from.site].ingress).unwrap();
        source.write_all(stream).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let got = arrives.join().unwrap();
        assert!(got == stream, "{} bytes of {}", got.len(), stream.len());
        drop(source);
        let finished = |now| now > done;
        self.wait_for(from, "skyferry_migrations_finished_total", finished);
        self.link_bytes(from) - before
    }
}

impl Gateway {
    /// Ends it in order.
    pub(crate) fn stop(mut self) {
        let pid = self.child.id().to_string();
        let told = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(told.success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nobody has, below the ports that the kernel gives out: a gateway that is started again must
/// find it free.
fn free<T>(bind: impl Fn(SocketAddr) -> std::io::Result<T>) -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000;
    let start = std::process::id().wrapping_mul(7919);
    loop {
        let next = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + next % COUNT).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if bind(address).is_ok() {
            return address;
        }
    }
}
