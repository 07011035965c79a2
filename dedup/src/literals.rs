//! Compression of the literals of a channel.
//!
//! All compressed frames of a channel form one zstd stream, flushed at the end of each frame: what
//! an earlier frame held can be matched by a later one, as far back as the window reaches. Frames are
//! therefore unpacked in the order in which they were packed. Short literals are stored as they are
//! and stay out of that stream.
//!
//! When the way of compression changes, the zstd frame that the stream consists of is ended and the
//! next one begins, with an empty window, in the same payload.

use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, DCtx, DParameter, FrameFormat, InBuffer, OutBuffer, SafeResult};

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

/// The compressor or decompressor failed: out of memory, or input that no compressor wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ZstdFailed;

fn checked(result: SafeResult) -> Result<usize, ZstdFailed> {
    result.map_err(|_| ZstdFailed)
}

/// How a channel is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackOptions {
    pub(crate) level: i32,
    pub(crate) window_log: u32,
    pub(crate) long_distance: bool,
}

/// Literals in the form in which they cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed<'a> {
    Stored(&'a [u8]),
    Zstd(&'a [u8]),
}

/// The sending side of a channel's zstd stream.
pub(crate) struct Packer {
    /// `None`: literals are stored.
    options: Option<PackOptions>,
    /// Made when it is first needed: it takes the window and some hundred KiB.
    context: Option<CCtx<'static>>,
    /// What `context` was made for.
    made_for: Option<PackOptions>,
    out: Vec<u8>,
}

impl Packer {
    pub(crate) fn new(options: PackOptions) -> Self {
        Self {
            options: Some(options),
            context: None,
            made_for: None,
            out: Vec::new(),
        }
    }

    /// Packs differently from the next frame on; `None` stores.
    pub(crate) fn set_options(&mut self, options: Option<PackOptions>) {
        self.options = options;
    }

    /// Packs the literals of the next frame.
    pub(crate) fn pack<'a>(&'a mut self, literals: &'a [u8]) -> Result<Packed<'a>, ZstdFailed> {
        let packs = literals.len() >= MIN_PACKED && !looks_random(literals);
        let Some(options) = self.options.filter(|_| packs) else {
            return Ok(Packed::Stored(literals));
        };
        let mut written = 0;
        if self.made_for != Some(options) {
            written = self.end_zstd_frame()?;
            self.made_for = Some(options);
        }
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(compressor(options)?),
        };
        let mut input = InBuffer::around(literals);
        loop {
            // Room for all in one turn, unless zstd thinks otherwise.
            grow(
                &mut self.out,
                written + zstd_safe::compress_bound(literals.len() - input.pos()),
            );
            let mut out = OutBuffer::around_pos(&mut self.out[..], written);
            let directive = ZSTD_EndDirective::ZSTD_e_flush;
            let left = checked(context.compress_stream2(&mut out, &mut input, directive))?;
            written = out.pos();
            if left == 0 {
                return Ok(Packed::Zstd(&self.out[..written]));
            }
        }
    }
}

impl Packer {
    /// Ends what `context` has begun; returns the bytes that this takes at the start of `out`.
    fn end_zstd_frame(&mut self) -> Result<usize, ZstdFailed> {
        let Some(mut context) = self.context.take() else {
            return Ok(0);
        };
        grow(&mut self.out, zstd_safe::compress_bound(0));
        let mut out = OutBuffer::around(&mut self.out[..]);
        let directive = ZSTD_EndDirective::ZSTD_e_end;
        let left =
            checked(context.compress_stream2(&mut out, &mut InBuffer::around(&[]), directive))?;
        // Everything was flushed before, so there is no more than an empty block.
        if left == 0 {
            Ok(out.pos())
        } else {
            Err(ZstdFailed)
        }
    }
}

