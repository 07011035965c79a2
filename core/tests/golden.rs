//! Small streams in hexadecimal, written by hand, and what must come out of them piece by piece.

use skyferry_core::qemu::{CommitMark, Decoder, Encoder, Event, MAX_PENDING, Phase, Step};
use skyferry_core::{BlockId, Piece};

/// File header and configuration "t" of a machine type.
const START: &str = "5145564d 00000003 07 00000001 74";
/// START of RAM, section 2: blocks "a" of 4 pages and "b" of 16 pages; its end.
const RAM: &str = "01 00000002 03 72616d 00000000 00000004
    0000000000014004 01 61 0000000000004000 01 62 0000000000010000
    0000000000000010 7e 00000002";
/// PART of RAM, section 2, and the end of a part.
const PART: &str = "02 00000002";
const EOS: &str = "0000000000000010 7e 00000002";

fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u32> = digits
        .chars()
        .filter_map(|char| char.to_digit(16))
        .collect();
    digits
        .chunks_exact(2)
        .map(|pair| (pair[0] << 4 | pair[1]) as u8)
        .collect()
}

fn stream(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|part| hex(part)).collect()
}

/// A page full of one byte, in hexadecimal.
fn page(byte: u8) -> String {
    format!("{byte:02x}").repeat(4096)
}

/// What comes out, in a form that is easy to write down.
#[derive(Debug, PartialEq, Eq)]
enum Out {
    Event(Event),
    /// Block, offset, named, first byte.
    Page(u32, u64, bool, u8),
    /// Block, offset, named, count.
    Zero(u32, u64, bool, u32),
    /// Length.
    Other(usize),
}

fn phase(phase: Phase) -> Out {
    Out::Event(Event::Phase(phase))
}

fn commit(mark: CommitMark) -> Out {
    Out::Event(Event::Commit(mark))
}

/// Decodes all of a stream at once.
fn decode(input: &[u8]) -> Vec<Out> {
    let mut decoder = Decoder::new();
    let mut rest = input;
    let mut out = Vec::new();
    loop {
        match decoder.flush(rest) {
            Step::NeedMore => return out,
            Step::Event(event) => out.push(Out::Event(event)),
            Step::Piece { piece, raw } => {
                out.push(match piece {
                    Piece::Page {
                        block,
                        offset,
                        named,
                        data,
                    } => Out::Page(block.0, offset, named, data[0]),
                    Piece::ZeroRun {
                        block,
                        offset,
                        named,
                        count,
                    } => Out::Zero(block.0, offset, named, count),
                    Piece::Other(bytes) => Out::Other(bytes.len()),
                });
                rest = &rest[raw.len()..];
            }
        }
    }
}

/// Events only.
fn events(input: &[u8]) -> Vec<Event> {
    let outs = decode(input).into_iter();
    outs.filter_map(|out| {
        if let Out::Event(event) = out {
            Some(event)
        } else {
            None
        }
    })
    .collect()
}

fn is_opaque(input: &[u8]) -> bool {
    events(input).contains(&Event::Phase(Phase::Opaque))
}

#[test]
fn page_records_of_every_form() {
    let input = stream(&[
        START,
        "08 0001 0000", // OPEN_RETURN_PATH
        RAM,
        PART,
        "0000000000000008 01 61",
        &page(0x11), // page 0 of "a", named
        "0000000000001028",
        &page(0), // page 1, continued, all zero but sent as a page
        "0000000000002022 00 0000000000003022 00", // pages 2 and 3, zero
        "0000000000000002 01 62 00", // page 0 of "b", zero, named
        "0000000000001022 00 0000000000003022 00", // page 1, and page 3 behind a gap
        EOS,
        PART,
        "0000000000004028", // goes on in "b" across the sections
        &page(0x22),
        EOS,
    ]);
    let ram = hex(RAM).len();
    assert_eq!(
        decode(&input),
        [
            phase(Phase::Setup),
            Out::Other(14),
            Out::Event(Event::ReturnPath(true)),
            Out::Other(5 + ram + 5),
            phase(Phase::Precopy { round: 1 }),
            Out::Page(0, 0, true, 0x11),
            Out::Page(0, 0x1000, false, 0),
            Out::Zero(0, 0x2000, false, 2),
            Out::Zero(1, 0, true, 2),
            Out::Zero(1, 0x3000, false, 1),
            Out::Other(13 + 5),
            Out::Page(1, 0x4000, false, 0x22),
            Out::Other(13),
        ]
    );
}

