//! Sockets on the hypervisor's side: TCP or unix, with small buffers.

use std::{
    io,
    mem::MaybeUninit,
    net::{Shutdown, SocketAddr},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::BufMut as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, SockRef, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tracing::warn;

use crate::config::{Egress, Endpoint, Host, HostPort, ListenAddress};

/// Kernel buffers asked for on the hypervisor's side (the kernel doubles the figure). What lies in
/// them counts as sent for the hypervisor, so they are small; they still hold several milliseconds
/// at 1 Gbit/s.
const SOCKET_BUFFER: usize = 128 << 10;

/// Connections that may wait to be accepted: QEMU opens one for each of at most 255 multifd
/// channels.
const BACKLOG: i32 = 512;

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn raw(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Unix(stream) => SockRef::from(stream),
        }
    }

    /// Waits until there is something to read, the end included.
    pub(super) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.readable().await,
            Self::Unix(stream) => stream.readable().await,
        }
    }

    /// Reads up to `limit` bytes behind what `buf` holds, without waiting.
    pub(super) fn try_read(&self, buf: &mut Vec<u8>, limit: usize) -> io::Result<usize> {
        let mut space = buf.limit(limit);
        match self {
            Self::Tcp(stream) => stream.try_read_buf(&mut space),
            Self::Unix(stream) => stream.try_read_buf(&mut space),
        }
    }

    /// Whether nothing waits to be read at this moment.
    ///
    /// # Errors
    /// A failure of the connection. The kernel reports it once: after this a read gives an end in
    /// order.
    pub(super) fn is_drained(&self) -> io::Result<bool> {
        let mut byte = [MaybeUninit::uninit(); 1];
        match self.raw().peek(&mut byte) {
            Ok(_) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// Whether the other side has closed the connection or its sending side, in order or not, whatever is
    /// left to read.
    pub(super) fn has_left(&self) -> bool {
        use PollFlags as P;
        let asked = P::RDHUP;
        self.poll(asked)
            .intersects(P::RDHUP | P::HUP | P::ERR | P::NVAL)
    }

    /// Whether all that was written has left this machine's queue, at this moment: on TCP the other side's
    /// kernel has it, on a unix socket its reader.
    pub(super) fn is_sent(&self) -> bool {
        self.unsent() == 0
    }

    /// How much has not, as the kernel counts it. A connection that is lost has nothing to send.
    #[expect(unsafe_code, reason = "a question that libc has no safe function for")]
    pub(super) fn unsent(&self) -> usize {
        let raw = self.raw();
        let mut waiting: libc::c_int = 0;
        // SAFETY: asks an open socket, and writes one int.
        let asked = unsafe { libc::ioctl(raw.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
        let lost = asked != 0 || self.poll(PollFlags::empty()).contains(PollFlags::ERR);
        usize::try_from(waiting).ok().filter(|_| !lost).unwrap_or(0)
    }

    /// The failure of a connection on which nothing can be sent any more, as far as that has shown. Not to be
    /// asked of one whose sending side has been ended.
    pub(super) fn broken(&self) -> Option<io::Error> {
        let seen = self.poll(PollFlags::empty());
        if !seen.intersects(PollFlags::ERR | PollFlags::HUP) {
            return None;
        }
        let error = self.raw().take_error().ok().flatten();
        Some(error.unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()))
    }

    /// What holds of these and of `HUP` and `ERR` at this moment.
    fn poll(&self, asked: PollFlags) -> PollFlags {
        let raw = self.raw();
        let mut polled = [PollFd::new(&*raw, asked)];
        // Does not wait; can fail only for want of memory in the kernel, and says nothing then.
        let _ = poll(&mut polled, Some(&Timespec::default()));
        polled[0].revents()
    }

    /// Writes all of `bytes`.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Self::Tcp(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
                Self::Unix(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Half-closes: the other side reads an end.
    pub(super) fn end_writing(&self) -> io::Result<()> {
        self.raw().shutdown(Shutdown::Write)
    }

    /// Makes the coming close a reset, so that the other side sees a failure and not an end. On a
    /// unix socket a close is all there is.
    pub(super) fn reset_on_close(&self) {
        if let Self::Tcp(stream) = self {
            // Best effort: without it the close is an orderly one, which VMMs take for a failure too.
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// Closes the connection as a reset.
    pub(super) fn reset(self) {
        self.reset_on_close();
    }
}

/// Whether a connection failed because its other end closed or reset it. Any other failure, such as
/// a time-out, is the network's, and the other end may know nothing of it.
pub(super) fn ended_by_its_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::WriteZero
    )
}

/// Where hypervisors connect to.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix {
        /// Removed before the listener closes: behind that it looks like one of a dead process.
        _file: SocketFile,
        listener: UnixListener,
    },
}

impl Listener {
    /// Starts to listen. A unix socket left behind by a process that is gone is replaced.
    pub(super) fn bind(address: &ListenAddress) -> io::Result<Self> {
        match address {
            ListenAddress::Tcp(address) => {
                let socket = tcp_socket(*address)?;
                socket.set_reuse_address(true)?;
                socket.bind(&(*address).into())?;
                socket.listen(BACKLOG)?;
                TcpListener::from_std(socket.into()).map(Self::Tcp)
            }
            ListenAddress::Unix(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path)?;
                let file = SocketFile::new(path)?;
                // Inherited by the sockets that are accepted.
                SockRef::from(&listener).set_recv_buffer_size(SOCKET_BUFFER)?;
                Ok(Self::Unix {
                    _file: file,
                    listener,
                })
            }
        }
    }

    /// Waits for the next connection.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                // A peer that is gone without a word is noticed some day.
                SockRef::from(&stream).set_keepalive(true)?;
                Ok(Socket::Tcp(stream))
            }
            Self::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                SockRef::from(&stream).set_recv_buffer_size(SOCKET_BUFFER)?;
                Ok(Socket::Unix(stream))
            }
        }
    }
}

