//! A hostile far gateway against the one that dials it.

use std::time::Duration;

use skyferry::transport::LinkEndpoint;
use skyferry::transport::tls::server_crypto;
use skyferry::wire::control::{ChannelPosition, MAX_MISSED, ResetCode};
use skyferry::wire::{Control, DataFlags, DataHeader, DataKind, MigrationId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::peer::{DOMAIN, Peer, endpoint, hello};
use crate::rig::{Gateway, MEMORY_ALLOWED, Site, read_to_end, soon};

const FAR: [u8; 16] = [1; 16];

/// A near gateway that dials this test.
pub(crate) struct Rig {
    _site: Site,
    acceptor: LinkEndpoint,
    pub(crate) gateway: Gateway,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(crate::rig::MAX_MIGRATIONS, None)
    }

    /// One whose gateway takes so many migrations, and whose end of the link has settings of its
    /// own.
    pub(crate) fn with(migrations: usize, transport: Option<quinn::TransportConfig>) -> Self {
        let site = Site::new();
        let identity = site.identity("edge-b");
        let acceptor = endpoint(&identity);
        if let Some(transport) = transport {
            let crypto = server_crypto(&identity).unwrap();
            let mut config = quinn::ServerConfig::with_crypto(crypto);
            config.transport_config(transport.into());
            acceptor.quinn().set_server_config(Some(config));
        }
        let address = acceptor.local_addr().unwrap();
        let gateway = Gateway::near_with_migrations(&site, address, migrations);
        Self {
            _site: site,
            acceptor,
            gateway,
        }
    }

    pub(crate) async fn accept(&self) -> Peer {
        Peer::accept(&self.acceptor, &hello("edge-b", (1, 1), FAR))
            .await
            .unwrap()
    }

    /// A source that has sent something, and the channel that was opened for it.
    async fn source(&self, peer: &mut Peer) -> (TcpStream, MigrationId, u32) {
        let mut source = soon("a connection", TcpStream::connect(self.gateway.ingress))
            .await
            .unwrap();
        source
            .write_all(b"not a migration, but carried")
            .await
            .unwrap();
        let message = peer
            .hear(|message| matches!(message, Control::Open { .. }))
            .await;
        let Control::Open {
            migration,
            channel,
            target,
            ..
        } = message
        else {
            unreachable!()
        };
        assert_eq!(target, "127.0.0.1:4444");
        (source, migration, channel)
    }

    /// The link works: what a source sends arrives as a frame.
    pub(crate) async fn expect_good(&self, peer: &mut Peer) {
        let (_source, id, no) = self.source(peer).await;
        loop {
            let (header, payload) = frame(peer).await;
            if header.migration == id && header.channel == no {
                assert!(header.seq == 0 && !payload.is_empty());
                break;
            }
        }
        let log = self.gateway.whole_log();
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// The next data stream of the gateway.
pub(crate) async fn frame(peer: &Peer) -> (DataHeader, Vec<u8>) {
    let mut stream = soon("a frame", peer.quinn.accept_uni()).await.unwrap();
    let bytes = soon("all of it", stream.read_to_end(4 << 20))
        .await
        .unwrap();
    let (header, payload) = bytes.split_first_chunk::<34>().unwrap();
    (DataHeader::decode(header).unwrap(), payload.to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_cannot_be_true_close_the_connection() {
    let rig = Rig::new();
    let id = MigrationId([5; 16]);
    let open = crate::peer::open(
        id,
        0,
        skyferry::wire::control::StreamKind::Opaque,
        true,
        "a:1",
    );
    let cases = [
        (open, "is not for this side"),
        (Control::Live { migrations: vec![] }, "is not for this side"),
        (
            Control::Commit {
                migration: id,
                channel: 0,
                digests: vec![],
                clock: 0,
            },
            "is not for this side",
        ),
        (
            Control::Resume {
                migration: id,
                channels: vec![],
            },
            "is not for this side",
        ),
        (Control::Close { migration: id }, "is not for this side"),
    ];
    for (message, words) in cases {
        let mut peer = rig.accept().await;
        peer.say(message).await;
        let text = peer.closed().await;
        assert!(text.contains(words), "{text}");
        rig.gateway.expect_log(&["no link", "edge-b", words]).await;
    }
    let mut peer = rig.accept().await;
    let (mut source, id, _) = rig.source(&mut peer).await;
    peer.say(Control::Ack {
        migration: id,
        channel: 0,
        next_seq: 2,
    })
    .await;
    let text = peer.closed().await;
    assert!(
        text.contains("frame 2 is acknowledged and was never made"),
        "{text}"
    );
    // The source does not notice: its migration goes on where it was on the next connection.
    let mut peer = rig.accept().await;
    peer.hear(|message| matches!(message, Control::Live { migrations } if *migrations == [id]))
        .await;
    peer.hear(|message| matches!(message, Control::Resume { migration, .. } if *migration == id))
        .await;
    let channels = vec![ChannelPosition {
        channel: 0,
        next_seq: 0,
    }];
    peer.say(Control::Resumed {
        migration: id,
        known: true,
        released: false,
        channels,
    })
    .await;
    let (header, _) = frame(&peer).await;
    assert_eq!((header.migration, header.seq), (id, 0));
    let silence = tokio::time::timeout(Duration::from_millis(100), source.read(&mut [0])).await;
    assert!(silence.is_err(), "the source's socket was closed");
    rig.expect_good(&mut peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_cannot_be_ends_the_migration_only() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let (mut source, id, _) = rig.source(&mut peer).await;
    drop(peer);
    let mut peer = rig.accept().await;
    peer.hear(|message| matches!(message, Control::Resume { .. }))
        .await;
    let channels = vec![ChannelPosition {
        channel: 0,
        next_seq: 17,
    }];
    peer.say(Control::Resumed {
        migration: id,
        known: true,
        released: true,
        channels,
    })
    .await;
    let (code, reason) = peer.hear_reset(id, 0).await;
    assert_eq!(code, ResetCode::Internal, "{reason}");
    assert_eq!(read_to_end(&mut source).await, (vec![], false));
    rig.gateway
        .expect_log(&[&id.to_string(), "waits for a frame that is gone"])
        .await;
    rig.expect_good(&mut peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_not_sent_without_end() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut source = TcpStream::connect(rig.gateway.ingress).await.unwrap();
    // The same contents again and again, so that later frames refer to earlier ones.
    let mut block = vec![0; 64 << 10];
    blake3::Hasher::new()
        .update(&DOMAIN)
        .finalize_xof()
        .fill(&mut block);
    source.write_all(&block).await.unwrap();
    let message = peer
        .hear(|message| matches!(message, Control::Open { .. }))
        .await;
    let Control::Open { migration, .. } = message else {
        unreachable!()
    };
    // The repetitions come when a good part of the first is sent: within one frame none is referred to,
    // and random as they are, they would be more than the budget lets out.
    while frame(&peer).await.1.len() < block.len() / 4 {}
    for _ in 0..7 {
        source.write_all(&block).await.unwrap();
    }
    let (seq, references) = loop {
        let (header, payload) = frame(&peer).await;
        peer.say(Control::Ack {
            migration,
            channel: 0,
            next_seq: header.seq,
        })
        .await;
        let references = references(&payload);
        if references > 0 {
            break (header.seq, references);
        }
    };
    // One reference many times in one request is no request.
    let indexes = vec![0; MAX_MISSED];
    peer.say(Control::Miss {
        migration,
        channel: 0,
        seq,
        indexes,
    })
    .await;
    rig.gateway
        .expect_log(&["asks for pages that were never sent"])
        .await;
    // All pages of the frame 5000 times, and none of them taken.
    let indexes: Vec<u32> = (0..references).collect();
    for _ in 0..5000 {
        let indexes = indexes.clone();
        peer.say(Control::Miss {
            migration,
            channel: 0,
            seq,
            indexes,
        })
        .await;
    }
    let peak = rig.gateway.peak_over(Duration::from_secs(4)).await;
    assert!(peak < MEMORY_ALLOWED, "{} MiB", peak >> 20);
    drop(peer);
    let mut peer = rig.accept().await;
    rig.expect_good(&mut peer).await;
}

/// How many references a frame has (`docs/protocol.md`, page frames).
fn references(frame: &[u8]) -> u32 {
    let mut rest = &frame[1..];
    crate::data::number(&mut rest);
    rest = &rest[16..];
    crate::data::number(&mut rest);
    u32::try_from(crate::data::number(&mut rest)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn success_is_never_made_up() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let (mut source, id, _) = rig.source(&mut peer).await;
    // It is opened before there is a frame, and what was never made can't be acknowledged.
    let (header, _) = frame(&peer).await;
    assert_eq!((header.migration, header.seq), (id, 0));
    // None of these is the destination's word.
    peer.say(Control::Opened {
        migration: id,
        channel: 0,
    })
    .await;
    peer.say(Control::Committed { migration: id }).await;
    peer.say(Control::Ack {
        migration: id,
        channel: 0,
        next_seq: 1,
    })
    .await;
    let silence = tokio::time::timeout(Duration::from_millis(500), source.read(&mut [0])).await;
    assert!(silence.is_err(), "the source heard something");
    peer.say(Control::Reset {
        migration: id,
        channel: 0,
        after_seq: 0,
        code: ResetCode::Endpoint,
        released: false,
        reason: "gone\n2026 INFO forged".into(),
    })
    .await;
    assert_eq!(read_to_end(&mut source).await, (vec![], false));
    rig.gateway
        .expect_log(&[&id.to_string(), "gone", "forged"])
        .await;
    assert!(!rig.gateway.whole_log().contains("\n2026 INFO forged"));
    // A frame for the source behind the end of all is dropped.
    let flags = DataFlags::default();
    let header = DataHeader {
        kind: DataKind::Frame,
        flags,
        migration: id,
        channel: 0,
        seq: 0,
        len: 0,
    };
    peer.data(header.encode(), &[]).await;
    rig.expect_good(&mut peer).await;
}
