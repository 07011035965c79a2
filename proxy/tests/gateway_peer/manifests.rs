//! Asking for what a guest held, and building on what was not agreed on.

use std::sync::Arc;

use skyferry::wire::control::{ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, MigrationId};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::{ChannelKind, Flush};

use crate::rig::{Gateway, Peer, Site, encoder, frame_of, soon};

fn adopt(migration: MigrationId, channel: u32) -> Control {
    Control::Adopt {
        migration,
        channel,
        manifest: [9; 16],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_agreed_to() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let main = peer.open_to_new_target(StreamKind::QemuMain).await;
    let opaque = peer.open_to_new_target(StreamKind::Opaque).await;
    // Of what is not known nothing is said, however often it is asked for.
    for _ in 0..1000 {
        peer.say(adopt(MigrationId([77; 16]), 0)).await;
        peer.say(adopt(main.migration, 5)).await;
    }
    for id in [main.migration, main.migration, opaque.migration] {
        peer.say(adopt(id, 0)).await;
        let answer = peer.hear(|m| matches!(m, Control::Adopted { .. })).await;
        let refused = Control::Adopted {
            migration: id,
            channel: 0,
            manifest: [9; 16],
            agreed: false,
        };
        assert!(answer == refused);
    }
    // The answer is the far gateway's to give.
    peer.say(Control::Adopted {
        migration: main.migration,
        channel: 0,
        manifest: [9; 16],
        agreed: true,
    })
    .await;
    let text = peer.closed().await;
    assert!(text.contains("is not for this side"), "{text}");
    gateway.expect_good(&site).await;
}

/// The frame cannot be right, whatever is in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_was_not_agreed_on_ends_the_channel() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 100)])
        .build();
    let mut before = encoder(ChannelKind::QemuMain);
    let encoded = before.encode(&stream.bytes, Flush::Hard, None, None);
    assert!(encoded.unwrap().frame.is_some());
    let manifest = Arc::new(before.take_table().into_manifest().unwrap());

    let mut peer = Peer::good(&gateway, &site).await;
    let mut channel = peer.open_to_new_target(StreamKind::QemuMain).await;
    channel.encoder.adopt(&manifest);
    let first = frame_of(&mut channel.encoder, &stream.bytes[..stream.records[0].at]);
    let plain = DataFlags::default();
    channel.send_payload(&peer, &first.payload, plain).await;
    let _socket = soon("a dial", channel.target.accept()).await.unwrap();
    let (code, reason) = peer.hear_reset(channel.migration, 0).await;
    assert_eq!(code, ResetCode::Internal);
    assert!(reason.contains("not agreed on"), "{reason}");
    gateway.expect_good(&site).await;
}
