//! Finding the commit byte in bytes whose structure is not known.
//!
//! The sections behind RAM are device state: they carry no length, and only the device's code knows
//! their end. The stream ends with one byte on which the destination starts the guest, the EOF mark
//! `00`, and a description of the device state:
//!
//! ```text
//! … device state  7E <section id>  00  06 <length> {"…JSON…"}
//!                                  ^^ commit byte
//! ```
//!
//! The destination acts on the EOF mark even if nothing comes behind it, so it has to be announced
//! *before* it is passed on. Two rules find candidates:
//!
//! * **Behind a footer**: a zero right behind `7E` and the id of a section that may be open. Ids are
//!   learnt from the stream, beginning with the footer of RAM: what follows a footer of a known id
//!   and looks like a section header makes its id known. So every true footer is known by the time it
//!   comes, whatever device state looks like, and false ones cost a candidate that is soon refuted.
//! * **General**, once the structure has been lost: any `00 06 <length> {"`.
//!
//! A candidate is confirmed when the JSON text behind it is balanced exactly at its length. Machines
//! with `suppress-vmdesc=on` end at the EOF mark; then only silence confirms it, which is the
//! caller's to judge.

use std::collections::HashSet;

use super::wire::item;

/// Longest description of the device state that is followed, in bytes (a large guest has some
/// hundred KiB). A caller that holds a candidate never holds more than this and the candidate's own
/// seven bytes because of it.
pub const MAX_VMDESC: u32 = 64 << 20;
/// Most section ids remembered; beyond that every footer may be one.
const MAX_IDS: usize = 65_536;
/// Bytes of a footer, an item type and a section id.
const WINDOW: usize = 5 + 1 + 4;
/// EOF mark, VMDESCRIPTION, be32 length, and how its JSON text begins. The length is left open.
const MARK: [Option<u8>; 8] = [
    Some(item::EOF),
    Some(item::VMDESCRIPTION),
    None,
    None,
    None,
    None,
    Some(b'{'),
    Some(b'"'),
];

/// Whether bytes begin like the mark of a commit byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    No,
    /// They do, as far as they go.
    Partly,
    Fully,
}

/// Compares `bytes` with the mark from its `from`th byte on.
fn begins(bytes: &[u8], from: usize) -> Begins {
    let mark = &MARK[from..];
    if bytes
        .iter()
        .zip(mark)
        .any(|(byte, want)| want.is_some_and(|want| want != *byte))
    {
        Begins::No
    } else if bytes.len() < mark.len() {
        Begins::Partly
    } else {
        Begins::Fully
    }
}

/// Where in `bytes[..end]` a mark begins, looking ahead as far as `bytes` goes: its position, and
/// whether all of it is there.
pub(super) fn find_mark(bytes: &[u8], end: usize) -> Option<(usize, bool)> {
    let mut at = 0;
    loop {
        at += quiet_len(&bytes[at..], false, true);
        if at >= end {
            return None;
        }
        match begins(&bytes[at..], 0) {
            Begins::No => at += 1,
            Begins::Partly => return Some((at, false)),
            Begins::Fully => return Some((at, true)),
        }
    }
}

/// Number of bytes before the first one at which a footer (if asked for) or a mark may begin.
///
/// Most bytes are passed here, so the loop over a block has no branch and compiles to vector code.
fn quiet_len(bytes: &[u8], footers: bool, marks: bool) -> usize {
    const BLOCK: usize = 64;
    let (footers_wanted, marks_wanted) = (u8::from(footers), u8::from(marks));
    let mut at = 0;
    while let Some(block) = bytes[at..].first_chunk::<{ BLOCK + 1 }>() {
        let loud = block.iter().zip(&block[1..]).fold(0, |loud, (byte, next)| {
            let footer = footers_wanted & u8::from(*byte == item::FOOTER);
            let mark = marks_wanted & u8::from(byte | (next ^ item::VMDESCRIPTION) == 0);
            loud | footer | mark
        });
        if loud != 0 {
            break;
        }
        at += BLOCK;
    }
    let rest = &bytes[at..];
    let is_loud = |(index, byte): (usize, &u8)| match *byte {
        item::FOOTER => footers,
        // The last byte may go on as a mark.
        item::EOF => {
            marks
                && rest
                    .get(index + 1)
                    .is_none_or(|next| *next == item::VMDESCRIPTION)
        }
        _ => false,
    };
    at + rest
        .iter()
        .enumerate()
        .position(is_loud)
        .unwrap_or(rest.len())
}

