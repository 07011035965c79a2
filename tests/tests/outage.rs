//! Links that are cut and gateways that die: fake VMs, real gateways.
//!
//! Before the commit byte every death ends in a failure at both VMs; after it, nothing but the
//! destination's word may close the source's socket.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_tests::fake_vm::{
    End, FakeEnd, FakeListener, FakeMigration, LIMIT, expect_state, expect_verdict, migrate, noise,
    pong, shut, wait_finished,
};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::process::wait_for;
use skyferry_tests::skip::lacks;
use skyferry_tests::wan::tun::{ADDRESS_B, TunWan};
use skyferry_tests::wan::{Shape, Way};

/// A link on which a few megabytes take a second.
const LINK: Shape = Shape {
    delay: Duration::from_millis(10),
    bits_per_sec: 50_000_000,
    queue_bytes: 128 << 10,
    loss: 0.0,
    seed: 1,
};
/// A link whose loss is noticed after two seconds.
const QUICK_LINK: &str = "idle_timeout = \"2s\"\nkeep_alive = \"200ms\"\n";
/// How long a link may be away besides.
const BUDGET: &str = "outage_budget = \"2s\"\n";
/// Noticing the loss, the budget, and some time for a busy machine.
const GIVEN_UP: Duration = Duration::from_secs(8);
/// Longer than the loss needs to be noticed and the budget together.
const TOO_LONG: Duration = Duration::from_millis(5500);

/// A pair over [`LINK`].
fn pair(wan: &str) -> Result<GatewayPair> {
    GatewayPair::over_relay(LINK, &setup(wan)?)
}

fn setup(wan: &str) -> Result<PairSetup> {
    Ok(PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        store_mib: Some([16; 2]),
        wan: wan.to_owned(),
        ..PairSetup::default()
    })
}

/// A pair that gives up after [`BUDGET`].
fn impatient_pair() -> Result<GatewayPair> {
    pair(&format!("{QUICK_LINK}{BUDGET}"))
}

/// Several megabytes on the wire.
fn guest() -> SyntheticStream {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", 3000)])
        .zero_percent(10)
        .random_percent(80)
        .build()
}

/// The same, and what a gateway knew is lost with its process.
fn forgetful_pair() -> Result<GatewayPair> {
    let setup = PairSetup {
        forgetful: true,
        ..setup(&format!("{QUICK_LINK}{BUDGET}"))?
    };
    GatewayPair::over_relay(LINK, &setup)
}

/// Runs the body of a test; failures carry both gateways' logs.
fn check(pair: &mut GatewayPair, body: impl FnOnce(&mut GatewayPair) -> Result<()>) -> Result<()> {
    body(pair).map_err(|error| error.context(pair.explain()))
}

/// Waits until a gateway's running migration says `state`.
fn wait_state(pair: &GatewayPair, side: Side, state: &str) -> Result<()> {
    wait_for(
        &format!("state {state} at {}", side.name()),
        LIMIT,
        || {
            let status = pair.gateway(side).status()?;
            Ok((status["migrations"][0]["state"] == state).then_some(()))
        },
        || format!("{:?}", pair.gateway(side).status()),
    )
}

/// Waits until a gateway sees the link down.
fn wait_link_down(pair: &GatewayPair, side: Side) -> Result<()> {
    wait_for(
        &format!("loss of the link at {}", side.name()),
        LIMIT,
        || {
            let status = pair.gateway(side).status()?;
            Ok((status["links"][0]["up"] == false).then_some(()))
        },
        || format!("{:?}", pair.gateway(side).status()),
    )
}

/// Waits until the near gateway knows that all it has read was delivered.
fn wait_delivery_known(pair: &GatewayPair) -> Result<()> {
    let in_flight = || {
        pair.gateway(Side::A)
            .metric("skyferry_in_flight_bytes", "direction=\"out\"")
    };
    wait_for(
        "news of the delivery at edge-a",
        LIMIT,
        || Ok((in_flight()? == 0.0).then_some(())),
        || format!("{:?} bytes in flight", in_flight()),
    )
}

