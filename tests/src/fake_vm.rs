//! Virtual machines that are not there: sockets that speak like a migration's source or destination.
//!
//! A real QEMU shows that migrations work; a fake one shows what exactly goes over its socket, and
//! does what no real one does: stops in the middle, closes at once, never answers, sends garbage.
//! Every [`FakeEnd`] reads all the time (at the pace it is told) and remembers what came and how it
//! ended, so that a test can look at any moment and never has to wait for longer than it says.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use socket2::SockRef;

use crate::process::POLL;
use crate::random::Random;

pub use migration::{FakeMigration, LIMIT, expect_state, expect_verdict, migrate, wait_finished};

mod migration;

/// How long a write may make no progress.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// How often a blocked read or write looks whether the connection is given up.
const LOOK: Duration = Duration::from_millis(20);
/// How long readers and writers may take to let go of a connection.
const LET_GO_LIMIT: Duration = Duration::from_secs(5);
/// Kernel buffers of a fake VM's sockets (the kernel doubles the figure): small, so that a test sees
/// what the gateways hold and not what the kernel does.
const SOCKET_BUFFER: usize = 64 << 10;
/// Bytes of one read or write.
const STEP: usize = 64 << 10;
/// How long a fixed address may stay taken: a child that is being started holds a copy of every
/// socket until it becomes another program.
const TAKEN_LIMIT: Duration = Duration::from_secs(3);
/// Reading at full speed.
const UNPACED: u64 = u64::MAX;

/// The end of a connection, as read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// In order.
    Closed,
    /// By a reset.
    Reset,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The same call on either kind of socket.
macro_rules! either {
    ($stream:expr, $socket:ident => $call:expr) => {
        match $stream {
            Stream::Tcp($socket) => $call,
            Stream::Unix($socket) => $call,
        }
    };
}

impl Stream {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, socket => { let mut socket = socket; socket.write(bytes) })
    }

    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        either!(self, socket => { let mut socket = socket; socket.read(bytes) })
    }

    fn shutdown(&self, how: Shutdown) {
        // A socket that the other side has reset can't be shut down once more.
        let _ = either!(self, socket => socket.shutdown(how));
    }
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    end: Option<End>,
}

#[derive(Debug)]
struct Shared {
    stream: Stream,
    seen: Mutex<Seen>,
    changed: Condvar,
    bytes_per_sec: AtomicU64,
    /// Readers and writers are to let go of the socket.
    given_up: AtomicBool,
    writing_ended: AtomicBool,
}

/// Whether a read or write has only taken too long, or was interrupted.
fn is_passing(error: &io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    fn send(&self, mut bytes: &[u8], sent: &AtomicU64) -> Result<()> {
        let mut patience = Instant::now() + WRITE_LIMIT;
        while !bytes.is_empty() {
            let left = bytes.len();
            match self.stream.write(&bytes[..left.min(STEP)]) {
                Ok(0) => bail!("the socket takes no more"),
                Ok(count) => {
                    sent.fetch_add(count as u64, Ordering::Relaxed);
                    bytes = &bytes[count..];
                    patience = Instant::now() + WRITE_LIMIT;
                }
                Err(error) if is_passing(&error) => {
                    ensure!(!self.is_given_up(), "given up, {left} bytes left");
                    let late = Instant::now() > patience;
                    ensure!(!late, "no progress in {WRITE_LIMIT:?}, {left} bytes left");
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("write, {left} bytes left"));
                }
            }
        }
        Ok(())
    }

    /// Whether a connection that reads an end was reset all the same: the kernel reports a reset
    /// once, and a write may have taken the report. Such a socket has no peer any more.
    fn was_reset(&self) -> bool {
        match &self.stream {
            Stream::Tcp(socket) => {
                !self.writing_ended.load(Ordering::Acquire) && socket.peer_addr().is_err()
            }
            Stream::Unix(_) => false,
        }
    }

    /// Reads at the pace that is set, until the end.
    fn read_all(&self) {
        let mut buf = vec![0; STEP];
        while !self.is_given_up() {
            let rate = self.bytes_per_sec.load(Ordering::Relaxed);
            if rate == 0 {
                thread::sleep(POLL);
                continue;
            }
            // A hundredth of a second's worth at a time.
            let step = usize::try_from(rate / 100).map_or(STEP, |step| step.clamp(1, STEP));
            let outcome = self.stream.read(&mut buf[..step]);
            let mut seen = self.seen();
            match outcome {
                Ok(0) if self.was_reset() => seen.end = Some(End::Reset),
                Ok(0) => seen.end = Some(End::Closed),
                Ok(count) => seen.bytes.extend_from_slice(&buf[..count]),
                Err(ref error) if is_passing(error) => {}
                Err(_) => seen.end = Some(End::Reset),
            }
            let ended = seen.end.is_some();
            drop(seen);
            self.changed.notify_all();
            if ended {
                return;
            }
            if rate != UNPACED
                && let Ok(count) = outcome
            {
                thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
            }
        }
    }
}

