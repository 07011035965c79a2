//! What two gateways remember of guests: on the way back, after restarts, and when the store is lost.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

mod rig;

use rig::{Sites, guest};

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
