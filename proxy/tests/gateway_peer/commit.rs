//! The commit byte: what must be true before the destination gets it.

use std::time::Duration;

use skyferry::wire::control::{ChannelDigest, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::rig::{Channel, Gateway, Peer, Site, read_to_end, soon};

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

/// A main channel of which everything is at the destination but the held byte and its followers.
pub(crate) async fn up_to_the_commit_byte(peer: &mut Peer) -> (Channel, TcpStream, ChannelDigest) {
    let mut channel = peer.open_to_new_target(StreamKind::QemuMain).await;
    channel.send(peer, b"a guest", PLAIN).await;
    let digest = ChannelDigest {
        channel: channel.no,
        offset: channel.encoder.offset(),
        digest: *channel.encoder.digest().as_bytes(),
    };
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
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    let migration = channel.migration;
    peer.say(Control::Commit {
        migration,
        channel: 0,
        digests: vec![digest],
    })
    .await;
    peer.hear(|message| matches!(message, Control::Committed { .. }))
        .await;
    let mut got = [0; 19];
    soon("the commit byte", socket.read_exact(&mut got))
        .await
        .unwrap();
    assert_eq!(&got, b"\0device description");
    gateway
        .expect_log(&[
            &migration.to_string(),
            "digests agree; commit byte released",
        ])
        .await;
    drop(peer);
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_digest_resets_the_destination() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    for what in ["digest", "no digest of the channel", "nothing"] {
        let mut peer = Peer::good(&gateway, &site).await;
        let (channel, mut socket, mut digest) = up_to_the_commit_byte(&mut peer).await;
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
        let migration = channel.migration;
        peer.say(Control::Commit {
            migration,
            channel: 0,
            digests,
        })
        .await;
        let (code, reason) = peer.hear_reset(migration, 0).await;
        assert_eq!(code, ResetCode::DigestMismatch, "{what}: {reason}");
        assert_eq!(read_to_end(&mut socket).await, (vec![], false), "{what}");
        gateway
            .expect_log(&[&migration.to_string(), "digest-mismatch", &reason])
            .await;
    }
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_of_another_place_keeps_the_byte_back() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    let migration = channel.migration;
    for offset in [digest.offset - 1, digest.offset + 1, u64::MAX] {
        let digests = vec![ChannelDigest { offset, ..digest }];
        peer.say(Control::Commit {
            migration,
            channel: 0,
            digests,
        })
        .await;
        assert!(!hears(&mut socket, Duration::from_millis(500)).await);
    }
    drop(peer);
    gateway.expect_good(&site).await;
    assert_eq!(read_to_end(&mut socket).await, (vec![], false));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_commit_the_byte_never_arrives() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (mut channel, mut socket, _) = up_to_the_commit_byte(&mut peer).await;
    // More behind it, its end included, is held as well.
    channel.send(&peer, b"more", PLAIN).await;
    channel
        .send_payload(&peer, &[], DataFlags { end: true, ..PLAIN })
        .await;
    assert!(!hears(&mut socket, Duration::from_secs(2)).await);
    // A commit for another channel or migration changes nothing.
    let migration = channel.migration;
    peer.say(Control::Commit {
        migration,
        channel: 3,
        digests: vec![],
    })
    .await;
    let other = skyferry::wire::MigrationId([9; 16]);
    peer.say(Control::Commit {
        migration: other,
        channel: 0,
        digests: vec![],
    })
    .await;
    assert!(!hears(&mut socket, Duration::from_secs(1)).await);
    peer.say(Control::Close { migration }).await;
    assert_eq!(read_to_end(&mut socket).await, (vec![], false));
    drop(peer);
    gateway.expect_good(&site).await;
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
    let digest = ChannelDigest {
        channel: channel.no,
        offset: channel.encoder.offset(),
        digest: *channel.encoder.digest().as_bytes(),
    };
    channel.send(&peer, b"\0device description", HELD).await;
    let migration = channel.migration;
    peer.say(Control::Commit {
        migration,
        channel: 0,
        digests: vec![digest],
    })
    .await;
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

    let mut peer = Peer::connect(&gateway, &site.identity("edge-a"))
        .await
        .unwrap();
    peer.say(crate::rig::hello("edge-a", (1, 1), instance))
        .await;
    peer.hear(|m| matches!(m, Control::Hello { .. })).await;
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
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    let migration = channel.migration;
    let other = ChannelDigest {
        channel: 5,
        offset: 1_000_000,
        digest: [9; 16],
    };
    peer.say(Control::Commit {
        migration,
        channel: 0,
        digests: vec![digest, other],
    })
    .await;
    assert!(!hears(&mut socket, Duration::from_secs(1)).await);
}

/// A channel that was reset took bytes with it that the destination never got.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_was_reset_agrees_with_nothing() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    let migration = channel.migration;
    let target = channel.target.local_addr().unwrap().to_string();
    peer.say(crate::rig::open(
        migration,
        1,
        StreamKind::Opaque,
        true,
        &target,
    ))
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
    peer.say(Control::Commit {
        migration,
        channel: 0,
        digests: vec![digest, other],
    })
    .await;
    assert!(!hears(&mut socket, Duration::from_secs(1)).await);
}

/// What was said before this process stood still is old when it is read after it: the near gateway
/// must be heard again.
#[tokio::test(flavor = "multi_thread")]
async fn a_word_from_before_a_standstill_is_no_sign_of_life() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
    gateway.stop();
    let migration = channel.migration;
    peer.say(Control::Commit {
        migration,
        channel: 0,
        digests: vec![digest],
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    gateway.signal("-CONT");
    assert!(
        !hears(&mut socket, Duration::from_secs(1)).await,
        "an old word counts as just heard"
    );
    // Asked for a sign of life, and given one.
    let Control::Ping { nonce } = peer.hear(|m| matches!(m, Control::Ping { .. })).await else {
        unreachable!()
    };
    peer.say(Control::Pong { nonce }).await;
    // The question may have been asked anew meanwhile.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !hears(&mut socket, Duration::from_millis(20)).await {
        assert!(std::time::Instant::now() < deadline, "never released");
        let ping = peer.hear(|m| matches!(m, Control::Ping { .. })).await;
        let Control::Ping { nonce } = ping else {
            unreachable!()
        };
        peer.say(Control::Pong { nonce }).await;
    }
}
