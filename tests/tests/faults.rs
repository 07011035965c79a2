//! What goes wrong around a migration: afterwards the guest runs in exactly one place, and a second
//! attempt works.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skyferry_tests::fake_vm::expect_state;
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::process::wait_for;
use skyferry_tests::qemu::{MigrationSettings, Qemu};
use skyferry_tests::random::seed;
use skyferry_tests::scenario::{Passage, prove_it_goes_on, start_source};
use skyferry_tests::wan::Shape;

/// A move of the tiny guest takes about two seconds on it.
fn link() -> Shape {
    Shape::wan(100, 20)
}

const LIMIT: Duration = Duration::from_secs(60);

fn tiny() -> Result<GuestImage> {
    GuestImage::prepare(&GuestSpec::TINY)
}

/// A pair with one route from A to B; `change` may alter it before the gateways start.
fn pair(change: impl FnOnce(&mut PairSetup)) -> Result<GatewayPair> {
    let mut setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        ..PairSetup::default()
    };
    change(&mut setup);
    GatewayPair::over_relay(link(), &setup)
}

/// Waits for the end of a migration that is expected to fail; the guest goes on at the source.
/// Gives back how long the wait for that end was.
fn expect_failure(source: &mut Qemu, pair: &GatewayPair, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    let outcome = source
        .wait_migration(limit, |_| {})
        .with_context(|| pair.explain())?;
    let waited = start.elapsed();
    ensure!(
        outcome.end.status == "failed",
        "{:?}\n{}",
        outcome.end,
        pair.explain()
    );
    source.wait_status("running", LIMIT)?;
    source.wait_ticks(3, LIMIT)?;
    source.check_memory()?;
    Ok(waited)
}

/// A move that must succeed.
fn expect_success(image: &GuestImage, pair: &GatewayPair, source: &mut Qemu) -> Result<()> {
    let passage = Passage::along(image, pair.route(0));
    let mut arrival = passage
        .run(source, |_| {})
        .with_context(|| pair.explain())?;
    prove_it_goes_on(source, &mut arrival.destination)
}

/// Waits until QEMU has written some of the guest's memory.
fn wait_precopy(source: &Qemu, bytes: u64) -> Result<()> {
    wait_for(
        "precopy under way",
        LIMIT,
        || Ok((source.migration()?.transferred_bytes > bytes).then_some(())),
        || source.explain(),
    )
}

#[test]
fn a_target_that_is_down_fails_the_migration_soon() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|_| {})?;
    let mut source = start_source(&image)?;
    Passage::along(&image, pair.route(0)).begin(&source)?;
    let waited = expect_failure(&mut source, &pair, LIMIT)?;
    ensure!(
        waited < Duration::from_secs(3),
        "failed after {waited:?}\n{}",
        pair.explain()
    );
    expect_success(&image, &pair, &mut source)
}

#[test]
fn a_target_that_is_not_allowed_is_not_reached() -> Result<()> {
    let image = tiny()?;
    let another = Route::tcp(Side::A)?;
    let pair = pair(|setup| {
        setup.routes[0].allowed = false;
        setup.routes.push(another);
    })?;
    let mut source = start_source(&image)?;
    let passage = Passage::along(&image, pair.route(0));
    let mut destination = passage.open_destination()?;
    passage.begin(&source)?;
    expect_failure(&mut source, &pair, LIMIT)?;
    ensure!(destination.status()? == "inmigrate" && destination.exited().is_none());
    let log = pair.gateway(Side::B).log();
    ensure!(
        log.contains("is not on the allow list"),
        "no reason in\n{log}"
    );
    Ok(())
}

#[test]
fn a_source_without_return_path_is_refused() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|_| {})?;
    let mut source = start_source(&image)?;
    let mut passage = Passage::along(&image, pair.route(0));
    passage.settings = MigrationSettings {
        return_path: false,
        ..MigrationSettings::default()
    };
    let mut destination = passage.open_destination()?;
    passage.begin(&source)?;
    expect_failure(&mut source, &pair, LIMIT)?;
    ensure!(!destination.is_running());
    let log = pair.gateway(Side::A).log();
    ensure!(log.contains("return path"), "no reason in\n{log}");
    Ok(())
}

#[test]
fn a_source_without_return_path_passes_where_that_is_allowed() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|setup| setup.routes[0].more = "allow_no_return_path = true".into())?;
    let mut source = start_source(&image)?;
    let mut passage = Passage::along(&image, pair.route(0));
    passage.settings = MigrationSettings {
        return_path: false,
        ..MigrationSettings::default()
    };
    let mut arrival = passage
        .run(&mut source, |_| {})
        .with_context(|| pair.explain())?;
    prove_it_goes_on(&mut source, &mut arrival.destination)
}

#[test]
fn a_hundred_port_scans_do_not_reach_the_destination() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|_| {})?;
    let mut source = start_source(&image)?;
    let passage = Passage::along(&image, pair.route(0));
    let mut destination = passage.open_destination()?;
    for _ in 0..100 {
        drop(TcpStream::connect(&pair.route(0).listen)?);
    }
    thread::sleep(Duration::from_millis(500));
    ensure!(destination.exited().is_none() && destination.status()? == "inmigrate");
    passage.begin(&source)?;
    let outcome = source.wait_migration(LIMIT, |_| {})?;
    outcome
        .expect_completed(&source)
        .with_context(|| pair.explain())?;
    prove_it_goes_on(&mut source, &mut destination)
}

