//! What gateways refuse, and what they pass on when a VM gives up: fake VMs, real gateways.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_tests::fake_vm::{
    End, FakeEnd, FakeListener, FakeMigration, LIMIT, expect_state, migrate, noise, pong, shut,
    wait_finished,
};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::process::wait_for;
use skyferry_tests::wan::Shape;

/// How soon a source must know that its migration has failed.
const SOON: Duration = Duration::from_secs(3);
/// A link whose loss is noticed after two seconds.
const QUICK_LINK: &str = "idle_timeout = \"2s\"\nkeep_alive = \"200ms\"";
/// How long to look for a call that must not come.
const A_WHILE: Duration = Duration::from_millis(300);

fn pair(change: impl FnOnce(&mut PairSetup)) -> Result<GatewayPair> {
    let mut setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        store_mib: Some([16; 2]),
        ..PairSetup::default()
    };
    change(&mut setup);
    GatewayPair::over_relay(Shape::wan(1000, 4), &setup)
}

fn guest() -> Vec<u8> {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", 1000)])
        .build()
        .bytes
}

/// A stream so long that a slow destination takes many seconds for it.
fn long_guest() -> Vec<u8> {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", 8000)])
        .zero_percent(0)
        .build()
        .bytes
}

/// Lets a source write `stream` and makes sure that it fails soon, having read nothing.
fn expect_soon_over(route: &Route, stream: &[u8]) -> Result<()> {
    let begun = Instant::now();
    let source = FakeEnd::connect(&route.listen)?;
    let _sending = source.send_in_background(stream.to_vec());
    source.wait_end(SOON).context("the source")?;
    let took = begun.elapsed();
    ensure!(took < SOON, "{took:?}");
    ensure!(source.received_len() == 0, "the source reads something");
    Ok(())
}

/// Law 10: a waiting destination ends when somebody connects and closes, so a port scan of an
/// ingress must not get through to it.
#[test]
fn a_hundred_connects_and_closes_dial_nobody() -> Result<()> {
    let pair = pair(|_| {})?;
    let route = pair.route(0);
    let stream = guest();
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&route.target)?;
        for index in 0..100 {
            let scan = FakeEnd::connect(&route.listen)?;
            if index % 2 == 0 {
                scan.reset()?;
            }
        }
        listener.expect_not_dialled(A_WHILE)?;
        FakeMigration::begin(route, &listener, &stream)?.conclude(&stream)?;
        listener.expect_not_dialled(A_WHILE)
    };
    run().with_context(|| pair.explain())?;
    expect_state(&pair, 1, "completed")
}

/// Law 3: a target that is down or not allowed, and a peer that is away, end in a failure at the
/// source within three seconds; the gateway says why, and the next migration works.
#[test]
fn a_target_out_of_reach_fails_the_source_soon() -> Result<()> {
    let mut forbidden = Route::tcp(Side::A)?;
    forbidden.allowed = false;
    let mut pair = pair(|setup| {
        setup.routes.push(forbidden);
        setup.wan = QUICK_LINK.to_owned();
    })?;
    let stream = guest();

    expect_soon_over(pair.route(0), &stream).with_context(|| pair.explain())?;
    pair.gateway(Side::A).wait_log("cannot connect to")?;
    expect_state(&pair, 1, "refused")?;

    let forbidden = FakeListener::bind(&pair.route(1).target)?;
    expect_soon_over(pair.route(1), &stream).with_context(|| pair.explain())?;
    forbidden.expect_not_dialled(A_WHILE)?;
    pair.gateway(Side::A).wait_log("is not on the allow list")?;
    let refused = pair
        .gateway(Side::B)
        .metric("skyferry_refused_connections_total", "")?;
    ensure!(refused == 2.0, "{refused} refused\n{}", pair.explain());

    migrate(&pair, 0, &stream)?;

    pair.gateway_mut(Side::B).kill();
    pair.gateway_mut(Side::B).restart()?;
    pair.gateway(Side::A)
        .wait_log("the peer's gateway was restarted")?;
    migrate(&pair, 0, &stream)
}

