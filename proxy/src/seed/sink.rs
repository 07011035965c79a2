//! Where pages go: to the gateway that has the store open, or into the store itself.

use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use skyferry_dedup::disk::{DiskOptions, DiskStore, OpenError, OpenErrorKind};
use skyferry_dedup::{DomainKey, SeedCounts, SeedError, Seeder, StoreId};

use super::socket;
use super::wire::{MAX_REPLY, Reply, Request, VERSION, WireError, frame_length};
use crate::config::DiskConfig;

/// Frames of pages that may wait for their answers: enough that the gateway never waits for the next one.
const MAX_UNANSWERED: usize = 4;

/// How long a gateway may be silent: longer than it waits for its disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(90);

/// Why pages could not be handed over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// No gateway runs, and the store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store is in use, and not by a gateway that takes pages.
    #[error("the store is in use, by no gateway that takes pages: {0}")]
    InUse(OpenError),
    /// The folder belongs to somebody else, who could not use what this user writes to it.
    #[error(
        "no gateway runs, and the store's folder belongs to user {owner}: run this as that user, or \
         start the gateway"
    )]
    Owner {
        /// The folder's user id.
        owner: u32,
    },
    /// Nobody could read what was stored.
    #[error(
        "no gateway runs, and the store has no key of its own: it would be deleted at the gateway's next \
         start; set store.key_file, or start the gateway"
    )]
    NoKey,
    /// The disk of the store that was opened here.
    #[error(transparent)]
    Disk(#[from] SeedError),
    /// The gateway's answer.
    #[error("the gateway: {0}")]
    Refused(String),
    /// The socket.
    #[error("the gateway's socket: {0}")]
    Socket(#[from] io::Error),
    /// The gateway speaks another protocol.
    #[error(
        "the gateway answered what this program does not understand ({0}): are both of one version?"
    )]
    Wire(#[from] WireError),
    /// As above, with a frame that does not belong there.
    #[error("the gateway answered out of order")]
    Order,
}

/// Whose pages they are, and where they go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address<'a> {
    pub(super) store: &'a DiskConfig,
    pub(super) tenant: &'a str,
    pub(super) key: &'a DomainKey,
}

/// Takes pages.
pub(super) struct Sink {
    way: Way,
    /// The store in which they end up.
    pub(super) store: StoreId,
    /// Bytes that its files may take.
    pub(super) capacity_bytes: u64,
    /// What became of the pages so far.
    pub(super) counts: SeedCounts,
}

enum Way {
    Gateway(Client),
    Own(Box<Own>),
}

struct Client {
    stream: UnixStream,
    unanswered: usize,
    frame: Vec<u8>,
}

struct Own {
    store: DiskStore,
    seeder: Seeder,
}

