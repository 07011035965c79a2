//! A peer fills neither the disk nor the view of whoever reads the log.

use std::time::Duration;

use skyferry::wire::control::{ResetCode, StreamKind};
use skyferry::wire::{Control, MigrationId};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use crate::near::Rig;
use crate::peer::{Peer, open};
use crate::rig::{Gateway, Site, soon};

/// Lines of a kind within ten seconds: those about a fault, and those of everyday work.
const FEW: usize = 10;
const MANY: usize = 100;
const ID: MigrationId = MigrationId([200; 16]);

fn number(number: u8) -> MigrationId {
    MigrationId([number; 16])
}

impl Gateway {
    /// The log has as many lines with one of `parts` as are written of a kind: in one span of ten seconds, or two
    /// on a slow machine. Of the rest it says how many they were.
    async fn expect_lines(&self, parts: &[&str], most: usize, rest: &str) {
        self.expect_log(&[rest, "edge-a", "count="]).await;
        let log = self.whole_log();
        let is_one = |line: &&str| parts.iter().any(|part| line.contains(part));
        let lines = log.lines().filter(is_one).count();
        assert!((most..=2 * most).contains(&lines), "{lines} with {parts:?}");
    }
}

/// Whether it shows at once or when a name is looked up that a target is not allowed.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_without_end_are_counted_and_not_all_written_down() {
    const OPENS: u8 = 240;
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let targets = ["nowhere", "127.0.0.2:4444", "localhost:80"];
    for (index, target) in (0..OPENS).zip(targets.into_iter().cycle()) {
        let id = number(index);
        peer.say(open(id, 0, StreamKind::Opaque, true, target))
            .await;
        let (code, reason) = peer.hear_reset(id, 0).await;
        assert_eq!(code, ResetCode::NotAllowed, "{target}: {reason}");
    }
    let refused = "skyferry_refused_connections_total";
    gateway
        .expect_metric(refused, |count| count >= f64::from(OPENS))
        .await;
    // A migration that was refused behind its name takes two lines.
    let parts = ["open refused", "migration finished"];
    gateway
        .expect_lines(&parts, FEW, "more opens refused")
        .await;
    let lines = gateway.whole_log().lines().count();
    assert!(lines < 4 * FEW + 20, "{lines} lines");
    gateway.expect_good(&site).await;
}

/// What is carried for a peer is named, up to a number that no honest peer comes to.
#[tokio::test(flavor = "multi_thread")]
async fn migrations_without_end_are_not_all_written_down() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = target.local_addr().unwrap().to_string();
    for index in 0..250 {
        let id = number(index);
        peer.say(open(id, 0, StreamKind::Opaque, true, &address))
            .await;
        let opened =
            |m: &Control| matches!(m, Control::Opened { migration, .. } if *migration == id);
        peer.hear(opened).await;
        soon("a dial", target.accept()).await.unwrap();
        peer.say(Control::Close { migration: id }).await;
        peer.hear_reset(id, 0).await;
    }
    gateway
        .expect_lines(&["migration finished"], MANY, "more migrations")
        .await;
    let opened = gateway.whole_log();
    let opened = opened
        .lines()
        .filter(|line| line.contains("channel opened"));
    assert!(opened.count() <= 2 * MANY);
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_without_sense_are_not_all_written_down() {
    const QUESTIONS: u64 = 300;
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let (channel, _target) = peer.open_and_send(b"hello").await;
    for seq in 0..QUESTIONS {
        assert_eq!(peer.resume(ID, vec![]).await, (false, vec![]));
        peer.say(Control::Miss {
            migration: channel.migration,
            channel: channel.no,
            seq: 100 + seq,
            indexes: vec![0],
        })
        .await;
    }
    gateway
        .expect_lines(
            &["resumed by the near gateway"],
            MANY,
            "more migrations resumed",
        )
        .await;
    gateway
        .expect_lines(&["asks for pages"], FEW, "more requests for pages")
        .await;
    gateway.expect_good(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_end_are_not_all_written_down() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    for _ in 0..150 {
        // Another process each time, as far as the gateway can tell.
        Peer::good(&gateway, &site).await;
    }
    gateway
        .expect_log(&["more connections came or went", "edge-a"])
        .await;
    let log = gateway.whole_log();
    let lines = log.lines().filter(|line| {
        ["link up", "was restarted", "link from peer ended"]
            .iter()
            .any(|part| line.contains(part))
    });
    // The first two of a connection count as one.
    let lines = lines.count();
    assert!((MANY..=3 * MANY).contains(&lines), "{lines} lines");
    gateway.expect_good(&site).await;
}

/// A terminal that is halted stops nothing, and one that goes away ends nothing: a source may be kept waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_is_not_waited_for() {
    let rig = Rig::new();
    let _peer = rig.accept().await;
    let answer = rig.gateway.is_well_unread(|| {
        // A line each, until the pipe must be full; then lines of other threads.
        for _ in 0..1500 {
            rig.gateway.signal("-HUP");
        }
        for _ in 0..20 {
            let mut source = std::net::TcpStream::connect(rig.gateway.ingress).unwrap();
            std::io::Write::write_all(&mut source, b"something that is no migration").unwrap();
        }
        std::thread::sleep(Duration::from_millis(500));
    });
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    rig.gateway.expect_log(&["SIGHUP is ignored"]).await;
}

/// Lines about a migration name it as the peer does.
#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_migration_carry_its_id() {
    let rig = Rig::new();
    let mut peer = rig.accept().await;
    let mut source = TcpStream::connect(rig.gateway.ingress).await.unwrap();
    source.write_all(&[7; 100]).await.unwrap();
    let message = peer
        .hear(|message| matches!(message, Control::Open { .. }))
        .await;
    let Control::Open { migration: id, .. } = message else {
        unreachable!()
    };
    let field = format!("migration={id}");
    rig.gateway.expect_log(&["migration begins", &field]).await;
    drop(source);
    rig.gateway
        .expect_log(&["migration finished", &field])
        .await;
}
