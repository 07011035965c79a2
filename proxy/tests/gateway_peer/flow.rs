//! How much a near gateway has on its way to a peer that acknowledges late, selectively or never.

use std::collections::BTreeMap;
use std::time::Duration;

use skyferry::wire::control::{ResetCode, StreamKind};
use skyferry::wire::data::HEADER_LEN;
use skyferry::wire::{Control, DataFlags, DataHeader, MigrationId};
use skyferry_dedup::{ChannelDecoder, ChannelKind, DecodeLimits, DomainKey, MemoryStore};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::near::{Rig, frame};
use crate::peer::Peer;
use crate::rig::{Gateway, MEMORY_ALLOWED, Site, read_to_end, soon};

/// Frames that a direction may have undelivered (`docs/protocol.md`).
const FRAMES_IN_FLIGHT: u64 = 8192;
/// The gauge of bytes that were accepted and are not delivered.
const IN_FLIGHT: &str = "skyferry_in_flight_bytes";

/// Bytes that begin like no protocol, do not get smaller, and differ from those of another seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes[0] = b'x';
    bytes
}

/// Connects a source that begins with `first`; its channel counts as reached.
async fn opened(rig: &Rig, peer: &mut Peer, first: &[u8]) -> (TcpStream, MigrationId, DomainKey) {
    let mut source = soon("a connection", TcpStream::connect(rig.gateway.ingress))
        .await
        .unwrap();
    source.set_nodelay(true).unwrap();
    source.write_all(first).await.unwrap();
    let open = peer.hear(|m| matches!(m, Control::Open { .. })).await;
    let Control::Open {
        migration, domain, ..
    } = open
    else {
        unreachable!()
    };
    peer.say(Control::Opened {
        migration,
        channel: 0,
    })
    .await;
    (source, migration, DomainKey::from_bytes(domain))
}

/// The stream that frames stand for.
fn decoded(frames: &BTreeMap<u64, Vec<u8>>, domain: &DomainKey) -> Vec<u8> {
    let store = MemoryStore::new(1 << 20);
    let mut decoder = ChannelDecoder::new(ChannelKind::Opaque, domain, DecodeLimits::default());
    let mut bytes = Vec::new();
    for payload in frames.values().filter(|payload| !payload.is_empty()) {
        let mut pending = decoder.begin(payload, &store).unwrap();
        bytes.extend(decoder.finish(&mut pending, &store).unwrap().bytes);
    }
    bytes
}

/// A frame for each byte: far more of them fit into the budget of bytes than a peer puts in order,
/// and one too many would cost the connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_single_bytes_stays_within_the_limit_of_frames() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut bytes = noise(0, 12_000);
    let (mut source, migration, domain) = opened(&rig, &mut peer, &bytes[..1]).await;
    let mut frames = BTreeMap::new();
    let mut written = 1;
    // The next byte when the one before has come as a frame, so that each gets one of its own.
    while let Ok((header, payload)) = timeout(Duration::from_secs(2), frame(&peer)).await {
        frames.insert(header.seq, payload);
        assert!(
            header.seq < FRAMES_IN_FLIGHT,
            "more frames in flight than a peer may be sent"
        );
        source.write_all(&bytes[written..=written]).await.unwrap();
        written += 1;
    }
    // As long as the machine did not stand still for seconds, that was the limit.
    assert!(frames.len() > 4096, "only {} frames", frames.len());
    let held = rig.gateway.resident();
    assert!(held < MEMORY_ALLOWED, "{} MiB", held >> 20);

    // The source notices nothing but that it has to wait.
    let rest = bytes.split_off(written);
    let writing = tokio::spawn({
        let rest = rest.clone();
        async move {
            for byte in rest.chunks(1) {
                source.write_all(byte).await.unwrap();
            }
            source.shutdown().await.unwrap();
            source
        }
    });
    bytes.extend(rest);
    let mut delivered = 0;
    let mut end = false;
    while !end || delivered < u64::try_from(frames.len()).unwrap() {
        while frames.contains_key(&delivered) {
            delivered += 1;
        }
        peer.say(Control::Ack {
            migration,
            channel: 0,
            next_seq: delivered,
        })
        .await;
        if !end || delivered < u64::try_from(frames.len()).unwrap() {
            let (header, payload) = frame(&peer).await;
            end |= header.flags.end;
            assert!(frames.insert(header.seq, payload).is_none());
        }
    }
    soon("the last byte", writing).await.unwrap();
    assert!(decoded(&frames, &domain) == bytes, "the bytes differ");
    rig.expect_good(&mut peer).await;
}

