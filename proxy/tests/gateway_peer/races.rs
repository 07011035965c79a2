//! Messages that cross: ends that meet a commit, connections that follow each other closely, and
//! peers that get in each other's way.

use std::time::Duration;

use skyferry::transport::LinkEndpoint;
use skyferry::wire::control::{ChannelDigest, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, DataHeader, DataKind, InstanceId, MigrationId};
use skyferry_core::qemu::synthetic::SyntheticStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::commit::{commit, hears, up_to_the_commit_byte};
use crate::peer::{Channel, Peer, encoder, endpoint, hello, open};
use crate::rig::{Gateway, MAX_MIGRATIONS, Site, read_to_end, soon};

const FAR: InstanceId = [1; 16];
/// Long enough for whatever happens at once to have happened.
const MOMENT: Duration = Duration::from_millis(500);

/// A near gateway that this test is the far end of.
pub(crate) struct NearRig {
    _site: Site,
    pub(crate) acceptor: LinkEndpoint,
    pub(crate) gateway: Gateway,
}

/// A migration of which the near gateway has asked for the commit.
pub(crate) struct Asked {
    pub(crate) source: TcpStream,
    pub(crate) id: MigrationId,
}

impl NearRig {
    pub(crate) fn new(wan: &str) -> Self {
        let site = Site::new();
        let acceptor = endpoint(&site.identity("edge-b"));
        let gateway =
            Gateway::near_with(&site, acceptor.local_addr().unwrap(), MAX_MIGRATIONS, wan);
        Self {
            _site: site,
            acceptor,
            gateway,
        }
    }

    pub(crate) async fn accept(&self, instance: InstanceId) -> Peer {
        Peer::accept(&self.acceptor, &hello("edge-b", (1, 1), instance))
            .await
            .unwrap()
    }

    pub(crate) async fn source(&self, bytes: &[u8]) -> TcpStream {
        let mut source = soon("a connection", TcpStream::connect(self.gateway.ingress))
            .await
            .unwrap();
        source.write_all(bytes).await.unwrap();
        source
    }

    /// A whole stream of a source that waits for the destination's verdict.
    pub(crate) async fn ask_for_the_commit(&self, peer: &mut Peer) -> Asked {
        let stream = SyntheticStream::builder().build();
        let source = self.source(&stream.bytes).await;
        let id = peer.take_open().await;
        peer.hear(|m| matches!(m, Control::Commit { .. })).await;
        Asked { source, id }
    }

    /// Asks for the commit, then makes the near gateway fail for a reason of its own: a frame of the
    /// return path that makes no sense.
    async fn fail_behind_the_commit(&self, peer: &mut Peer) -> Asked {
        let mut asked = self.ask_for_the_commit(peer).await;
        let header = DataHeader {
            kind: DataKind::Frame,
            flags: DataFlags::default(),
            migration: asked.id,
            channel: 0,
            seq: 0,
            len: 10,
        };
        peer.data(header.encode(), &[0xff; 10]).await;
        let (code, reason) = peer.hear_reset(asked.id, 0).await;
        assert_eq!(code, ResetCode::Internal, "{reason}");
        asked.expect_open("before the answer").await;
        asked
    }

    /// The next connection, up to where the near gateway resumes the migration.
    async fn resumed(&self, instance: InstanceId, id: MigrationId) -> Peer {
        let mut peer = self.accept(instance).await;
        peer.hear(|m| matches!(m, Control::Live { migrations } if migrations.contains(&id)))
            .await;
        peer.hear(|m| matches!(m, Control::Resume { migration, .. } if *migration == id))
            .await;
        peer
    }
}

impl Asked {
    async fn expect_open(&mut self, when: &str) {
        let read = tokio::time::timeout(MOMENT, self.source.read(&mut [0])).await;
        assert!(read.is_err(), "the source's socket was closed {when}");
    }

    async fn expect_closed(mut self) {
        assert_eq!(read_to_end(&mut self.source).await, (vec![], false));
    }

    fn answer(&self, released: bool) -> Control {
        Control::Reset {
            migration: self.id,
            channel: 0,
            after_seq: 0,
            code: ResetCode::Unknown,
            released,
            reason: "over".into(),
        }
    }

    fn forgotten(&self, released: bool) -> Control {
        Control::Resumed {
            migration: self.id,
            known: false,
            released,
            channels: vec![],
        }
    }
}