#[test]
fn records_that_pass_as_they_are() {
    let input = stream(&[
        START,
        RAM,
        PART,
        "0000000000000200",                      // multifd sync mark
        "0000000000000040 01 61 01 0003 640101", // XBZRLE, names the block
        "0000000000001120 00000004 789c0300",    // COMPRESS_PAGE
        "0000000000002028",
        &page(7),
        EOS,
    ]);
    let out = decode(&input);
    assert_eq!(out[4], phase(Phase::Precopy { round: 1 }));
    assert_eq!(out[6..], [Out::Page(0, 0x2000, false, 7), Out::Other(13)]);
}

#[test]
fn a_round_begins_when_the_place_goes_back() {
    let zero = |offset: u32| format!("{:016x} 00", offset | 0x22);
    let input = stream(&[
        START,
        RAM,
        PART,
        "0000000000000002 01 61 00",
        &zero(0x2000),
        "0000000000000002 01 62 00", // a later block, so no new round
        "0000000000000002 01 61 00", // an earlier one
        &zero(0),                    // the same place again
        &zero(0x1000),
        "0000000000000022 00",
        EOS,
    ]);
    let rounds: Vec<_> = events(&input)
        .into_iter()
        .filter_map(|event| match event {
            Event::Phase(Phase::Precopy { round }) => Some(round),
            _ => None,
        })
        .collect();
    assert_eq!(rounds, [1, 2, 3]);
}

#[test]
fn the_configuration_is_read() {
    let bits = "05 1e 636f6e66696775726174696f6e2f7461726765742d706167652d62697473 00000001";
    let input = stream(&[
        "5145564d 00000003 07 00000001 74",
        bits,
        "00000010",
        "08 0001 0000",
    ]);
    let mut decoder = Decoder::new();
    let mut rest = &input[..];
    while let step @ (Step::Piece { .. } | Step::Event(_)) = decoder.step(rest) {
        if let Step::Piece { raw, .. } = step {
            rest = &rest[raw.len()..];
        }
    }
    assert_eq!(decoder.page_size(), 65_536);
    assert!(!is_opaque(&input));
    for bits_value in ["00000009", "00000011", "ffffffff"] {
        assert!(is_opaque(&stream(&[
            "5145564d 00000003 07 00000001 74",
            bits,
            bits_value
        ])));
    }
}

#[test]
fn pages_of_another_size_are_found() {
    let bits = "05 1e 636f6e66696775726174696f6e2f7461726765742d706167652d62697473 00000001";
    let input = stream(&[
        "5145564d 00000003 07 00000001 74",
        bits,
        "0000000d",
        "01 00000002 03 72616d 00000000 00000004 0000000000008004 01 61 0000000000008000",
        EOS,
        PART,
        "0000000000000002 01 61 00 0000000000002022 00 0000000000004028",
        &page(5),
        &page(5),
        EOS,
    ]);
    let out = decode(&input);
    // Runs are joined at distances of 4096 only.
    assert_eq!(
        out[4..],
        [
            phase(Phase::Precopy { round: 1 }),
            Out::Zero(0, 0, true, 1),
            Out::Zero(0, 0x2000, false, 1),
            Out::Page(0, 0x4000, false, 5),
            Out::Other(13)
        ]
    );
}

