//! Ends that must arrive: of a gateway that stops, of a channel whose connection was lost, and of a
//! peer that listens to nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use skyferry::wire::control::{ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, DataHeader, DataKind, MigrationId};
use skyferry_dedup::ChannelKind;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::rig::{
    DRAIN, Gateway, MEMORY_ALLOWED, Peer, Site, encoder, endpoint, frame_of, hello, open, soon,
};
use crate::sources::small_guest;

// --- a gateway that stops ---------------------------------------------------------------------

/// Passes packets on between a gateway and whoever `to` is, while it may.
async fn relay(to: SocketAddr, cut: Arc<AtomicBool>) -> SocketAddr {
    let outside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let inside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = outside.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut there, mut back) = (vec![0; 65536], vec![0; 65536]);
        let mut gateway = None;
        loop {
            tokio::select! {
                Ok((len, from)) = outside.recv_from(&mut there) => {
                    gateway = Some(from);
                    if !cut.load(Ordering::Relaxed) {
                        let _ = inside.send_to(&there[..len], to).await;
                    }
                }
                Ok((len, _)) = inside.recv_from(&mut back) => {
                    if let Some(gateway) = gateway && !cut.load(Ordering::Relaxed) {
                        let _ = outside.send_to(&back[..len], gateway).await;
                    }
                }
            }
        }
    });
    address
}

/// The far gateway is to end the destination's connection at once, not when its patience with the
/// link ends: packets that are lost at the end are sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_near_gateway_that_gives_up_says_so_before_it_stops() {
    let site = Site::new();
    let acceptor = endpoint(&site.identity("edge-b"));
    let cut = Arc::new(AtomicBool::new(false));
    let relay = relay(acceptor.local_addr().unwrap(), cut.clone()).await;
    let gateway = Gateway::near(&site, relay);
    let mut peer = Peer::accept(&acceptor, &hello("edge-b", (1, 1), [1; 16]))
        .await
        .unwrap();
    let mut sources = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let mut source = TcpStream::connect(gateway.ingress).await.unwrap();
        let guest = small_guest();
        source
            .write_all(&guest.bytes[..guest.commit.unwrap() / 2])
            .await
            .unwrap();
        sources.push(source);
        let message = peer.hear(|m| matches!(m, Control::Open { .. })).await;
        let Control::Open {
            migration, channel, ..
        } = message
        else {
            unreachable!()
        };
        peer.say(Control::Opened { migration, channel }).await;
        ids.push(migration);
    }
    gateway.signal("-TERM");
    gateway.expect_log(&["draining"]).await;
    tokio::time::sleep(DRAIN - Duration::from_millis(100)).await;
    cut.store(true, Ordering::Relaxed);
    gateway.expect_log(&["migration finished"]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    cut.store(false, Ordering::Relaxed);
    // In any order, as they end.
    while !ids.is_empty() {
        let message = peer.hear(|m| matches!(m, Control::Close { .. })).await;
        let Control::Close { migration } = message else {
            unreachable!()
        };
        ids.retain(|id| *id != migration);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_far_gateway_that_gives_up_says_so_before_it_stops() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let mut channels = Vec::new();
    let mut sockets = Vec::new();
    for _ in 0..3 {
        let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
        channel.send(&peer, b"hello", DataFlags::default()).await;
        let (socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
        let id = channel.migration;
        peer.hear(|m| matches!(m, Control::Ack { migration, .. } if *migration == id))
            .await;
        sockets.push(socket);
        channels.push(channel);
    }
    gateway.signal("-TERM");
    let mut ids: Vec<MigrationId> = channels.iter().map(|c| c.migration).collect();
    while !ids.is_empty() {
        let message = peer.hear(|m| matches!(m, Control::Reset { .. })).await;
        let Control::Reset {
            migration, code, ..
        } = message
        else {
            unreachable!()
        };
        assert_eq!(code, ResetCode::Busy);
        ids.retain(|id| *id != migration);
    }
}

// --- an end that was lost with its connection -------------------------------------------------

/// The destination's last words are on their way when the connection is lost, and with it the reset
/// behind them.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_was_lost_is_said_again_on_the_next_connection() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let instance = [77; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let (channel, mut socket) = peer.open_and_send(b"hello").await;
    let id = channel.migration;
    socket.write_all(b"last words").await.unwrap();
    soon("the last words", peer.quinn.accept_uni())
        .await
        .unwrap();
    drop(peer);
    gateway.expect_log(&["link from peer ended"]).await;
    socket.set_zero_linger().unwrap();
    drop(socket);
    gateway.expect_log(&["reset the connection"]).await;

    let mut peer = Peer::greeted(&gateway, &site, "edge-a", instance).await;
    peer.say(Control::Live {
        migrations: vec![id],
    })
    .await;
    peer.say(Control::Resume {
        migration: id,
        channels: vec![channel.position(0)],
    })
    .await;
    let message = peer.hear(|m| matches!(m, Control::Resumed { .. })).await;
    let Control::Resumed { known, .. } = message else {
        unreachable!()
    };
    assert!(known, "its last words are not delivered");
    let message = peer.hear(|m| matches!(m, Control::Reset { .. })).await;
    assert!(
        matches!(
            message,
            Control::Reset { migration, after_seq: 1, code: ResetCode::Endpoint, .. }
                if migration == id
        ),
        "{message:?}"
    );
}

// --- a peer that does not listen --------------------------------------------------------------

/// Were it kept, whatever waits to tell it something would wait for ever: the end of a migration,
/// and so that of a source, or of a gateway that drains.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_reads_no_messages_is_disconnected() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let peer = Peer::good(&gateway, &site).await;
    let Peer {
        mut send,
        quinn,
        recv,
        ..
    } = peer;
    let mut pings = Vec::new();
    for nonce in 0..4096 {
        Control::Ping { nonce }.encode(&mut pings);
    }
    let flood = async { while send.write_all(&pings).await.is_ok() {} };
    soon("a close", flood).await;
    let reason = soon("a close", quinn.closed()).await.to_string();
    assert!(reason.contains("control messages"), "{reason}");
    drop(recv);
    gateway.expect_good(&site).await;
}