fn expect_reset(end: &FakeEnd, who: &str, limit: Duration) -> Result<()> {
    let seen = end.wait_end(limit).with_context(|| who.to_owned())?;
    ensure!(seen == End::Reset, "{who} reads {seen:?}");
    Ok(())
}

/// Begins a migration with these bytes and waits until the near gateway knows that they were delivered: else it
/// may read no more before an outage is over.
fn deliver(pair: &GatewayPair, bytes: &[u8]) -> Result<(FakeListener, FakeMigration)> {
    let listener = FakeListener::bind(&pair.route(0).target)?;
    let moving = FakeMigration::begin(pair.route(0), &listener, bytes)?;
    moving.destination.wait_received(bytes.len(), LIMIT)?;
    wait_delivery_known(pair)?;
    Ok((listener, moving))
}

/// Begins a migration and stops in the middle of it.
fn begin_half(pair: &GatewayPair, stream: &[u8]) -> Result<FakeMigration> {
    let listener = FakeListener::bind(&pair.route(0).target)?;
    let moving = FakeMigration::begin(pair.route(0), &listener, stream)?;
    moving.destination.wait_received(2 << 20, LIMIT)?;
    Ok(moving)
}

/// Moves a guest up to its commit byte, and on; the destination has not answered yet.
fn commit(pair: &GatewayPair, stream: &[u8]) -> Result<FakeMigration> {
    let listener = FakeListener::bind(&pair.route(0).target)?;
    let moving = FakeMigration::begin(pair.route(0), &listener, stream)?;
    moving.destination.wait_received(stream.len(), LIMIT)?;
    moving.destination.expect_received(stream)?;
    Ok(moving)
}

/// Law 4: the VMs never notice a cut of seconds, though both directions are busy and the connection
/// between the gateways is lost meanwhile; the bytes are exact.
#[test]
fn a_cut_is_a_pause() -> Result<()> {
    let mut pair = pair(QUICK_LINK)?;
    let (there, back) = (noise(1, 6 << 20), noise(2, 6 << 20));
    check(&mut pair, |pair| {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let client = FakeEnd::connect(&pair.route(0).listen)?;
        let sending = client.send_in_background(there.clone());
        let server = listener.accept(LIMIT)?;
        let answering = server.send_in_background(back.clone());
        server.wait_received(1 << 20, LIMIT)?;
        client.wait_received(1 << 20, LIMIT)?;
        pair.control().cut();
        wait_link_down(pair, Side::A)?;
        wait_link_down(pair, Side::B)?;
        ensure!(client.end().is_none() && server.end().is_none());
        pair.control().mend();
        sending.finish(LIMIT)?;
        answering.finish(LIMIT)?;
        server.wait_received(there.len(), LIMIT)?;
        client.wait_received(back.len(), LIMIT)?;
        server.expect_received(&there)?;
        client.expect_received(&back)
    })
}

/// Law 4 for a QEMU stream: cut in its middle, it completes afterwards.
#[test]
fn a_migration_goes_on_after_a_cut() -> Result<()> {
    let mut pair = pair(QUICK_LINK)?;
    let stream = guest().bytes;
    check(&mut pair, |pair| {
        let moving = begin_half(pair, &stream)?;
        pair.control().cut();
        wait_link_down(pair, Side::A)?;
        wait_link_down(pair, Side::B)?;
        wait_state(pair, Side::A, "paused")?;
        pair.control().mend();
        moving.conclude(&stream)
    })?;
    expect_state(&pair, 1, "completed")
}

/// Law 3 before the commit: a cut longer than the outage budget fails the migration on both sides,
/// and the next one works.
#[test]
fn a_cut_beyond_the_budget_fails_both_sides() -> Result<()> {
    let mut pair = impatient_pair()?;
    let stream = guest();
    let commit = stream.commit.context("a commit byte")?;
    check(&mut pair, |pair| {
        let moving = begin_half(pair, &stream.bytes)?;
        pair.control().cut();
        expect_reset(&moving.source, "the source", GIVEN_UP)?;
        expect_reset(&moving.destination, "the destination", GIVEN_UP)?;
        moving
            .destination
            .expect_prefix_of(&stream.bytes[..commit])?;
        pair.control().mend();
        pair.wait_link()
    })?;
    expect_state(&pair, 1, "failed")?;
    migrate(&pair, 0, &stream.bytes)
}

