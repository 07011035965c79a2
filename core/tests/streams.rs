//! Whole streams: made-up ones with known contents, mutated ones, and any bytes.

use proptest::collection::vec;
use proptest::prelude::*;
use skyferry_core::fuzz_entry::{self, Transcript, events_are_in_order, replay};
use skyferry_core::qemu::synthetic::{Builder, SyntheticStream};
use skyferry_core::qemu::{CommitMark, Event, Phase};

/// Decodes all at once.
fn whole(bytes: &[u8]) -> Transcript {
    replay(bytes, || (bytes.len(), false))
}

/// Asserts that a transcript is exactly what the stream holds.
fn assert_matches(stream: &SyntheticStream, seen: &Transcript) {
    let pages: Vec<_> = seen
        .pages
        .iter()
        .map(|p| (p.at, p.block, p.offset, p.named, p.zero))
        .collect();
    let expected: Vec<_> = stream
        .records
        .iter()
        .map(|r| (r.at, r.block as u32, r.offset, r.named, r.zero))
        .collect();
    assert_eq!(pages, expected);
    assert_eq!(seen.events, stream.events);
    assert_eq!(seen.blocks, stream.blocks);
}

/// Settings that between them use everything a made-up stream can have.
fn variants() -> Vec<Builder> {
    let base = SyntheticStream::builder;
    vec![
        base(),
        base()
            .return_path(false)
            .switchover_start(false)
            .vmdesc(false),
        base().rounds(1).empty_parts(0),
        base().xbzrle(true).rounds(4).dirty_percent(40),
        base().dirty_bitmap(true).virtio_mem(true),
        base().unknown_section(true),
        base()
            .multifd_flush(true)
            .blocks(&[("a", 1), ("b", 700), ("0000:00:02.0/vga.vram", 16)]),
        base().postcopy(true).dirty_bitmap(true),
        base().postcopy(true).switchover_start(false),
    ]
}

fn any_builder() -> impl Strategy<Value = Builder> {
    let flags = vec(any::<bool>(), 10);
    let shape = (
        any::<u64>(),
        1_u32..5,
        0_u64..101,
        0_u64..101,
        1_u64..40,
        0_usize..3000,
    );
    (shape, flags).prop_map(|((seed, rounds, dirty, zero, pages, device), flags)| {
        SyntheticStream::builder()
            .seed(seed)
            .rounds(rounds)
            .dirty_percent(dirty)
            .zero_percent(zero)
            .blocks(&[
                ("pc.ram", pages),
                ("vga.vram", 3),
                ("/rom@etc/table-loader", 1),
            ])
            .device_bytes(device)
            .return_path(flags[0])
            .xbzrle(flags[1])
            .dirty_bitmap(flags[2])
            .virtio_mem(flags[3])
            // Where there is doubt, the forged end of stream in the bitmap is taken for one, and so
            // is the last byte of postcopy.
            .unknown_section(flags[4] && !flags[2] && !(flags[8] && flags[9]))
            .multifd_flush(flags[5])
            .switchover_start(flags[6])
            .vmdesc(flags[7])
            .postcopy(flags[8] && flags[9])
    })
}

/// Portions: small ones as often as large ones.
fn any_cuts() -> impl Strategy<Value = Vec<usize>> {
    vec(
        prop_oneof![1_usize..20, 1_usize..6000, 1_usize..200_000],
        1..40,
    )
}

fn in_turn<T: Clone>(values: &[T]) -> impl FnMut() -> T {
    let mut turn = values.iter().cycle();
    move || turn.next().expect("values to draw from").clone()
}

#[test]
fn all_variants_are_understood() {
    for settings in variants() {
        let stream = settings.build();
        let seen = whole(&stream.bytes);
        assert_matches(&stream, &seen);
        assert!(events_are_in_order(&seen.events));
    }
}

#[test]
fn byte_by_byte_gives_the_same() {
    for settings in variants() {
        let stream = settings
            .blocks(&[("pc.ram", 12), ("rom", 2)])
            .device_bytes(3000)
            .build();
        assert_matches(&stream, &replay(&stream.bytes, || (1, false)));
    }
}

#[test]
fn a_stream_without_description_ends_at_its_candidate() {
    let stream = SyntheticStream::builder().vmdesc(false).build();
    let seen = whole(&stream.bytes);
    assert!(seen.candidate_is_last);
    assert_eq!(seen.candidates().last(), Some(&(stream.bytes.len() - 1)));
    assert!(!whole(&SyntheticStream::builder().build().bytes).candidate_is_last);
}

#[test]
fn every_truncation_passes_flushed_or_not() {
    for settings in variants() {
        let stream = settings
            .blocks(&[("pc.ram", 4), ("rom", 1)])
            .device_bytes(800)
            .build();
        for end in 0..stream.bytes.len() {
            let cut = &stream.bytes[..end];
            let seen = replay(cut, || (end, true));
            if let Some(commit) = stream.commit.filter(|commit| *commit < end) {
                assert!(seen.holds(commit));
            }
            assert!(events_are_in_order(&seen.events));
        }
    }
}

