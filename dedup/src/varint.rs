//! Unsigned LEB128 numbers: seven bits per byte, low bits first, the top bit says that more follow.

/// Bytes of the longest number, 2^64 - 1.
pub(crate) const MAX_SIZE: usize = 10;

/// Appends `value` to `out`: 1 to 10 bytes.
pub(crate) fn write(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off the start of `input`. `None` when it is cut off or has more than 64 bits.
pub(crate) fn read(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for (at, &byte) in input.iter().enumerate().take(MAX_SIZE) {
        let bits = u64::from(byte & 0x7f);
        let shifted = bits << (7 * at);
        if shifted >> (7 * at) != bits {
            return None;
        }
        value |= shifted;
        if byte & 0x80 == 0 {
            *input = &input[at + 1..];
            return Some(value);
        }
    }
    None
}

/// A signed number as an unsigned one: small in either direction is small.
pub(crate) fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63).cast_unsigned()
}

/// What [`zigzag`] made the number of.
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_numbers_come_back() {
        for (value, number) in [
            (0, 0),
            (-1, 1),
            (1, 2),
            (-2, 3),
            (i64::MAX, u64::MAX - 1),
            (i64::MIN, u64::MAX),
        ] {
            assert_eq!(zigzag(value), number);
            assert_eq!(unzigzag(number), value);
        }
    }

    #[test]
    fn numbers_come_back() {
        for value in [
            0,
            1,
            0x7f,
            0x80,
            0x3fff,
            0x4000,
            u64::from(u32::MAX),
            u64::MAX - 1,
            u64::MAX,
        ] {
            let mut bytes = Vec::new();
            write(value, &mut bytes);
            for cut in 0..bytes.len() {
                assert_eq!(read(&mut &bytes[..cut]), None);
            }
            bytes.push(0xaa);
            let mut input = &bytes[..];
            assert_eq!(read(&mut input), Some(value));
            assert_eq!(input, [0xaa]);
        }
    }

    #[test]
    fn golden() {
        let mut bytes = Vec::new();
        write(300, &mut bytes);
        assert_eq!(bytes, [0xac, 0x02]);
    }

    #[test]
    fn more_than_64_bits_are_refused() {
        assert_eq!(read(&mut &[0xff; 11][..]), None);
        let mut bytes = [0xff; 10];
        bytes[9] = 0x02;
        assert_eq!(read(&mut &bytes[..]), None);
        bytes[9] = 0x01;
        assert_eq!(read(&mut &bytes[..]), Some(u64::MAX));
    }
}
