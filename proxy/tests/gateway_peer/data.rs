//! Data streams that are malformed, unasked for, or too many.

use std::time::Duration;

use skyferry::wire::control::{ResetCode, StreamKind};
use skyferry::wire::data::{HEADER_LEN, MAX_PAYLOAD};
use skyferry::wire::{Control, DataFlags, DataKind, MigrationId};
use skyferry_dedup::ChannelKind;

use crate::peer::{Channel, Peer, encoder, frame_of, header};
use crate::rig::{Gateway, MEMORY_ALLOWED, Site, read_to_end, soon};

const PLAIN: DataFlags = DataFlags {
    end: false,
    held: false,
    unheld: false,
};

#[tokio::test(flavor = "multi_thread")]
async fn malformed_headers_close_the_connection() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let good = header(DataKind::Frame, PLAIN, MigrationId([1; 16]), 0, 0);
    let with = |at: usize, value: u8| {
        let mut header = good;
        header[at] = value;
        header
    };
    let mut pages_with_flags = with(0, 2);
    pages_with_flags[1] = 1;
    let mut announced = with(0, 3);
    announced[1] = 0;
    let mut nothing = [0; HEADER_LEN];
    nothing[0] = 3;
    let cases = [
        ("kind 0", with(0, 0), "unknown message type 0"),
        ("kind 4", with(0, 4), "unknown message type 4"),
        ("announcements of a channel", announced, "`announcements`"),
        ("announcements", nothing, "announcements to the far side"),
        ("flag 8", with(1, 8), "`flags`"),
        ("flags on pages", pages_with_flags, "`flags`"),
        ("length", with(33, 0xff), "`length`"),
    ];
    for (what, header, words) in cases {
        let peer = Peer::good(&gateway, &site).await;
        peer.data(header, &[]).await;
        let text = peer.closed().await;
        assert!(text.contains(words), "{what}: {text}");
        gateway
            .expect_log(&["edge-a", "broke the protocol", words])
            .await;
    }
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_frame_numbers_close_the_connection() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    for seq in [20_000, u64::MAX] {
        let mut peer = Peer::good(&gateway, &site).await;
        let channel = peer.open_to_new_target(StreamKind::Opaque).await;
        peer.data(
            header(DataKind::Frame, PLAIN, channel.migration, seq, 0),
            &[],
        )
        .await;
        let text = peer.closed().await;
        assert!(
            text.contains(&format!("frame {seq} is more than")),
            "{text}"
        );
    }
    let mut peer = Peer::good(&gateway, &site).await;
    let channel = peer.open_to_new_target(StreamKind::Opaque).await;
    let end = DataFlags { end: true, ..PLAIN };
    peer.data(header(DataKind::Frame, end, channel.migration, 3, 0), &[])
        .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    peer.data(header(DataKind::Frame, PLAIN, channel.migration, 4, 0), &[])
        .await;
    let text = peer.closed().await;
    assert!(text.contains("frame 4 lies behind the end"), "{text}");
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_unknown_migrations_do_not_pile_up() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let peer = Peer::good(&gateway, &site).await;
    let payload = vec![1; 64 << 10];
    let quinn = peer.quinn.clone();
    let flood = tokio::spawn(async move {
        for number in 0_u64.. {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&number.to_le_bytes());
            let header = header(DataKind::Frame, PLAIN, MigrationId(id), number, 65_536);
            let Ok(mut stream) = quinn.open_uni().await else {
                return;
            };
            let payload = payload.clone();
            tokio::spawn(async move {
                let _ = stream.write_all(&header).await;
                let _ = stream.write_all(&payload).await;
                let _ = stream.finish();
            });
        }
    });
    let peak = gateway.peak_over(Duration::from_secs(4)).await;
    flood.abort();
    assert!(peak < MEMORY_ALLOWED, "{} MiB", peak >> 20);
    drop(peer);
    gateway.expect_good(&site).await;
}