#[test]
fn unknown_records_are_surprises() {
    let refused = [
        "0000000000000400",                // no such flag
        "0000000000000009 01 61",          // FULL is gone since 2009
        "000000000000000a 01 61",          // zero and page at once
        "0000000000000002 01 61 01",       // fill byte other than zero
        "0000000000000002 01 7a 00",       // unknown block
        "0000000000000002 00 00",          // no name
        "0000000000004002 01 61 00",       // behind the end of the block
        "fffffffffffff008 01 62",          // far behind
        "0000000000000040 01 61 02",       // unknown delta coding
        "0000000000000040 01 61 01 1001",  // delta longer than a page
        "0000000000000100 01 61 00002001", // compressed to more than twice its size
        "0000000000001010",                // EOS with an offset
        "0000000000000080 01 61",          // RDMA hook
    ];
    for record in refused {
        assert!(is_opaque(&stream(&[START, RAM, PART, record])), "{record}");
    }
}

#[test]
fn unknown_items_are_surprises() {
    let refused = [
        "05",          // a subsection is no item
        "06 00000000", // description without EOF
        "09",
        "7e 00000002",                                 // footer without section
        "02 00000007",                                 // part of a section that never started
        "08 000c 0000",                                // unknown command
        "08 0001 0001 00",                             // wrong length
        "04 00000009 00",                              // no name
        "01 00000003 03 72616d 00000000 00000004",     // RAM a second time
        "01 00000002 05 626c6f636b 00000000 00000001", // another section of the same id
    ];
    for item in refused {
        assert!(is_opaque(&stream(&[START, RAM, item])), "{item}");
    }
    assert!(is_opaque(&stream(&[
        START,
        RAM,
        PART,
        "0000000000000010 7e 00000003"
    ])));
}

#[test]
fn block_lists_are_checked() {
    let head = "01 00000002 03 72616d 00000000 00000004";
    let refused = [
        "0000000000001004 01 61 0000000000002000", // longer than all blocks together
        "0000000000001004 00 0000000000001000",    // no name
        "0000000000002004 01 61 0000000000000800", // not whole pages
    ];
    for list in refused {
        assert!(is_opaque(&stream(&[START, head, list])), "{list}");
    }
}

#[test]
fn huge_page_sizes_in_the_block_list_are_recognised() {
    let advise = |sizes: &str| format!("08 0001 0000 08 0003 0010 {sizes} 0000000000001000");
    // Pages of 4 KiB and 2 MiB: the first block is huge, the second is not.
    let list = "01 00000002 03 72616d 00000000 00000004 0000000000201004
        01 61 0000000000200000 0000000000200000 01 62 0000000000001000
        0000000000000010 7e 00000002";
    let last = "01 00000002 03 72616d 00000000 00000004 0000000000201004
        01 62 0000000000001000 01 61 0000000000200000 0000000000200000
        0000000000000010 7e 00000002";
    for list in [list, last] {
        let page = "02 00000002 0000000000001002 01 61 00 0000000000000010 7e 00000002";
        let input = stream(&[START, &advise("0000000000201000"), list, page]);
        assert!(
            decode(&input).contains(&Out::Zero(0, 0x1000, true, 1)),
            "{list}"
        );
        assert!(!is_opaque(&input));
    }
    assert!(is_opaque(&stream(&[
        START,
        &advise("0000000000001000"),
        list
    ])));
}

#[test]
fn capabilities_that_change_the_block_list() {
    let capabilities =
        "05 1a 636f6e66696775726174696f6e2f6361706162696c6974696573 00000001 00000001";
    let shared = "0f 782d69676e6f72652d736861726564";
    let list = "01 00000002 03 72616d 00000000 00000004 0000000000001004
        01 61 0000000000001000 0000000100000000 0000000000000010 7e 00000002";
    assert!(!is_opaque(&stream(&[START, capabilities, shared, list])));
    assert!(is_opaque(&stream(&[
        START,
        capabilities,
        "0a 6d61707065642d72616d",
        list
    ])));
}