/// What is known about the last candidate.
#[derive(Debug)]
enum Check {
    /// It and the bytes of the mark behind it: how many have passed.
    Mark { passed: usize },
    /// The description, behind its first two bytes.
    Json {
        left: u32,
        depth: u32,
        string: bool,
        escape: bool,
    },
}

/// Why the scanner stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// All bytes have been read.
    End,
    /// The rest may begin a mark; more bytes will tell.
    Short,
    /// The next byte may be the commit byte.
    Candidate,
    /// The last candidate was none.
    Refuted,
    /// The bytes read complete the stream.
    Complete,
    /// A footer of this id has been read, and another item may follow (only when asked for).
    Footer(u32),
}

/// Reads bytes of unknown structure; see the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// The last bytes read, the newest lowest: a footer, an item type and a section id.
    window: u128,
    /// Number of bytes read since the last one with which a footer may begin.
    calm: usize,
    known: HashSet<u32>,
    /// More ids than can be remembered, or items that the rule for ids does not follow.
    any_id: bool,
    general: bool,
    /// The next byte stands where an item begins.
    at_item: bool,
    /// The footer just read has been dealt with.
    footer_passed: bool,
    check: Option<Check>,
    /// Bytes have been seen behind the last candidate.
    followed: bool,
}

impl Scanner {
    /// Makes the id of a section known, so that its footer is recognised.
    pub(super) fn learn(&mut self, id: u32) {
        if self.known.len() < MAX_IDS {
            self.known.insert(id);
        } else if !self.known.contains(&id) {
            self.any_id = true;
        }
    }

    /// Begins at an item, behind a footer of `last` if there was one. `begun` is the start of that
    /// item as far as it has passed already.
    pub(super) fn enter(&mut self, last: Option<u32>, begun: &[u8]) {
        self.window = last.map_or(0, |id| u128::from(item::FOOTER) << 32 | u128::from(id));
        self.calm = 0;
        self.at_item = true;
        self.footer_passed = true;
        self.push_all(begun);
    }

    /// Begins anywhere: from now on the general rule holds, too. `before` has passed already.
    pub(super) fn enter_lost(&mut self, before: &[u8]) {
        self.general = true;
        self.at_item = false;
        self.footer_passed = false;
        self.window = 0;
        self.calm = WINDOW;
        self.push_all(before);
    }

    /// Whether structure was ever lost in this channel, so that what looks like it may be forged.
    pub(super) fn doubts(&self) -> bool {
        self.general
    }

    /// The footer just read needs no further look.
    pub(super) fn pass_footer(&mut self) {
        self.footer_passed = true;
    }

    /// See [`Decoder::candidate_is_last`](super::Decoder::candidate_is_last).
    pub(super) fn candidate_is_last(&self) -> bool {
        matches!(self.check, Some(Check::Mark { passed: 0 | 1 })) && !self.followed
    }

    /// Reads `input` until something is found; returns the number of bytes read and why it stopped.
    /// With `flush` it is never `Short`, and with `footers` it stops behind footers of known ids.
    pub(super) fn scan(&mut self, input: &[u8], flush: bool, footers: bool) -> (usize, Halt) {
        if self.check.is_some() {
            return self.confirm(input, flush);
        }
        let mut at = 0;
        while let Some(&byte) = input.get(at) {
            if self.calm >= WINDOW && !self.at_item {
                let quiet = quiet_len(&input[at..], true, self.general);
                if quiet > 0 {
                    // The window holds nothing that matters, and so does what is skipped.
                    at += quiet;
                    continue;
                }
            }
            if byte == item::EOF {
                let full = self.at_item
                    || self.behind_footer()
                    || (self.general
                        && match begins(&input[at..], 0) {
                            Begins::No => false,
                            Begins::Fully => true,
                            Begins::Partly if flush => true,
                            Begins::Partly => return (at, Halt::Short),
                        });
                if full {
                    self.check = Some(Check::Mark { passed: 0 });
                    self.followed = false;
                    return (at, Halt::Candidate);
                }
            } else if footers && !self.footer_passed && self.behind_footer() {
                return (at, Halt::Footer(self.last_word()));
            }
            self.push(byte);
            at += 1;
        }
        (at, Halt::End)
    }

