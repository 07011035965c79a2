//! As many sources as a gateway takes, and some more.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use skyferry::wire::control::{ChannelPosition, MAX_MIGRATIONS};
use skyferry::wire::{Control, MigrationId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::near::{Rig, frame};
use crate::peer::Peer;
use crate::rig::{read_to_end, soon};
use crate::sources::small_guest;

/// Connections of one listener that may be silent (`docs/troubleshooting.md`, reason `limit`).
const MAX_SILENT: usize = 512;

/// Connects from an address that no test listens on, so that a thousand of these take no port that
/// another test has just chosen.
async fn connect(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    soon("a connection", socket.connect(to)).await.unwrap()
}

/// The next migration that is opened; its target counts as reached.
async fn next_opened(peer: &mut Peer) -> MigrationId {
    let open = peer.hear(|m| matches!(m, Control::Open { .. })).await;
    let Control::Open {
        migration, channel, ..
    } = open
    else {
        unreachable!()
    };
    peer.say(Control::Opened { migration, channel }).await;
    migration
}

/// With all migrations that two gateways may have between them, resuming takes more messages than
/// wait for the wire at once, and the list of what is alive is as long as it may be.
#[tokio::test(flavor = "multi_thread")]
async fn all_migrations_that_a_link_may_have_are_resumed() {
    let rig = Rig::with(4096, None);
    let mut peer = rig.accept().await;
    let mut main = connect(rig.gateway.ingress).await;
    let guest = small_guest();
    main.write_all(&guest.bytes[..guest.commit.unwrap() / 2])
        .await
        .unwrap();
    let first = next_opened(&mut peer).await;
    let mut ids = HashSet::from([first]);
    // None of these belongs to a guest, so each is a migration of its own.
    while ids.len() < MAX_MIGRATIONS {
        let mut source = connect(rig.gateway.ingress).await;
        source.write_all(b"something by itself").await.unwrap();
        assert!(ids.insert(next_opened(&mut peer).await));
    }
    let mut one_more = connect(rig.gateway.ingress).await;
    one_more.write_all(b"something by itself").await.unwrap();
    assert_eq!(read_to_end(&mut one_more).await, (vec![], false));
    rig.gateway.expect_log(&["too many migrations"]).await;

    drop(peer);
    let mut peer = rig.accept().await;
    let live = peer.hear(|m| matches!(m, Control::Live { .. })).await;
    let Control::Live { migrations } = live else {
        unreachable!()
    };
    assert_eq!(migrations.len(), ids.len());
    assert!(migrations.into_iter().collect::<HashSet<_>>() == ids);
    let mut resumed = HashSet::new();
    while resumed.len() < ids.len() {
        let resume = peer.hear(|m| matches!(m, Control::Resume { .. })).await;
        let Control::Resume { migration, .. } = resume else {
            unreachable!()
        };
        assert!(resumed.insert(migration));
    }
    assert!(resumed == ids);
    // And it goes on.
    peer.say(Control::Resumed {
        migration: first,
        known: true,
        released: false,
        channels: vec![ChannelPosition {
            channel: 0,
            next_seq: 0,
        }],
    })
    .await;
    let (header, _) = frame(&peer).await;
    assert_eq!((header.migration, header.seq), (first, 0));
}

/// Port scans and half-open connections make room for a source.
#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_silent_connection_makes_room_for_a_source() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut silent = Vec::new();
    for number in 0..MAX_SILENT {
        let mut connection = connect(rig.gateway.ingress).await;
        if number % 2 == 0 {
            // Less than any protocol begins with.
            connection.write_all(b"Q").await.unwrap();
        }
        silent.push(connection);
    }
    let mut source = connect(rig.gateway.ingress).await;
    source.write_all(b"a source of its own").await.unwrap();
    let id = next_opened(&mut peer).await;
    let (header, _) = frame(&peer).await;
    assert_eq!(header.migration, id);
    rig.gateway
        .expect_log(&["too many silent connections; the oldest is closed"])
        .await;
    let mut rest = silent.split_off(1);
    let (bytes, _) = read_to_end(&mut silent[0]).await;
    assert!(bytes.is_empty());
    // The others, and the source, stay.
    rest.push(source);
    for connection in [0, 1, MAX_SILENT / 2, MAX_SILENT - 2, MAX_SILENT - 1] {
        let mut byte = [0];
        let heard = rest[connection].read(&mut byte);
        let silence = timeout(Duration::from_millis(20), heard).await;
        assert!(silence.is_err(), "connection {connection} was closed");
    }
}
