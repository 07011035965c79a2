//! Ends that must arrive: of a gateway that stops, of a channel whose connection was lost, and of a
//! peer that listens to nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use skyferry::wire::control::{ChannelPosition, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, DataHeader, DataKind, MigrationId};
use skyferry_dedup::ChannelKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::near::{Rig, frame};
use crate::peer::{Peer, clock, encoder, endpoint, frame_of, header, hello, open};
use crate::rig::{DRAIN, Gateway, MEMORY_ALLOWED, Site, read_to_end, soon};
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
    peer.lose(&gateway).await;
    socket.set_zero_linger().unwrap();
    drop(socket);
    gateway.expect_log(&["reset the connection"]).await;

    let mut peer = Peer::back(&gateway, &site, instance, vec![id]).await;
    let (known, _) = peer.resume(id, vec![channel.position(0)]).await;
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

// --- an end in order whose last acknowledgement was lost ----------------------------------------

const END: DataFlags = DataFlags {
    end: true,
    held: false,
    unheld: false,
};

/// Long enough for whatever happens at once to have happened.
const MOMENT: Duration = Duration::from_millis(200);

/// Takes all frames of a migration up to the end of a channel, and acknowledges that channel's.
/// Returns how many it had.
async fn take_up_to_the_end(peer: &mut Peer, migration: MigrationId, channel: u32) -> u64 {
    let mut next_seq = 0;
    loop {
        let (header, _) = frame(peer).await;
        if header.channel != channel {
            continue;
        }
        next_seq = next_seq.max(header.seq + 1);
        if header.flags.end {
            break;
        }
    }
    peer.say(Control::Ack {
        migration,
        channel,
        next_seq,
    })
    .await;
    next_seq
}

/// Everything has been delivered in both directions, and the far gateway is done with the channel; its
/// last word on that was lost with the connection. It remembers, alone or beside another channel.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_in_order_is_acknowledged_again_by_the_far_gateway() {
    for beside_another in [false, true] {
        let site = Site::new();
        let gateway = Gateway::far(&site);
        let instance = [78; 16];
        let mut peer = Peer::with_instance(&gateway, &site, instance).await;
        let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
        let id = channel.migration;
        let mut positions = vec![channel.position(1)];
        let another = TcpListener::bind("127.0.0.1:0").await.unwrap();
        if beside_another {
            let address = another.local_addr().unwrap().to_string();
            peer.say(open(id, 1, StreamKind::Opaque, true, &address))
                .await;
            peer.hear(|m| matches!(m, Control::Opened { channel: 1, .. }))
                .await;
            positions.push(ChannelPosition {
                channel: 1,
                next_seq: 0,
            });
        }
        channel.send(&peer, b"hello", DataFlags::default()).await;
        channel.send_payload(&peer, &[], END).await;
        let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
        assert_eq!(read_to_end(&mut socket).await, (b"hello".to_vec(), true));
        drop(socket);
        let (end, _) = frame(&peer).await;
        assert!(end.flags.end && end.seq == 0);
        peer.say(Control::Ack {
            migration: id,
            channel: 0,
            next_seq: 1,
        })
        .await;
        // Behind the acknowledgement, and time for the channel's task.
        assert!(peer.hear_up_to_now(|_| false).await.is_none());
        tokio::time::sleep(MOMENT).await;
        peer.lose(&gateway).await;

        let mut peer = Peer::back(&gateway, &site, instance, vec![id]).await;
        let (known, channels) = peer.resume(id, positions.clone()).await;
        assert!(
            known && channels.contains(&channel.position(2)),
            "{channels:?}"
        );
        assert_eq!(channels.len(), 1 + usize::from(beside_another));
        peer.hear(|m| {
            matches!(
                m,
                Control::Ack {
                    channel: 0,
                    next_seq: 2,
                    ..
                }
            )
        })
        .await;
        // Until the near gateway is done with it, too.
        peer.say(Control::Close { migration: id }).await;
        gateway
            .expect_log(&["migration finished", &id.to_string()])
            .await;
        let forgotten = peer.resume(id, positions).await;
        assert_eq!(forgotten, (false, vec![]));
    }
}

