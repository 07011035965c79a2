//! Postcopy: the guest runs at the destination while the rest of its memory follows.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::process::wait_for;
use skyferry_tests::qemu::{Launch, MigrationSettings, Start};
use skyferry_tests::scenario::{Passage, prove_it_goes_on, start_source};
use skyferry_tests::wan::Shape;

const LIMIT: Duration = Duration::from_secs(60);

/// Slow, and never done before the switch is asked for.
fn settings() -> MigrationSettings {
    MigrationSettings {
        max_bytes_per_sec: 20 << 20,
        downtime_limit: Duration::from_millis(1),
        ..MigrationSettings::default()
    }
}

/// Moves a guest by postcopy; `preempt`: with a channel of its own for urgent pages, on which the
/// source is silent until the first fault.
fn moves(image: &GuestImage, pair: &GatewayPair, preempt: bool) -> Result<()> {
    let capabilities = json!({"capabilities": [
        {"capability": "postcopy-ram", "state": true},
        {"capability": "postcopy-preempt", "state": preempt},
    ]});
    let passage = Passage::along(image, pair.route(0));
    let mut source = start_source(image)?;
    let mut destination = Launch {
        label: "destination",
        image,
        start: Start::Incoming,
        netns: None,
    }
    .run()?;
    for qemu in [&source, &destination] {
        qemu.configure_migration(&settings())?;
        qemu.qmp()
            .execute("migrate-set-capabilities", capabilities.clone())
            .context("postcopy needs userfaultfd")?;
    }
    destination.listen(&passage.destination_uri)?;
    source.start_migration(&passage.source_uri)?;
    wait_for(
        "some megabytes of precopy",
        LIMIT,
        || Ok((source.migration()?.transferred_bytes > 8 << 20).then_some(())),
        || source.explain(),
    )?;
    source.qmp().execute("migrate-start-postcopy", json!({}))?;
    source
        .wait_migration(LIMIT, |_| {})?
        .expect_completed(&source)?;
    destination.wait_status("running", LIMIT)?;
    prove_it_goes_on(&mut source, &mut destination)
}

#[test]
fn postcopy_passes_with_and_without_its_urgent_channel() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(400, 20), &setup)?;
    for preempt in [false, true] {
        moves(&image, &pair, preempt)
            .with_context(|| format!("preempt {preempt}\n{}", pair.explain()))?;
    }
    Ok(())
}