// --- bytes that wait for a commit -------------------------------------------------------------

/// All channels of a link together may keep as much behind their candidates as one may.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_has_held_back_is_bounded_over_all_channels() {
    const CHANNELS: u8 = 4;
    const FRAMES: u32 = 200;
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = target.local_addr().unwrap().to_string();
    // Cheap on the wire, a quarter of a megabyte each where they are kept. The same for each channel.
    let zeroes = vec![0; 256 << 10];
    let mut encoder = encoder(ChannelKind::Opaque);
    let payloads: Vec<_> = (0..FRAMES)
        .map(|_| frame_of(&mut encoder, &zeroes).payload)
        .collect();
    let mut sockets = Vec::new();
    for number in 0..CHANNELS {
        // Each of its own migration: one that goes too far takes no other with it.
        let id = MigrationId([number; 16]);
        peer.say(open(id, 0, StreamKind::Opaque, false, &address))
            .await;
        for (seq, payload) in (0..).zip(&payloads) {
            let header = DataHeader {
                kind: DataKind::Frame,
                flags: DataFlags {
                    held: seq == 0,
                    ..DataFlags::default()
                },
                migration: id,
                channel: 0,
                seq,
                len: u32::try_from(payload.len()).unwrap(),
            };
            peer.data(header.encode(), payload).await;
        }
        sockets.push(soon("a dial", target.accept()).await.unwrap());
    }
    let peak = gateway.peak_over(Duration::from_secs(4)).await;
    assert!(
        peak < MEMORY_ALLOWED + (32 << 20),
        "{} MiB are resident",
        peak >> 20
    );
    let reset = timeout(
        Duration::from_secs(1),
        peer.hear(|m| matches!(m, Control::Reset { .. })),
    );
    assert!(reset.await.is_ok(), "nothing was refused");
    drop((sockets, peer));
    gateway.expect_good(&site).await;
}
