//! Streams recorded from a real QEMU; `data/README.md` says how.

use std::collections::HashSet;

use skyferry_core::fuzz_entry::{Transcript, replay};
use skyferry_core::qemu::{CommitMark, Event, Phase, ReturnMessage, ReturnPath};

const XBZRLE: &[u8] = include_bytes!("data/microvm-xbzrle.bin");
const POSTCOPY: &[u8] = include_bytes!("data/microvm-postcopy.bin");

/// Pages of the guest: 4 MiB of RAM and 64 KiB of firmware.
const GUEST_PAGES: usize = 1024 + 16;

fn whole(stream: &[u8]) -> Transcript {
    replay(stream, || (stream.len(), false))
}

fn assert_all_pages_seen(seen: &Transcript) {
    assert_eq!(seen.blocks, [b"microvm.ram".to_vec(), b"pc.bios".to_vec()]);
    let places: HashSet<_> = seen
        .pages
        .iter()
        .map(|page| (page.block, page.offset))
        .collect();
    assert_eq!(places.len(), GUEST_PAGES);
}

#[test]
fn a_precopy_stream_with_xbzrle_is_understood_to_its_last_byte() {
    let seen = whole(XBZRLE);
    assert_all_pages_seen(&seen);
    assert_eq!(
        seen.events,
        [
            (0, Event::Phase(Phase::Setup)),
            (20, Event::ReturnPath(true)),
            (134, Event::Phase(Phase::Precopy { round: 1 })),
            (50_482, Event::Phase(Phase::Precopy { round: 2 })),
            (83_344, Event::Phase(Phase::Precopy { round: 3 })),
            (84_095, Event::Phase(Phase::Switchover)),
            (84_118, Event::Phase(Phase::DeviceState)),
            (87_397, Event::Commit(CommitMark::Candidate)),
            (XBZRLE.len(), Event::Commit(CommitMark::Complete)),
            (XBZRLE.len(), Event::Phase(Phase::End)),
        ]
    );
    assert_eq!(XBZRLE[87_397], 0);
}

#[test]
fn a_postcopy_stream_is_understood_to_its_last_byte() {
    let seen = whole(POSTCOPY);
    assert_all_pages_seen(&seen);
    assert_eq!(
        seen.events,
        [
            (0, Event::Phase(Phase::Setup)),
            (20, Event::ReturnPath(true)),
            (134, Event::Phase(Phase::Precopy { round: 1 })),
            (50_482, Event::Phase(Phase::Precopy { round: 2 })),
            (83_339, Event::Phase(Phase::Switchover)),
            (83_388, Event::Commit(CommitMark::Candidate)),
            (86_695, Event::Commit(CommitMark::Complete)),
            (86_695, Event::Phase(Phase::Postcopy)),
            (POSTCOPY.len(), Event::Phase(Phase::End)),
        ]
    );
    // The package ends with POSTCOPY_RUN.
    assert_eq!(POSTCOPY[86_690..86_695], [8, 0, 5, 0, 0]);
}

#[test]
fn the_cut_changes_nothing() {
    for stream in [XBZRLE, POSTCOPY] {
        let expected = whole(stream);
        for size in [1, 7, 4096, 5000, 65_536] {
            assert_eq!(
                replay(stream, || (size, false)),
                expected,
                "portions of {size}"
            );
        }
    }
}

#[test]
fn without_its_description_the_stream_ends_at_the_candidate() {
    let seen = whole(&XBZRLE[..87_398]);
    assert!(seen.candidate_is_last);
    assert_eq!(
        seen.events.last(),
        Some(&(87_397, Event::Commit(CommitMark::Candidate)))
    );
}

/// The return path that belongs to the postcopy stream: PING(4) is answered before PING(3), because
/// the destination reads on while it loads the package.
#[test]
fn the_return_path_is_understood() {
    let bytes = [
        0, 2, 0, 4, 0, 0, 0, 1, 0, 2, 0, 4, 0, 0, 0, 2, 0, 2, 0, 4, 0, 0, 0, 4, 0, 2, 0, 4, 0, 0,
        0, 3, 0, 1, 0, 4, 0, 0, 0, 0,
    ];
    let mut path = ReturnPath::new();
    let pong = ReturnMessage::Pong;
    let shut = ReturnMessage::Shut { status: 0 };
    assert_eq!(
        path.feed(&bytes),
        [pong(1), pong(2), pong(4), pong(3), shut]
    );
    assert!(path.ends_with_shut());
}
