//! What sources do at a listener: strays among them, and sources that leave.

use skyferry::wire::control::StreamKind;
use skyferry::wire::{Control, MigrationId};
use skyferry_core::qemu::synthetic::SyntheticStream;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::near::Rig;
use crate::peer::Peer;
use crate::rig::soon;

/// A guest of some pages, whose whole stream fits into the buffers of a socket.
pub(crate) fn small_guest() -> SyntheticStream {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", 8)])
        .rounds(1)
        .device_bytes(500)
        .build()
}

async fn connect(rig: &Rig) -> TcpStream {
    soon("a connection", TcpStream::connect(rig.gateway.ingress))
        .await
        .unwrap()
}

/// The next channel that is opened; it counts as reached.
async fn next_opened(peer: &mut Peer) -> (MigrationId, u32, StreamKind) {
    let open = peer.hear(|m| matches!(m, Control::Open { .. })).await;
    let Control::Open {
        migration,
        channel,
        kind,
        ..
    } = open
    else {
        unreachable!()
    };
    peer.say(Control::Opened { migration, channel }).await;
    (migration, channel, kind)
}

/// A scanner that finds the port of a guest under way has a migration of its own: its bytes do not
/// reach the guest's destination as a channel, and its end is not the end of the guest's migration.
#[tokio::test(flavor = "multi_thread")]
async fn a_stray_does_not_join_a_guest_under_way() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let guest = small_guest();
    let mut source = connect(&rig).await;
    let (begin, end) = guest.bytes.split_at(guest.commit.unwrap() / 2);
    source.write_all(begin).await.unwrap();
    let (id, no, kind) = next_opened(&mut peer).await;
    assert_eq!(kind, StreamKind::QemuMain);

    let mut stray = connect(&rig).await;
    stray.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let (stray_id, _, kind) = next_opened(&mut peer).await;
    assert_eq!(kind, StreamKind::Opaque);
    assert!(stray_id != id, "the stray is a channel of the guest");
    stray.set_zero_linger().unwrap();
    drop(stray);
    peer.hear_reset(stray_id, 0).await;

    source.write_all(end).await.unwrap();
    let commit = peer.hear(|m| matches!(m, Control::Commit { .. })).await;
    let Control::Commit {
        migration,
        channel,
        digests,
        ..
    } = commit
    else {
        unreachable!()
    };
    assert_eq!((migration, channel), (id, no));
    assert_eq!(digests.len(), 1);
}

/// The same while only one of the guest's further channels is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_stray_does_not_join_a_guest_whose_main_channel_is_to_come() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut further = connect(&rig).await;
    further
        .write_all(b"\x11\x22\x33\x44\0\0\0\x01 and the rest of a packet")
        .await
        .unwrap();
    rig.gateway.expect_log(&["migration begins"]).await;
    let mut stray = connect(&rig).await;
    stray.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let (stray_id, ..) = next_opened(&mut peer).await;

    let guest = small_guest();
    let mut source = connect(&rig).await;
    source
        .write_all(&guest.bytes[..guest.commit.unwrap() / 2])
        .await
        .unwrap();
    let (id, _, kind) = next_opened(&mut peer).await;
    assert_eq!(kind, StreamKind::QemuMain);
    let (further_id, _, kind) = next_opened(&mut peer).await;
    assert_eq!(kind, StreamKind::Opaque);
    assert!(further_id == id, "the guest's channels are apart");
    assert!(stray_id != id, "the stray is a channel of the guest");
}

/// A source that has closed its socket is dead or was cancelled, and in the latter case its guest
/// runs again: what it sent is whole, and is not committed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_has_closed_is_never_committed() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let guest = small_guest();
    for closed in [true, false] {
        // All of it, and the end behind it, is there before the gateway reads the first byte.
        rig.gateway.stop();
        let mut source = connect(&rig).await;
        source.write_all(&guest.bytes).await.unwrap();
        if closed {
            drop(source);
        } else {
            source.shutdown().await.unwrap();
        }
        rig.gateway.signal("-CONT");
        let (id, no, kind) = next_opened(&mut peer).await;
        assert_eq!(kind, StreamKind::QemuMain);
        let outcome = peer
            .hear(|m| matches!(m, Control::Commit { .. } | Control::Reset { .. }))
            .await;
        let Control::Reset {
            migration,
            channel,
            reason,
            ..
        } = outcome
        else {
            panic!("a commit was asked for in the name of a source that is gone");
        };
        assert_eq!((migration, channel), (id, no));
        assert_eq!(reason, "the source left before the commit");
        peer.hear(|m| matches!(m, Control::Close { migration } if *migration == id))
            .await;
        rig.gateway
            .expect_log(&["migration finished", &id.to_string(), "cancelled"])
            .await;
    }
}
