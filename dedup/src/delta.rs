//! A page as the difference from another one: the runs of bytes that changed.
//!
//! ```text
//! run   = gap × 2 + more, length, bytes       (two numbers; `more`: another run follows)
//! delta = run, run, …
//! ```
//!
//! A gap counts the bytes that stay since the run before it (at first: since the start of the page).
//! Deltas go among the literals of a frame, so the channel's compressor has them with everything
//! else. Why not with the old pages as a prefix of the compressor: `docs/adr/0009-deltas.md`.

use crate::page::PAGE_SIZE;
use crate::varint;

/// Longest delta that is worth it. What is longer has hardly anything in common with the old page,
/// and goes better as a page.
pub(crate) const MAX_DELTA: usize = PAGE_SIZE / 8 * 7;

/// Bytes compared at once; equal ones are skipped at memory speed.
const STRIDE: usize = 64;
const WORD: usize = 8;

/// Longest delta from a page of another place. Pages that have less than half in common are alike by
/// chance, and what is left of them compresses better among its own kind.
pub(crate) const MAX_DELTA_FROM_SIMILAR: usize = PAGE_SIZE / 2;

/// Appends what makes `new` of `old`. False, and nothing is appended, when that would be longer than
/// `most`, which is at most [`MAX_DELTA`], or the pages are equal.
pub(crate) fn write(
    old: &[u8; PAGE_SIZE],
    new: &[u8; PAGE_SIZE],
    most: usize,
    out: &mut Vec<u8>,
) -> bool {
    let start = out.len();
    let mut writer = Writer {
        old,
        new,
        out,
        open: None,
        behind: 0,
        head: None,
    };
    let strides = old.as_chunks::<STRIDE>().0.iter();
    for (stride, (a, b)) in strides.zip(new.as_chunks::<STRIDE>().0).enumerate() {
        let at = stride * STRIDE;
        if a == b {
            writer.close(at);
            continue;
        }
        let words = a.as_chunks::<WORD>().0.iter();
        for (word, (a, b)) in words.zip(b.as_chunks::<WORD>().0).enumerate() {
            let at = at + word * WORD;
            if a == b {
                writer.close(at);
            } else if writer.open.is_none() {
                writer.open = Some(at);
            }
        }
        if writer.length() > start + most {
            writer.out.truncate(start);
            return false;
        }
    }
    writer.close(PAGE_SIZE);
    let done = writer.head.is_some() && out.len() - start <= most;
    if !done {
        out.truncate(start);
    }
    done
}

struct Writer<'a> {
    old: &'a [u8; PAGE_SIZE],
    new: &'a [u8; PAGE_SIZE],
    out: &'a mut Vec<u8>,
    /// Start of words that differ, up to where we are.
    open: Option<usize>,
    /// End of the last run in the page.
    behind: usize,
    /// Where the last run's first number is in `out`.
    head: Option<usize>,
}

impl Writer<'_> {
    /// At least what it will come to if everything ahead is equal.
    fn length(&self) -> usize {
        self.out.len()
    }

    /// Ends the run of differing words at `end`, if there is one.
    fn close(&mut self, mut end: usize) {
        let Some(mut start) = self.open.take() else {
            return;
        };
        // The first and the last word differ somewhere, so both loops end.
        while self.old[start] == self.new[start] {
            start += 1;
        }
        while self.old[end - 1] == self.new[end - 1] {
            end -= 1;
        }
        if let Some(head) = self.head {
            // The low bit of a number is in its first byte.
            self.out[head] |= 1;
        }
        self.head = Some(self.out.len());
        varint::write(((start - self.behind) as u64) << 1, self.out);
        varint::write((end - start) as u64, self.out);
        self.out.extend_from_slice(&self.new[start..end]);
        self.behind = end;
    }
}

/// A delta that was found to be well-formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Delta<'a>(&'a [u8]);

impl<'a> Delta<'a> {
    /// Takes a delta off the start of `input`. `None` when it is cut off, has an empty run, goes
    /// beyond a page or is longer than any that we write.
    pub(crate) fn take(input: &mut &'a [u8]) -> Option<Self> {
        let mut rest = *input;
        let mut at = 0;
        loop {
            let run = Run::take(&mut rest)?;
            at = run.end(at)?;
            let length = input.len() - rest.len();
            if length > MAX_DELTA {
                return None;
            }
            if !run.more {
                let (delta, rest) = input.split_at(length);
                *input = rest;
                return Some(Self(delta));
            }
        }
    }

