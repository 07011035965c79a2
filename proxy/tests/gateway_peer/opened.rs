//! The word that a target was reached.

use std::time::{Duration, Instant};

use skyferry::wire::Control;
use skyferry::wire::control::ResetCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::near::Rig;
use crate::peer::Peer;
use crate::rig::{Gateway, Site, read_to_end};

/// A peer that stands and says nothing about a channel does not keep its source waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_nobody_answers_for_is_given_up() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut source = TcpStream::connect(rig.gateway.ingress).await.unwrap();
    let start = Instant::now();
    source.write_all(b"is anybody there?").await.unwrap();
    let open = peer.hear(|m| matches!(m, Control::Open { .. })).await;
    let Control::Open { migration, .. } = open else {
        unreachable!()
    };
    assert_eq!(read_to_end(&mut source).await, (vec![], false));
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(5), "{waited:?}");
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    let (code, reason) = peer.hear_reset(migration, 0).await;
    assert_eq!(code, ResetCode::TargetUnreachable);
    assert_eq!(reason, "peer edge-b does not answer");
    rig.gateway
        .expect_log(&["migration finished", &migration.to_string(), "refused"])
        .await;
    rig.expect_good(&mut peer).await;
}

/// An outage is a pause: as long as there is no link, nobody can answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_is_not_given_up_while_there_is_no_link() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut source = TcpStream::connect(rig.gateway.ingress).await.unwrap();
    source.write_all(b"is anybody there?").await.unwrap();
    let open = peer.hear(|m| matches!(m, Control::Open { .. })).await;
    let Control::Open { migration, .. } = open else {
        unreachable!()
    };
    tokio::time::sleep(Duration::from_secs(3)).await;
    drop(peer);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut peer = rig.accept().await;
    let resume = peer.hear(|m| matches!(m, Control::Resume { .. })).await;
    let Control::Resume { migration: id, .. } = resume else {
        unreachable!()
    };
    assert_eq!(id, migration);
    peer.say(Control::Resumed {
        migration,
        known: false,
        released: false,
        channels: vec![],
    })
    .await;
    peer.hear(|m| matches!(m, Control::Open { migration, .. } if *migration == id))
        .await;
    let mut byte = [0];
    let heard = source.read(&mut byte);
    let silence = tokio::time::timeout(Duration::from_millis(500), heard).await;
    assert!(silence.is_err(), "the source's socket was closed");
}

/// What was said on a connection that is gone may never have been heard.
#[tokio::test(flavor = "multi_thread")]
async fn the_far_gateway_repeats_it_on_a_new_connection() {
    let site = Site::new();
    let gateway = Gateway::far(&site);
    let instance = [44; 16];
    let mut peer = Peer::with_instance(&gateway, &site, instance).await;
    let (channel, _target) = peer.open_and_send(b"hello").await;
    let migration = channel.migration;
    drop(peer);

    let mut peer = Peer::back(&gateway, &site, instance, vec![migration]).await;
    let (known, _) = peer.resume(migration, vec![channel.position(0)]).await;
    assert!(known);
    peer.hear(|m| matches!(m, Control::Opened { channel: 0, .. }))
        .await;
}