// --- a near gateway that fails behind its request ---------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_let_go_when_nothing_was_released() {
    let rig = NearRig::new("");
    let mut peer = rig.accept(FAR).await;
    let asked = rig.fail_behind_the_commit(&mut peer).await;
    peer.say(asked.answer(false)).await;
    let id = asked.id;
    asked.expect_closed().await;
    peer.hear(|m| matches!(m, Control::Close { migration } if *migration == id))
        .await;
    rig.gateway
        .expect_log(&["migration finished", &id.to_string(), "failed"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_kept_when_the_byte_was_released() {
    let rig = NearRig::new("");
    let mut peer = rig.accept(FAR).await;
    let mut asked = rig.fail_behind_the_commit(&mut peer).await;
    peer.say(asked.answer(true)).await;
    asked.expect_open("though the byte was released").await;
    // What contradicts it later changes nothing.
    peer.say(asked.answer(false)).await;
    asked.expect_open("by a contradiction").await;
    rig.gateway
        .expect_log(&[&asked.id.to_string(), "the source is kept waiting"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_lost_comes_with_the_next_connection() {
    let rig = NearRig::new("");
    // The far gateway has forgotten the migration since.
    let mut peer = rig.accept(FAR).await;
    let asked = rig.fail_behind_the_commit(&mut peer).await;
    drop(peer);
    let mut peer = rig.resumed(FAR, asked.id).await;
    peer.say(asked.forgotten(false)).await;
    asked.expect_closed().await;

    // The reset had not arrived: it is said again, and the commit is not asked for any more.
    let mut asked = rig.fail_behind_the_commit(&mut peer).await;
    drop(peer);
    let mut peer = rig.resumed(FAR, asked.id).await;
    let channels = vec![skyferry::wire::control::ChannelPosition {
        channel: 0,
        next_seq: 0,
    }];
    peer.say(Control::Resumed {
        migration: asked.id,
        known: true,
        released: false,
        channels,
    })
    .await;
    let id = asked.id;
    let message = peer
        .hear(|m| matches!(m, Control::Commit { .. } | Control::Reset { .. }))
        .await;
    assert!(
        matches!(message, Control::Reset { migration, .. } if migration == id),
        "{message:?}"
    );
    asked.expect_open("before the answer").await;
    peer.say(asked.answer(false)).await;
    asked.expect_closed().await;
}

/// Another process at the far end can't know what the one before released.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_far_gateway_answers_for_nothing() {
    let rig = NearRig::new("");
    let mut peer = rig.accept(FAR).await;
    let mut asked = rig.fail_behind_the_commit(&mut peer).await;
    drop(peer);
    let mut peer = rig.accept([2; 16]).await;
    peer.say(asked.forgotten(false)).await;
    peer.say(asked.answer(false)).await;
    asked.expect_open("on the word of another process").await;
}

// --- what the far gateway answers --------------------------------------------------------------

async fn answer_of(peer: &mut Peer, id: MigrationId, no: u32) -> bool {
    peer.say(Control::Reset {
        migration: id,
        channel: no,
        after_seq: 0,
        code: ResetCode::Internal,
        released: false,
        reason: "a fault of the near gateway".into(),
    })
    .await;
    let message = peer
        .hear(|m| {
            matches!(m, Control::Reset { migration, channel, .. }
                if *migration == id && *channel == no)
        })
        .await;
    let Control::Reset { released, code, .. } = message else {
        unreachable!()
    };
    assert_eq!(code, ResetCode::Unknown);
    released
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_answered_for_good() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    let migration = channel.migration;
    // A request that has to wait, and is given up.
    let offset = digest.offset + 1;
    peer.say(commit(migration, vec![ChannelDigest { offset, ..digest }]))
        .await;
    assert!(!answer_of(&mut peer, migration, 0).await);
    peer.say(commit(migration, vec![digest])).await;
    assert_eq!(read_to_end(&mut socket).await, (vec![], false));
    // The same answer again, and for a migration that never was.
    assert!(!answer_of(&mut peer, migration, 0).await);
    assert!(!answer_of(&mut peer, MigrationId([3; 16]), 0).await);

    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    let migration = channel.migration;
    peer.tell_clock().await;
    peer.say(commit(migration, vec![digest])).await;
    peer.hear(|m| matches!(m, Control::Committed { .. })).await;
    assert!(hears(&mut socket, MOMENT).await);
    assert!(answer_of(&mut peer, migration, 0).await);
    assert!(answer_of(&mut peer, migration, 0).await);
    drop(peer);
    gateway.expect_good(&site).await;
}

// --- what is opened while a connection is new ---------------------------------------------------

async fn still_answers(peer: &mut Peer, nonce: u64) {
    peer.say(Control::Ping { nonce }).await;
    peer.hear(|m| matches!(m, Control::Pong { nonce: n, .. } if *n == nonce))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn live_ends_nothing_that_was_opened_on_its_connection() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let mut peer = Peer::greeted(&gateway, &site, "edge-a", [50; 16]).await;
    let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
    peer.say(Control::Live { migrations: vec![] }).await;
    still_answers(&mut peer, 1).await;
    channel.send(&peer, b"hello", DataFlags::default()).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    let mut got = [0; 5];
    soon("the bytes", socket.read_exact(&mut got))
        .await
        .unwrap();
    assert!(!gateway.whole_log().contains("gave the migration up"));
}

#[tokio::test(flavor = "multi_thread")]
async fn resume_ends_no_channel_that_was_opened_on_its_connection() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let instance = [51; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let (channel, _socket) = peer.open_and_send(b"hello").await;
    drop(peer);

    let mut peer = Peer::greeted(&gateway, &site, "edge-a", instance).await;
    let id = channel.migration;
    peer.say(Control::Live {
        migrations: vec![id],
    })
    .await;
    let target = channel.target.local_addr().unwrap().to_string();
    peer.say(open(id, 1, StreamKind::Opaque, true, &target))
        .await;
    peer.say(Control::Resume {
        migration: id,
        channels: vec![channel.position(0)],
    })
    .await;
    // The dial is not waited for: its word comes before the answer, or behind it.
    let (mut resumed, mut opened) = (false, false);
    while !(resumed && opened) {
        let is_awaited = |m: &Control| {
            matches!(
                m,
                Control::Resumed { known: true, .. } | Control::Opened { channel: 1, .. }
            )
        };
        match peer.hear(is_awaited).await {
            Control::Resumed { .. } => resumed = true,
            _ => opened = true,
        }
    }
    let (mut second, _) = soon("a dial", channel.target.accept()).await.unwrap();
    let read = tokio::time::timeout(MOMENT, second.read(&mut [0])).await;
    assert!(read.is_err(), "the second channel was ended");
}

/// Sources that come at the moment at which the link does: each channel is opened once on each
/// connection, by the resumption or for itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_is_opened_once_on_a_connection() {
    let rig = NearRig::new("");
    for round in 0..12_u64 {
        let sources = async {
            let mut sources = Vec::new();
            for _ in 0..3 {
                sources.push(rig.source(b"not a migration, but carried").await);
                tokio::time::sleep(Duration::from_micros(300 * (round % 7))).await;
            }
            sources
        };
        let (mut peer, sources) = tokio::join!(rig.accept(FAR), sources);
        let mut opened = Vec::new();
        let listen = async {
            loop {
                let message = peer
                    .hear(|m| {
                        matches!(
                            m,
                            Control::Open { .. } | Control::Resume { .. } | Control::Reset { .. }
                        )
                    })
                    .await;
                match message {
                    Control::Open {
                        migration, channel, ..
                    } => {
                        assert!(!opened.contains(&(migration, channel)), "opened twice");
                        opened.push((migration, channel));
                    }
                    Control::Resume { migration, .. } => {
                        peer.say(Control::Resumed {
                            migration,
                            known: false,
                            released: false,
                            channels: vec![],
                        })
                        .await;
                    }
                    other => panic!("{other:?}"),
                }
            }
        };
        let _: Result<(), _> = tokio::time::timeout(Duration::from_millis(150), listen).await;
        drop(sources);
        peer.quinn.close(0_u32.into(), b"the next one, please");
    }
}

// --- a reset behind frames that never come ------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_does_not_wait_for_ever() {
    let rig = NearRig::new("outage_budget = \"1s\"\n");
    let mut peer = rig.accept(FAR).await;
    let mut source = rig.source(b"not a migration, but carried").await;
    let message = peer.hear(|m| matches!(m, Control::Open { .. })).await;
    let Control::Open { migration, .. } = message else {
        unreachable!()
    };
    peer.say(Control::Opened {
        migration,
        channel: 0,
    })
    .await;
    let reset = |after_seq| Control::Reset {
        migration,
        channel: 0,
        after_seq,
        code: ResetCode::Endpoint,
        released: false,
        reason: "the destination has gone".into(),
    };
    for after_seq in 1000..1010 {
        peer.say(reset(after_seq)).await;
    }
    let read = tokio::time::timeout(MOMENT, source.read(&mut [0])).await;
    assert!(read.is_err(), "the reset did not wait for its frames");
    assert_eq!(read_to_end(&mut source).await, (vec![], false));
    rig.gateway
        .expect_log(&[&migration.to_string(), "the destination has gone"])
        .await;
}

// --- peers that get in each other's way ---------------------------------------------------------

/// Whether the gateway takes one more migration of this peer.
async fn is_taken(peer: &mut Peer, number: u8, target: &str) -> bool {
    let id = MigrationId([number; 16]);
    peer.say(open(id, 0, StreamKind::Opaque, true, target))
        .await;
    let answer = peer
        .hear(|m| {
            matches!(m, Control::Opened { migration, .. } | Control::Reset { migration, .. }
                if *migration == id)
        })
        .await;
    matches!(answer, Control::Opened { .. })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_begins_all_it_may_leaves_others_their_share() {
    let site = Site::new();
    let gateway = Gateway::far_of_two(&site);
    let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = target.local_addr().unwrap().to_string();
    let mut greedy = Peer::greeted(&gateway, &site, "edge-a", [64; 16]).await;
    let mut begun = 0;
    while is_taken(&mut greedy, begun, &target).await {
        begun += 1;
    }
    // Half of them in equal shares.
    assert_eq!(usize::from(begun), MAX_MIGRATIONS - MAX_MIGRATIONS / 4);
    let mut modest = Peer::greeted(&gateway, &site, "edge-c", [65; 16]).await;
    assert!(is_taken(&mut modest, 100, &target).await);
    assert!(!is_taken(&mut modest, 101, &target).await);
    let over = MigrationId([0; 16]);
    greedy.say(Control::Close { migration: over }).await;
    gateway
        .expect_log(&["migration finished", &over.to_string()])
        .await;
    assert!(is_taken(&mut modest, 102, &target).await);
}

/// A frame that waits for the one before it holds memory. However many of them one peer sends,
/// another's frames are taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_fills_its_memory_leaves_others_theirs() {
    const BIG: usize = 3 << 20;
    let site = Site::new();
    let gateway = Gateway::far_of_two(&site);
    let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = target.local_addr().unwrap().to_string();
    let mut greedy = Peer::greeted(&gateway, &site, "edge-a", [60; 16]).await;
    let hoard = MigrationId([61; 16]);
    greedy
        .say(open(hoard, 0, StreamKind::Opaque, false, &address))
        .await;
    still_answers(&mut greedy, 1).await;
    let quarter = vec![9; 256 << 10];
    for seq in 1..=80 {
        let len = u32::try_from(quarter.len()).unwrap();
        let header = crate::peer::header(DataKind::Frame, DataFlags::default(), hoard, seq, len);
        greedy.data(header, &quarter).await;
    }
    still_answers(&mut greedy, 2).await;

    let mut modest = Peer::greeted(&gateway, &site, "edge-c", [62; 16]).await;
    let mut channel = Channel {
        migration: MigrationId([63; 16]),
        no: 0,
        target,
        encoder: encoder(skyferry_dedup::ChannelKind::Opaque),
        seq: 0,
    };
    modest
        .say(open(
            channel.migration,
            0,
            StreamKind::Opaque,
            false,
            &address,
        ))
        .await;
    still_answers(&mut modest, 1).await;
    // More than the window of a stream: it is through when the gateway has read it.
    let header = crate::peer::header(
        DataKind::Frame,
        DataFlags::default(),
        channel.migration,
        1,
        u32::try_from(BIG).unwrap(),
    );
    let mut stream = modest.quinn.open_uni().await.unwrap();
    let sent = async {
        stream.write_all(&header).await.unwrap();
        stream.write_all(&vec![9; BIG]).await.unwrap();
        stream.finish().unwrap();
        stream.stopped().await.unwrap()
    };
    let taken = tokio::time::timeout(Duration::from_secs(5), sent).await;
    assert_eq!(taken, Ok(None), "the frame was not taken");
    channel.send(&modest, b"hello", DataFlags::default()).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    let mut got = [0; 5];
    soon("the bytes", socket.read_exact(&mut got))
        .await
        .unwrap();
    assert_eq!(&got, b"hello");
}