/// Law 3 before the commit: the near gateway dies. Its source is reset by the system, and the
/// destination within the outage budget, or as soon as the next instance is there.
#[test]
fn a_dead_near_gateway_fails_the_destination() -> Result<()> {
    for restart in [false, true] {
        let mut pair = impatient_pair()?;
        let stream = guest();
        let commit = stream.commit.context("a commit byte")?;
        check(&mut pair, |pair| {
            let moving = begin_half(pair, &stream.bytes)?;
            pair.gateway_mut(Side::A).kill();
            expect_reset(&moving.source, "the source", LIMIT)?;
            let mut limit = GIVEN_UP;
            if restart {
                pair.gateway_mut(Side::A).restart()?;
                limit = Duration::from_secs(2);
            }
            expect_reset(&moving.destination, "the destination", limit)?;
            moving.destination.expect_prefix_of(&stream.bytes[..commit])
        })?;
        if restart {
            pair.wait_link()?;
            migrate(&pair, 0, &stream.bytes)?;
        }
    }
    Ok(())
}

/// Law 3 before the commit: the far gateway dies. The source is reset within the outage budget, or
/// when the next instance knows nothing of it.
#[test]
fn a_dead_far_gateway_fails_the_source() -> Result<()> {
    for restart in [false, true] {
        let mut pair = impatient_pair()?;
        let SyntheticStream {
            bytes: stream,
            commit,
            ..
        } = guest();
        let commit = commit.context("a commit byte")?;
        check(&mut pair, |pair| {
            let moving = begin_half(pair, &stream)?;
            pair.gateway_mut(Side::B).kill();
            // The system closes a dead process's sockets, in order where all was read.
            moving.destination.wait_end(LIMIT)?;
            moving.destination.expect_prefix_of(&stream[..commit])?;
            if restart {
                pair.gateway_mut(Side::B).restart()?;
            }
            expect_reset(&moving.source, "the source", GIVEN_UP)?;
            ensure!(moving.source.received_len() == 0);
            Ok(())
        })?;
        wait_finished(pair.gateway(Side::A), 1)?;
        if restart {
            pair.wait_link()?;
            migrate(&pair, 0, &stream)?;
        }
    }
    Ok(())
}

/// Law 3 after the commit: the link goes right behind the commit byte, the destination's verdict
/// falls into the outage, which is longer than the budget. The source waits, reads the verdict, and
/// only then the end.
#[test]
fn a_verdict_survives_an_outage_of_any_length() -> Result<()> {
    let mut pair = impatient_pair()?;
    let stream = guest().bytes;
    check(&mut pair, |pair| {
        let moving = commit(pair, &stream)?;
        pair.control().cut();
        moving.destination.send(&shut(0))?;
        drop(moving.destination);
        moving.source.expect_silence(TOO_LONG)?;
        wait_state(pair, Side::A, "awaiting-verdict")?;
        pair.control().mend();
        expect_verdict(&moving.source, &shut(0))
    })?;
    expect_state(&pair, 1, "completed")
}

/// Law 3 after the commit: the verdict is the destination's, also when it comes long after the
/// outage, and when it is a failure.
#[test]
fn a_late_verdict_passes_after_an_outage() -> Result<()> {
    let mut pair = impatient_pair()?;
    let stream = guest().bytes;
    check(&mut pair, |pair| {
        let moving = commit(pair, &stream)?;
        pair.control().cut();
        moving.source.expect_silence(TOO_LONG)?;
        pair.control().mend();
        pair.wait_link()?;
        moving.source.expect_silence(Duration::from_millis(500))?;
        ensure!(moving.destination.end().is_none());
        moving.destination.send(&shut(1))?;
        drop(moving.destination);
        expect_verdict(&moving.source, &shut(1))
    })?;
    expect_state(&pair, 1, "failed")
}