/// A peer that was never there: refused within three seconds, with a reason.
#[test]
fn a_peer_that_is_down_fails_the_source_soon() -> Result<()> {
    let mut pair = pair(|setup| setup.wan = QUICK_LINK.to_owned())?;
    pair.gateway_mut(Side::B).kill();
    wait_for(
        "the loss of the link",
        LIMIT,
        || {
            let status = pair.gateway(Side::A).status()?;
            Ok((status["links"][0]["up"] == false).then_some(()))
        },
        || pair.explain(),
    )?;
    expect_soon_over(pair.route(0), &guest()).with_context(|| pair.explain())?;
    pair.gateway(Side::A).wait_log("no link to peer edge-b")
}

/// Law 3: a source without return path would report success before anything has arrived. It is
/// refused with a reason, and the destination is not dialled; unless the ingress allows it.
#[test]
fn a_source_without_return_path_is_refused_unless_allowed() -> Result<()> {
    let mut allowed = Route::tcp(Side::A)?;
    allowed.more = "allow_no_return_path = true\n".to_owned();
    let pair = pair(|setup| setup.routes.push(allowed))?;
    let stream = SyntheticStream::builder().return_path(false).build().bytes;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        expect_soon_over(pair.route(0), &stream)?;
        listener.expect_not_dialled(A_WHILE)?;
        pair.gateway(Side::A).wait_log("opens no return path")?;

        let listener = FakeListener::bind(&pair.route(1).target)?;
        let moving = FakeMigration::begin(pair.route(1), &listener, &stream)?;
        // Such a source closes when it has written all, and reports success; such a destination says
        // nothing. The close must not stop what is still on its way.
        moving.sending.finish(LIMIT)?;
        drop(moving.source);
        moving.destination.wait_received(stream.len(), LIMIT)?;
        moving.destination.expect_received(&stream)?;
        let end = moving.destination.wait_end(LIMIT)?;
        ensure!(end == End::Closed, "the destination reads {end:?}");
        Ok(())
    };
    run().with_context(|| pair.explain())
}

/// A protocol in which the server speaks first: the target is dialled for a client that is silent.
#[test]
fn a_server_that_speaks_first_is_dialled_at_once() -> Result<()> {
    let pair = pair(|setup| setup.routes[0].more = "first = \"server\"\n".to_owned())?;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let client = FakeEnd::connect(&pair.route(0).listen)?;
        let server = listener.accept(LIMIT)?;
        server.send(b"NBDMAGIC")?;
        client.wait_received(8, LIMIT)?;
        client.expect_received(b"NBDMAGIC")?;
        client.send(b"flags")?;
        server.wait_received(5, LIMIT)?;
        server.expect_received(b"flags")
    };
    run().with_context(|| pair.explain())
}

/// Law 1 of ends: a reset on one side is a reset on the other, and what comes before it is never
/// made to look complete.
#[test]
fn a_reset_is_passed_on() -> Result<()> {
    let pair = pair(|_| {})?;
    let stream = long_guest();
    let half = &stream[..stream.len() / 2];
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, half)?;
        moving.destination.wait_received(1 << 20, LIMIT)?;
        moving.source.reset()?;
        let end = moving.destination.wait_end(LIMIT)?;
        ensure!(end == End::Reset, "the destination reads {end:?}");
        moving.destination.expect_prefix_of(half)?;

        let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
        moving.destination.wait_received(1 << 20, LIMIT)?;
        moving.destination.reset()?;
        let end = moving.source.wait_end(LIMIT)?;
        ensure!(end == End::Reset, "the source reads {end:?}");
        ensure!(moving.source.received_len() == 0);

        // Of no known kind: the same.
        let bytes = noise(1, 4 << 20);
        let moving = FakeMigration::begin(pair.route(0), &listener, &bytes)?;
        moving.destination.wait_received(1 << 20, LIMIT)?;
        moving.source.reset()?;
        let end = moving.destination.wait_end(LIMIT)?;
        ensure!(end == End::Reset, "the server reads {end:?}");
        moving.destination.expect_prefix_of(&bytes)
    };
    run().with_context(|| pair.explain())?;
    wait_finished(pair.gateway(Side::A), 3)?;
    wait_finished(pair.gateway(Side::B), 3)?;
    migrate(&pair, 0, &guest())
}