/// Streams at once that promise the largest payload and send all of it but the last byte.
async fn almost_send(peer: &Peer, count: usize, header: impl Fn(u64) -> [u8; 34]) {
    for number in 0..count as u64 {
        let Ok(stream) =
            tokio::time::timeout(Duration::from_millis(500), peer.quinn.open_uni()).await
        else {
            return;
        };
        let (mut stream, header) = (stream.unwrap(), header(number));
        tokio::spawn(async move {
            let _ = stream.write_all(&header).await;
            let chunk = vec![1; 1 << 16];
            for _ in 0..(MAX_PAYLOAD as usize >> 16) - 1 {
                if stream.write_all(&chunk).await.is_err() {
                    return;
                }
            }
            // Keeps the stream open.
            tokio::time::sleep(Duration::from_secs(60)).await;
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promised_payloads_take_no_memory_beyond_the_limits() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    for what in [
        "frames in order",
        "one frame many times",
        "pages nobody asked for",
    ] {
        let mut peer = Peer::good(&gateway, &site).await;
        let channel = peer.open_to_new_target(StreamKind::Opaque).await;
        let id = channel.migration;
        almost_send(&peer, 2048, move |number| match what {
            "frames in order" => header(DataKind::Frame, PLAIN, id, number, MAX_PAYLOAD),
            "one frame many times" => header(DataKind::Frame, PLAIN, id, 0, MAX_PAYLOAD),
            _ => header(DataKind::Pages, PLAIN, id, number, MAX_PAYLOAD),
        })
        .await;
        let peak = gateway.peak_over(Duration::from_secs(4)).await;
        // Behind the limits of the gateway comes what QUIC's window lets wait for it.
        let allowed = MEMORY_ALLOWED + (64 << 20);
        assert!(peak < allowed, "{what}: {} MiB", peak >> 20);
    }
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_nobody_asked_for_are_not_kept() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
    let mut pages = 500_u32.to_le_bytes().to_vec();
    for index in 0..500_u32 {
        pages.extend_from_slice(&index.to_le_bytes());
        pages.extend_from_slice(&4096_u16.to_le_bytes());
        pages.extend_from_slice(&[7; 4096]);
    }
    let len = u32::try_from(pages.len()).unwrap();
    for seq in 0..200 {
        peer.data(
            header(DataKind::Pages, PLAIN, channel.migration, seq, len),
            &pages,
        )
        .await;
    }
    let peak = gateway.peak_over(Duration::from_secs(3)).await;
    assert!(peak < MEMORY_ALLOWED, "{} MiB", peak >> 20);
    // The channel itself has taken no harm.
    channel.send(&peer, b"hello", PLAIN).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    peer.hear(|message| matches!(message, Control::Ack { next_seq: 1, .. }))
        .await;
    drop(peer);
    gateway.expect_good(&site).await;
    assert_eq!(read_to_end(&mut socket).await, (b"hello".to_vec(), false));
}

/// Sends a payload as the first frame and returns why the channel is reset.
async fn refused(gateway: &Gateway, site: &Site, payload: &[u8]) -> (ResetCode, String) {
    let mut peer = Peer::good(gateway, site).await;
    let mut channel: Channel = peer.open_to_new_target(StreamKind::Opaque).await;
    channel.send_payload(&peer, payload, PLAIN).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    let answer = peer.hear_reset(channel.migration, 0).await;
    assert_eq!(
        read_to_end(&mut socket).await,
        (vec![], false),
        "nothing of it is passed on"
    );
    gateway
        .expect_log(&[&channel.migration.to_string(), &answer.1])
        .await;
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn bombs_and_broken_frames_reset_the_channel_only() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut encoder = encoder(ChannelKind::Opaque);
    let frame = frame_of(&mut encoder, &b"to be or not to be ".repeat(50))
        .payload
        .to_vec();

    // 100 KB of zeroes in a few bytes, announced as 1000.
    let zeroes = frame_of(&mut self::encoder(ChannelKind::Opaque), &vec![0; 100_000]).payload;
    let (code, reason) = refused(&gateway, &site, &bomb(literals_of(&zeroes))).await;
    assert_eq!(code, ResetCode::Internal, "{reason}");
    assert!(
        reason.contains("do not decompress as announced"),
        "{reason}"
    );

    let mut wrong_digest = frame.clone();
    wrong_digest[4] ^= 1;
    let (code, reason) = refused(&gateway, &site, &wrong_digest).await;
    assert_eq!(code, ResetCode::DigestMismatch, "{reason}");

    for broken in [&[0xff][..], &frame[..frame.len() / 2], &[0, 0], &[1; 100]] {
        let (code, reason) = refused(&gateway, &site, broken).await;
        assert_eq!(code, ResetCode::Internal, "{reason}");
    }
    gateway.expect_good(&site).await;
}

/// Takes a number off the front.
pub(crate) fn number(rest: &mut &[u8]) -> usize {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (&byte, behind) = rest.split_first().unwrap();
        *rest = behind;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// The packed literals of a frame without references (`docs/protocol.md`, page frames).
fn literals_of(frame: &[u8]) -> &[u8] {
    let mut rest = &frame[1..];
    number(&mut rest);
    rest = &rest[16..];
    let program = number(&mut rest);
    assert_eq!(number(&mut rest), 0, "references");
    number(&mut rest);
    &rest[program..]
}

/// A frame of 1000 other bytes that brings these packed literals.
fn bomb(literals: &[u8]) -> Vec<u8> {
    let mut frame = vec![1, 0xe8, 0x07];
    frame.extend_from_slice(&[0; 16]);
    // Two bytes of program, no references, 1000 bytes of literals; `other` with a count of 1000.
    frame.extend_from_slice(&[2, 0, 0xe8, 0x07, 0x88, 0x7d]);
    frame.extend_from_slice(literals);
    frame
}
