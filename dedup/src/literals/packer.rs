//! The sending side of a channel's zstd stream.

#![expect(
    unsafe_code,
    reason = "the compressor reads memory that it does not borrow"
)]

use super::context::Context;
use super::{Matching, PackOptions, Packed, ZstdFailed};

/// Literals shorter than this are stored: zstd would save little or nothing on them, and a channel
/// with nothing but small messages (the return path) never needs a compressor.
const MIN_PACKED: usize = 128;

/// Bytes looked at to tell whether literals can be compressed at all, and the least of literals for
/// which that is asked.
const SAMPLES: usize = 2048;
const MIN_SAMPLED: usize = 8 * SAMPLES;

/// Sum of the squares of how often each byte value was seen, below which the bytes are taken for
/// random. Of random bytes it is 18,424 on average, with a standard deviation of 180; text comes to
/// some 100,000, machine code to more.
const RANDOM_BELOW: u32 = 19_200;

/// Largest window whose literals the compressor reads in place.
const MAX_IN_PLACE: u32 = 21;

/// The end of a zstd frame, as a block: the last one, raw, of no bytes (RFC 8878, 3.1.1.2).
const END_OF_ZSTD_FRAME: [u8; 3] = [1, 0, 0];

/// Gathers the literals of a frame and packs them.
///
/// Where only the last MiB or two are matched, zstd reads the literals where they were gathered, in an
/// area of twice the window; when that is full, compression begins anew with an empty window. In zstd's
/// own ring buffer they would be copied once more and soon lie in two pieces, which level 3 searches a
/// fifth slower (zstd 1.5.7). With larger windows the search itself takes most of the time.
pub(crate) struct Packer {
    /// `None`: literals are stored.
    options: Option<PackOptions>,
    /// Up to `start` what `context` has read and may look at again, then the literals of the frame
    /// being made.
    area: Vec<u8>,
    start: usize,
    /// Made when it is first needed: it takes some hundred KiB, and the window.
    pub(super) context: Option<Context>,
    /// The peer is within a zstd frame of `context`.
    begun: bool,
    /// `context` looks at `area`, which must neither move nor change up to `start`.
    pinned: bool,
    /// The peer is within a zstd frame that nothing will be added to.
    left: bool,
    /// The frame's literals have gone into the stream.
    packed: bool,
    out: Vec<u8>,
}

impl Packer {
    pub(crate) fn new(options: PackOptions) -> Self {
        Self {
            options: Some(options),
            area: Vec::new(),
            start: 0,
            context: None,
            begun: false,
            pinned: false,
            left: false,
            packed: false,
            out: Vec::new(),
        }
    }

    /// Packs differently from the next frame on; `None` stores. What the way before took is given back:
    /// others may have come to need it.
    pub(crate) fn set_options(&mut self, options: Option<PackOptions>) {
        if self.options == options {
            return;
        }
        self.options = options;
        self.leave_zstd_frame();
        self.context = None;
        self.area.shrink_to(options.map_or(0, area_size));
    }

    /// Gives back what compression took, for a channel that has nothing to say. It begins with an empty
    /// window when it has.
    pub(crate) fn rest(&mut self) {
        self.leave_zstd_frame();
        self.context = None;
        self.area.shrink_to_fit();
        self.out = Vec::new();
    }

    /// Whether literals are compressed at all.
    pub(crate) fn compresses(&self) -> bool {
        self.options.is_some()
    }

    /// Adds to the literals of the frame.
    pub(crate) fn push(&mut self, literals: &[u8]) {
        if self.pinned && self.area.capacity() - self.area.len() < literals.len() {
            self.leave_zstd_frame();
        }
        self.area.extend_from_slice(literals);
    }

    /// Length of the frame's literals.
    pub(crate) fn len(&self) -> usize {
        self.area.len() - self.start
    }

    /// Packs the literals of the frame.
    pub(crate) fn pack(&mut self) -> Result<Packed<'_>, ZstdFailed> {
        let literals = &self.area[self.start..];
        let packs = literals.len() >= MIN_PACKED && !looks_random(literals);
        let Some(options) = self.options.filter(|_| packs) else {
            return Ok(Packed::Stored(&self.area[self.start..]));
        };
        let in_place = reads_in_place(options);
        if in_place && !self.pinned {
            let area = area_size(options).max(self.area.len());
            self.area.reserve_exact(area - self.area.len());
            self.pinned = true;
        }
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(Context::new(options, in_place)?),
        };
        self.out.clear();
        if std::mem::take(&mut self.left) {
            self.out.extend_from_slice(&END_OF_ZSTD_FRAME);
        }
        self.begun = true;
        if in_place {
            // SAFETY: while `pinned`, literals are added behind `start` only, as long as there is room.
            unsafe { context.flush_in_place(&self.area, self.start, &mut self.out)? };
        } else {
            context.flush(&self.area[self.start..], &mut self.out)?;
        }
        self.packed = true;
        Ok(Packed::Zstd(&self.out))
    }

    /// Forgets the frame's literals, so that those of the next can be gathered.
    pub(crate) fn next_frame(&mut self) {
        if std::mem::take(&mut self.packed) && self.pinned {
            self.start = self.area.len();
        } else {
            self.area.truncate(self.start);
        }
    }

    /// Ends the zstd frame that the peer is in, and moves the literals to the start of the area.
    fn leave_zstd_frame(&mut self) {
        if let Some(context) = self.context.as_mut().filter(|_| self.begun) {
            context.reset();
            self.left = true;
        }
        self.begun = false;
        self.pinned = false;
        self.area.drain(..self.start);
        self.start = 0;
    }
}