/// The same the other way round: the far gateway would take a migration that is not alive any more for
/// one that was given up.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_in_order_is_acknowledged_again_by_the_near_gateway() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut source = TcpStream::connect(rig.gateway.ingress).await.unwrap();
    source.write_all(b"not a migration").await.unwrap();
    source.shutdown().await.unwrap();
    let id = peer.take_open().await;
    let frames = take_up_to_the_end(&mut peer, id, 0).await;
    peer.data(header(DataKind::Frame, END, id, 0, 0), &[]).await;
    assert_eq!(read_to_end(&mut source).await, (vec![], true));
    rig.gateway
        .expect_log(&["migration finished", &id.to_string()])
        .await;
    drop(peer);

    let position = |next_seq| ChannelPosition {
        channel: 0,
        next_seq,
    };
    let resume = Control::Resume {
        migration: id,
        channels: vec![position(1)],
    };
    // Resumed comes before Close is acted on, and says nothing of it; what is asked behind it does.
    for close_is_heard in [false, true] {
        let mut peer = rig.accept().await;
        peer.hear(|m| matches!(m, Control::Live { migrations } if *migrations == [id]))
            .await;
        peer.hear(|m| matches!(m, Control::Ack { migration, next_seq: 1, .. } if *migration == id))
            .await;
        peer.hear(|m| *m == resume).await;
        peer.hear(|m| matches!(m, Control::Close { migration } if *migration == id))
            .await;
        peer.say(Control::Resumed {
            migration: id,
            known: true,
            released: false,
            channels: vec![position(frames)],
        })
        .await;
        let question = peer.hear(|m| matches!(m, Control::Ping { .. })).await;
        if let Control::Ping { nonce } = question
            && close_is_heard
        {
            peer.say(Control::Pong {
                nonce,
                clock: clock(),
            })
            .await;
        }
        assert!(peer.hear_up_to_now(|_| false).await.is_none());
        tokio::time::sleep(MOMENT).await;
        drop(peer);
    }

    // It has been heard.
    let mut peer = rig.accept().await;
    peer.hear(|m| matches!(m, Control::Live { migrations } if migrations.is_empty()))
        .await;
    rig.expect_good(&mut peer).await;
}

/// A channel that ends between Resume and Resumed: what was sent before may still arrive. Before it is
/// known where the far gateway stands it is told nothing of the channel; but of one that was the last
/// Resumed will not ask any more.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_in_order_beside_a_resumption_is_acknowledged_by_the_near_gateway() {
    for beside_another in [false, true] {
        let rig = Rig::new();
        let mut peer = rig.accept().await;
        let mut sources = Vec::new();
        let mut id = MigrationId([0; 16]);
        for channel in 0..=u32::from(beside_another) {
            let mut source = TcpStream::connect(rig.gateway.ingress).await.unwrap();
            source.write_all(b"not a migration").await.unwrap();
            let message = peer.hear(|m| matches!(m, Control::Open { .. })).await;
            let Control::Open { migration, .. } = message else {
                unreachable!()
            };
            id = migration;
            peer.say(Control::Opened { migration, channel }).await;
            sources.push(source);
        }
        sources[0].shutdown().await.unwrap();
        let frames = take_up_to_the_end(&mut peer, id, 0).await;
        drop(peer);

        let mut peer = rig.accept().await;
        peer.hear(|m| matches!(m, Control::Resume { .. })).await;
        peer.say(Control::Ack {
            migration: id,
            channel: 0,
            next_seq: frames,
        })
        .await;
        peer.data(header(DataKind::Frame, END, id, 0, 0), &[]).await;
        assert_eq!(read_to_end(&mut sources[0]).await, (vec![], true));
        let closed = |m: &Control| matches!(m, Control::Close { migration } if *migration == id);
        let is_ack = |m: &Control| matches!(m, Control::Ack { channel: 0, .. });
        if beside_another {
            // Time for an acknowledgement, were it said at once.
            tokio::time::sleep(MOMENT).await;
            let early = peer.hear_up_to_now(is_ack).await;
            assert!(early.is_none(), "{early:?} before Resumed");
            let position = |channel, next_seq| ChannelPosition { channel, next_seq };
            peer.say(Control::Resumed {
                migration: id,
                known: true,
                released: false,
                channels: vec![position(0, frames), position(1, 0)],
            })
            .await;
        }
        let message = peer.hear(|m| closed(m) || is_ack(m)).await;
        assert!(
            matches!(message, Control::Ack { next_seq: 1, .. }),
            "{message:?}"
        );
        if !beside_another {
            peer.hear(closed).await;
        }
    }
}

/// One that overtakes the word on where a side stands would contradict it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_acknowledged_on_a_connection_that_the_channel_is_not_on() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let instance = [79; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let (mut channel, mut socket) = peer.open_and_send(b"hello").await;
    let id = channel.migration;
    // More than a socket takes from which nobody reads.
    for _ in 0..64 {
        let zeroes = [0; 256 << 10];
        channel.send(&peer, &zeroes, DataFlags::default()).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    peer.lose(&gateway).await;

    let mut peer = Peer::back(&gateway, &site, instance, vec![id]).await;
    let mut read = 0;
    let mut buffer = vec![0; 1 << 20];
    let wait = Duration::from_millis(300);
    while let Ok(count) = timeout(wait, socket.read(&mut buffer)).await {
        read += count.unwrap();
    }
    assert!(read > 1 << 20, "{read}");
    peer.say(Control::Resume {
        migration: id,
        channels: vec![channel.position(0)],
    })
    .await;
    let message = peer
        .hear(|m| matches!(m, Control::Ack { .. } | Control::Resumed { .. }))
        .await;
    let Control::Resumed { channels, .. } = message else {
        panic!("{message:?}")
    };
    let position = channels[0].next_seq;
    peer.hear(|m| matches!(m, Control::Ack { next_seq, .. } if *next_seq == position))
        .await;
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
