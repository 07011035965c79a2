//! A far gateway that is killed and started again: what it says of commit bytes that the process before released.

use std::time::Duration;

use skyferry::wire::control::{ChannelPosition, ResetCode, StreamKind};
use skyferry::wire::{Control, InstanceId, MigrationId};
use tokio::io::AsyncReadExt;

use crate::commit::{commit, hears, up_to_the_commit_byte};
use crate::peer::{Peer, new_id, open};
use crate::rig::{Gateway, Site, soon};

/// A migration of which one far gateway held the commit byte, and either released it or not, before it was
/// killed; and the next one.
struct Scene {
    site: Site,
    gateway: Gateway,
    near: InstanceId,
    migration: MigrationId,
    /// The process that was killed.
    before: InstanceId,
}

impl Scene {
    async fn new(released: bool) -> Self {
        let site = Site::new();
        let first = Gateway::far(&site);
        let near = new_id();
        let mut peer = Peer::with_instance(&first, &site, near).await;
        let (channel, mut socket, digest) = up_to_the_commit_byte(&mut peer).await;
        let migration = channel.migration;
        if released {
            peer.tell_clock().await;
            peer.say(commit(migration, vec![digest])).await;
            let mut byte = [0];
            soon("the commit byte", socket.read_exact(&mut byte))
                .await
                .unwrap();
        } else {
            assert!(!hears(&mut socket, Duration::from_millis(200)).await);
        }
        let before = peer.told.0;
        drop(first);
        Self {
            gateway: Gateway::far(&site),
            site,
            near,
            migration,
            before,
        }
    }

    async fn back(&self, near: InstanceId, live: Vec<MigrationId>) -> Peer {
        let peer = Peer::back(&self.gateway, &self.site, near, live).await;
        assert_eq!(peer.told.1, [self.before]);
        peer
    }

    /// What a near gateway that still has the migration is told: known, released.
    async fn ask(&self, peer: &mut Peer) -> (bool, bool) {
        let channels = vec![ChannelPosition {
            channel: 0,
            next_seq: 0,
        }];
        let migration = self.migration;
        peer.say(Control::Resume {
            migration,
            channels,
        })
        .await;
        let answer = peer.hear(|m| matches!(m, Control::Resumed { .. })).await;
        let Control::Resumed {
            known, released, ..
        } = answer
        else {
            unreachable!()
        };
        (known, released)
    }

    /// What it is told when it has given up and says so.
    async fn reset(&self, peer: &mut Peer) -> bool {
        peer.say(Control::Reset {
            migration: self.migration,
            channel: 0,
            after_seq: 0,
            code: ResetCode::Internal,
            released: false,
            reason: "a fault".into(),
        })
        .await;
        released_of(&peer.hear(|m| matches!(m, Control::Reset { .. })).await)
    }
}

fn released_of(reset: &Control) -> bool {
    let Control::Reset { released, .. } = reset else {
        panic!("{reset:?}");
    };
    *released
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_released_and_what_was_not_is_known_to_the_next_process() {
    for released in [true, false] {
        let scene = Scene::new(released).await;
        let live = vec![scene.migration];
        let mut peer = scene.back(scene.near, live.clone()).await;
        assert_eq!(scene.ask(&mut peer).await, (false, released));
        assert_eq!(scene.reset(&mut peer).await, released);
        // Closed: nobody asks any more.
        let migration = scene.migration;
        peer.say(Control::Close { migration }).await;
        assert_eq!(scene.ask(&mut peer).await, (false, false));
    }
}

/// Whoever is late to join the migration must not make a new one of it, of which nothing would be released.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_was_released_is_not_begun_again() {
    let scene = Scene::new(true).await;
    let live = vec![scene.migration];
    let mut peer = scene.back(scene.near, live.clone()).await;
    for (no, kind) in [(1, StreamKind::Opaque), (0, StreamKind::QemuMain)] {
        peer.say(open(scene.migration, no, kind, true, "127.0.0.1:1"))
            .await;
        let answer = peer.hear(|m| matches!(m, Control::Reset { .. })).await;
        assert!(released_of(&answer), "{answer:?}");
    }
    assert_eq!(scene.ask(&mut peer).await, (false, true));
    drop(peer);
    let mut peer = scene.back(scene.near, live).await;
    assert_eq!(scene.ask(&mut peer).await, (false, true));
}

/// Another process of the near gateway's name knows nothing of the one that waits.
#[tokio::test(flavor = "multi_thread")]
async fn another_near_gateway_does_not_have_a_release_forgotten() {
    let scene = Scene::new(true).await;
    let mut other = scene.back(new_id(), vec![]).await;
    let migration = scene.migration;
    other.say(Control::Close { migration }).await;
    other.say(Control::Ping { nonce: 7 }).await;
    other
        .hear(|m| matches!(m, Control::Pong { nonce: 7, .. }))
        .await;
    drop(other);
    let mut peer = scene.back(scene.near, vec![migration]).await;
    assert_eq!(scene.ask(&mut peer).await, (false, true));
    drop(peer);
    // The one that asked has no such migration any more.
    let mut peer = scene.back(scene.near, vec![]).await;
    assert_eq!(scene.ask(&mut peer).await, (false, false));
}