/// Law 3 when nobody can know: the far gateway dies after the commit, with or without a successor.
/// The source is kept waiting, since a close would start its guest beside the destination's.
#[test]
fn a_far_gateway_dead_after_the_commit_leaves_the_source_waiting() -> Result<()> {
    for (restart, forgetful) in [(false, false), (true, false), (true, true)] {
        let mut pair = if forgetful {
            forgetful_pair()?
        } else {
            impatient_pair()?
        };
        let stream = guest().bytes;
        check(&mut pair, |pair| {
            let moving = commit(pair, &stream)?;
            pair.gateway_mut(Side::B).kill();
            if restart {
                pair.gateway_mut(Side::B).restart()?;
            }
            moving.source.expect_silence(TOO_LONG)?;
            wait_state(pair, Side::A, "awaiting-verdict")?;
            if !restart {
                return Ok(());
            }
            // The operator decides; the source's own end is the end.
            drop(moving.source);
            let finished = wait_finished(pair.gateway(Side::A), 1)?;
            ensure!(finished[0]["state"] == "unknown", "{}", finished[0]);
            Ok(())
        })?;
    }
    Ok(())
}

/// Law 3 before the release: the near gateway has asked for the commit, and the far one dies without having
/// heard of that. Its successor knows that nothing was released, and the source may go on; one that knows
/// nothing has it kept waiting.
#[test]
fn a_far_gateway_dead_before_the_release_fails_the_source() -> Result<()> {
    let stream = guest();
    let at = stream.commit.context("a commit byte")?;
    for forgetful in [false, true] {
        let mut pair = if forgetful {
            forgetful_pair()?
        } else {
            impatient_pair()?
        };
        check(&mut pair, |pair| {
            let before = &stream.bytes[..at];
            let (listener, moving) = deliver(pair, before)?;
            pair.gateway_mut(Side::B).kill();
            moving.source.send(&stream.bytes[at..])?;
            wait_state(pair, Side::A, "awaiting-verdict")?;
            moving.destination.wait_end(LIMIT)?;
            moving.destination.expect_received(before)?;
            pair.gateway_mut(Side::B).restart()?;
            if forgetful {
                moving.source.expect_silence(TOO_LONG)?;
                return wait_state(pair, Side::A, "awaiting-verdict");
            }
            expect_reset(&moving.source, "the source", GIVEN_UP)?;
            listener.expect_not_dialled(Duration::from_secs(1))
        })?;
        if !forgetful {
            let finished = wait_finished(pair.gateway(Side::A), 1)?;
            ensure!(finished[0]["state"] == "failed", "{}", finished[0]);
            migrate(&pair, 0, &stream.bytes)?;
        }
    }
    Ok(())
}

/// Laws 2 and 3 when the outage swallows the commit request. Short: it is asked again, and the
/// migration completes. Too long: the far gateway gives up, the destination has not read the commit
/// byte, and the source learns that it may go on.
#[test]
fn a_swallowed_commit_request_is_asked_again_or_fails() -> Result<()> {
    let stream = guest();
    let at = stream.commit.context("a commit byte")?;
    for too_long in [false, true] {
        let mut pair = impatient_pair()?;
        check(&mut pair, |pair| {
            let before = &stream.bytes[..at];
            let (_listener, moving) = deliver(pair, before)?;
            pair.control().cut();
            moving.source.send(&stream.bytes[at..])?;
            wait_state(pair, Side::A, "awaiting-verdict")?;
            wait_link_down(pair, Side::A)?;
            wait_link_down(pair, Side::B)?;
            if !too_long {
                pair.control().mend();
                return moving.conclude(&stream.bytes);
            }
            expect_reset(&moving.destination, "the destination", GIVEN_UP)?;
            moving.destination.expect_received(before)?;
            ensure!(moving.source.end().is_none(), "closed without knowing");
            pair.control().mend();
            expect_reset(&moving.source, "the source", LIMIT)
        })?;
        expect_state(&pair, 1, if too_long { "failed" } else { "completed" })?;
    }
    Ok(())
}