#[test]
fn a_migration_is_cancelled_and_the_second_one_works() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|_| {})?;
    let mut source = start_source(&image)?;
    let passage = Passage::along(&image, pair.route(0));
    let mut destination = passage.open_destination()?;
    passage.begin(&source)?;
    wait_precopy(&source, 10 << 20)?;
    source.cancel_migration()?;
    let outcome = source.wait_migration(LIMIT, |_| {})?;
    // QEMU up to 10.0 shuts the socket before it takes note of the cancellation: a thread of its own that
    // is just writing may be faster, and calls it a failure.
    ensure!(
        ["cancelled", "failed"].contains(&outcome.end.status.as_str()),
        "{:?}",
        outcome.end
    );
    destination
        .wait_exit(LIMIT)
        .with_context(|| pair.explain())?;
    expect_state(&pair, 1, "cancelled")?;
    source.wait_ticks(3, LIMIT)?;
    expect_success(&image, &pair, &mut source)
}

#[test]
fn a_link_cut_is_a_pause() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|_| {})?;
    let mut source = start_source(&image)?;
    let mut cut = false;
    let passage = Passage::along(&image, pair.route(0));
    let arrival = passage.run(&mut source, |progress| {
        if !cut && progress.transferred_bytes > 10 << 20 {
            cut = true;
            pair.control().cut_for(Duration::from_secs(5));
        }
    });
    let mut arrival = arrival.with_context(|| pair.explain())?;
    ensure!(cut && arrival.outcome.end.total > Duration::from_secs(5));
    prove_it_goes_on(&mut source, &mut arrival.destination)
}

#[test]
fn a_corrupted_frame_never_runs() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|setup| setup.faults[1] = "corrupt-frame=20".into())?;
    let mut source = start_source(&image)?;
    let passage = Passage::along(&image, pair.route(0));
    let mut destination = passage.open_destination()?;
    passage.begin(&source)?;
    expect_failure(&mut source, &pair, LIMIT)?;
    ensure!(
        !destination.is_running(),
        "the destination runs damaged memory"
    );
    Ok(())
}

#[test]
fn a_cut_after_the_commit_leaves_the_guest_at_the_destination_only() -> Result<()> {
    let image = tiny()?;
    let pair = pair(|setup| setup.faults[1] = "delay-verdict-ms=3000".into())?;
    let mut source = start_source(&image)?;
    let passage = Passage::along(&image, pair.route(0));
    let mut destination = passage.open_destination()?;
    passage.begin(&source)?;
    // The destination has resumed, the source does not know it yet.
    destination
        .qmp()
        .wait_event("RESUME", LIMIT)
        .with_context(|| pair.explain())?;
    pair.control().cut_for(Duration::from_secs(8));
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        ensure!(
            !source.is_running(),
            "the guest runs twice\n{}",
            pair.explain()
        );
        thread::sleep(Duration::from_millis(50));
    }
    let outcome = source.wait_migration(LIMIT, |_| {})?;
    outcome
        .expect_completed(&source)
        .with_context(|| pair.explain())?;
    prove_it_goes_on(&mut source, &mut destination)
}

/// The far store holds far less than the near one believes, and loses pages at random.
#[test]
fn pages_missing_in_the_far_store_cost_a_round_trip_only() -> Result<()> {
    let image = tiny()?;
    let seed = seed()?;
    let pair = pair(|setup| {
        setup.store_mib = Some([256, 8]);
        setup.faults[1] = format!("drop-stored-pages=0.02:{seed}");
    })?;
    for _ in 0..2 {
        expect_success(&image, &pair, &mut start_source(&image)?)?;
    }
    let missed = pair
        .gateway(Side::A)
        .metric("skyferry_page_misses_total", "")?;
    ensure!(missed > 0.0, "nothing was missing\n{}", pair.explain());
    Ok(())
}

#[test]
fn a_drain_lets_running_migrations_finish_and_takes_no_new_ones() -> Result<()> {
    let image = tiny()?;
    let mut pair = pair(|_| {})?;
    let mut source = start_source(&image)?;
    let passage = Passage::along(&image, pair.route(0));
    let mut destination = passage.open_destination()?;
    passage.begin(&source)?;
    wait_precopy(&source, 5 << 20)?;
    pair.gateway_mut(Side::A).terminate();
    thread::sleep(Duration::from_millis(300));
    let mut late = start_source(&image)?;
    late.start_migration(&pair.route(0).source_uri())?;
    expect_failure(&mut late, &pair, LIMIT)?;
    let outcome = source.wait_migration(LIMIT, |_| {})?;
    outcome
        .expect_completed(&source)
        .with_context(|| pair.explain())?;
    prove_it_goes_on(&mut source, &mut destination)?;
    let status = pair
        .gateway_mut(Side::A)
        .wait_exit(Duration::from_secs(20))?;
    ensure!(status.success(), "{status}");
    Ok(())
}
