//! What cannot wait does not wait for what is plenty: fake VMs, real gateways, a slow link.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_core::qemu::{Event, Phase};
use skyferry_tests::fake_vm::{FakeListener, FakeMigration, LIMIT, pong};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::wan::Shape;

/// 2.5 MB/s.
const LINK: Shape = Shape {
    delay: Duration::from_millis(20),
    bits_per_sec: 20_000_000,
    queue_bytes: 128 << 10,
    loss: 0.0,
    seed: 1,
};

fn pair(routes: Vec<Route>) -> Result<GatewayPair> {
    let setup = PairSetup {
        routes,
        store_mib: Some([16; 2]),
        ..PairSetup::default()
    };
    GatewayPair::over_relay(LINK, &setup)
}

/// A stream that the link takes half a minute for.
fn bulk(seed: u64) -> Vec<u8> {
    let builder = SyntheticStream::builder().blocks(&[("pc.ram", 20_000)]);
    let builder = builder.zero_percent(0).random_percent(100).rounds(2);
    builder.seed(seed).build().bytes
}

/// Begins migrations in bulk along the routes from `first` on, and waits until all of them move.
fn begin_bulk(pair: &GatewayPair, routes: std::ops::Range<usize>) -> Result<Vec<FakeMigration>> {
    let begun: Vec<_> = routes
        .map(|route| {
            let listener = FakeListener::bind(&pair.route(route).target)?;
            FakeMigration::begin(pair.route(route), &listener, &bulk(route as u64))
        })
        .collect::<Result<_>>()?;
    for migration in &begun {
        migration.destination.wait_received(500_000, LIMIT)?;
    }
    Ok(begun)
}

/// Law 6: what a guest that stands still waits for goes before the memory of guests that run. It takes
/// about as long as on a free link, and not its share of a crowded one.
#[test]
fn a_guest_that_stands_still_goes_before_those_that_run() -> Result<()> {
    const OTHERS: usize = 5;
    let routes = (0..OTHERS + 2).map(|_| Route::tcp(Side::A));
    let pair = pair(routes.collect::<Result<_>>()?)?;
    let run = || -> Result<()> {
        let alone = device_state(&pair, 0, 0..0)?;
        let among = device_state(&pair, 1, 2..OTHERS + 2)?;
        eprintln!("alone {alone:?}, among {OTHERS} others {among:?}");
        // Enough to tell its share from the whole.
        ensure!(
            alone > Duration::from_millis(500),
            "alone it took {alone:?}"
        );
        ensure!(
            among < alone * 2 + Duration::from_millis(500),
            "{alone:?}, then {among:?}"
        );
        Ok(())
    };
    run().with_context(|| pair.explain())
}

/// How long the device state of a guest takes along a route, while others move.
fn device_state(
    pair: &GatewayPair,
    route: usize,
    others: std::ops::Range<usize>,
) -> Result<Duration> {
    let stream = SyntheticStream::builder()
        .device_bytes(6_000_000)
        .seed(route as u64 + 50)
        .build();
    let stopped = Event::Phase(Phase::DeviceState);
    let mut events = stream.events.iter();
    let found = events.find(|(_, event)| *event == stopped);
    let (stopped, commit) = (found.context("no device state")?.0, stream.commit);
    let commit = commit.context("a commit byte")?;
    let listener = FakeListener::bind(&pair.route(route).target)?;
    let moving = FakeMigration::begin(pair.route(route), &listener, &stream.bytes[..stopped])?;
    moving.destination.wait_received(stopped, LIMIT)?;
    let others = begin_bulk(pair, others)?;
    let before: usize = others
        .iter()
        .map(|other| other.destination.received_len())
        .sum();
    let begun = Instant::now();
    let sending = moving
        .source
        .send_in_background(stream.bytes[stopped..commit].to_vec());
    moving.destination.wait_received(commit, LIMIT)?;
    let took = begun.elapsed();
    sending.finish(LIMIT)?;
    moving
        .destination
        .expect_received(&stream.bytes[..commit])?;
    let after: usize = others
        .iter()
        .map(|other| other.destination.received_len())
        .sum();
    eprintln!("the others got {} bytes meanwhile", after - before);
    for other in &others {
        ensure!(other.source.end().is_none(), "a migration has ended");
    }
    Ok(took)
}

/// The return path is small and urgent: with both ways of the link full of other migrations, a
/// destination's words are read by the source after a fraction of a second, not after what others
/// have to say.
#[test]
fn a_destination_is_heard_over_full_links() -> Result<()> {
    let routes = [Side::A, Side::A, Side::A, Side::B, Side::B, Side::B].map(Route::tcp);
    let pair = pair(routes.into_iter().collect::<Result<_>>()?)?;
    let stream = SyntheticStream::builder().build().bytes;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream[..20_000])?;
        moving.destination.wait_received(20_000, LIMIT)?;
        let others = begin_bulk(&pair, 1..6)?;
        let mut took = Vec::new();
        let mut said = Vec::new();
        for value in 0..20 {
            let begun = Instant::now();
            said.extend(pong(value));
            moving.destination.send(&pong(value))?;
            moving.source.wait_received(said.len(), LIMIT)?;
            took.push(begun.elapsed());
        }
        moving.source.expect_received(&said)?;
        took.sort();
        let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
        eprintln!("heard after {median:?}, at most {most:?}");
        ensure!(median < Duration::from_millis(300), "heard after {took:?}");
        ensure!(most < Duration::from_secs(1), "heard after {took:?}");
        for other in &others {
            ensure!(other.between() > 0, "a migration is over");
        }
        Ok(())
    };
    run().with_context(|| pair.explain())
}
