//! QEMU's own migration over the emulated WAN: the yardstick, and a test of the kit itself.

use std::time::Duration;

use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::qemu::{Launch, MigrationSettings, Start, blackout};
use skyferry_tests::skip::lacks;
use skyferry_tests::wan::tun::{ADDRESS_B, TunWan};
use skyferry_tests::wan::{Shape, Way};

#[test]
fn a_guest_moves_over_the_wan_and_goes_on() {
    if !TunWan::is_possible() {
        lacks(TunWan::NEEDS);
        return;
    }
    let image = GuestImage::prepare(&GuestSpec::SMALL).unwrap();
    let wan = TunWan::new(Shape::wan(400, 20)).unwrap();
    let launch = |label, start, netns| {
        Launch {
            label,
            image: &image,
            start,
            netns: Some(netns),
        }
        .run()
        .unwrap()
    };
    let mut source = launch("source", Start::Recording, wan.a());
    let mut destination = launch("destination", Start::Incoming, wan.b());
    let settings = MigrationSettings::default();
    source.configure_migration(&settings).unwrap();
    destination.configure_migration(&settings).unwrap();
    let uri = format!("tcp:{ADDRESS_B}:4444");
    destination.listen(&uri).unwrap();
    source.wait_ticks(3, Duration::from_secs(20)).unwrap();

    source.start_migration(&uri).unwrap();
    let outcome = source
        .wait_migration(Duration::from_secs(60), |_| {})
        .unwrap();
    let outcome = outcome.expect_completed(&source).unwrap();
    let blackout = blackout(&source, &destination).unwrap();

    assert!(
        blackout >= Duration::from_millis(20),
        "{blackout:?} is less than a round trip"
    );
    assert!(!source.is_running());
    assert!(destination.is_running());
    destination.wait_ticks(3, Duration::from_secs(20)).unwrap();
    destination.check_memory().unwrap();
    let left = source.console().ticks();
    let arrived = destination.console().ticks();
    assert!(
        arrived[0] > *left.last().unwrap(),
        "ticks {left:?} then {arrived:?}"
    );
    assert!(arrived.is_sorted());
    assert!(wan.control().counters(Way::AToB).delivered_bytes > outcome.end.transferred_bytes);
}