/// Closes `gone`, which has read everything, as the kernel does for a process that has died: in order. The other
/// side must learn that nobody takes what it sends.
fn expect_noticed(gone: FakeEnd, stays: &FakeEnd, more: Vec<u8>) -> Result<()> {
    drop(gone);
    thread::sleep(A_WHILE);
    let begun = Instant::now();
    // Fails where it is not all taken before the news arrives.
    let _ = stays.send_in_background(more).finish(LIMIT);
    while stays.send(b"more").is_ok() {
        ensure!(begun.elapsed() < SOON, "all is taken, by nobody");
        thread::sleep(Duration::from_millis(50));
    }
    let took = begun.elapsed();
    ensure!(took < SOON, "noticed after {took:?}");
    Ok(())
}

/// A VM that dies while nothing waits to be read by it closes its connection in order. What is sent to it from
/// then on must not be swallowed, nor be taken for a migration that is complete.
#[test]
fn a_vm_that_dies_without_a_reset_is_noticed() -> Result<()> {
    let mut without = Route::tcp(Side::A)?;
    without.more = "allow_no_return_path = true\n".to_owned();
    let pair = pair(|setup| setup.routes.push(without))?;
    let run = || -> Result<()> {
        for (route, return_path) in [(0, true), (1, false)] {
            let stream = SyntheticStream::builder()
                .blocks(&[("pc.ram", 3000)])
                .zero_percent(0)
                .return_path(return_path)
                .build()
                .bytes;
            let half = stream.len() / 2;
            let listener = FakeListener::bind(&pair.route(route).target)?;
            let moving = FakeMigration::begin(pair.route(route), &listener, &stream[..half])?;
            // The start of a page that is cut off goes out soon.
            moving.destination.wait_received(half, LIMIT)?;
            expect_noticed(moving.destination, &moving.source, stream[half..].to_vec())
                .with_context(|| format!("the source, return path {return_path}"))?;
        }
        // Of no known kind, and both ways.
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let begin = || -> Result<FakeMigration> {
            let moving = FakeMigration::begin(pair.route(0), &listener, &noise(1, 1000))?;
            moving.destination.wait_received(1000, LIMIT)?;
            moving.destination.send(b"hello")?;
            moving.source.wait_received(5, LIMIT)?;
            Ok(moving)
        };
        let FakeMigration {
            source,
            destination,
            ..
        } = begin()?;
        expect_noticed(destination, &source, noise(2, 8 << 20)).context("the client")?;
        let FakeMigration {
            source,
            destination,
            ..
        } = begin()?;
        expect_noticed(source, &destination, noise(3, 8 << 20)).context("the server")
    };
    run().with_context(|| pair.explain())?;
    for side in [Side::A, Side::B] {
        for finished in wait_finished(pair.gateway(side), 4)? {
            ensure!(finished["state"] != "completed", "{finished}");
        }
    }
    migrate(&pair, 0, &guest())
}

/// Nothing is committed on bytes that the destination never got: one of its connections has ended, and what was
/// sent there is lost.
#[test]
fn a_guest_of_which_a_part_was_lost_is_never_started() -> Result<()> {
    let pair = pair(|_| {})?;
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 500)])
        .build();
    let at = stream.commit.context("a commit byte")?;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream.bytes[..at - 1000])?;
        moving.destination.wait_received(at - 1000, LIMIT)?;
        // How a further connection of a guest begins.
        let further = FakeEnd::connect(&pair.route(0).listen)?;
        let mut packet = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
        packet.extend(noise(1, 1000));
        further.send(&packet)?;
        let its_end = listener.accept(LIMIT)?;
        its_end.wait_received(packet.len(), LIMIT)?;
        drop(its_end);
        thread::sleep(A_WHILE);
        let _ = further.send(&noise(2, 300_000));
        let _ = moving.source.send(&stream.bytes[at - 1000..]);
        moving.source.wait_end(LIMIT)?;
        moving.destination.wait_end(LIMIT)?;
        moving.destination.expect_prefix_of(&stream.bytes[..at])
    };
    run().with_context(|| pair.explain())?;
    for side in [Side::A, Side::B] {
        let finished = wait_finished(pair.gateway(side), 1)?;
        ensure!(finished[0]["state"] == "failed", "{}", finished[0]);
    }
    Ok(())
}