#[test]
fn other_iterable_sections_are_read_by_their_length() {
    let vfio = "01 00000005 06 612f7666696f 00000000 00000001
        ffffffffef100003 ffffffffef100001 7e 00000005
        02 00000005 ffffffffef100004 0000000000000003 7e0000 ffffffffef100001 7e 00000005
        02 00000005 ffffffffef100005 7e 00000005";
    let block = "01 00000006 05 626c6f636b 00000000 00000001
        0000000000000604 0000000000000209 01 64 0000000000000002 7e 00000006";
    let bitmap = "01 00000007 0c 64697274792d6269746d6170 00000000 00000001
        1c 01 64 01 62 00010000 01 40 0000000000000000 00000008 0000000000000001 ff 20 01 7e 00000007";
    let page = "02 00000002 0000000000001002 01 61 00 0000000000000010 7e 00000002";
    let input = stream(&[START, RAM, vfio, block, bitmap, page]);
    assert!(!is_opaque(&input));
    assert!(decode(&input).contains(&Out::Zero(0, 0x1000, true, 1)));
    for body in [
        "01 00000005 06 612f7666696f 00000000 00000001 ffffffffef100002",
        "01 00000006 05 626c6f636b 00000000 00000001 0000000000000010",
        "01 00000007 0c 64697274792d6269746d6170 00000000 00000001 80",
        "01 00000007 0c 64697274792d6269746d6170 00000000 00000001 30",
    ] {
        assert!(is_opaque(&stream(&[START, RAM, body])), "{body}");
    }
}

#[test]
fn the_end_of_an_unknown_section_is_found_and_false_ends_are_not() {
    let section = "04 00000009 03 78797a 00000000 00000001
        7e 00000009 02 00000002 0000000000000400
        7e 00000009 02 00000002 0000000000000022 00 0000000000000400
        7e 00000009 09 7e 00000009 08 0063 0000
        7e 00000009";
    let part =
        "02 00000002 0000000000000002 01 61 00 0000000000001022 00 0000000000000010 7e 00000002";
    let input = stream(&[START, RAM, section, part]);
    let out = decode(&input);
    assert_eq!(
        out[2..],
        [
            Out::Event(Event::ReturnPath(false)),
            Out::Other(hex(RAM).len()),
            phase(Phase::Opaque),
            Out::Other(hex(section).len()),
            phase(Phase::Setup),
            Out::Other(5),
            phase(Phase::Precopy { round: 1 }),
            Out::Zero(0, 0, true, 2),
            Out::Other(13),
        ]
    );
}

/// RAM ends, one device follows, and then what is given.
fn tail(rest: &str) -> Vec<u8> {
    let device = "04 00000009 03 64 65 76 00000000 00000001 aabb 7e 00000009";
    stream(&[START, RAM, "03 00000002", EOS, device, rest])
}

#[test]
fn the_commit_byte_is_announced_and_confirmed() {
    let input = tail("00 06 0000000a 7b225d7d223a5b5d7d20");
    let marks: Vec<_> = events(&input)[2..].to_vec();
    // A blank behind the last brace: the text is not balanced exactly at its end.
    assert_eq!(
        marks,
        [
            Event::Phase(Phase::Switchover),
            Event::Phase(Phase::DeviceState),
            Event::Commit(CommitMark::Candidate),
            Event::Commit(CommitMark::Refuted),
        ]
    );
    let input = tail("00 06 0000000d 7b22 5d 5c22 7d 22 3a 5b 5d 20 20 7d");
    let out = decode(&input);
    assert_eq!(
        out[out.len() - 5..],
        [
            Out::Other(hex("04 00000009 03 646576 00000000 00000001 aabb 7e 00000009").len()),
            commit(CommitMark::Candidate),
            Out::Other(1 + 5 + 13),
            commit(CommitMark::Complete),
            phase(Phase::End),
        ]
    );
}

