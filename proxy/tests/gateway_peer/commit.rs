//! The commit byte: what must be true before the destination gets it.

use std::time::Duration;

use skyferry::wire::control::{ChannelDigest, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, MigrationId};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::peer::{Channel, Peer, clock, open};
use crate::rig::{Gateway, Site, read_to_end, soon};

const PLAIN: DataFlags = DataFlags {
    end: false,
    held: false,
    unheld: false,
};
const HELD: DataFlags = DataFlags {
    end: false,
    held: true,
    unheld: false,
};

/// The request for a commit of channel 0.
pub(crate) fn commit(migration: MigrationId, digests: Vec<ChannelDigest>) -> Control {
    Control::Commit {
        migration,
        channel: 0,
        digests,
        clock: clock(),
    }
}

/// The digest of all that was sent on a channel so far.
fn digest_of(channel: &Channel) -> ChannelDigest {
    ChannelDigest {
        channel: channel.no,
        offset: channel.encoder.offset(),
        digest: *channel.encoder.digest().as_bytes(),
    }
}

/// A far gateway that waits for the request to release a commit byte.
struct Scene {
    site: Site,
    gateway: Gateway,
    peer: Peer,
    channel: Channel,
    socket: TcpStream,
    /// What the request has to say of the channel.
    digest: ChannelDigest,
}

impl Scene {
    async fn new() -> Self {
        let site = Site::new();
        let gateway = Gateway::far(&site);
        let mut peer = Peer::good(&gateway, &site).await;
        let (channel, socket, digest) = up_to_the_commit_byte(&mut peer).await;
        Self {
            site,
            gateway,
            peer,
            channel,
            socket,
            digest,
        }
    }

    async fn ask(&mut self, digests: Vec<ChannelDigest>) {
        let request = commit(self.channel.migration, digests);
        self.peer.say(request).await;
    }

    /// Whether the destination gets anything within a time.
    async fn hears(&mut self, time: Duration) -> bool {
        hears(&mut self.socket, time).await
    }
}

/// A main channel of which everything is at the destination but the held byte and its followers.
pub(crate) async fn up_to_the_commit_byte(peer: &mut Peer) -> (Channel, TcpStream, ChannelDigest) {
    let mut channel = peer.open_to_new_target(StreamKind::QemuMain).await;
    channel.send(peer, b"a guest", PLAIN).await;
    let digest = digest_of(&channel);
    channel.send(peer, b"\0device description", HELD).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    let mut got = [0; 7];
    soon("the guest", socket.read_exact(&mut got))
        .await
        .unwrap();
    assert_eq!(&got, b"a guest");
    (channel, socket, digest)
}