/// A peer stops a stream whose frame it has from an earlier connection. That is not the end of this
/// one: the frames behind it follow.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_the_peer_stops_is_no_lost_connection() {
    /// So little that a frame can't be written before the peer reads of it.
    const WINDOW: u32 = 4096;
    let mut transport = quinn::TransportConfig::default();
    transport.stream_receive_window(WINDOW.into());
    let rig = Rig::with(crate::rig::MAX_MIGRATIONS, Some(transport));
    let mut peer = rig.accept().await;
    let (mut source, migration, _) = opened(&rig, &mut peer, &noise(0, 32 << 10)).await;
    let (mut seq, mut stopped) = (0, 0);
    while stopped < 4 {
        let mut stream = soon("a frame", peer.quinn.accept_uni()).await.unwrap();
        let mut header = [0; HEADER_LEN];
        soon("its header", stream.read_exact(&mut header))
            .await
            .unwrap();
        let header = DataHeader::decode(&header).unwrap();
        assert_eq!((header.migration, header.seq), (migration, seq));
        if header.len > 2 * WINDOW && seq % 2 == 0 {
            stopped += 1;
            stream.stop(0_u32.into()).unwrap();
        } else {
            let payload = soon("all of it", stream.read_to_end(4 << 20)).await;
            assert_eq!(payload.unwrap().len(), header.len as usize);
        }
        seq += 1;
        peer.say(Control::Ack {
            migration,
            channel: 0,
            next_seq: seq,
        })
        .await;
        source.write_all(&noise(seq, 32 << 10)).await.unwrap();
    }
    let (header, _) = frame(&peer).await;
    assert_eq!((header.migration, header.seq), (migration, seq));
    assert!(peer.quinn.close_reason().is_none());
    rig.expect_good(&mut peer).await;
}

/// What was accepted counts as in flight until it is delivered or the channel is over, whatever
/// ended it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_stays_in_flight_behind_the_end_of_a_channel() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    for end in ["refusal", "cancel", "death"] {
        let (mut source, migration, _) = opened(&rig, &mut peer, &noise(0, 100_000)).await;
        let some = |bytes| bytes >= 100_000.0;
        rig.gateway.expect_metric(IN_FLIGHT, some).await;
        let reset = |code, reason: &str| Control::Reset {
            migration,
            channel: 0,
            after_seq: 0,
            code,
            released: false,
            reason: reason.into(),
        };
        match end {
            "refusal" => {
                peer.say(reset(ResetCode::NotAllowed, "not here")).await;
                read_to_end(&mut source).await;
            }
            "cancel" => {
                drop(source);
                // The destination gives up on a stream that is not whole.
                peer.say(reset(ResetCode::Endpoint, "cut off")).await;
            }
            _ => {
                source.set_zero_linger().unwrap();
                drop(source);
                peer.hear_reset(migration, 0).await;
                // What was accepted would still be delivered.
                rig.gateway.expect_metric(IN_FLIGHT, some).await;
                peer.say(reset(ResetCode::Unknown, "over here")).await;
            }
        }
        let none = |bytes: f64| bytes.abs() < 0.5;
        rig.gateway.expect_metric(IN_FLIGHT, none).await;
        rig.gateway
            .expect_log(&["migration finished", &migration.to_string()])
            .await;
    }
}

/// The same on the way back: a destination's bytes that the near gateway never took.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_stays_in_flight_at_the_far_gateway() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
    channel.send(&peer, b"hello", DataFlags::default()).await;
    let (mut target, _) = soon("a dial", channel.target.accept()).await.unwrap();
    target.write_all(&noise(0, 100_000)).await.unwrap();
    let some = |bytes| bytes >= 100_000.0;
    gateway.expect_metric(IN_FLIGHT, some).await;
    peer.say(Control::Close {
        migration: channel.migration,
    })
    .await;
    gateway
        .expect_metric(IN_FLIGHT, |bytes| bytes.abs() < 0.5)
        .await;
}