/// Whether zstd is to read what it compresses where it was gathered.
fn reads_in_place(options: PackOptions) -> bool {
    options.matching == Matching::OfLevel && options.window_log <= MAX_IN_PLACE
}

/// Bytes of literals that are kept for zstd to read.
fn area_size(options: PackOptions) -> usize {
    if reads_in_place(options) {
        2 << options.window_log
    } else {
        0
    }
}

/// Whether literals look encrypted or compressed already, by a sample of their bytes: trying costs the
/// more the harder the compressor tries, and brings nothing.
fn looks_random(literals: &[u8]) -> bool {
    if literals.len() < MIN_SAMPLED {
        return false;
    }
    // An odd stride meets every position in words and records.
    let stride = (literals.len() / SAMPLES - 1) | 1;
    let mut seen = [0_u32; 256];
    let samples = literals.iter().step_by(stride).take(SAMPLES);
    samples.for_each(|&byte| seen[usize::from(byte)] += 1);
    seen.iter().map(|count| count * count).sum::<u32>() < RANDOM_BELOW
}

#[cfg(test)]
mod tests {
    use super::super::Unpacker;
    use super::super::tests::{letters, noise};
    use super::*;

    /// With the window of one way of compression and then a smaller one, and none at all.
    #[test]
    fn what_is_not_needed_is_given_back() {
        let of = |window_log| PackOptions {
            level: 1,
            window_log,
            matching: Matching::OfLevel,
        };
        let mut packer = Packer::new(of(20));
        let literals = letters(1, 100_000);
        for (options, area) in [(Some(of(20)), 2 << 20), (Some(of(18)), 1 << 19), (None, 0)] {
            packer.set_options(options);
            for _ in 0..30 {
                packer.push(&literals);
                packer.pack().unwrap();
                packer.next_frame();
            }
            // Stored literals are gathered, too.
            let room = area.max(2 * literals.len());
            assert!(packer.area.capacity() <= room, "{}", packer.area.capacity());
            assert_eq!(packer.context.is_some(), options.is_some());
        }
        packer.set_options(Some(of(20)));
        packer.push(&literals);
        packer.set_options(None);
        assert!(matches!(packer.pack(), Ok(Packed::Stored(bytes)) if bytes == literals));
    }

    #[test]
    fn what_rests_takes_nothing() {
        let options = PackOptions {
            level: 1,
            window_log: 20,
            matching: Matching::OfLevel,
        };
        let (mut packer, mut unpacker) = (Packer::new(options), Unpacker::new(20));
        let mut out = Vec::new();
        for seed in 0..6 {
            let literals = letters(seed, 100_000);
            packer.push(&literals);
            if seed == 3 {
                packer.rest();
                assert_eq!(packer.area, literals, "gathered, not packed yet");
            }
            let Packed::Zstd(packed) = packer.pack().unwrap() else {
                panic!("stored");
            };
            let unpacked = unpacker.unpack(packed, literals.len(), &mut out);
            assert_eq!(unpacked.unwrap(), literals);
            packer.next_frame();
            if seed % 2 == 1 {
                packer.rest();
                assert_eq!(packer.area.capacity() + packer.out.capacity(), 0);
                assert!(packer.context.is_none());
            }
        }
    }

    #[test]
    fn random_bytes_are_told_from_others() {
        for seed in 0..200 {
            let length = 16_384 + seed as usize * 1301;
            assert!(looks_random(&noise(seed, length)), "{seed}");
        }
        // Seven of eight pages random, one text; numbers; pointers; letters at random.
        let mut mixed = noise(1, 65_536);
        mixed[..8192].copy_from_slice(&b"skyferry".repeat(1024));
        assert!(!looks_random(&mixed));
        let words = |word: fn(u64) -> u64| -> Vec<u8> {
            (0..8192_u64).flat_map(|n| word(n).to_le_bytes()).collect()
        };
        assert!(!looks_random(&words(|n| n)));
        assert!(!looks_random(&words(|n| 0x7f12_3400_0000 + n * 4096)));
        assert!(!looks_random(&letters(2, 65_536)));
        let text = include_bytes!("packer.rs").repeat(3);
        assert!(!looks_random(&text));
    }
}
