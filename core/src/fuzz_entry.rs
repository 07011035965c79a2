//! What fuzz targets and property tests run: the codecs under arbitrary bytes, cut anywhere.
//!
//! Each entry takes any bytes and panics if a promise is broken, so a plain test can run it, too.

use crate::piece::Piece;
use crate::qemu::{
    CommitMark, Decoder, Encoder, Event, MAX_PENDING, Phase, ReturnMessage, ReturnPath, Step,
};

/// More events than this at one place would be a loop.
const MAX_EVENTS_AT_ONCE: u32 = 8;

/// How a test feeds its input: the size of the next portion, and whether the decoder must not wait.
pub type Portion = (usize, bool);

/// A page or run of zero pages, where it stood in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSeen {
    /// Position of the first byte of its record.
    pub at: usize,
    /// Number of its block.
    pub block: u32,
    /// Byte offset inside the block.
    pub offset: u64,
    /// Whether it carries its block's name.
    pub named: bool,
    /// Whether it is a zero page. Runs are taken apart.
    pub zero: bool,
}

/// What a decoder made of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    /// Pages, in order.
    pub pages: Vec<PageSeen>,
    /// Events and the number of bytes in front of each.
    pub events: Vec<(usize, Event)>,
    /// Names of the blocks, in the order of their numbers.
    pub blocks: Vec<Vec<u8>>,
    /// Whether the last candidate was the last byte.
    pub candidate_is_last: bool,
}

impl Transcript {
    /// Whether a caller that holds what it is told to holds the byte at `at`.
    #[must_use]
    pub fn holds(&self, at: usize) -> bool {
        let mut marks = self.events.iter().filter_map(|(place, event)| match event {
            Event::Commit(mark) if *place <= at => Some(*mark),
            _ => None,
        });
        marks.next_back() == Some(CommitMark::Candidate)
    }

    /// Positions of all bytes that were announced as candidates.
    #[must_use]
    pub fn candidates(&self) -> Vec<usize> {
        let candidate = Event::Commit(CommitMark::Candidate);
        self.events
            .iter()
            .filter(|(_, event)| *event == candidate)
            .map(|(at, _)| *at)
            .collect()
    }
}

/// Decodes `input` in portions, encodes every piece, and compares.
///
/// # Panics
/// When a piece does not encode to the bytes it was decoded from, when the decoder stands still,
/// leaves more than it may, or waits although it must not.
#[must_use]
pub fn replay(input: &[u8], mut portion: impl FnMut() -> Portion) -> Transcript {
    let mut decoder = Decoder::new();
    let mut encoder = Encoder::new();
    let mut transcript = Transcript::default();
    let (mut done, mut end) = (0, 0);
    while end < input.len() || done < input.len() {
        let (size, mut flush) = portion();
        // The last bytes never get company, so they are flushed.
        flush |= end == input.len();
        end = (end + size.max(1)).min(input.len());
        let mut events_at_once = 0;
        loop {
            let rest = &input[done..end];
            match if flush {
                decoder.flush(rest)
            } else {
                decoder.step(rest)
            } {
                Step::Event(event) => {
                    events_at_once += 1;
                    assert!(
                        events_at_once <= MAX_EVENTS_AT_ONCE,
                        "events without end at {done}"
                    );
                    transcript.events.push((done, event));
                }
                Step::NeedMore => {
                    assert!(
                        rest.len() <= MAX_PENDING,
                        "{} bytes left at {done}",
                        rest.len()
                    );
                    assert!(!flush || rest.is_empty(), "a flush waits at {done}");
                    break;
                }
                Step::Piece { piece, raw } => {
                    events_at_once = 0;
                    assert!(!raw.is_empty(), "no progress at {done}");
                    assert!(std::ptr::eq(raw.as_ptr(), rest.as_ptr()), "a gap at {done}");
                    check_encoding(&decoder, &mut encoder, &piece, raw);
                    note_pages(&mut transcript, &piece, done, raw.len());
                    done += raw.len();
                }
            }
        }
    }
    for id in 0..encoder.block_count() {
        let id = crate::BlockId(u32::try_from(id).unwrap_or(u32::MAX));
        transcript
            .blocks
            .push(decoder.block_name(id).unwrap_or_default().to_vec());
    }
    transcript.candidate_is_last = decoder.candidate_is_last();
    transcript
}

