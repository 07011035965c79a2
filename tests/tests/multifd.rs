//! Several channels of one migration, which a pair of gateways carries as they are.

use anyhow::{Context, Result};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::qemu::{MigrationSettings, Multifd};
use skyferry_tests::scenario::{Passage, prove_it_goes_on, start_source};
use skyferry_tests::skip::skip;
use skyferry_tests::wan::Shape;

#[test]
fn four_channels_pass() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    if image.qemu().major() < 8 {
        // QEMU 7.2 as a multifd source under TCG damages the guest without any gateway.
        let version = image.qemu().version();
        skip(&format!(
            "QEMU {version} is no sound multifd source, 8.0 is"
        ));
        return Ok(());
    }
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(400, 20), &setup)?;
    for zstd_level in [Some(1), None] {
        let multifd = Some(Multifd {
            channels: 4,
            zstd_level,
        });
        let passage = Passage {
            settings: MigrationSettings {
                multifd,
                ..MigrationSettings::default()
            },
            ..Passage::along(&image, pair.route(0))
        };
        let mut source = start_source(&image)?;
        let mut arrival = passage
            .run(&mut source, |_| {})
            .with_context(|| pair.explain())?;
        prove_it_goes_on(&mut source, &mut arrival.destination)?;
    }
    Ok(())
}
