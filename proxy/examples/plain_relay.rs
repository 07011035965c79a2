//! What the gateways' transport alone takes: a pair of relays that copy TCP connections over it and do nothing
//! else. The benchmarks measure the gateways against it.
//!
//! ```text
//! plain_relay near EDGE-A.CRT-FOLDER LISTEN(tcp) PEER(udp)
//! plain_relay far  EDGE-B.CRT-FOLDER LISTEN(udp) TARGET(tcp)
//! ```
//!
//! The folder is one that `skyferry pki` has made, with the certificates of `edge-a` and `edge-b`.

use std::error::Error;
use std::net::SocketAddr;
use std::path::Path;

use quinn::{RecvStream, SendStream};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use skyferry::transport::{Identity, LinkEndpoint, TransportSettings};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const NEAR: &str = "edge-a";
const FAR: &str = "edge-b";
/// Bytes copied at once, as the gateway reads them.
const COPY_BYTES: usize = 256 << 10;
/// What the gateway asks the kernel for.
const SOCKET_BUFFER: usize = 8 << 20;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [role, folder, listen, to] = arguments.as_slice() else {
        return Err("usage: plain_relay near|far FOLDER LISTEN TO".into());
    };
    let (folder, listen, to) = (Path::new(folder), listen.parse()?, to.parse()?);
    match role.as_str() {
        "near" => near(&identity(folder, NEAR)?, listen, to).await,
        "far" => far(&identity(folder, FAR)?, listen, to).await,
        other => Err(format!("{other} is neither near nor far").into()),
    }
}

fn identity(folder: &Path, name: &str) -> Result<Identity> {
    let mut authorities = RootCertStore::empty();
    authorities.add(CertificateDer::from_pem_file(folder.join("ca.pem"))?)?;
    let chain = CertificateDer::pem_file_iter(folder.join(format!("{name}.pem")))?
        .collect::<std::result::Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join(format!("{name}.key")))?;
    Ok(Identity {
        authorities,
        chain,
        key,
    })
}

async fn near(identity: &Identity, listen: SocketAddr, peer: SocketAddr) -> Result<()> {
    let own = SocketAddr::new(peer.ip(), 0);
    let endpoint = LinkEndpoint::bind(own, SOCKET_BUFFER, identity, &TransportSettings::default())?;
    let connection = endpoint.connect(peer, FAR)?.await?;
    let listener = TcpListener::bind(listen).await?;
    eprintln!("listening on {listen}");
    loop {
        let (socket, _) = listener.accept().await?;
        let (send, recv) = connection.open_bi().await?;
        tokio::spawn(copy_both(socket, send, recv));
    }
}

async fn far(identity: &Identity, listen: SocketAddr, target: SocketAddr) -> Result<()> {
    let settings = TransportSettings::default();
    let endpoint = LinkEndpoint::bind(listen, SOCKET_BUFFER, identity, &settings)?;
    eprintln!("listening on {listen}");
    let incoming = endpoint.accept().await.ok_or("the endpoint is closed")?;
    let connection = incoming.await?;
    loop {
        let (send, recv) = connection.accept_bi().await?;
        let socket = TcpStream::connect(target).await?;
        tokio::spawn(copy_both(socket, send, recv));
    }
}

/// Until both directions have ended. An error ends the connection, as the benchmark will see.
async fn copy_both(socket: TcpStream, send: SendStream, recv: RecvStream) {
    let (from_socket, to_socket) = socket.into_split();
    let there = async move {
        let mut send = send;
        copy(from_socket, &mut send).await?;
        Ok(send.finish()?)
    };
    let back = async move {
        let mut to_socket = to_socket;
        copy(recv, &mut to_socket).await?;
        Ok(to_socket.shutdown().await?)
    };
    let ended: Result<((), ())> = tokio::try_join!(there, back);
    if let Err(error) = ended {
        eprintln!("connection ended: {error}");
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWriteExt + Unpin),
) -> Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length]).await?;
    }
}