/// What a source says that is cancelled, whose destination answers the end of the stream as QEMU's does.
#[test]
fn a_cancelled_migration_is_no_failed_one() -> Result<()> {
    let pair = pair(|_| {})?;
    let stream = guest();
    let half = &stream[..stream.len() / 2];
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let begin = || -> Result<(FakeEnd, FakeEnd)> {
            let moving = FakeMigration::begin(pair.route(0), &listener, half)?;
            moving.destination.wait_received(half.len(), LIMIT)?;
            Ok((moving.source, moving.destination))
        };
        let (source, destination) = begin()?;
        source.end_writing();
        destination.wait_end(LIMIT)?;
        destination.send(&shut(1))?;
        drop(destination);
        source.wait_end(LIMIT)?;
        drop(source);
        expect_state(&pair, 1, "cancelled")?;

        // The source is gone altogether, and the destination goes on talking for a while.
        let (source, destination) = begin()?;
        drop(source);
        destination.wait_end(LIMIT)?;
        for value in 0..5 {
            destination.send(&pong(value))?;
            thread::sleep(Duration::from_millis(50));
        }
        destination.send(&shut(1))?;
        drop(destination);
        expect_state(&pair, 2, "cancelled")?;

        // The destination gives up by itself.
        let (source, destination) = begin()?;
        destination.send(&shut(1))?;
        source.wait_received(shut(1).len(), LIMIT)?;
        drop((source, destination));
        expect_state(&pair, 3, "failed")
    };
    run().with_context(|| pair.explain())
}

/// A drain lets the running migration finish, takes no new one, and ends with success.
#[test]
fn a_drain_waits_for_what_runs_and_refuses_the_rest() -> Result<()> {
    for side in [Side::A, Side::B] {
        let mut pair = pair(|setup| setup.routes.push(Route::tcp(Side::A).expect("a port")))?;
        let stream = guest();
        let half = stream.len() / 2;
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream[..half])?;
        let other = FakeListener::bind(&pair.route(1).target)?;
        pair.gateway_mut(side).terminate();
        pair.gateway(side).wait_log("draining")?;
        let run = || -> Result<()> {
            expect_soon_over(pair.route(1), &stream)?;
            other.expect_not_dialled(A_WHILE)?;
            moving.destination.wait_received(half - 4096, LIMIT)?;
            moving.source.send(&stream[half..])?;
            moving.conclude(&stream)
        };
        run().with_context(|| pair.explain())?;
        let status = pair.gateway_mut(side).wait_exit(LIMIT)?;
        ensure!(status.success(), "{status}\n{}", pair.explain());
    }
    Ok(())
}

/// A drain that takes too long gives up what is not committed, and ends.
#[test]
fn a_drain_gives_up_in_time() -> Result<()> {
    let mut pair = pair(|setup| setup.gateway = "drain_timeout = \"1s\"".to_owned())?;
    let stream = long_guest();
    let listener = FakeListener::bind(&pair.route(0).target)?;
    let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
    moving.destination.read_at(500_000);
    pair.gateway_mut(Side::A).terminate();
    let run = || -> Result<()> {
        let end = moving.source.wait_end(SOON)?;
        ensure!(end == End::Reset, "the source reads {end:?}");
        moving.destination.read_at(u64::MAX);
        let end = moving.destination.wait_end(LIMIT)?;
        ensure!(end == End::Reset, "the destination reads {end:?}");
        moving.destination.expect_prefix_of(&stream)
    };
    run().with_context(|| pair.explain())?;
    let status = pair.gateway_mut(Side::A).wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}\n{}", pair.explain());
    Ok(())
}