fn compressor(options: PackOptions) -> Result<CCtx<'static>, ZstdFailed> {
    let mut context = CCtx::try_create().ok_or(ZstdFailed)?;
    for parameter in [
        CParameter::Format(FrameFormat::Magicless),
        CParameter::CompressionLevel(options.level),
        CParameter::WindowLog(options.window_log),
        CParameter::EnableLongDistanceMatching(options.long_distance),
        CParameter::ContentSizeFlag(false),
        CParameter::ChecksumFlag(false),
        CParameter::DictIdFlag(false),
    ] {
        checked(context.set_parameter(parameter))?;
    }
    Ok(context)
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

/// The receiving side of a channel's zstd stream.
pub(crate) struct Unpacker {
    max_window_log: u32,
    context: Option<DCtx<'static>>,
}

impl Unpacker {
    pub(crate) fn new(max_window_log: u32) -> Self {
        Self {
            max_window_log,
            context: None,
        }
    }

    /// Unpacks the literals of the next frame, exactly `length` bytes, to the start of `out`, which
    /// grows as needed. The caller has checked `length` against its limit.
    pub(crate) fn unpack<'a>(
        &mut self,
        packed: &[u8],
        length: usize,
        out: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], ZstdFailed> {
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(decompressor(self.max_window_log)?),
        };
        // One byte more than due, so that there is always room: zstd then shows what is too much,
        // and a call that neither reads nor writes has nothing left to give.
        grow(out, length + 1);
        let mut input = InBuffer::around(packed);
        let mut written = 0;
        loop {
            let before = (input.pos(), written);
            let mut buffer = OutBuffer::around_pos(&mut out[..=length], written);
            let hint = checked(context.decompress_stream(&mut buffer, &mut input))?;
            written = buffer.pos();
            // Zero: a zstd frame ends here, and the next one has to begin: the stream goes on as long
            // as the channel.
            if hint == 0 && input.pos() == packed.len() || written > length {
                return Err(ZstdFailed);
            }
            if (input.pos(), written) == before {
                break;
            }
        }
        let complete = input.pos() == packed.len() && written == length;
        complete.then_some(&out[..length]).ok_or(ZstdFailed)
    }
}

/// Makes `buffer` at least `length` long. It never shrinks, so its bytes are set once.
fn grow(buffer: &mut Vec<u8>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
}

