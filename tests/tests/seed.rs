//! A site that was given the image of a guest before the guest comes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec, write_disk_image};
use skyferry_tests::process::wait_for;
use skyferry_tests::scenario::{Passage, prove_it_goes_on, start_source};
use skyferry_tests::wan::Shape;

/// How long the far gateway may take to tell what it was given.
const TELL_LIMIT: Duration = Duration::from_secs(20);

fn pair() -> Result<GatewayPair> {
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        shared_secret: true,
        more: "[store]\npath = \"store\"\nsize = \"1GiB\"\nkey_file = \"store.key\"\n".into(),
        ..PairSetup::default()
    };
    GatewayPair::over_relay(Shape::wan(400, 20), &setup)
}

/// Moves the guest to B; returns what that took on the link.
fn carry(image: &GuestImage, pair: &GatewayPair) -> Result<u64> {
    let mut source = start_source(image)?;
    let before = pair.control().wire_bytes();
    let passage = Passage::along(image, pair.route(0));
    let mut arrival = passage
        .run(&mut source, |_| {})
        .with_context(|| pair.explain())?;
    prove_it_goes_on(&mut source, &mut arrival.destination)?;
    Ok(pair.control().wire_bytes() - before)
}

/// The page cache of a guest lies in pages in which its disk has it: it need not cross even once.
#[test]
fn files_of_a_seeded_image_do_not_cross_the_link() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    let cold = carry(&image, &pair()?)?;

    let mut seeded = pair()?;
    let disk = tempfile::NamedTempFile::new()?;
    write_disk_image(image.spec(), disk.path())?;
    let report = seeded.gateway(Side::B).seed(disk.path())?;
    let new = report["new_pages"].as_u64().context("a count")?;
    ensure!(report["by_gateway"] == true, "{report}");
    // Of 48 MiB of files some pages are zero, and some are alike.
    ensure!(new > 8000, "{report}");
    let taken = seeded
        .gateway(Side::B)
        .metric("skyferry_seeded_pages_total", "new")?;
    ensure!(
        taken as u64 == new,
        "{taken} pages taken, {new} handed over"
    );
    wait_for(
        "word of the seeded pages",
        TELL_LIMIT,
        || {
            let near = seeded.gateway(Side::A);
            let announced = near.metric("skyferry_link_announced_pages", "")?;
            Ok((announced as u64 >= new).then_some(()))
        },
        || seeded.explain(),
    )?;
    let wire = carry(&image, &seeded)?;

    eprintln!("{cold} bytes cold, {wire} seeded, {new} pages new");
    ensure!(wire * 10 <= cold * 7, "{cold} bytes cold, {wire} seeded");
    // What was seeded outlives a gateway that is killed.
    seeded.gateway_mut(Side::B).restart()?;
    let report = seeded.gateway(Side::B).seed(disk.path())?;
    ensure!(report["new_pages"] == 0, "{report}");
    Ok(())
}