/// A unix socket that is not there, and one that nobody serves any more, are targets that are down.
#[test]
fn a_unix_target_that_is_down_fails_the_source_soon() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("target");
    let target = format!("unix:{}", path.display());
    let listen = format!("unix:{}", dir.path().join("ingress").display());
    let pair = pair(|setup| setup.routes = vec![Route::between(Side::A, &listen, &target)])?;
    let stream = guest();
    expect_soon_over(pair.route(0), &stream).with_context(|| pair.explain())?;
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    expect_soon_over(pair.route(0), &stream).with_context(|| pair.explain())?;
    fs::remove_file(&path)?;
    // Writes of the refused sources are over before the next one begins.
    thread::sleep(Duration::from_millis(10));
    migrate(&pair, 0, &stream)
}

/// A connection that is none of QEMU's came first, and neither end of it gets on: a guest does not wait for that.
#[test]
fn a_stray_that_stays_holds_no_guest_up() -> Result<()> {
    let pair = pair(|_| {})?;
    let run = || -> Result<()> {
        let route = pair.route(0);
        let listener = FakeListener::bind(&route.target)?;
        let stray = FakeEnd::connect(&route.listen)?;
        stray.send(b"GET / HTTP/1.1\r\n\r\n")?;
        let reached = listener.accept(LIMIT)?;
        reached.read_at(0);
        let sending = stray.send_in_background(noise(1, 4 << 20));
        thread::sleep(Duration::from_millis(300));
        drop(listener);
        migrate(&pair, 0, &guest())?;
        ensure!(stray.end().is_none() && reached.end().is_none());
        reached.read_at(u64::MAX);
        sending.finish(LIMIT)
    };
    run().with_context(|| pair.explain())
}

/// A stray greeting in the middle of a migration belongs to none of its channels: what becomes of it is no reason to
/// fail.
#[test]
fn a_stray_greeting_does_a_guest_no_harm() -> Result<()> {
    let tls = [&[0x16, 3, 1, 0, 0x7a, 1, 0, 0, 0x76, 3, 3][..], &[0; 112]].concat();
    let resume = [&[8, 0, 10, 0, 0][..], &[0; 30]].concat();
    for stray in [b"GET / HTTP/1.0\r\n\r\n".to_vec(), tls, resume] {
        let pair = pair(|_| {})?;
        let stream = long_guest();
        let run = || -> Result<()> {
            let listener = FakeListener::bind(&pair.route(0).target)?;
            let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
            moving.destination.read_at(8 << 20);
            // As QEMU's does that expects one connection.
            drop(listener);
            let stranger = FakeEnd::connect(&pair.route(0).listen)?;
            stranger.send(&stray)?;
            stranger.wait_end(LIMIT)?;
            drop(stranger);
            moving.destination.read_at(u64::MAX);
            moving.conclude(&stream)
        };
        run().with_context(|| format!("{stray:?} {}", pair.explain()))?;
    }
    Ok(())
}

/// What a source has sent may be more than is read before the destination takes some of it: that the source has
/// left is noticed all the same.
#[test]
fn a_source_that_leaves_is_noticed_though_the_destination_takes_nothing() -> Result<()> {
    let pair = pair(|_| {})?;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let source = FakeEnd::connect(&pair.route(0).listen)?;
        let sending = source.send_in_background(long_guest());
        let destination = listener.accept(LIMIT)?;
        destination.read_at(0);
        // Until nothing more is taken from it.
        let mut sent = 0;
        wait_for(
            "back-pressure",
            LIMIT,
            || {
                thread::sleep(Duration::from_millis(500));
                let before = std::mem::replace(&mut sent, sending.sent());
                Ok((sent > 0 && sent == before).then_some(()))
            },
            || pair.explain(),
        )?;
        source.reset()?;
        let finished = wait_finished(pair.gateway(Side::A), 1)?;
        ensure!(finished[0]["state"] == "cancelled", "{}", finished[0]);
        destination.read_at(u64::MAX);
        let end = destination.wait_end(SOON)?;
        ensure!(end == End::Reset, "{end:?}");
        Ok(())
    };
    run().with_context(|| pair.explain())
}