/// From before the commit on nothing comes back from the far side: the near gateway does not hear that the
/// commit byte was released.
fn commit_unheard(
    pair: &GatewayPair,
    stream: &SyntheticStream,
) -> Result<(FakeListener, FakeMigration)> {
    let at = stream.commit.context("a commit byte")?;
    let (listener, moving) = deliver(pair, &stream.bytes[..at])?;
    // The far gateway asks for the near one's clock twice within half a second; without it, it would have
    // to ask about the commit.
    thread::sleep(Duration::from_millis(1500));
    pair.control().set_shape_of(Way::BToA, LINK.with_loss(1.0));
    moving.source.send(&stream.bytes[at..])?;
    moving
        .destination
        .wait_received(stream.bytes.len(), LIMIT)?;
    moving.destination.expect_received(&stream.bytes)?;
    Ok((listener, moving))
}

/// A stream whose end fits into a QUIC connection's first window.
fn tiny() -> SyntheticStream {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", 4)])
        .device_bytes(700)
        .build()
}

/// Law 3 with a link that goes in one direction only: the verdict comes when it is mended.
#[test]
fn a_commit_that_was_not_heard_of_is_still_one() -> Result<()> {
    let mut pair = impatient_pair()?;
    let stream = tiny();
    check(&mut pair, |pair| {
        let (_listener, moving) = commit_unheard(pair, &stream)?;
        moving.destination.send(&shut(0))?;
        drop(moving.destination);
        moving.source.expect_silence(TOO_LONG)?;
        pair.control().set_shape(LINK);
        expect_verdict(&moving.source, &shut(0))
    })?;
    expect_state(&pair, 1, "completed")
}

/// Law 3, and the far gateway forgets all of it: the source is kept waiting, and nobody is dialled a
/// second time.
#[test]
fn a_commit_that_was_not_heard_of_is_not_begun_again() -> Result<()> {
    let mut pair = impatient_pair()?;
    let stream = tiny();
    check(&mut pair, |pair| {
        let (listener, moving) = commit_unheard(pair, &stream)?;
        pair.gateway_mut(Side::B).kill();
        pair.gateway_mut(Side::B).restart()?;
        pair.control().set_shape(LINK);
        wait_link_down(pair, Side::A)?;
        pair.wait_link()?;
        listener.expect_not_dialled(Duration::from_secs(2))?;
        ensure!(moving.source.end().is_none(), "the source's guest goes on");
        wait_state(pair, Side::A, "awaiting-verdict")
    })
}

/// Many short cuts during one migration.
#[test]
fn a_flapping_link_carries_a_migration() -> Result<()> {
    let mut pair = pair(QUICK_LINK)?;
    let stream = guest().bytes;
    check(&mut pair, |pair| {
        let moving = begin_half(pair, &stream)?;
        let end = Instant::now() + LIMIT;
        let mut read = moving.destination.received_len();
        for _ in 0..5 {
            pair.control().cut_for(Duration::from_millis(300));
            read = (read + (1 << 20)).min(stream.len());
            moving.destination.wait_received(read, LIMIT)?;
        }
        ensure!(Instant::now() < end);
        moving.conclude(&stream)
    })?;
    expect_state(&pair, 1, "completed")
}

/// How long the link is away around a commit: longer than what counts as silence, shorter than what
/// either gateway notices of its connection.
const SILENCE: Duration = Duration::from_millis(800);

/// A pair over [`LINK`] with another delay, one way.
fn distant_pair(delay: Duration) -> Result<GatewayPair> {
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        store_mib: Some([16; 2]),
        ..PairSetup::default()
    };
    GatewayPair::over_relay(Shape { delay, ..LINK }, &setup)
}

/// Moves a guest up to its last bytes, without which no commit is asked for, and cuts the link; the
/// source writes the rest into the silence, which is over when this returns.
fn commit_into_silence(pair: &GatewayPair, stream: &SyntheticStream) -> Result<FakeMigration> {
    let at = stream.commit.context("a commit byte")?;
    let (most, rest) = stream.bytes.split_at(stream.bytes.len() - 10);
    let listener = FakeListener::bind(&pair.route(0).target)?;
    let moving = FakeMigration::begin(pair.route(0), &listener, most)?;
    moving.destination.wait_received(at, LIMIT)?;
    // What follows the commit byte gets there, too.
    moving.destination.expect_silence(SILENCE)?;
    pair.control().cut();
    moving.source.send(rest)?;
    pair.gateway(Side::A).wait_log("commit requested")?;
    moving.destination.expect_silence(SILENCE)?;
    pair.control().mend();
    Ok(moving)
}