/// One end of a connection: a source that has connected, or a destination that was dialled.
///
/// Dropping it closes the connection in order.
pub struct FakeEnd {
    shared: Arc<Shared>,
}

impl fmt::Debug for FakeEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.shared.seen();
        write!(f, "{} bytes read, end: {:?}", seen.bytes.len(), seen.end)
    }
}

impl FakeEnd {
    /// Connects as a source does. `address` is written as in the configuration.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(address: &str) -> Result<Self> {
        let stream = match address.strip_prefix("unix:") {
            Some(path) => UnixStream::connect(path).map(Stream::Unix),
            None => TcpStream::connect(address).map(Stream::Tcp),
        };
        Self::new(stream.with_context(|| format!("connect to {address}"))?)
    }

    fn new(stream: Stream) -> Result<Self> {
        either!(&stream, socket => SockRef::from(socket).set_send_buffer_size(SOCKET_BUFFER))?;
        either!(&stream, socket => SockRef::from(socket).set_recv_buffer_size(SOCKET_BUFFER))?;
        either!(&stream, socket => socket.set_read_timeout(Some(LOOK)))?;
        either!(&stream, socket => socket.set_write_timeout(Some(LOOK)))?;
        if let Stream::Tcp(socket) = &stream {
            socket.set_nodelay(true)?;
        }
        let shared = Arc::new(Shared {
            stream,
            seen: Mutex::default(),
            changed: Condvar::new(),
            bytes_per_sec: AtomicU64::new(UNPACED),
            given_up: AtomicBool::new(false),
            writing_ended: AtomicBool::new(false),
        });
        let reader = shared.clone();
        thread::spawn(move || reader.read_all());
        Ok(Self { shared })
    }

    /// Sets how fast it reads from now on; 0 stops it.
    pub fn read_at(&self, bytes_per_sec: u64) {
        self.shared
            .bytes_per_sec
            .store(bytes_per_sec, Ordering::Relaxed);
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// When the connection is over, or the other side does not read for half a minute.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = AtomicU64::new(0);
        self.shared.send(bytes, &sent)
    }

    /// Writes all of `bytes` on a thread of its own.
    #[must_use]
    pub fn send_in_background(&self, bytes: Vec<u8>) -> Sending {
        let shared = self.shared.clone();
        let sent = Arc::new(AtomicU64::new(0));
        let counter = sent.clone();
        let thread = thread::spawn(move || shared.send(&bytes, &counter));
        Sending { thread, sent }
    }

    /// Half-closes: the other side reads an end.
    pub fn end_writing(&self) {
        self.shared.writing_ended.store(true, Ordering::Release);
        self.shared.stream.shutdown(Shutdown::Write);
    }

    /// Closes so that the other side reads a reset.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn reset(self) -> Result<()> {
        either!(&self.shared.stream, socket => {
            SockRef::from(socket).set_linger(Some(Duration::ZERO))
        })?;
        self.close()
    }

    /// Closes as a program does that ends, whatever is left to read: on TCP a reset is sent for that, and
    /// the sending side is not ended in order before.
    ///
    /// # Errors
    /// When a thread of this still holds the socket.
    pub fn close(self) -> Result<()> {
        self.shared.given_up.store(true, Ordering::Release);
        let end = Instant::now() + LET_GO_LIMIT;
        // Nothing goes out before the last of them has closed it.
        while Arc::strong_count(&self.shared) > 1 {
            ensure!(Instant::now() < end, "the socket is held");
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until what was sent over TCP has left this side's kernel; another socket's need not.
    ///
    /// # Errors
    /// When it has not after `limit`.
    pub fn wait_sent(&self, limit: Duration) -> Result<()> {
        let Stream::Tcp(socket) = &self.shared.stream else {
            return Ok(());
        };
        let end = Instant::now() + limit;
        while crate::sys::unsent(socket)? > 0 {
            ensure!(Instant::now() < end, "not sent within {limit:?}");
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Bytes read so far.
    #[must_use]
    pub fn received_len(&self) -> usize {
        self.shared.seen().bytes.len()
    }

    /// What has been read so far.
    #[must_use]
    pub fn received(&self) -> Vec<u8> {
        self.shared.seen().bytes.clone()
    }

    /// How the connection ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        self.shared.seen().end
    }

    /// Waits until at least `count` bytes have been read.
    ///
    /// # Errors
    /// When the connection ends before, or `limit` passes.
    pub fn wait_received(&self, count: usize, limit: Duration) -> Result<()> {
        let seen = self.wait(limit, |seen| {
            seen.bytes.len() >= count || seen.end.is_some()
        });
        let (len, end) = (seen.bytes.len(), seen.end);
        ensure!(
            len >= count,
            "{len} of {count} bytes read within {limit:?}, end: {end:?}"
        );
        Ok(())
    }

    /// Waits until the connection ends.
    ///
    /// # Errors
    /// When it still stands after `limit`.
    pub fn wait_end(&self, limit: Duration) -> Result<End> {
        let seen = self.wait(limit, |seen| seen.end.is_some());
        let len = seen.bytes.len();
        seen.end
            .with_context(|| format!("no end within {limit:?}, {len} bytes read"))
    }

    /// Makes sure that the connection stands and brings nothing for `time`.
    ///
    /// # Errors
    /// When it ends or something is read.
    pub fn expect_silence(&self, time: Duration) -> Result<()> {
        let before = self.received_len();
        let seen = self.wait(time, |seen| seen.bytes.len() > before || seen.end.is_some());
        let more = seen.bytes.len() - before;
        ensure!(
            more == 0 && seen.end.is_none(),
            "{more} bytes more, end: {:?}",
            seen.end
        );
        Ok(())
    }

    /// Makes sure that what was read is exactly `expected`, or a beginning of it.
    ///
    /// # Errors
    /// Says where the first difference is.
    pub fn expect_prefix_of(&self, expected: &[u8]) -> Result<()> {
        let seen = self.shared.seen();
        let differs = seen.bytes.iter().zip(expected).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "byte {differs:?} differs");
        let (len, most) = (seen.bytes.len(), expected.len());
        ensure!(len <= most, "{len} bytes of {most}");
        Ok(())
    }

    /// Makes sure that what was read is exactly `expected`.
    ///
    /// # Errors
    /// Says what is missing, or where the first difference is.
    pub fn expect_received(&self, expected: &[u8]) -> Result<()> {
        self.expect_prefix_of(expected)?;
        let (len, all) = (self.received_len(), expected.len());
        ensure!(len == all, "{len} bytes of {all}");
        Ok(())
    }

    fn wait(&self, limit: Duration, done: impl Fn(&Seen) -> bool) -> MutexGuard<'_, Seen> {
        let waited = self
            .shared
            .changed
            .wait_timeout_while(self.shared.seen(), limit, |seen| !done(seen));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for FakeEnd {
    fn drop(&mut self) {
        if !self.shared.given_up.swap(true, Ordering::AcqRel) {
            self.shared.stream.shutdown(Shutdown::Both);
        }
    }
}

/// A write under way.
#[derive(Debug)]
pub struct Sending {
    thread: thread::JoinHandle<Result<()>>,
    sent: Arc<AtomicU64>,
}

impl Sending {
    /// Bytes that the socket has taken so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the write failed, or still runs after `limit`.
    pub fn finish(self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !self.thread.is_finished() {
            let sent = self.sent();
            ensure!(
                Instant::now() < end,
                "write not done within {limit:?}, {sent} bytes sent"
            );
            thread::sleep(POLL);
        }
        match self.thread.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("the writing thread panicked"),
        }
    }
}

fn bind_when_free<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + TAKEN_LIMIT;
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(POLL);
            }
            outcome => return outcome,
        }
    }
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Where a fake destination waits to be dialled.
#[derive(Debug)]
pub struct FakeListener {
    listening: Listening,
}

