//! A day of a small site, replayed against the store on disk.

use std::process::Command;

use skyferry_benches::replay::{self, Plan};
use skyferry_tests::bars::Bars;

/// Not a test: what the next one starts in processes of their own, to kill some.
#[test]
fn child_that_lives_through_a_part_of_the_day() {
    replay::live_if_asked().expect("a part of the day");
}

#[test]
fn a_day_leaves_the_store_as_it_should_be() {
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a folder");
    let program = std::env::current_exe().expect("this program");
    let day = replay::run(&Plan::SMALL, folder.path(), || {
        let mut command = Command::new(&program);
        command.args([
            "--exact",
            "child_that_lives_through_a_part_of_the_day",
            "--nocapture",
        ]);
        command
    });
    let day = day.expect("a day");
    day.print();
    let mut bars = Bars::default();
    day.add_bars(&mut bars);
    assert!(bars.print(), "a bar is missed, see above");
    assert!(day.expired() > 0);
}