/// Law 2 and a link that is silent just when the commit is asked for: when it is back, what is heard may be
/// old, and the near gateway says once more that it means it. All goes well, on the same connection.
#[test]
fn a_commit_asked_for_into_a_silence_is_asked_about() -> Result<()> {
    let mut pair = pair("")?;
    let stream = SyntheticStream::builder().build();
    check(&mut pair, |pair| {
        commit_into_silence(pair, &stream)?.conclude(&stream.bytes)?;
        ensure!(
            !pair.gateway(Side::A).log().contains("resumed"),
            "the connection was lost"
        );
        let asked = pair
            .gateway(Side::B)
            .metric("skyferry_commit_checks_total", "result=\"asked\"")?;
        ensure!(asked >= 1.0, "nobody was asked");
        Ok(())
    })?;
    expect_state(&pair, 1, "completed")
}

/// The same, but the source goes when the request has come through: the destination, which has
/// everything, is not started.
#[test]
fn a_commit_withdrawn_after_a_silence_starts_nobody() -> Result<()> {
    const DELAY: Duration = Duration::from_millis(250);
    let mut pair = distant_pair(DELAY)?;
    let stream = SyntheticStream::builder().build();
    check(&mut pair, |pair| {
        let moving = commit_into_silence(pair, &stream)?;
        wait_for(
            "the far gateway's question",
            LIMIT,
            || {
                let far = pair.gateway(Side::B);
                let asked = far.metric("skyferry_commit_checks_total", "result=\"asked\"")?;
                Ok((asked >= 1.0).then_some(()))
            },
            || pair.explain(),
        )?;
        // The question is still on its way: nobody answers for the source any more.
        moving.source.reset()?;
        expect_reset(&moving.destination, "the destination", LIMIT)?;
        let at = stream.commit.context("a commit byte")?;
        moving.destination.expect_received(&stream.bytes[..at])?;
        Ok(())
    })?;
    // The near gateway has heard that nothing was released.
    expect_state(&pair, 1, "cancelled")
}

/// Law 3, and it is not the link that fails but the network between far gateway and destination. The
/// destination has read the commit byte, so it runs, and nothing comes back from it, so that the far
/// gateway's connection to it is lost. That is not the destination's word: the source is kept
/// waiting.
#[test]
fn a_network_that_fails_behind_the_commit_does_not_let_the_source_go() -> Result<()> {
    if !TunWan::is_possible() {
        lacks(TunWan::NEEDS);
        return Ok(());
    }
    let net = TunWan::new(LINK)?;
    net.a().set_tcp_retries(2)?;
    let route = Route::between(Side::A, "127.0.0.1:4444", &format!("{ADDRESS_B}:4444"));
    let setup = PairSetup {
        routes: vec![route],
        store_mib: Some([16; 2]),
        ..PairSetup::default()
    };
    let pair = GatewayPair::inside(net.a(), &setup)?;
    let stream = SyntheticStream::builder().blocks(&[("pc.ram", 50)]).build();
    let at = stream.commit.context("a commit byte")?;
    let run = || {
        let route = pair.route(0);
        let listener = net.b().run(|| FakeListener::bind(&route.target))?;
        let source = net.a().run(|| FakeEnd::connect(&route.listen))?;
        source.send(&stream.bytes[..at])?;
        let destination = listener.accept(LIMIT)?;
        destination.wait_received(at, LIMIT)?;
        // The far gateway's kernel knows so, too: behind what it still has nothing is released.
        thread::sleep(Duration::from_millis(500));
        let dark = LINK.with_loss(1.0);
        net.control().set_shape_of(Way::BToA, dark);
        source.send(&stream.bytes[at..])?;
        destination.wait_received(stream.bytes.len(), LIMIT)?;
        destination.expect_received(&stream.bytes)?;
        pair.gateway(Side::B)
            .wait_log("the connection to the VM's side was lost")?;
        pair.gateway(Side::A)
            .wait_log("the source is kept waiting")?;
        source.expect_silence(Duration::from_secs(2))?;
        wait_state(&pair, Side::A, "awaiting-verdict")
    };
    run().with_context(|| pair.explain())
}