/// The file of a unix socket that this process has made; removed when the listener closes.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and number by which the file is known: another process may have put its own there since.
    id: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let id = file_id(&path)?;
        Ok(Self { path, id })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !file_id(&self.path).is_ok_and(|id| id == self.id) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "a socket is left behind");
        }
    }
}

/// What tells a file from any other that exists now.
fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

fn tcp_socket(address: SocketAddr) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    Ok(socket)
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err_and(refused) {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Why a target was not reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("{0} is not on the allow list for this peer")]
    NotAllowed(String),
    #[error("cannot connect to {target}: {source}")]
    Unreachable {
        target: String,
        #[source]
        source: io::Error,
    },
    #[error("{target} did not answer within {timeout:?}")]
    TimedOut { target: String, timeout: Duration },
}

/// Connects to a target that `egress` allows.
pub(super) async fn dial(target: &Endpoint, egress: &Egress) -> Result<Socket, DialError> {
    let unreachable = |source| DialError::Unreachable {
        target: target.to_string(),
        source,
    };
    let attempt = async {
        match target {
            Endpoint::Unix(path) => {
                if !egress.allows(target) {
                    return Err(DialError::NotAllowed(target.to_string()));
                }
                UnixStream::connect(path)
                    .await
                    .map(Socket::Unix)
                    .map_err(unreachable)
            }
            Endpoint::Tcp(HostPort { host, port }) => {
                let addresses: Vec<SocketAddr> = match host {
                    Host::Ip(ip) => vec![SocketAddr::new(*ip, *port)],
                    Host::Name(name) => tokio::net::lookup_host((name.as_str(), *port))
                        .await
                        .map_err(unreachable)?
                        .collect(),
                };
                dial_tcp(target, egress, &addresses).await
            }
        }
    };
    match tokio::time::timeout(egress.dial_timeout, attempt).await {
        Ok(result) => result,
        Err(_) => Err(DialError::TimedOut {
            target: target.to_string(),
            timeout: egress.dial_timeout,
        }),
    }
}

async fn dial_tcp(
    target: &Endpoint,
    egress: &Egress,
    addresses: &[SocketAddr],
) -> Result<Socket, DialError> {
    let named = egress.allows(target);
    let mut error = DialError::NotAllowed(target.to_string());
    for address in addresses
        .iter()
        .filter(|address| named || egress.allows_address(**address))
    {
        let connected = async {
            let socket = tcp_socket(*address)?;
            socket.set_send_buffer_size(SOCKET_BUFFER)?;
            let stream = tokio::net::TcpSocket::from_std_stream(socket.into())
                .connect(*address)
                .await?;
            stream.set_nodelay(true)?;
            // A destination that is gone without a word is noticed some day.
            SockRef::from(&stream).set_keepalive(true)?;
            Ok(Socket::Tcp(stream))
        };
        match connected.await {
            Ok(socket) => return Ok(socket),
            Err(source) => {
                error = DialError::Unreachable {
                    target: address.to_string(),
                    source,
                };
            }
        }
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Behind the commit byte a source is let go on a reset of the destination's own, and on nothing
    /// that a network says.
    #[test]
    fn a_network_that_fails_is_not_the_other_end() {
        use rustix::io::Errno;
        for errno in [Errno::CONNRESET, Errno::PIPE, Errno::NOTCONN] {
            assert!(ended_by_its_peer(&errno.into()), "{errno}");
        }
        for errno in [
            Errno::TIMEDOUT,
            Errno::HOSTUNREACH,
            Errno::NETUNREACH,
            Errno::NETDOWN,
            Errno::NOBUFS,
            Errno::NOMEM,
        ] {
            assert!(!ended_by_its_peer(&errno.into()), "{errno}");
        }
    }

    /// A source's end is seen behind bytes that nobody has read yet, and that bytes are still on their way.
    #[tokio::test]
    async fn what_cannot_be_read_or_written_now_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tcp_ours, tcp_theirs) = tcp_pair().await;
        for (ours, theirs) in [
            (Socket::Unix(ours), Socket::Unix(theirs)),
            (Socket::Tcp(tcp_ours), Socket::Tcp(tcp_theirs)),
        ] {
            assert!(ours.is_sent() && !ours.has_left());
            theirs.write_all(b"not read yet").await.unwrap();
            assert!(!ours.has_left());
            let full = async { while ours.write_all(&[0; 4096]).await.is_ok() {} };
            let filled = tokio::time::timeout(Duration::from_millis(300), full).await;
            assert!(filled.is_err() && !ours.is_sent());
            drop(theirs);
            tokio::time::sleep(Duration::from_millis(50)).await;
            // That a write would fail is to be seen by the write.
            assert!(ours.has_left() && ours.is_sent(), "{ours:?}");
        }
    }

    /// The file of a unix socket goes with its listener, unless it has become another's.
    #[tokio::test]
    async fn a_unix_socket_leaves_no_file_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let address = ListenAddress::Unix(path.clone());
        let listener = Listener::bind(&address).unwrap();
        assert!(path.exists());
        drop(listener);
        assert!(!path.exists());
        let listener = Listener::bind(&address).unwrap();
        std::fs::rename(&path, dir.path().join("ours.sock")).unwrap();
        let other = Listener::bind(&address).unwrap();
        drop(listener);
        assert!(path.exists(), "another's socket was removed");
        drop(other);
        assert!(!path.exists());
        // Gone already.
        let listener = Listener::bind(&address).unwrap();
        std::fs::remove_file(&path).unwrap();
        drop(listener);
    }

    async fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }
}