impl FakeListener {
    /// Listens at an address written as in the configuration.
    ///
    /// # Errors
    /// When it is taken and stays so for three seconds.
    pub fn bind(address: &str) -> Result<Self> {
        let listening = match address.strip_prefix("unix:") {
            Some(path) => {
                let listener = bind_when_free(|| UnixListener::bind(path))?;
                listener.set_nonblocking(true)?;
                Listening::Unix(listener, path.into())
            }
            None => {
                let address: SocketAddr = address.parse()?;
                let listener = bind_when_free(|| TcpListener::bind(address))?;
                // Inherited by what is accepted, from the first packet on.
                SockRef::from(&listener).set_recv_buffer_size(SOCKET_BUFFER)?;
                listener.set_nonblocking(true)?;
                Listening::Tcp(listener)
            }
        };
        Ok(Self { listening })
    }

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// When the listener fails.
    pub fn poll(&self) -> Result<Option<FakeEnd>> {
        let accepted = match &self.listening {
            Listening::Tcp(listener) => listener.accept().map(|(socket, _)| Stream::Tcp(socket)),
            Listening::Unix(listener, _) => {
                listener.accept().map(|(socket, _)| Stream::Unix(socket))
            }
        };
        match accepted {
            Ok(stream) => {
                either!(&stream, socket => socket.set_nonblocking(false))?;
                FakeEnd::new(stream).map(Some)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits to be dialled.
    ///
    /// # Errors
    /// When nobody has dialled after `limit`.
    pub fn accept(&self, limit: Duration) -> Result<FakeEnd> {
        let end = Instant::now() + limit;
        loop {
            if let Some(accepted) = self.poll()? {
                return Ok(accepted);
            }
            ensure!(Instant::now() < end, "not dialled within {limit:?}");
            thread::sleep(POLL);
        }
    }

    /// Makes sure that nobody has dialled, after `time` more.
    ///
    /// # Errors
    /// When somebody has.
    pub fn expect_not_dialled(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if let Some(end) = self.poll()? {
                bail!("dialled; {end:?}");
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for FakeListener {
    fn drop(&mut self) {
        if let Listening::Unix(_, path) = &self.listening {
            // Its folder may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What a destination says on the return path when its guest runs (0) or can't: the message SHUT
/// (type, length, value; big-endian).
#[must_use]
pub fn shut(status: u32) -> Vec<u8> {
    [&[0, 1, 0, 4], status.to_be_bytes().as_slice()].concat()
}

/// What a destination answers to a PING on the return path.
#[must_use]
pub fn pong(value: u32) -> Vec<u8> {
    [&[0, 2, 0, 4], value.to_be_bytes().as_slice()].concat()
}

/// Bytes that no compressor can shrink; they follow from the seed alone.
#[must_use]
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.draw().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