    /// Follows the bytes behind a candidate.
    fn confirm(&mut self, input: &[u8], flush: bool) -> (usize, Halt) {
        let mut at = 0;
        if let Some(Check::Mark { mut passed }) = self.check {
            // The candidate itself passes at once; it is the caller who holds it.
            if passed == 0
                && let Some(candidate) = input.first()
            {
                self.push(*candidate);
                passed = 1;
                at = 1;
            }
            let rest = &input[at..];
            self.followed |= !rest.is_empty();
            let taken = loop {
                match begins(rest, passed) {
                    Begins::Fully => break MARK.len() - passed,
                    Begins::Partly if flush => break rest.len(),
                    Begins::Partly => break 0,
                    Begins::No => match self.later_candidate(passed) {
                        Some(later) => passed = later,
                        None => {
                            self.check = None;
                            return (at, Halt::Refuted);
                        }
                    },
                }
            };
            self.push_all(&rest[..taken]);
            passed += taken;
            at += taken;
            if passed < MARK.len() {
                self.check = Some(Check::Mark { passed });
                return (
                    at,
                    if at < input.len() {
                        Halt::Short
                    } else {
                        Halt::End
                    },
                );
            }
            // Behind the length stands how the text begins.
            let len = (self.window >> 16) as u32;
            if !(2..=MAX_VMDESC).contains(&len) {
                self.check = None;
                return (at, Halt::Refuted);
            }
            self.check = Some(Check::Json {
                left: len - 2,
                depth: 1,
                string: true,
                escape: false,
            });
        }
        self.follow_json(input, at)
    }

    /// A candidate among the last `passed` bytes, behind the first of them: how many there are from
    /// it on. Only a flush passes such bytes before they are decided; the caller holds them because
    /// of the candidate before, so that one is not refuted yet.
    fn later_candidate(&self, passed: usize) -> Option<usize> {
        let newest_last = self.window.to_be_bytes();
        (1..passed).rev().find(|later| {
            let start = newest_last.len() - later;
            let footer = self.window >> (8 * later);
            let behind_footer = (footer >> 32) as u8 == item::FOOTER && self.knows(footer as u32);
            (self.general || behind_footer) && begins(&newest_last[start..], 0) != Begins::No
        })
    }

    /// Follows the description from `at` on.
    fn follow_json(&mut self, input: &[u8], mut at: usize) -> (usize, Halt) {
        let Some(Check::Json {
            mut left,
            mut depth,
            mut string,
            mut escape,
        }) = self.check
        else {
            return (at, Halt::End);
        };
        while left > 0 && depth > 0 {
            let Some(&byte) = input.get(at) else {
                self.check = Some(Check::Json {
                    left,
                    depth,
                    string,
                    escape,
                });
                return (at, Halt::End);
            };
            match byte {
                // Text has no zero; and this one may itself be a candidate, so it stays unread.
                0 => {
                    self.check = None;
                    return (at, Halt::Refuted);
                }
                _ if escape => escape = false,
                b'\\' if string => escape = true,
                b'"' => string = !string,
                b'{' | b'[' if !string => depth += 1,
                b'}' | b']' if !string => depth -= 1,
                _ => {}
            }
            self.push(byte);
            left -= 1;
            at += 1;
        }
        self.check = None;
        (
            at,
            if left == 0 && depth == 0 {
                Halt::Complete
            } else {
                Halt::Refuted
            },
        )
    }