fn check_encoding(decoder: &Decoder, encoder: &mut Encoder, piece: &Piece<'_>, raw: &[u8]) {
    if let Piece::Page { block, .. } | Piece::ZeroRun { block, .. } = piece
        && block.0 as usize >= encoder.block_count()
    {
        let name = decoder
            .block_name(*block)
            .expect("a block that a piece names");
        assert_eq!(
            encoder.define_block(name),
            Some(*block),
            "blocks come in order"
        );
    }
    let mut encoded = Vec::with_capacity(raw.len());
    assert!(
        encoder.encode(piece, &mut encoded),
        "{piece:?} is not accepted"
    );
    assert!(encoded == raw, "{piece:?} does not give its bytes");
}

fn note_pages(transcript: &mut Transcript, piece: &Piece<'_>, at: usize, len: usize) {
    match *piece {
        Piece::Other(_) => {}
        Piece::Page {
            block,
            offset,
            named,
            ..
        } => {
            transcript.pages.push(PageSeen {
                at,
                block: block.0,
                offset,
                named,
                zero: false,
            });
        }
        Piece::ZeroRun {
            block,
            offset,
            named,
            count,
        } => {
            let records = u64::from(count) - 1;
            let first = len - 9 * usize::try_from(records).unwrap_or(usize::MAX);
            for index in 0..=records {
                let skipped = usize::try_from(index).unwrap_or(usize::MAX);
                let at = if index == 0 {
                    at
                } else {
                    at + first + 9 * (skipped - 1)
                };
                let offset = offset + index * crate::piece::RUN_PAGE_SIZE;
                let named = named && index == 0;
                transcript.pages.push(PageSeen {
                    at,
                    block: block.0,
                    offset,
                    named,
                    zero: true,
                });
            }
        }
    }
}

/// Portions drawn from bytes: the first bytes of a fuzzer's input say how the rest is cut.
fn drawn(mut plan: impl Iterator<Item = u8>) -> impl FnMut() -> Portion {
    move || {
        let byte = plan.next().unwrap_or(0xFF);
        (1 << (byte & 0x0F), byte & 0x80 != 0)
    }
}

/// Fuzz entry for the decoder: identity under cuts and flushes, and the same pages and events
/// however the stream is cut, as long as nothing is flushed.
pub fn qemu_decoder(data: &[u8]) {
    const PLAN: usize = 16;
    let (plan, input) = data.split_at(data.len().min(PLAN));
    let _ = replay(input, drawn(plan.iter().copied().cycle()));
    let whole = replay(input, || (input.len(), false));
    let cut = replay(input, drawn(plan.iter().map(|byte| byte & 0x7F).cycle()));
    assert_eq!(
        semantics(&whole),
        semantics(&cut),
        "the cut changes what is seen"
    );
}

/// What must not depend on the cut.
fn semantics(transcript: &Transcript) -> (&[PageSeen], &[(usize, Event)]) {
    (&transcript.pages, &transcript.events)
}

/// Fuzz entry for the reader of the return path: the cut changes nothing.
pub fn return_path(data: &[u8]) {
    let mut path = ReturnPath::new();
    let whole = path.feed(data);
    let mut cut_path = ReturnPath::new();
    let mut cut: Vec<ReturnMessage> = Vec::new();
    for byte in data {
        cut.extend(cut_path.feed(&[*byte]));
    }
    assert_eq!(whole, cut);
    assert_eq!(path.shut_seen(), cut_path.shut_seen());
    assert_eq!(path.ends_with_shut(), cut_path.ends_with_shut());
}

/// Whether events come in an order that a caller may rely on: `Setup` first, one `ReturnPath` at
/// most, rounds counted up, and verdicts on a candidate only behind one.
#[must_use]
pub fn events_are_in_order(events: &[(usize, Event)]) -> bool {
    let mut open = false;
    let mut round = 0;
    let mut return_paths = 0;
    for (_, event) in events {
        match event {
            Event::ReturnPath(_) => return_paths += 1,
            Event::Phase(Phase::Precopy { round: now }) => {
                if *now < round {
                    return false;
                }
                round = *now;
            }
            Event::Commit(CommitMark::Candidate) => open = true,
            Event::Commit(_) if !open => return false,
            Event::Commit(_) => open = false,
            Event::Phase(_) => {}
        }
    }
    return_paths <= 1
}