/// Whether the destination gets anything within a time.
pub(crate) async fn hears(socket: &mut TcpStream, time: Duration) -> bool {
    let mut byte = [0];
    matches!(
        tokio::time::timeout(time, socket.read(&mut byte)).await,
        Ok(Ok(1))
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commit_byte_goes_when_the_digests_agree() {
    let mut scene = Scene::new().await;
    scene.peer.tell_clock().await;
    scene.ask(vec![scene.digest]).await;
    let peer = &mut scene.peer;
    // Without another question.
    let answer = |m: &Control| matches!(m, Control::Committed { .. } | Control::AskCommit { .. });
    let answer = peer.hear(answer).await;
    assert!(matches!(answer, Control::Committed { .. }), "{answer:?}");
    let mut got = [0; 19];
    soon("the commit byte", scene.socket.read_exact(&mut got))
        .await
        .unwrap();
    assert_eq!(&got, b"\0device description");
    let migration = scene.channel.migration.to_string();
    scene
        .gateway
        .expect_log(&[&migration, "digests agree; commit byte released"])
        .await;
    drop(scene.peer);
    scene.gateway.expect_good(&scene.site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_digest_resets_the_destination() {
    for what in ["digest", "no digest of the channel", "nothing"] {
        let mut scene = Scene::new().await;
        let mut digest = scene.digest;
        let digests = match what {
            "digest" => {
                digest.digest[3] ^= 1;
                vec![digest]
            }
            "no digest of the channel" => vec![ChannelDigest {
                channel: 7,
                ..digest
            }],
            _ => vec![],
        };
        scene.ask(digests).await;
        let migration = scene.channel.migration;
        let (code, reason) = scene.peer.hear_reset(migration, 0).await;
        assert_eq!(code, ResetCode::DigestMismatch, "{what}: {reason}");
        assert_eq!(
            read_to_end(&mut scene.socket).await,
            (vec![], false),
            "{what}"
        );
        scene
            .gateway
            .expect_log(&[&migration.to_string(), "digest-mismatch", &reason])
            .await;
        scene.gateway.expect_good(&scene.site).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_of_another_place_keeps_the_byte_back() {
    let mut scene = Scene::new().await;
    let digest = scene.digest;
    for offset in [digest.offset - 1, digest.offset + 1, u64::MAX] {
        scene.ask(vec![ChannelDigest { offset, ..digest }]).await;
        assert!(!scene.hears(Duration::from_millis(500)).await);
    }
    drop(scene.peer);
    scene.gateway.expect_good(&scene.site).await;
    assert_eq!(read_to_end(&mut scene.socket).await, (vec![], false));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_commit_the_byte_never_arrives() {
    let mut scene = Scene::new().await;
    // More behind it, its end included, is held as well.
    let Scene { peer, channel, .. } = &mut scene;
    channel.send(peer, b"more", PLAIN).await;
    channel
        .send_payload(peer, &[], DataFlags { end: true, ..PLAIN })
        .await;
    assert!(!scene.hears(Duration::from_secs(2)).await);
    // A commit for another channel or migration changes nothing.
    let migration = scene.channel.migration;
    let of_another_channel = Control::Commit {
        migration,
        channel: 3,
        digests: vec![],
        clock: clock(),
    };
    scene.peer.say(of_another_channel).await;
    scene.peer.say(commit(MigrationId([9; 16]), vec![])).await;
    assert!(!scene.hears(Duration::from_secs(1)).await);
    scene.peer.say(Control::Close { migration }).await;
    assert_eq!(read_to_end(&mut scene.socket).await, (vec![], false));
    drop(scene.peer);
    scene.gateway.expect_good(&scene.site).await;
}

/// A request from a connection that is gone may have been withdrawn since: its source may have been
/// cancelled in the outage. Until the near gateway has said on the new connection what it still has,
/// nothing is released.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_a_lost_connection_releases_nothing() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let instance = [77; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let mut channel = peer.open_to_new_target(StreamKind::QemuMain).await;
    // More than the sockets hold, so that the destination is still busy when the link goes.
    let mut total = 0;
    let mut state = 12_345_u64;
    for _ in 0..80 {
        let noise = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_le_bytes()[7]
        });
        total += channel
            .send(&peer, &noise.take(100_000).collect::<Vec<_>>(), PLAIN)
            .await;
    }
    let digest = digest_of(&channel);
    channel.send(&peer, b"\0device description", HELD).await;
    peer.say(commit(channel.migration, vec![digest])).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    // The answer to a ping behind it proves that the request has been read.
    peer.say(Control::Ping { nonce: 1 }).await;
    peer.hear(|m| matches!(m, Control::Pong { .. })).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    drop(peer);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut guest = vec![0; total];
    soon("the guest", socket.read_exact(&mut guest))
        .await
        .unwrap();
    assert!(
        !hears(&mut socket, Duration::from_millis(300)).await,
        "released without a link"
    );

    let mut peer = Peer::greeted(&gateway, &site, "edge-a", instance).await;
    assert!(
        !hears(&mut socket, Duration::from_millis(300)).await,
        "released before Live"
    );
    peer.say(Control::Live { migrations: vec![] }).await;
    assert!(
        !hears(&mut socket, Duration::from_millis(300)).await,
        "released after Live"
    );
}

/// A digest of a channel that this gateway never had can't agree.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_channel_agrees_with_nothing() {
    let mut scene = Scene::new().await;
    let other = ChannelDigest {
        channel: 5,
        offset: 1_000_000,
        digest: [9; 16],
    };
    scene.ask(vec![scene.digest, other]).await;
    assert!(!scene.hears(Duration::from_secs(1)).await);
}

/// A channel that was reset took bytes with it that the destination never got.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_was_reset_agrees_with_nothing() {
    let mut scene = Scene::new().await;
    let Scene { peer, channel, .. } = &mut scene;
    let migration = channel.migration;
    let target = channel.target.local_addr().unwrap().to_string();
    peer.say(open(migration, 1, StreamKind::Opaque, true, &target))
        .await;
    let (second, _) = soon("a dial", channel.target.accept()).await.unwrap();
    peer.hear(|m| matches!(m, Control::Opened { channel: 1, .. }))
        .await;
    second.set_zero_linger().unwrap();
    drop(second);
    peer.hear_reset(migration, 1).await;
    let other = ChannelDigest {
        channel: 1,
        offset: 1_000_000,
        digest: [9; 16],
    };
    scene.ask(vec![scene.digest, other]).await;
    assert!(!scene.hears(Duration::from_secs(1)).await);
}

/// Answers what the far gateway asks before it releases: what time it is, and whether the commit stands.
async fn confirm(peer: &mut Peer, digest: ChannelDigest) {
    peer.answer_clock().await;
    loop {
        let asks = |m: &Control| matches!(m, Control::Ping { .. } | Control::AskCommit { .. });
        match peer.hear(asks).await {
            Control::Ping { nonce } => {
                let clock = clock();
                peer.say(Control::Pong { nonce, clock }).await;
            }
            Control::AskCommit { migration } => peer.say(commit(migration, vec![digest])).await,
            _ => unreachable!(),
        }
    }
}

impl Scene {
    /// Whether the byte goes once the near gateway answers what it is asked.
    async fn goes_when_confirmed(&mut self) -> bool {
        let digest = self.digest;
        let Self { peer, socket, .. } = self;
        tokio::select! {
            released = hears(socket, Duration::from_secs(10)) => released,
            () = confirm(peer, digest) => unreachable!(),
        }
    }

    async fn is_asked(&mut self) {
        let migration = self.channel.migration;
        let asks = Control::AskCommit { migration };
        self.peer.hear(|m| *m == asks).await;
    }
}

/// What was said before this process stood still is old when it is read after it: the near gateway
/// must be heard again.
#[tokio::test(flavor = "multi_thread")]
async fn a_word_from_before_a_standstill_is_asked_for_again() {
    let mut scene = Scene::new().await;
    scene.peer.tell_clock().await;
    scene.gateway.stop();
    scene.ask(vec![scene.digest]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    scene.gateway.signal("-CONT");
    assert!(
        !scene.hears(Duration::from_secs(1)).await,
        "an old word counts as just heard"
    );
    scene.is_asked().await;
    assert!(scene.goes_when_confirmed().await, "never released");
}

/// A request that was lost, and sent again, or waited anywhere, while everything else came through: its source
/// may have left since.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_was_long_under_way_is_asked_for_again() {
    let mut scene = Scene::new().await;
    scene.peer.tell_clock().await;
    let request = commit(scene.channel.migration, vec![scene.digest]);
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let packets = scene.peer.hear_up_to_now(|_| false);
        assert!(packets.await.is_none());
    }
    scene.peer.say(request).await;
    assert!(!scene.hears(Duration::from_secs(1)).await);
    scene.is_asked().await;
    assert!(scene.goes_when_confirmed().await, "never released");
}

/// How old a request is can't be told by a clock that is not known.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_an_unknown_age_is_asked_for_again() {
    let mut scene = Scene::new().await;
    scene.ask(vec![scene.digest]).await;
    assert!(!scene.hears(Duration::from_secs(1)).await);
    scene.is_asked().await;
    assert!(scene.goes_when_confirmed().await, "never released");
}