/// A pair of which one gateway's tasks panic when they decode frame `frame` of a channel.
fn panicking_pair(side: Side, frame: u64) -> Result<GatewayPair> {
    faulty_pair(side, &format!("panic-at-frame={frame}"))
}

fn faulty_pair(side: Side, fault: &str) -> Result<GatewayPair> {
    let mut setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        store_mib: Some([16; 2]),
        ..PairSetup::default()
    };
    fault.clone_into(&mut setup.faults[side as usize]);
    GatewayPair::over_relay(LINK, &setup)
}

/// Has the near gateway decode frames 0 and 1 of the return path.
fn two_answers(moving: &FakeMigration) -> Result<()> {
    moving.destination.send(&pong(1))?;
    moving.source.wait_received(pong(1).len(), LIMIT)?;
    moving.destination.send(&pong(2))
}

/// A fault that unwinds the task of a channel ends the migration at both sides, and nothing of it is
/// left behind that a drain would wait for.
#[test]
fn a_panic_ends_its_migration_and_no_other() -> Result<()> {
    let stream = guest().bytes;
    for side in [Side::A, Side::B] {
        let mut pair = panicking_pair(side, if side == Side::A { 1 } else { 16 })?;
        check(&mut pair, |pair| {
            let moving = begin_half(pair, &stream)?;
            if side == Side::A {
                two_answers(&moving)?;
            }
            expect_reset(&moving.source, "the source", LIMIT)?;
            expect_reset(&moving.destination, "the destination", LIMIT)?;
            expect_state(pair, 1, "failed")?;
            // A few frames, and an answer of one.
            migrate(pair, 0, &tiny().bytes)?;
            pair.gateway_mut(side).terminate();
            let status = pair.gateway_mut(side).wait_exit(LIMIT)?;
            ensure!(status.success(), "{status}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The same before anything is carried, and where the channel's task takes its leave.
#[test]
fn a_panic_around_a_channel_ends_its_migration_too() -> Result<()> {
    let cases = [
        (Side::A, "open"),
        (Side::B, "dial"),
        (Side::A, "end"),
        (Side::B, "end"),
    ];
    for (side, step) in cases {
        let mut pair = faulty_pair(side, &format!("panic-at-step={step}"))?;
        check(&mut pair, |pair| {
            let listener = FakeListener::bind(&pair.route(0).target)?;
            let source = FakeEnd::connect(&pair.route(0).listen)?;
            source.send(&tiny().bytes[..2000])?;
            if step == "end" {
                listener.accept(LIMIT)?.reset()?;
            }
            expect_reset(&source, "the source", LIMIT).with_context(|| step.to_owned())?;
            for side in [Side::A, Side::B] {
                let gateway = pair.gateway_mut(side);
                gateway.terminate();
                let status = gateway.wait_exit(LIMIT)?;
                ensure!(status.success(), "{step}: {status}");
                ensure!(!gateway.log().contains("still waiting"), "{step}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Law 3 and a fault that unwinds the near gateway's task behind the commit byte.
#[test]
fn a_panic_behind_the_commit_leaves_the_source_waiting() -> Result<()> {
    let mut pair = panicking_pair(Side::A, 1)?;
    let stream = tiny();
    check(&mut pair, |pair| {
        let moving = commit(pair, &stream.bytes)?;
        two_answers(&moving)?;
        pair.gateway(Side::A)
            .wait_log("the source is kept waiting")?;
        moving.source.expect_silence(Duration::from_secs(2))?;
        wait_state(pair, Side::A, "awaiting-verdict")?;
        drop(moving.source);
        let finished = wait_finished(pair.gateway(Side::A), 1)?;
        ensure!(finished[0]["state"] == "unknown", "{}", finished[0]);
        Ok(())
    })
}
