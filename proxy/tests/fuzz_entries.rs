//! The bodies of the fuzz targets on stable: over their corpora and some thousand random inputs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure is a failed test"
)]

use std::path::Path;

#[path = "../../fuzz/entries/announcement.rs"]
mod announcement;
#[path = "../../fuzz/entries/carry.rs"]
mod carry;
#[path = "../../fuzz/entries/frames.rs"]
mod frames;
#[path = "../../fuzz/entries/sequence.rs"]
mod sequence;
#[path = "../../fuzz/entries/wire.rs"]
mod wire;

use proptest::prelude::*;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&folder).unwrap();
    let inputs: Vec<_> = files
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs
}

/// Each input of a corpus, and the same with one byte changed, at every place.
fn each_with_changes(target: &str, entry: fn(&[u8])) {
    for input in corpus(target) {
        entry(&input);
        for place in 0..input.len().min(600) {
            for change in [1, 0x80, 0xff] {
                let mut input = input.clone();
                input[place] ^= change;
                entry(&input);
            }
        }
    }
}

#[test]
fn control_messages() {
    for input in corpus("control_message") {
        assert!(
            skyferry::wire::Control::decode(&input).is_ok(),
            "the corpus holds messages"
        );
    }
    each_with_changes("control_message", wire::control);
}

#[test]
fn data_headers() {
    each_with_changes("data_header", wire::data_header);
}

#[test]
fn frames_of_the_seed_socket() {
    each_with_changes("seed_socket", wire::seed);
}

#[test]
fn hostile_frames() {
    each_with_changes("hostile_frames", frames::hostile);
}

#[test]
fn damaged_frames() {
    each_with_changes("damaged_frames", frames::damaged);
}

#[test]
fn announcements() {
    for input in corpus("announcement") {
        announcement::hostile(&input);
    }
}

#[test]
fn sequences() {
    each_with_changes("sequence", sequence::operations);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_announcements(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        announcement::hostile(&data);
    }
}

proptest! {
    #[test]
    fn random_messages(kind in 0..16_u8, rest in proptest::collection::vec(any::<u8>(), 0..120)) {
        let mut input = vec![kind];
        input.extend_from_slice(&rest);
        wire::control(&input);
        wire::data_header(&input);
        wire::seed(&input);
        input[0] |= 0x80;
        wire::seed(&input);
    }

    #[test]
    fn random_frames(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        frames::hostile(&data);
    }

    #[test]
    fn random_damage(
        plan in any::<[u8; 5]>(),
        block in proptest::collection::vec(any::<u8>(), 1..3000),
        times in 1..8_usize,
    ) {
        let mut input = plan.to_vec();
        input[1] %= 4;
        (0..times).for_each(|_| input.extend_from_slice(&block));
        frames::damaged(&input);
    }

    #[test]
    fn random_operations(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        sequence::operations(&data);
    }
}
