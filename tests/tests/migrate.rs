//! The main job: a guest moves through two gateways and goes on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::qemu::{Launch, MigrationSettings, Qemu, Start};
use skyferry_tests::scenario::{Passage, prove_it_goes_on};
use skyferry_tests::wan::Shape;

fn source(image: &GuestImage) -> Result<Qemu> {
    Launch {
        label: "source",
        image,
        start: Start::Recording,
        netns: None,
    }
    .run()
}

/// Moves the guest of `source` along a route and gives back where it runs then.
fn carry(image: &GuestImage, pair: &GatewayPair, route: usize, source: &mut Qemu) -> Result<Qemu> {
    let passage = Passage::along(image, pair.route(route));
    let mut arrival = passage
        .run(source, |_| {})
        .with_context(|| pair.explain())?;
    prove_it_goes_on(source, &mut arrival.destination)?;
    Ok(arrival.destination)
}

#[test]
fn a_guest_moves_there_and_back_and_there_again() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    let routes = vec![Route::tcp(Side::A)?, Route::tcp(Side::B)?];
    let setup = PairSetup {
        routes,
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(400, 20), &setup)?;

    let mut first = source(&image)?;
    let mut second = carry(&image, &pair, 0, &mut first)?;
    let once = pair.control().wire_bytes();
    let mut third = carry(&image, &pair, 1, &mut second)?;
    let back = pair.control().wire_bytes() - once;
    carry(&image, &pair, 0, &mut third)?;
    let again = pair.control().wire_bytes() - once - back;

    eprintln!("{once} bytes there, {back} back, {again} there again");
    // The near side knows what the far side holds.
    ensure!(again < once / 4, "{once} bytes there, {again} there again");
    Ok(())
}

/// Pages that the source sends as differences pass as they are.
#[test]
fn a_guest_moves_with_xbzrle() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(400, 20), &setup)?;
    let passage = Passage {
        settings: MigrationSettings {
            xbzrle: true,
            // Slow enough for several rounds: differences come from the second on.
            max_bytes_per_sec: 40 << 20,
            downtime_limit: Duration::from_millis(20),
            ..MigrationSettings::default()
        },
        ..Passage::along(&image, pair.route(0))
    };
    let mut source = source(&image)?;
    let mut arrival = passage
        .run(&mut source, |_| {})
        .with_context(|| pair.explain())?;
    prove_it_goes_on(&mut source, &mut arrival.destination)
}