    /// Its bytes, to be taken again later.
    pub(crate) fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Makes the new page of the old one.
    pub(crate) fn apply(&self, page: &mut [u8; PAGE_SIZE]) {
        let (mut rest, mut at) = (self.0, 0);
        while let Some(run) = Run::take(&mut rest)
            && let Some(end) = run.end(at)
        {
            page[end - run.bytes.len()..end].copy_from_slice(run.bytes);
            at = end;
        }
    }
}

struct Run<'a> {
    gap: u64,
    more: bool,
    bytes: &'a [u8],
}

impl<'a> Run<'a> {
    fn take(input: &mut &'a [u8]) -> Option<Self> {
        let head = varint::read(input)?;
        let length = varint::read(input)?;
        let length = usize::try_from(length).ok().filter(|&length| length > 0)?;
        let (bytes, rest) = input.split_at_checked(length)?;
        *input = rest;
        Some(Self {
            gap: head >> 1,
            more: head & 1 != 0,
            bytes,
        })
    }

    /// Where the run ends in the page, when the one before it ends at `behind`.
    fn end(&self, behind: usize) -> Option<usize> {
        let gap = usize::try_from(self.gap)
            .ok()
            .filter(|&gap| gap < PAGE_SIZE)?;
        let end = behind + gap + self.bytes.len();
        (end <= PAGE_SIZE).then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OLD: [u8; PAGE_SIZE] = [7; PAGE_SIZE];

    fn written(new: &[u8; PAGE_SIZE]) -> Option<Vec<u8>> {
        let mut out = b"before".to_vec();
        let done = write(&OLD, new, MAX_DELTA, &mut out);
        assert_eq!(&out[..6], b"before");
        assert_eq!(done, out.len() > 6);
        done.then(|| out.split_off(6))
    }

    /// docs/protocol.md, "Deltas".
    #[test]
    fn golden() {
        let mut new = OLD;
        new[0] = 1;
        new[100..103].copy_from_slice(&[2, 7, 3]);
        new[4095] = 4;
        let expected = [1, 1, 1, 0xc7, 0x01, 3, 2, 7, 3, 0xb0, 0x3e, 1, 4];
        assert_eq!(written(&new), Some(expected.to_vec()));
    }

    #[test]
    fn equal_pages_and_strangers_have_no_delta() {
        assert_eq!(written(&OLD), None);
        assert_eq!(written(&[8; PAGE_SIZE]), None);
        let mut new = [8; PAGE_SIZE];
        new[MAX_DELTA - 4..].fill(7);
        assert_eq!(written(&new).map(|delta| delta.len()), Some(MAX_DELTA - 1));
        new[MAX_DELTA - 4..MAX_DELTA + 8].fill(8);
        assert_eq!(written(&new), None);
    }

    #[test]
    fn malformed_deltas_are_refused() {
        let refused: [&[u8]; 9] = [
            &[],
            &[0],                         // no length
            &[0, 0],                      // empty run
            &[0, 2, 1],                   // bytes cut off
            &[1, 1, 1],                   // the next run is missing
            &[0x80, 0x40, 1, 1],          // begins behind the page
            &[0xfe, 0x3f, 2, 1, 1],       // ends behind the page
            &[0xff, 0x3f, 1, 1, 0, 1, 1], // the second one does
            &[
                0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1, 1,
            ],
        ];
        for delta in refused {
            assert_eq!(Delta::take(&mut &delta[..]), None, "{delta:x?}");
        }
        let mut long = vec![0, 0x80, 0x20];
        long.extend([1; PAGE_SIZE]);
        assert_eq!(Delta::take(&mut &long[..]), None);
    }

    proptest! {
        #[test]
        fn what_was_written_makes_the_new_page(
            changes in prop::collection::vec((0..PAGE_SIZE, 1..200_usize, any::<u8>()), 1..40),
            behind in prop::collection::vec(any::<u8>(), 0..10),
        ) {
            let mut new = OLD;
            for (at, length, byte) in changes {
                let end = PAGE_SIZE.min(at + length);
                new[at..end].fill(byte);
            }
            if let Some(mut delta) = written(&new) {
                prop_assert!(delta.len() <= MAX_DELTA);
                let length = delta.len();
                delta.extend_from_slice(&behind);
                let mut input = &delta[..];
                let taken = Delta::take(&mut input).unwrap();
                prop_assert_eq!(input, &behind[..]);
                prop_assert_eq!(taken.as_bytes().len(), length);
                let mut page = OLD;
                taken.apply(&mut page);
                prop_assert!(page == new);
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut input = &bytes[..];
            if let Some(delta) = Delta::take(&mut input) {
                delta.apply(&mut [0; PAGE_SIZE]);
                prop_assert!(delta.as_bytes().len() + input.len() == bytes.len());
            }
        }
    }
}
