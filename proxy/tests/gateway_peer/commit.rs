//! The commit byte: what must be true before the destination gets it.

use std::time::Duration;

use skyferry::wire::control::{ChannelDigest, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, MigrationId};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::rig::{Channel, Gateway, Peer, Site, open, read_to_end, soon};

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
    scene.ask(vec![scene.digest]).await;
    let peer = &mut scene.peer;
    peer.hear(|message| matches!(message, Control::Committed { .. }))
        .await;
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

/// What was said before this process stood still is old when it is read after it: the near gateway
/// must be heard again.
#[tokio::test(flavor = "multi_thread")]
async fn a_word_from_before_a_standstill_is_no_sign_of_life() {
    let mut scene = Scene::new().await;
    scene.gateway.stop();
    scene.ask(vec![scene.digest]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    scene.gateway.signal("-CONT");
    assert!(
        !scene.hears(Duration::from_secs(1)).await,
        "an old word counts as just heard"
    );
    // Asked for a sign of life, and given one. The question may be asked anew meanwhile.
    let Scene { peer, socket, .. } = &mut scene;
    let answered = async {
        while let Control::Ping { nonce } = peer.hear(|m| matches!(m, Control::Ping { .. })).await {
            peer.say(Control::Pong { nonce }).await;
        }
    };
    tokio::select! {
        released = hears(socket, Duration::from_secs(10)) => assert!(released, "never released"),
        () = answered => {}
    }
}
