//! Control messages that are malformed, out of place, or ask for what may not be.

use skyferry::wire::control::{ChannelPosition, Interest, MAX_MESSAGE, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, MigrationId};
use tokio::net::TcpListener;

use crate::peer::{Peer, encoded, open};
use crate::rig::{Gateway, MAX_CHANNELS, MAX_MIGRATIONS, Site, read_to_end, soon};

const ID: MigrationId = MigrationId([5; 16]);

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_close_the_connection() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut cut = encoded(&Control::Ping { nonce: 1 });
    cut[0] -= 1;
    cut.truncate(cut.len() - 1);
    let mut long = encoded(&Control::Ping { nonce: 1 });
    long[0] += 1;
    long.push(0);
    let cases: [(&str, Vec<u8>, &str); 6] = [
        (
            "oversize",
            (MAX_MESSAGE + 1).to_le_bytes().to_vec(),
            "a control message of 65537 bytes",
        ),
        (
            "huge",
            u32::MAX.to_le_bytes().to_vec(),
            "a control message of 4294967295 bytes",
        ),
        ("empty", vec![0; 4], "a control message of 0 bytes"),
        (
            "unknown type",
            vec![1, 0, 0, 0, 200],
            "unknown message type 200",
        ),
        ("cut field", cut, "ends inside a field"),
        ("bytes behind", long, "1 bytes are left over"),
    ];
    for (what, bytes, words) in cases {
        let mut peer = Peer::good(&gateway, &site).await;
        peer.raw(&bytes).await;
        let text = peer.closed().await;
        assert!(
            text.contains("broke the protocol") && text.contains(words),
            "{what}: {text}"
        );
        gateway.expect_log(&["edge-a", words]).await;
    }
    gateway.expect_good(&site).await;
}