impl Sink {
    /// The gateway, if one runs on that store; else the store, which nobody else can open until the sink
    /// is dropped.
    ///
    /// # Errors
    /// When neither takes pages.
    pub(super) fn open(address: Address<'_>) -> Result<Self, SinkError> {
        if let Some(stream) = socket::connect(&address.store.path)? {
            return Self::greet(stream, address);
        }
        if address.store.key.is_ephemeral() {
            return Err(SinkError::NoKey);
        }
        // A folder that does not exist yet is made, and is this user's.
        if let Ok(folder) = address.store.path.metadata() {
            let owner = folder.uid();
            if owner != rustix::process::geteuid().as_raw() {
                return Err(SinkError::Owner { owner });
            }
        }
        let options = DiskOptions {
            ttl: Some(address.store.ttl),
            ..DiskOptions::new(&address.store.path, address.store.size_bytes)
        };
        match DiskStore::open(options, &address.store.key) {
            Ok(store) => Ok(Self {
                store: store.id(),
                capacity_bytes: store.disk_stats().capacity_bytes,
                way: Way::Own(Box::new(Own {
                    store,
                    seeder: Seeder::new(address.key),
                })),
                counts: SeedCounts::default(),
            }),
            Err(error) if matches!(error.kind, OpenErrorKind::Locked) => {
                // A gateway may have come up in this moment.
                match socket::connect(&address.store.path)? {
                    Some(stream) => Self::greet(stream, address),
                    None => Err(SinkError::InUse(error)),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    fn greet(stream: UnixStream, address: Address<'_>) -> Result<Self, SinkError> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut client = Client {
            stream,
            unanswered: 0,
            frame: Vec::new(),
        };
        client.say(&Request::Hello {
            version: VERSION,
            tenant: address.tenant,
            domain: address.key.id(),
        })?;
        match client.hear()? {
            Reply::Welcome {
                store,
                capacity_bytes,
            } => Ok(Self {
                way: Way::Gateway(client),
                store,
                capacity_bytes,
                counts: SeedCounts::default(),
            }),
            _ => Err(SinkError::Order),
        }
    }

    /// Whether a gateway takes the pages.
    pub(super) fn is_gateway(&self) -> bool {
        matches!(self.way, Way::Gateway(_))
    }

    /// Hands whole pages over, at most [`MAX_PAGES_BYTES`](super::wire::MAX_PAGES_BYTES). They are counted
    /// with this call or a later one, with [`settle`](Self::settle) at the latest.
    ///
    /// # Errors
    /// When they were not taken, or earlier ones.
    pub(super) fn put(&mut self, pages: &[u8]) -> Result<(), SinkError> {
        match &mut self.way {
            Way::Own(own) => self.counts += own.seeder.put(&own.store, pages)?,
            Way::Gateway(client) => {
                if client.unanswered >= MAX_UNANSWERED {
                    self.counts += client.hear_taken()?;
                }
                client.say(&Request::Pages(pages))?;
                client.unanswered += 1;
            }
        }
        Ok(())
    }

    /// Waits until all that was handed over is written. Returns the bytes that the store takes now.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn settle(&mut self) -> Result<u64, SinkError> {
        match &mut self.way {
            Way::Own(own) => {
                own.seeder.settle(&own.store)?;
                Ok(own.store.disk_stats().bytes)
            }
            Way::Gateway(client) => {
                client.say(&Request::Flush)?;
                while client.unanswered > 0 {
                    self.counts += client.hear_taken()?;
                }
                match client.hear()? {
                    Reply::Flushed { used_bytes } => Ok(used_bytes),
                    _ => Err(SinkError::Order),
                }
            }
        }
    }
}

impl Client {
    fn say(&mut self, request: &Request<'_>) -> Result<(), SinkError> {
        self.frame.clear();
        request.encode(&mut self.frame);
        match self.stream.write_all(&self.frame) {
            Ok(()) => Ok(()),
            // Its last words say why it has closed.
            Err(error) => loop {
                match self.hear() {
                    Ok(_) => {}
                    Err(SinkError::Refused(text)) => return Err(SinkError::Refused(text)),
                    Err(_) => return Err(error.into()),
                }
            },
        }
    }

    fn hear_taken(&mut self) -> Result<SeedCounts, SinkError> {
        match self.hear()? {
            Reply::Taken(counts) => {
                self.unanswered -= 1;
                Ok(counts)
            }
            _ => Err(SinkError::Order),
        }
    }

    fn hear(&mut self) -> Result<Reply, SinkError> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).map_err(closed)?;
        let mut frame = vec![0; frame_length(head, MAX_REPLY)?];
        self.stream.read_exact(&mut frame).map_err(closed)?;
        match Reply::decode(&frame)? {
            Reply::Refused(text) => Err(SinkError::Refused(text)),
            reply => Ok(reply),
        }
    }
}

/// What a failed read from the gateway means.
fn closed(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(
            error.kind(),
            "the gateway has ended or closed the connection",
        ),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => io::Error::new(
            error.kind(),
            format!("no answer for {} s", ANSWER_LIMIT.as_secs()),
        ),
        _ => error,
    }
}
