//! Sources that leave between their commit and the verdict: their guests run again, so nothing may be released
//! in their name any more.

use std::time::{Duration, Instant};

use skyferry::wire::Control;
use skyferry_core::qemu::synthetic::SyntheticStream;
use tokio::io::AsyncWriteExt;

use crate::peer::Peer;
use crate::races::NearRig;
use crate::rig::soon;

const FAR: [u8; 16] = [1; 16];
/// How soon word of a source that has left goes out, on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(1500);

fn is_commit(message: &Control) -> bool {
    matches!(message, Control::Commit { .. })
}

fn stamp_of(message: &Control) -> u64 {
    let Control::Commit { clock, .. } = message else {
        panic!("{message:?}");
    };
    *clock
}

/// The request that is asked for once more says when the source was last seen; once it has left there is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_repeated_as_long_as_the_source_is_there() {
    let rig = NearRig::new("");
    let mut peer = rig.accept(FAR).await;
    let stream = SyntheticStream::builder().build();
    let mut source = rig.source(&stream.bytes).await;
    let migration = peer.take_open().await;
    let mut last = stamp_of(&peer.hear(is_commit).await);
    // What the gateway's clock shows is what it stamps with.
    peer.say(Control::Ping { nonce: 5 }).await;
    let pong = peer
        .hear(|m| matches!(m, Control::Pong { nonce: 5, .. }))
        .await;
    let Control::Pong { clock, .. } = pong else {
        unreachable!()
    };
    assert!(clock >= last && clock - last < 2_000_000, "{last}, {clock}");
    for _ in 0..3 {
        let pause = Duration::from_millis(300);
        tokio::time::sleep(pause).await;
        peer.say(Control::AskCommit { migration }).await;
        let stamp = stamp_of(&peer.hear(is_commit).await);
        assert!(stamp >= last + 300_000, "{last}, {stamp}");
        last = stamp;
    }
    source.shutdown().await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    peer.say(Control::AskCommit { migration }).await;
    assert!(peer.hear_up_to_now(is_commit).await.is_none());
    // Nor on another connection.
    drop(peer);
    let mut peer = rig.accept(FAR).await;
    peer.say(Control::AskCommit { migration }).await;
    assert!(peer.hear_up_to_now(is_commit).await.is_none());
}

/// Whether the far gateway hears of a source that leaves right behind its commit, though nothing of what it
/// sent was acknowledged. `None`: the gateway did not take all of a stream of this size.
async fn is_told_of(rig: &NearRig, peer: &mut Peer, pages: u64) -> Option<Duration> {
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", pages)])
        .random_percent(100)
        .build();
    let mut source = rig.source(b"").await;
    let bytes = stream.bytes.clone();
    let writing = tokio::spawn(async move {
        // Part of it may never be read.
        let _ = source.write_all(&bytes).await;
        source
    });
    let migration = peer.take_open().await;
    let wanted = peer.hear(is_commit);
    let asked = tokio::time::timeout(Duration::from_millis(700), wanted).await;
    if asked.is_err() {
        writing.abort();
        return None;
    }
    let source = writing.await.unwrap();
    source.set_zero_linger().unwrap();
    let left = Instant::now();
    drop(source);
    peer.hear_reset(migration, 0).await;
    Some(left.elapsed())
}

/// What was read and not yet delivered may be so much that nothing more is read: an end that could be read is
/// noticed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_leaves_is_noticed_though_nothing_is_read() {
    let mut noticed = 0;
    let mut unread = false;
    for pages in (16..600).step_by(16) {
        let rig = NearRig::new("");
        let mut peer = rig.accept(FAR).await;
        let Some(after) = soon("the end", is_told_of(&rig, &mut peer, pages)).await else {
            // From here on not even the whole stream is read without an acknowledgement.
            unread = true;
            break;
        };
        assert!(after < AT_ONCE, "{pages} pages: {after:?}");
        noticed += 1;
    }
    assert!(noticed > 0 && unread, "{noticed}");
}