fn decompressor(max_window_log: u32) -> Result<DCtx<'static>, ZstdFailed> {
    let mut context = DCtx::try_create().ok_or(ZstdFailed)?;
    checked(context.set_parameter(DParameter::Format(FrameFormat::Magicless)))?;
    checked(context.set_parameter(DParameter::WindowLogMax(max_window_log)))?;
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: PackOptions = PackOptions {
        level: 1,
        window_log: 19,
        long_distance: false,
    };

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut noise = vec![0; length];
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut noise);
        noise
    }

    /// Seven bits of each byte are random: hardly compressible, and not taken for random.
    fn letters(seed: u64, length: usize) -> Vec<u8> {
        noise(seed, length).iter().map(|byte| byte & 0x7f).collect()
    }

    fn zstd(packed: Packed<'_>) -> Vec<u8> {
        match packed {
            Packed::Zstd(bytes) => bytes.to_vec(),
            Packed::Stored(_) => panic!("stored"),
        }
    }

    #[test]
    fn later_frames_use_earlier_ones() {
        let (mut packer, mut unpacker) = (Packer::new(OPTIONS), Unpacker::new(19));
        let mut out = Vec::new();
        for round in 0..3 {
            for seed in 0..4 {
                let literals = letters(seed, 60_000);
                let packed = zstd(packer.pack(&literals).unwrap());
                assert!(if round == 0 {
                    packed.len() > 50_000
                } else {
                    packed.len() < 200
                });
                assert_eq!(
                    unpacker.unpack(&packed, literals.len(), &mut out).unwrap(),
                    literals
                );
            }
        }
    }

    #[test]
    fn the_way_of_compression_may_change_at_any_frame() {
        let (mut packer, mut unpacker) = (Packer::new(OPTIONS), Unpacker::new(20));
        let mut out = Vec::new();
        let literals = letters(1, 60_000);
        let mut sizes = Vec::new();
        let harder = PackOptions {
            level: 3,
            window_log: 20,
            long_distance: true,
        };
        for options in [
            Some(OPTIONS),
            Some(OPTIONS),
            Some(harder),
            Some(harder),
            None,
            Some(harder),
            Some(OPTIONS),
            Some(OPTIONS),
        ] {
            packer.set_options(options);
            match packer.pack(&literals).unwrap() {
                Packed::Stored(stored) => {
                    assert!(stored == literals && options.is_none());
                    sizes.push(stored.len());
                }
                Packed::Zstd(packed) => {
                    let unpacked = unpacker.unpack(packed, literals.len(), &mut out);
                    assert_eq!(unpacked.unwrap(), literals);
                    sizes.push(packed.len());
                }
            }
        }
        // A change costs the window, and only a change.
        let known: Vec<bool> = sizes.iter().map(|&size| size < 1000).collect();
        assert_eq!(known, [false, true, false, true, false, true, false, true]);
    }

    #[test]
    fn a_stream_that_ends_is_refused() {
        let mut packer = Packer::new(OPTIONS);
        let mut packed = zstd(packer.pack(&[5; 5000]).unwrap());
        let end = packer.end_zstd_frame().unwrap();
        packed.extend_from_slice(&packer.out[..end]);
        let mut out = Vec::new();
        assert_eq!(
            Unpacker::new(20).unpack(&packed, 5000, &mut out),
            Err(ZstdFailed)
        );
    }

    #[test]
    fn random_literals_are_stored_and_others_are_not() {
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
        let text = include_bytes!("literals.rs").repeat(3);
        assert!(!looks_random(&text));

        let mut packer = Packer::new(OPTIONS);
        let random = noise(3, 60_000);
        let stored = packer.pack(&random).unwrap() == Packed::Stored(&random[..]);
        assert!(stored);
    }

    #[test]
    fn short_literals_are_stored() {
        let mut packer = Packer::new(OPTIONS);
        assert_eq!(packer.pack(&[1; 127]).unwrap(), Packed::Stored(&[1; 127]));
        assert!(packer.context.is_none());
        assert!(zstd(packer.pack(&[1; 128]).unwrap()).len() < 30);
    }

    #[test]
    fn other_lengths_and_cuts_are_refused() {
        let literals = noise(1, 1000);
        let packed = zstd(Packer::new(OPTIONS).pack(&literals).unwrap());
        let mut out = Vec::new();
        for length in [0, 1, 999, 1001, 100_000] {
            let refused = Unpacker::new(19).unpack(&packed, length, &mut out);
            assert_eq!(refused, Err(ZstdFailed), "{length}");
        }
        for cut in 0..packed.len() {
            let refused = Unpacker::new(19).unpack(&packed[..cut], 1000, &mut out);
            assert_eq!(refused, Err(ZstdFailed), "{cut}");
        }
        // What follows is read as the next block, here one of a type that does not exist. (A few
        // bytes of a valid block would be noticed in the next frame.)
        let mut longer = packed.clone();
        longer.extend([6, 0, 0]);
        assert_eq!(
            Unpacker::new(19).unpack(&longer, 1000, &mut out),
            Err(ZstdFailed)
        );
    }

    #[test]
    fn a_window_over_the_limit_is_refused() {
        let mut packer = Packer::new(PackOptions {
            window_log: 24,
            ..OPTIONS
        });
        let packed = zstd(packer.pack(&[0; 5000]).unwrap());
        let mut out = Vec::new();
        assert_eq!(
            Unpacker::new(23).unpack(&packed, 5000, &mut out),
            Err(ZstdFailed)
        );
        assert_eq!(
            Unpacker::new(24).unpack(&packed, 5000, &mut out),
            Ok(&[0; 5000][..])
        );
    }
}
