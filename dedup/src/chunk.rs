//! Content-defined chunks of bytes that have no structure we know.
//!
//! A boundary lies where a rolling hash of the last 64 bytes has certain bits zero, so what repeats is
//! cut the same way wherever it begins, and an insertion moves few boundaries. The wire carries the
//! lengths: another choice of boundaries is not another format, only fewer hits.

use crate::page::PAGE_SIZE;

/// Shortest chunk in bytes: below it a reference saves little. The format's limit.
pub(crate) const MIN_CHUNK: usize = 1024;

/// Longest chunk in bytes, what a store takes as one value. The format's limit.
pub(crate) const MAX_CHUNK: usize = PAGE_SIZE;

/// Fewer bytes in a row than this are not worth cutting up.
pub(crate) const MIN_STRETCH: usize = 4096;

/// A boundary every 2 KiB behind the shortest chunk: 2.6 KiB a chunk, a fifth of them of full length.
/// The bits are the top ones, which depend on all of the last 64 bytes.
const BOUNDARY: u64 = !(u64::MAX >> 11);

/// A random number for each byte value.
const GEAR: [u64; 256] = {
    let mut gear = [0; 256];
    let mut state = 0_u64;
    let mut byte = 0;
    while byte < gear.len() {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        gear[byte] = mixed ^ (mixed >> 31);
        byte += 1;
    }
    gear
};

/// Length of the chunk at the start of `bytes`: `MIN_CHUNK` to `MAX_CHUNK`, or all there is.
pub(crate) fn cut(bytes: &[u8]) -> usize {
    let most = bytes.len().min(MAX_CHUNK);
    let mut hash = 0_u64;
    // The hash has forgotten what lies more than 64 bytes back.
    for (at, &byte) in bytes[..most].iter().enumerate().skip(MIN_CHUNK - 64) {
        hash = (hash << 1).wrapping_add(GEAR[usize::from(byte)]);
        if hash & BOUNDARY == 0 && at + 1 >= MIN_CHUNK {
            return at + 1;
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut noise = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    fn chunks(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut chunks = Vec::new();
        while !bytes.is_empty() {
            let (chunk, rest) = bytes.split_at(cut(bytes));
            chunks.push(chunk);
            bytes = rest;
        }
        chunks
    }

    #[test]
    fn sizes_are_kept_and_chunks_rejoin() {
        let bytes = noise(1_000_000);
        let chunks = chunks(&bytes);
        assert_eq!(chunks.concat(), bytes);
        let (last, others) = chunks.split_last().unwrap();
        assert!(
            others
                .iter()
                .all(|chunk| (MIN_CHUNK..=MAX_CHUNK).contains(&chunk.len()))
        );
        assert!(last.len() <= MAX_CHUNK);
        let average = bytes.len() / chunks.len();
        assert!((2200..3000).contains(&average), "{average}");
    }

    #[test]
    fn a_local_edit_moves_few_boundaries() {
        let before = noise(500_000);
        let mut after = before.clone();
        after.splice(200_000..200_000, *b"inserted");
        let known: HashSet<&[u8]> = chunks(&before).into_iter().collect();
        let new = chunks(&after)
            .into_iter()
            .filter(|chunk| !known.contains(chunk))
            .count();
        assert!((1..10).contains(&new), "{new} new chunks");
    }

    #[test]
    fn short_and_uniform_inputs_end() {
        for length in [0, 1, 63, MIN_CHUNK - 1, MIN_CHUNK, MAX_CHUNK, MAX_CHUNK + 1] {
            let chunk = cut(&vec![0; length]);
            assert!(chunk <= length && (chunk > 0 || length == 0));
            assert!(chunk >= length.min(MIN_CHUNK));
        }
    }
}