    fn push_all(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.push(*byte);
        }
    }

    /// Takes a byte into the window and learns an id if it ends a section header.
    fn push(&mut self, byte: u8) {
        self.window = self.window << 8 | u128::from(byte);
        self.calm = if byte == item::FOOTER {
            0
        } else {
            self.calm.saturating_add(1)
        };
        self.at_item = false;
        self.footer_passed = false;
        if self.window_byte(WINDOW as u32 - 1) == item::FOOTER
            && self.knows((self.window >> 40) as u32)
        {
            match self.window_byte(4) {
                item::START..=item::FULL => self.learn(self.last_word()),
                // No command is known to come among device state; one could hide the next header.
                item::COMMAND if !self.general => self.any_id = true,
                _ => {}
            }
        }
    }

    fn window_byte(&self, back: u32) -> u8 {
        (self.window >> (8 * back)) as u8
    }

    fn last_word(&self) -> u32 {
        self.window as u32
    }

    fn knows(&self, id: u32) -> bool {
        self.any_id || self.known.contains(&id)
    }

    fn behind_footer(&self) -> bool {
        self.window_byte(4) == item::FOOTER && self.knows(self.last_word())
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Positions of the candidates in `bytes`, each taken for refuted at once.
    fn candidates(scanner: &mut Scanner, bytes: &[u8]) -> Vec<usize> {
        let (mut at, mut found) = (0, Vec::new());
        loop {
            let (read, halt) = scanner.scan(&bytes[at..], true, false);
            at += read;
            match halt {
                Halt::Candidate => found.push(at),
                Halt::End if at == bytes.len() => return found,
                _ => {}
            }
        }
    }

    #[test]
    fn only_footers_of_known_ids_count() {
        let mut scanner = Scanner::default();
        scanner.learn(2);
        scanner.enter(Some(2), &[]);
        let bytes = crate::qemu::hex(
            "04 00000009 01 78 00000000 00000001 7e00000003 00 7e00000009 00
             7e00000009 03 0000000b aa 7e0000000b 00",
        );
        assert_eq!(candidates(&mut scanner, &bytes), [26, 43]);
    }

    #[test]
    fn a_command_among_device_state_makes_every_footer_count() {
        let mut scanner = Scanner::default();
        scanner.learn(2);
        scanner.enter(Some(2), &[]);
        let bytes = crate::qemu::hex("08 000b 0000 04 00000009 00000000 7e00000009 00");
        assert_eq!(candidates(&mut scanner, &bytes), [19]);
    }

    #[test]
    fn more_ids_than_can_be_remembered_make_every_footer_count() {
        let mut scanner = Scanner::default();
        for id in 0..=MAX_IDS as u32 {
            scanner.learn(id);
        }
        assert_eq!(scanner.known.len(), MAX_IDS);
        scanner.enter_lost(&[]);
        assert_eq!(
            candidates(&mut scanner, &[item::FOOTER, 9, 9, 9, 9, 0, 1]),
            [5]
        );
    }

    #[test]
    fn a_footer_is_found_across_any_cut() {
        let bytes = crate::qemu::hex("04 00000009 aabb 7e00000009 00 07");
        for cut in 0..=12 {
            let mut scanner = Scanner::default();
            scanner.learn(2);
            scanner.enter(Some(2), &[]);
            let mut found = candidates(&mut scanner, &bytes[..cut]);
            found.extend(
                candidates(&mut scanner, &bytes[cut..])
                    .iter()
                    .map(|at| at + cut),
            );
            assert_eq!(found, [12], "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn vector_code_finds_what_plain_code_finds(
            quiet in 0_usize..300,
            bytes in vec(prop_oneof![Just(0_u8), Just(6), Just(0x7E), Just(0x7B), any::<u8>()], 0..90),
        ) {
            let mut input = vec![1; quiet];
            input.extend_from_slice(&bytes);
            for (footers, marks) in [(true, true), (true, false), (false, true)] {
                let plain = (0..input.len()).find(|at| {
                    let zero_then = input.get(at + 1).is_none_or(|next| *next == item::VMDESCRIPTION);
                    (footers && input[*at] == item::FOOTER) || (marks && input[*at] == 0 && zero_then)
                });
                prop_assert_eq!(quiet_len(&input, footers, marks), plain.unwrap_or(input.len()));
            }
            let mark = (0..input.len()).find(|at| begins(&input[*at..], 0) != Begins::No);
            prop_assert_eq!(find_mark(&input, input.len()).map(|(at, _)| at), mark);
        }
    }
}
