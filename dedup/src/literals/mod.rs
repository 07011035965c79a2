//! Compression of the literals of a channel.
//!
//! All compressed frames of a channel form one zstd stream, flushed at the end of each frame: what
//! an earlier frame held can be matched by a later one, as far back as the window reaches. Frames are
//! therefore unpacked in the order in which they were packed. Short literals are stored as they are
//! and stay out of that stream.
//!
//! Now and then the zstd frame that the stream consists of is ended and the next one begins, with an
//! empty window, in the same payload: when the way of compression changes, and when the sender's memory
//! for what the compressor reads in place is used up.

mod context;
mod packer;
mod unpacker;

pub(crate) use packer::Packer;
pub(crate) use unpacker::Unpacker;

/// The compressor or decompressor failed: out of memory, or input that no compressor wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ZstdFailed;

/// How a channel is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackOptions {
    pub(crate) level: i32,
    pub(crate) window_log: u32,
    pub(crate) matching: Matching,
}

/// How zstd looks for what was there before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Matching {
    /// As the level says.
    #[default]
    OfLevel,
    /// For long matches in the whole window, too.
    LongDistance,
    /// For more and shorter matches than the level: pages hold pointers and counters, of which half
    /// the bytes are the same. Blocks end where what they hold changes.
    Short,
}

/// Literals in the form in which they cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed<'a> {
    Stored(&'a [u8]),
    Zstd(&'a [u8]),
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: PackOptions = PackOptions {
        level: 1,
        window_log: 19,
        matching: Matching::OfLevel,
    };

    pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut noise = vec![0; length];
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut noise);
        noise
    }

    /// Seven bits of each byte are random: hardly compressible, and not taken for random.
    pub(super) fn letters(seed: u64, length: usize) -> Vec<u8> {
        noise(seed, length).iter().map(|byte| byte & 0x7f).collect()
    }

    /// A frame of these literals, as it crosses the wire, and whether it is compressed.
    fn pack(packer: &mut Packer, literals: &[u8]) -> (Vec<u8>, bool) {
        // In pieces, as pages come.
        literals.chunks(4096).for_each(|piece| packer.push(piece));
        let packed = match packer.pack().unwrap() {
            Packed::Zstd(bytes) => (bytes.to_vec(), true),
            Packed::Stored(bytes) => (bytes.to_vec(), false),
        };
        packer.next_frame();
        packed
    }

    fn zstd(packer: &mut Packer, literals: &[u8]) -> Vec<u8> {
        let (packed, compressed) = pack(packer, literals);
        assert!(compressed);
        packed
    }

    #[test]
    fn later_frames_use_earlier_ones() {
        let (mut packer, mut unpacker) = (Packer::new(OPTIONS), Unpacker::new(19));
        let mut out = Vec::new();
        for round in 0..3 {
            for seed in 0..4 {
                let literals = letters(seed, 60_000);
                let packed = zstd(&mut packer, &literals);
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
            matching: Matching::LongDistance,
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
            let (packed, compressed) = pack(&mut packer, &literals);
            assert_eq!(compressed, options.is_some());
            let unpacked = if compressed {
                unpacker.unpack(&packed, literals.len(), &mut out).unwrap()
            } else {
                &packed
            };
            assert_eq!(unpacked, literals);
            sizes.push(packed.len());
        }
        // A change costs the window, and only a change.
        let known: Vec<bool> = sizes.iter().map(|&size| size < 1000).collect();
        assert_eq!(known, [false, true, false, true, false, false, false, true]);
    }

    #[test]
    fn a_stream_that_ends_is_refused() {
        let mut packer = Packer::new(OPTIONS);
        let mut packed = zstd(&mut packer, &[5; 5000]);
        packed.extend([1, 0, 0]);
        let mut out = Vec::new();
        assert_eq!(
            Unpacker::new(20).unpack(&packed, 5000, &mut out),
            Err(ZstdFailed)
        );
    }

    #[test]
    fn random_literals_are_stored() {
        let (mut packer, mut unpacker) = (Packer::new(OPTIONS), Unpacker::new(19));
        let (random, text) = (noise(3, 60_000), letters(4, 60_000));
        let mut out = Vec::new();
        assert!(zstd(&mut packer, &text).len() > 50_000);
        assert!(pack(&mut packer, &random) == (random, false));
        // They stay out of the stream, which goes on behind them.
        let first = zstd(&mut Packer::new(OPTIONS), &text);
        unpacker.unpack(&first, text.len(), &mut out).unwrap();
        let again = zstd(&mut packer, &text);
        assert!(again.len() < 200);
        assert_eq!(unpacker.unpack(&again, text.len(), &mut out), Ok(&text[..]));
    }

    /// Literals of many sizes: memory for them is used up again and again, at times in the middle of a
    /// frame.
    #[test]
    fn a_long_stream_passes_whole() {
        use Matching::{LongDistance, OfLevel, Short};
        for matching in [OfLevel, LongDistance, Short] {
            let options = PackOptions {
                matching,
                ..OPTIONS
            };
            let (mut packer, mut unpacker) = (Packer::new(options), Unpacker::new(20));
            let mut out = Vec::new();
            let contents = letters(7, 3 << 20);
            let mut passed = 0;
            for round in 0..150_usize {
                if round % 40 == 39 {
                    let level = 1 + (round / 40) as i32;
                    packer.set_options(Some(PackOptions { level, ..options }));
                }
                let length = 1 + round * 7919 % 300_000 + round / 149 * (2 << 20);
                let start = round * 104_729 % (contents.len() - length);
                let literals = &contents[start..][..length];
                let (packed, compressed) = pack(&mut packer, literals);
                assert_eq!(compressed, length >= 128);
                if compressed {
                    let unpacked = unpacker.unpack(&packed, length, &mut out).unwrap();
                    assert!(unpacked == literals, "round {round}");
                } else {
                    assert_eq!(packed, literals);
                }
                passed += length;
            }
            assert!(passed > 20 << 20);
        }
    }

    #[test]
    fn short_literals_are_stored() {
        let mut packer = Packer::new(OPTIONS);
        assert_eq!(pack(&mut packer, &[1; 127]), (vec![1; 127], false));
        assert!(packer.context.is_none());
        assert!(zstd(&mut packer, &[1; 128]).len() < 30);
    }

    #[test]
    fn other_lengths_and_cuts_are_refused() {
        let literals = noise(1, 1000);
        let packed = zstd(&mut Packer::new(OPTIONS), &literals);
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
        let packed = zstd(&mut packer, &[0; 5000]);
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
