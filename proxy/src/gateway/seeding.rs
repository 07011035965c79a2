//! Takes pages from `skyferry seed` while the gateway has the store open.
//!
//! Whoever may connect to the socket may put pages of any tenant of this gateway into its store. Only this
//! user and root may: by the rights of the file, and by what the kernel says of who has connected.

use std::{io, os::unix::net::UnixListener as StdListener, sync::Arc, time::Duration};

use skyferry_dedup::{DomainId, Seeder, TieredStore};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::spawn_blocking,
    time::timeout,
};
use tracing::{info, warn};

use super::Gateway;
use crate::seed::{
    socket,
    wire::{MAX_REQUEST, Reply, Request, VERSION, frame_length},
};

/// Seedings at once.
const MAX_SEEDINGS: usize = 4;
/// How long one that has connected may take to say who it is.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long the last word to one that is refused may take.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted: the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Makes the socket, where the store has a folder. That it cannot be made stops nothing else.
pub(super) fn bind(gateway: &Gateway) -> Option<UnixListener> {
    let disk = gateway.config.store.disk.as_ref()?;
    let bound = socket::bind(&disk.path).and_then(|listener: StdListener| {
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    });
    bound
        .inspect_err(|error| {
            warn!(folder = %disk.path.display(), %error, "no socket for `skyferry seed`");
        })
        .ok()
}

/// Removes the socket, before anybody else may open the store.
pub(super) fn unbind(gateway: &Gateway) {
    if let Some(disk) = &gateway.config.store.disk
        && let Err(error) = socket::unbind(&disk.path)
    {
        warn!(folder = %disk.path.display(), %error, "the socket for `skyferry seed` is left behind");
    }
}

/// Serves whoever connects.
pub(super) async fn run(gateway: Arc<Gateway>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(MAX_SEEDINGS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept a `skyferry seed`");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (gateway, place) = (gateway.clone(), places.clone().try_acquire_owned());
        tokio::spawn(async move {
            let mut client = Client {
                stream,
                frame: Vec::new(),
                reply: Vec::new(),
            };
            let result = match place {
                Err(_) => Err(Ending::Refused(format!(
                    "{MAX_SEEDINGS} seedings run already"
                ))),
                Ok(_place) => seed(&gateway, &mut client).await,
            };
            if let Err(Ending::Refused(reason)) = result {
                warn!(reason, "`skyferry seed` was refused");
                let reply = Reply::Refused(reason);
                let farewell = client.answer(&reply);
                // Whether it is heard or not, this ends.
                let _ = timeout(FAREWELL_LIMIT, farewell).await;
            }
        });
    }
}

/// Why a seeding ends.
enum Ending {
    /// It is told why.
    Refused(String),
    /// The connection has ended or failed.
    Gone,
}

impl From<io::Error> for Ending {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

struct Client {
    stream: UnixStream,
    frame: Vec<u8>,
    reply: Vec<u8>,
}

impl Client {
    /// Reads a frame into `frame`.
    async fn hear(&mut self) -> Result<(), Ending> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).await?;
        let length = frame_length(head, MAX_REQUEST).map_err(refused)?;
        self.frame.resize(length, 0);
        self.stream.read_exact(&mut self.frame).await?;
        Ok(())
    }

    async fn answer(&mut self, reply: &Reply) -> Result<(), Ending> {
        self.reply.clear();
        reply.encode(&mut self.reply);
        Ok(self.stream.write_all(&self.reply).await?)
    }
}

fn refused(reason: impl ToString) -> Ending {
    Ending::Refused(reason.to_string())
}

/// One connection, to its end.
async fn seed(gateway: &Gateway, client: &mut Client) -> Result<(), Ending> {
    let user = client.stream.peer_cred()?.uid();
    if user != 0 && user != rustix::process::geteuid().as_raw() {
        return Err(refused(format!(
            "user {user} may not put pages in this store"
        )));
    }
    let Some(tiers) = gateway.tiers.clone() else {
        return Err(refused("this gateway has no store on disk"));
    };
    let hello = timeout(HELLO_LIMIT, client.hear()).await;
    hello.map_err(|_| refused("nothing was said"))??;
    let (tenant, seeder) = greet(gateway, &client.frame)?;
    let disk = tiers.disk();
    let welcome = Reply::Welcome {
        store: disk.id(),
        capacity_bytes: disk.disk_stats().capacity_bytes,
    };
    client.answer(&welcome).await?;
    info!(tenant, "`skyferry seed` fills the store");
    let seeder = Arc::new(seeder);
    let mut pages = 0;
    let ended = loop {
        let served = tokio::select! {
            served = serve(gateway, &tiers, &seeder, client) => served,
            () = gateway.draining.cancelled() => Err(refused("the gateway stops")),
        };
        match served {
            Ok(more) => pages += more,
            Err(ended) => break ended,
        }
    };
    info!(tenant, pages, "`skyferry seed` has ended");
    Err(ended)
}

/// Who it is: its tenant's name, and what puts that tenant's pages into the store.
fn greet(gateway: &Gateway, frame: &[u8]) -> Result<(String, Seeder), Ending> {
    let Request::Hello {
        version,
        tenant,
        domain,
    } = Request::decode(frame).map_err(refused)?
    else {
        return Err(refused("the first word must be a hello"));
    };
    if version != VERSION {
        return Err(refused(format!(
            "it speaks version {VERSION} of the socket's protocol, `skyferry seed` {version}: both must be of \
             one version"
        )));
    }
    let key = gateway.domains.get(tenant).ok_or_else(|| {
        refused(format!(
            "it has no tenant \"{tenant}\"; was it started with this configuration?"
        ))
    })?;
    let ours: DomainId = key.id();
    if ours != domain {
        return Err(refused(format!(
            "tenant \"{tenant}\" has another secret there; was it started with this configuration?"
        )));
    }
    Ok((tenant.to_owned(), Seeder::new(key)))
}

/// Answers one request. Returns how many pages it brought.
async fn serve(
    gateway: &Gateway,
    tiers: &Arc<TieredStore>,
    seeder: &Arc<Seeder>,
    client: &mut Client,
) -> Result<u64, Ending> {
    client.hear().await?;
    let is_flush = match Request::decode(&client.frame).map_err(refused)? {
        Request::Hello { .. } => return Err(refused("a second hello")),
        Request::Pages(_) => false,
        Request::Flush => true,
    };
    let (tiers, seeder) = (tiers.clone(), seeder.clone());
    let frame = std::mem::take(&mut client.frame);
    // Hashing takes time, and the disk may be waited for.
    let work = move || {
        let disk = tiers.disk();
        let done = if is_flush {
            seeder.settle(disk).map(|()| Reply::Flushed {
                used_bytes: disk.disk_stats().bytes,
            })
        } else {
            seeder.put(disk, &frame[1..]).map(Reply::Taken)
        };
        (done, frame)
    };
    let (done, frame) = spawn_blocking(work).await.map_err(refused)?;
    client.frame = frame;
    let reply = done.map_err(refused)?;
    client.answer(&reply).await?;
    Ok(match reply {
        Reply::Taken(counts) => {
            gateway.metrics.store.observe_seeded(&counts);
            counts.pages()
        }
        _ => 0,
    })
}