#[test]
fn false_candidates_are_refuted() {
    use CommitMark::{Candidate, Complete, Refuted};
    let cases: [(&str, &[CommitMark]); 8] = [
        ("00", &[Candidate]),
        ("00 07", &[Candidate, Refuted]),
        ("00 06 00000001 7b22", &[Candidate, Refuted]),
        ("00 06 00000004 7b22227d", &[Candidate, Complete]),
        ("00 06 00000004 7b220000", &[Candidate, Refuted]),
        ("00 06 00000003 7b2222", &[Candidate, Refuted]),
        // Another section opens behind a footer, and its id is the one that counts then.
        (
            "04 0000000b 01 78 00000000 00000001 7e 0000000a 00 7e 0000000b 00",
            &[Candidate],
        ),
        // Inside the text of a false candidate the true one comes.
        (
            "00 06 00000040 7b22 7e 00000009 00 06 00000004 7b22227d",
            &[Candidate, Refuted, Candidate, Complete],
        ),
    ];
    for (rest, expected) in cases {
        let marks: Vec<_> = events(&tail(rest))
            .into_iter()
            .filter_map(|event| {
                if let Event::Commit(mark) = event {
                    Some(mark)
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(marks, expected, "{rest}");
    }
}

#[test]
fn a_stream_that_goes_on_behind_its_end_is_watched_further() {
    let input = tail("00 06 00000004 7b22227d aa 7e 00000009 00 06 00000004 7b22227d");
    let events = events(&input);
    assert_eq!(
        events[events.len() - 7..],
        [
            Event::Commit(CommitMark::Candidate),
            Event::Commit(CommitMark::Complete),
            Event::Phase(Phase::End),
            Event::Phase(Phase::DeviceState),
            Event::Commit(CommitMark::Candidate),
            Event::Commit(CommitMark::Complete),
            Event::Phase(Phase::End),
        ]
    );
}

#[test]
fn a_stream_that_is_lost_keeps_its_commit_byte() {
    // Nothing is known, not even a section id, and the end is cut anywhere.
    let input = stream(&["5145564d 00000003 05 aabb0006 00 06 00000004 7b22227d"]);
    for cut in 9..input.len() {
        let mut decoder = Decoder::new();
        let mut marks = Vec::new();
        let mut done = 0;
        for end in [cut, input.len()] {
            loop {
                match decoder.flush(&input[done..end]) {
                    Step::NeedMore => break,
                    Step::Event(Event::Commit(mark)) => marks.push((done, mark)),
                    Step::Event(_) => {}
                    Step::Piece { raw, .. } => done += raw.len(),
                }
            }
        }
        // The zero two bytes before may stand for it where it was announced and not refuted.
        let last = marks
            .iter()
            .rposition(|(_, mark)| *mark == CommitMark::Candidate);
        let (at, _) = marks[last.expect("a candidate")];
        assert!(at == 11 || at == 13, "cut at {cut}: {marks:?}");
        assert_eq!(
            marks.last(),
            Some(&(input.len(), CommitMark::Complete)),
            "cut at {cut}"
        );
    }
}

#[test]
fn a_record_cut_by_a_flush_is_followed_by_structure() {
    let input = stream(&[
        START,
        RAM,
        PART,
        "0000000000000008 01 61",
        &page(1),
        "0000000000001028",
        &page(2),
        EOS,
    ]);
    let first = input.len() - 13 - 4104 - 4096 - 10;
    for cut in first + 1..first + 4106 {
        let mut decoder = Decoder::new();
        let mut done = 0;
        let mut pages = Vec::new();
        for end in [cut, input.len()] {
            loop {
                match decoder.flush(&input[done..end]) {
                    Step::NeedMore => break,
                    Step::Event(_) => {}
                    Step::Piece { piece, raw } => {
                        if let Piece::Page { block, offset, .. } = piece {
                            pages.push((block, offset));
                        }
                        done += raw.len();
                    }
                }
            }
        }
        assert_eq!(pages, [(BlockId(0), 0x1000)], "cut at {cut}");
    }
}

#[test]
fn no_input_leaves_more_than_the_limit() {
    let bits = "05 1e 636f6e66696775726174696f6e2f7461726765742d706167652d62697473 00000001";
    let mut input = stream(&[
        "5145564d 00000003 07 00000001 74",
        bits,
        "00000010",
        "01 00000002 03 72616d 00000000 00000004 0000000000010004 01 61 0000000000010000",
        EOS,
        PART,
        "0000000000000008 01 61",
    ]);
    input.extend(std::iter::repeat_n(0, (1 << 16) - 1));
    let mut decoder = Decoder::new();
    let mut rest = &input[..];
    loop {
        match decoder.step(rest) {
            Step::NeedMore => break,
            Step::Event(_) => {}
            Step::Piece { raw, .. } => rest = &rest[raw.len()..],
        }
    }
    assert_eq!(rest.len(), 10 + (1 << 16) - 1);
    assert!(rest.len() <= MAX_PENDING);
}

#[test]
fn tables_are_bounded() {
    let block = |index: u32| format!("04 {index:08x} 0000000000001000");
    let list = |count: u32| {
        let blocks: String = (0..count).map(block).collect();
        let total = (u64::from(count) * 0x1000) | 4;
        let head = "01 00000002 03 72616d 00000000 00000004";
        stream(&[START, head, &format!("{total:016x}"), &blocks, EOS])
    };
    let most = skyferry_core::qemu::MAX_BLOCKS as u32;
    assert!(!is_opaque(&list(most)));
    assert!(is_opaque(&list(most + 1)));
    // An empty vfio section for each id.
    let section = |id: u32| {
        format!("01 {id:08x} 06 612f7666696f 00000000 00000001 ffffffffef100001 7e {id:08x}")
    };
    let sections = |count: u32| {
        let sections: String = (10..10 + count).map(section).collect();
        stream(&[START, &sections])
    };
    assert!(!is_opaque(&sections(4096)));
    assert!(is_opaque(&sections(4097)));
}

#[test]
fn the_encoder_refuses_what_no_decoder_makes() {
    let mut encoder = Encoder::new();
    assert_eq!(encoder.define_block(b""), None);
    assert_eq!(encoder.define_block(&[b'a'; 256]), None);
    assert_eq!(encoder.define_block(b"a"), Some(BlockId(0)));
    let (block, named) = (BlockId(0), true);
    let data = [0; 4096];
    let refused = [
        Piece::Page {
            block: BlockId(1),
            offset: 0,
            named,
            data: &data,
        },
        Piece::Page {
            block,
            offset: 1,
            named,
            data: &data,
        },
        Piece::Page {
            block,
            offset: 0,
            named,
            data: &data[1..],
        },
        Piece::Page {
            block,
            offset: 0,
            named,
            data: &[],
        },
        Piece::ZeroRun {
            block: BlockId(1),
            offset: 0,
            named,
            count: 1,
        },
        Piece::ZeroRun {
            block,
            offset: 0,
            named,
            count: 0,
        },
        Piece::ZeroRun {
            block,
            offset: 0,
            named,
            count: u32::MAX,
        },
        Piece::ZeroRun {
            block,
            offset: 1024,
            named,
            count: 2,
        },
        Piece::ZeroRun {
            block,
            offset: 0_u64.wrapping_sub(4096),
            named,
            count: 2,
        },
    ];
    let mut out = Vec::new();
    for piece in refused {
        assert!(!encoder.encode(&piece, &mut out), "{piece:?}");
    }
    assert!(out.is_empty());
    let run = Piece::ZeroRun {
        block,
        offset: 0x1000,
        named,
        count: 2,
    };
    assert!(encoder.encode(&run, &mut out));
    assert_eq!(out, hex("0000000000001002 01 61 00 0000000000002022 00"));
    for index in 1..skyferry_core::qemu::MAX_BLOCKS {
        assert_eq!(encoder.define_block(b"x"), Some(BlockId(index as u32)));
    }
    assert_eq!(encoder.define_block(b"x"), None);
}