#[test]
fn a_flush_anywhere_costs_one_record_and_no_candidate() {
    for settings in variants() {
        let stream = settings
            .blocks(&[("pc.ram", 4), ("rom", 1)])
            .device_bytes(800)
            .build();
        let opaque = stream
            .events
            .iter()
            .filter(|(_, e)| *e == Event::Phase(Phase::Opaque))
            .count();
        for cut in 1..stream.bytes.len() {
            let mut portions = vec![(cut, true), (stream.bytes.len(), false)].into_iter();
            let seen = replay(&stream.bytes, || portions.next().unwrap_or((1, true)));
            let missing = stream.records.len() - seen.pages.len();
            if opaque == 0 {
                assert!(missing <= 1, "cut at {cut} loses {missing} records");
                let told: Vec<_> = seen.events.iter().map(|(_, event)| *event).collect();
                let expected: Vec<_> = stream.events.iter().map(|(_, event)| *event).collect();
                assert_eq!(told, expected, "cut at {cut}");
            }
            if let Some(commit) = stream.commit {
                assert!(seen.holds(commit), "cut at {cut}");
            }
        }
    }
}

#[test]
fn a_surprise_makes_the_rest_opaque_and_the_commit_byte_is_still_found() {
    let stream = SyntheticStream::builder().build();
    let setup_end = stream.records[0].at;
    // A RAM header with a flag that does not exist.
    let mut bytes = stream.bytes.clone();
    bytes.splice(setup_end..setup_end, 0x400_u64.to_be_bytes());
    let seen = whole(&bytes);
    assert!(
        seen.events
            .contains(&(setup_end, Event::Phase(Phase::Opaque)))
    );
    assert!(
        seen.candidates()
            .contains(&(stream.commit.expect("precopy") + 8))
    );
    assert!(
        seen.events
            .contains(&(bytes.len(), Event::Commit(CommitMark::Complete)))
    );
    // The structure is picked up at the next part of RAM.
    assert!(!seen.pages.is_empty() && seen.pages.len() < stream.records.len());
}

#[test]
fn other_channels_are_opaque_from_the_start() {
    for bytes in [
        &b"\x11\x22\x33\x44\0\0\0\x01"[..],
        b"\x08\0\x0A\0\x04\x03ram",
        b"QEVM\0\0\0\x02",
    ] {
        let seen = whole(bytes);
        assert_eq!(seen.events, [(0, Event::Phase(Phase::Opaque))]);
        assert!(seen.pages.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_pass(data in vec(any::<u8>(), 0..4000)) {
        fuzz_entry::qemu_decoder(&data);
    }

    #[test]
    fn any_bytes_behind_a_file_header_pass(data in vec(prop_oneof![any::<u8>(), 0_u8..10], 0..4000)) {
        let mut input = data[..data.len().min(16)].to_vec();
        input.resize(16, 3);
        input.extend_from_slice(b"QEVM\0\0\0\x03");
        input.extend_from_slice(&data);
        fuzz_entry::qemu_decoder(&input);
    }

    #[test]
    fn streams_are_understood_however_they_are_cut(settings in any_builder(), cuts in any_cuts()) {
        let stream = settings.build();
        let mut next = in_turn(&cuts);
        let seen = replay(&stream.bytes, || (next(), false));
        assert_matches(&stream, &seen);
    }

    #[test]
    fn flushes_change_no_byte_and_hide_no_candidate(
        settings in any_builder(), cuts in any_cuts(), flushes in vec(any::<bool>(), 1..20),
    ) {
        let stream = settings.build();
        let (mut next, mut flush) = (in_turn(&cuts), in_turn(&flushes));
        let seen = replay(&stream.bytes, || (next(), flush()));
        if let Some(commit) = stream.commit {
            prop_assert!(seen.holds(commit));
        }
        prop_assert!(events_are_in_order(&seen.events));
    }

    #[test]
    fn mutated_streams_pass(
        settings in any_builder(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>(), 0_u8..3), 1..6),
        plan in vec(any::<u8>(), 16),
    ) {
        let mut bytes = settings.build().bytes;
        for (place, value, how) in changes {
            let at = place.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes.insert(at, value),
                _ => drop(bytes.drain(at..(at + usize::from(value)).min(bytes.len()).max(at + 1))),
            }
            if bytes.is_empty() {
                bytes.push(value);
            }
        }
        fuzz_entry::qemu_decoder(&[plan, bytes].concat());
    }

    #[test]
    fn lost_streams_keep_their_commit_byte(
        settings in any_builder(),
        place in any::<prop::sample::Index>(),
        cuts in any_cuts(),
        flushes in vec(any::<bool>(), 1..20),
    ) {
        let stream = settings.vmdesc(true).postcopy(false).build();
        let at = place.get(&stream.records).at;
        let mut bytes = stream.bytes;
        // A RAM header with a flag that does not exist.
        bytes.splice(at..at, 0x400_u64.to_be_bytes());
        let (mut next, mut flush) = (in_turn(&cuts), in_turn(&flushes));
        let seen = replay(&bytes, || (next(), flush()));
        prop_assert!(seen.holds(stream.commit.expect("precopy") + 8));
        prop_assert_eq!(
            seen.events.last().copied(),
            Some((bytes.len(), Event::Phase(Phase::End)))
        );
    }

    #[test]
    fn any_return_path_is_read_alike_however_it_is_cut(
        data in vec(prop_oneof![0_u8..8, any::<u8>()], 0..600),
    ) {
        fuzz_entry::return_path(&data);
    }
}

/// Files that a fuzzer starts from, and inputs that once broke a promise.
#[test]
fn the_fuzz_corpus_passes() {
    for input in corpus("qemu_decoder") {
        fuzz_entry::qemu_decoder(&input);
    }
    for input in corpus("return_path") {
        fuzz_entry::return_path(&input);
    }
}

/// The corpus of a fuzz target.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let path = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(path).expect("corpus");
    let inputs: Vec<_> = files
        .map(|file| std::fs::read(file.expect("file").path()).expect("file"))
        .collect();
    assert!(!inputs.is_empty());
    inputs
}