/// Each may keep a task and a stream of announcements.
#[tokio::test(flavor = "multi_thread")]
async fn interest_is_taken_once_on_a_connection() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    for _ in 0..2 {
        peer.say(Control::Interest(Interest {
            store: [1; 16],
            capacity_pages: u64::MAX,
            segments: vec![(1, u32::MAX), (1, 0)],
            domains: vec![[2; 32]; 1000],
        }))
        .await;
    }
    let text = peer.closed().await;
    assert!(text.contains("a second interest"), "{text}");
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_for_the_other_side_close_the_connection() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let misplaced = [
        Control::Opened {
            migration: ID,
            channel: 0,
        },
        Control::Committed { migration: ID },
        Control::Resumed {
            migration: ID,
            known: true,
            released: true,
            channels: vec![],
        },
        crate::peer::hello("edge-a", (1, 1), [9; 16]),
    ];
    for message in misplaced {
        let mut peer = Peer::good(&gateway, &site).await;
        peer.say(message).await;
        let text = peer.closed().await;
        assert!(text.contains("is not for this side"), "{text}");
        gateway
            .expect_log(&["edge-a", "is not for this side"])
            .await;
    }
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_and_misses_of_frames_that_never_were() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
    channel.send(&peer, b"hello", DataFlags::default()).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();

    let migration = channel.migration;
    peer.say(Control::Miss {
        migration,
        channel: 0,
        seq: 17,
        indexes: vec![0, 1, u32::MAX],
    })
    .await;
    peer.say(Control::Miss {
        migration: ID,
        channel: 0,
        seq: 0,
        indexes: vec![0],
    })
    .await;
    peer.say(Control::Ack {
        migration: ID,
        channel: 0,
        next_seq: 3,
    })
    .await;
    gateway
        .expect_log(&["asks for pages that were never sent", "seq=17"])
        .await;
    // Still there.
    peer.say(Control::Ping { nonce: 77 }).await;
    peer.hear(|message| matches!(message, Control::Pong { nonce: 77, .. }))
        .await;

    peer.say(Control::Ack {
        migration,
        channel: 0,
        next_seq: 40,
    })
    .await;
    let text = peer.closed().await;
    assert!(
        text.contains("frame 40 is acknowledged and was never made"),
        "{text}"
    );
    gateway
        .expect_log(&["edge-a", "frame 40 is acknowledged"])
        .await;
    gateway.expect_good(&site).await;
    // The peer that came back was another process, so what the first had begun is over.
    assert_eq!(read_to_end(&mut socket).await, (b"hello".to_vec(), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_that_are_not_allowed_are_not_dialled() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let elsewhere = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let cases = [
        (
            elsewhere.local_addr().unwrap().to_string(),
            ResetCode::NotAllowed,
        ),
        ("127.0.0.1:80".to_owned(), ResetCode::NotAllowed),
        ("unix:/run/vm/vm1.sock".to_owned(), ResetCode::NotAllowed),
        ("no such thing".to_owned(), ResetCode::NotAllowed),
        (String::new(), ResetCode::NotAllowed),
        ("127.0.0.1:99999".to_owned(), ResetCode::NotAllowed),
        ("a\nb:1\u{1b}[31m".to_owned(), ResetCode::NotAllowed),
        // Allowed, and nobody there.
        ("127.0.0.1:1024".to_owned(), ResetCode::TargetUnreachable),
    ];
    for (index, (target, expected)) in cases.into_iter().enumerate() {
        let id = MigrationId([u8::try_from(index).unwrap() + 1; 16]);
        peer.say(open(id, 0, StreamKind::Opaque, true, &target))
            .await;
        let (code, reason) = peer.hear_reset(id, 0).await;
        assert_eq!(code, expected, "{target:?}: {reason}");
        gateway.expect_log(&[&id.to_string()]).await;
    }
    let dialled = tokio::time::timeout(std::time::Duration::from_millis(200), elsewhere.accept());
    assert!(
        dialled.await.is_err(),
        "a target that is not allowed was dialled"
    );
    assert!(!gateway.whole_log().contains('\u{1b}'));
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_and_migrations_are_limited() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = target.local_addr().unwrap().to_string();

    peer.say(open(ID, 0, StreamKind::Opaque, false, &target))
        .await;
    // The second open of one number is refused, and the first goes on.
    peer.say(open(ID, 0, StreamKind::QemuMain, false, &target))
        .await;
    assert_eq!(peer.hear_reset(ID, 0).await.0, ResetCode::Busy);
    for no in 1..=u32::try_from(MAX_CHANNELS).unwrap() {
        peer.say(open(ID, no, StreamKind::Opaque, false, &target))
            .await;
    }
    let (code, reason) = peer
        .hear_reset(ID, u32::try_from(MAX_CHANNELS).unwrap())
        .await;
    assert_eq!(code, ResetCode::Busy, "{reason}");
    gateway
        .expect_log(&["open refused", "edge-a", "too many channels"])
        .await;

    for number in 0..u8::try_from(MAX_MIGRATIONS).unwrap() {
        let id = MigrationId([100 + number; 16]);
        peer.say(open(id, 0, StreamKind::Opaque, false, &target))
            .await;
    }
    let last = MigrationId([99 + u8::try_from(MAX_MIGRATIONS).unwrap(); 16]);
    let (code, reason) = peer.hear_reset(last, 0).await;
    assert_eq!(
        (code, reason.as_str()),
        (ResetCode::Busy, "too many migrations")
    );
    gateway
        .expect_log(&["open refused", "edge-a", "too many migrations"])
        .await;
    // They go as they came.
    for id in [ID, MigrationId([100; 16]), MigrationId([101; 16])] {
        peer.say(Control::Close { migration: id }).await;
        gateway
            .expect_log(&["migration finished", &id.to_string()])
            .await;
    }
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resumption_at_impossible_places() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let instance = [42; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let (channel, mut socket) = peer.open_and_send(b"hello").await;
    let id = channel.migration;
    drop(peer);

    let mut peer = Peer::back(&gateway, &site, instance, vec![id, ID]).await;
    let stranger = ChannelPosition {
        channel: 12,
        next_seq: 3,
    };
    peer.say(Control::Resume {
        migration: ID,
        channels: vec![stranger],
    })
    .await;
    let answer = peer
        .hear(|message| matches!(message, Control::Resumed { .. }))
        .await;
    let unknown = Control::Resumed {
        migration: ID,
        known: false,
        released: false,
        channels: vec![],
    };
    assert!(answer == unknown);
    let channels = vec![channel.position(u64::MAX), channel.position(0), stranger];
    peer.say(Control::Resume {
        migration: id,
        channels,
    })
    .await;
    let answer = peer
        .hear(|message| matches!(message, Control::Resumed { .. }))
        .await;
    let known = Control::Resumed {
        migration: id,
        known: true,
        released: false,
        channels: vec![channel.position(1)],
    };
    assert!(answer == known);
    let (code, reason) = peer.hear_reset(id, 0).await;
    assert_eq!(code, ResetCode::Internal);
    assert!(reason.contains("waits for a frame"), "{reason}");
    gateway
        .expect_log(&[&id.to_string(), "waits for a frame"])
        .await;
    assert_eq!(read_to_end(&mut socket).await, (vec![], false));
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_live_omits_is_given_up() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let instance = [43; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let mut channel = peer.open_to_new_target(StreamKind::Opaque).await;
    channel.send(&peer, b"hello", DataFlags::default()).await;
    let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
    peer.hear(|message| matches!(message, Control::Ack { next_seq: 1, .. }))
        .await;
    drop(peer);
    let _peer = Peer::with_instance(&gateway, &site, instance).await;
    assert_eq!(read_to_end(&mut socket).await, (b"hello".to_vec(), false));
    gateway
        .expect_log(&[&channel.migration.to_string(), "gave the migration up"])
        .await;
    gateway.expect_good(&site).await;
}
