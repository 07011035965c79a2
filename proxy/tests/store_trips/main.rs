//! What two gateways remember of guests: on the way back, after restarts, and when the store is lost.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

mod faults;
mod rig;

use rig::{Sites, guest, non_zero_bytes, worked};

/// What the sender has sent, the receiver need not send back.
#[test]
fn a_guest_that_comes_back_is_known() {
    let sites = Sites::new("");
    let (a, b) = sites.start_both();
    let guest = guest(2);
    let there = sites.carry(&a, &b, &guest.bytes);
    let back = sites.carry(&b, &a, &guest.bytes);
    println!("there: {there} bytes, back: {back} bytes");
    assert!(back * 10 <= there, "{back} bytes back after {there} there");
}

/// Guests that a gateway remembers.
const KEPT: &str = "skyferry_manifests";
const ADOPTED: &str = "skyferry_manifests_adopted_total";

/// Bytes of the way back of a guest of which every tenth page has changed a little meanwhile. `more` goes
/// into both configurations.
fn way_back(more: &str) -> (u64, u64) {
    let sites = Sites::new(more);
    let (a, b) = sites.start_both();
    let mut guest = guest(1);
    sites.carry(&a, &b, &guest.bytes);
    worked(&mut guest, 10);
    let back = sites.carry(&b, &a, &guest.bytes);
    (back, sites.metric(&b, ADOPTED).unwrap())
}

/// Both sites remember what its pages held: what did not change costs nothing, what did its changes.
#[test]
fn a_guest_that_worked_and_comes_back_is_built_upon() {
    let (without, adopted) = way_back("[limits]\nmanifests = \"0\"");
    assert_eq!(adopted, 0);
    let (with, adopted) = way_back("");
    println!("back without: {without} bytes, with: {with} bytes");
    assert_eq!(adopted, 1);
    // How much less depends on how soon the answer came: a half, on a machine that has nothing else to do.
    assert!(with * 10 <= without * 9, "{with} bytes, {without} without");
}

/// One gateway has forgotten the guest: it is carried like any other, and asked for once.
#[test]
fn a_guest_that_one_side_has_forgotten_comes_back_all_the_same() {
    let sites = Sites::new("");
    let (a, b) = sites.start_both();
    let guest = guest(1);
    sites.carry(&a, &b, &guest.bytes);
    sites.wait_for(&b, "skyferry_manifests", |kept| kept == 1);
    a.stop();
    let a = sites.start_again(&b, "edge-a");
    sites.carry(&b, &a, &guest.bytes);
    assert_eq!(sites.metric(&b, ADOPTED), Some(0));
    // What was refused is gone; this trip is remembered.
    sites.wait_for(&b, "skyferry_manifests", |kept| kept == 1);
    sites.carry(&a, &b, &guest.bytes);
    assert_eq!(sites.metric(&a, ADOPTED), Some(1));
}

/// The disks of both sites, with keys that outlive the gateways.
const ON_DISK: &str = "path = \"store-{name}\"\nsize = \"256MiB\"\nkey_file = \"store.key\"";

const ANNOUNCED: &str = "skyferry_link_announced_pages";

/// What crossed once is known after both gateways have been started anew: a run costs bytes, not each
/// page.
#[test]
fn a_guest_is_known_after_both_gateways_were_restarted() {
    let sites = Sites::new(ON_DISK);
    let (a, b) = sites.start_both();
    let guest = guest(2);
    let cold = sites.carry(&a, &b, &guest.bytes);
    a.stop();
    b.stop();

    let (a, b) = sites.start_both();
    sites.wait_for(&a, ANNOUNCED, |pages| pages >= 4000);
    let warm = sites.carry(&a, &b, &guest.bytes);
    let guest_bytes = non_zero_bytes(&guest);
    println!("cold: {cold} bytes, warm: {warm} bytes, guest: {guest_bytes} bytes");
    assert!(warm * 50 <= guest_bytes, "{warm} bytes for {guest_bytes}");
    assert_eq!(sites.metric(&a, "skyferry_page_misses_total"), Some(0));
    // And back: each site has what the other needs not send.
    sites.wait_for(&b, ANNOUNCED, |pages| pages >= 4000);
    let back = sites.carry(&b, &a, &guest.bytes);
    assert!(back * 50 <= guest_bytes, "{back} bytes for {guest_bytes}");
}

/// What the guest held survives with the pages.
#[test]
fn a_guest_that_worked_is_built_upon_after_both_gateways_were_restarted() {
    let sites = Sites::new(ON_DISK);
    let (a, b) = sites.start_both();
    let mut guest = guest(1);
    let cold = sites.carry(&a, &b, &guest.bytes);
    for gateway in [&a, &b] {
        sites.wait_for(gateway, KEPT, |kept| kept == 1);
    }
    a.stop();
    b.stop();

    let (a, b) = sites.start_both();
    for gateway in [&a, &b] {
        sites.wait_for(gateway, KEPT, |kept| kept == 1);
    }
    sites.wait_for(&b, ANNOUNCED, |pages| pages >= 4000);
    worked(&mut guest, 10);
    let back = sites.carry(&b, &a, &guest.bytes);
    println!("cold: {cold} bytes, back: {back} bytes");
    assert_eq!(sites.metric(&b, ADOPTED), Some(1));
    assert!(back * 20 <= non_zero_bytes(&guest), "{back} bytes");
}

/// The sender believes that the receiver has what it has lost: it costs bytes and nothing else.
#[test]
fn a_store_that_is_purged_meanwhile_fails_nothing() {
    let sites = Sites::new(ON_DISK);
    let (a, b) = sites.start_both();
    let guest = guest(2);
    sites.carry(&a, &b, &guest.bytes);
    sites.wait_for(&a, ANNOUNCED, |pages| pages >= 4000);
    b.stop();
    sites.purge("edge-b");
    let b = sites.start_again(&a, "edge-b");
    sites.carry(&a, &b, &guest.bytes);
    sites.wait_for(&a, ANNOUNCED, |pages| pages >= 4000);
    let warm = sites.carry(&a, &b, &guest.bytes);
    assert!(warm * 50 <= non_zero_bytes(&guest), "{warm} bytes");
}
