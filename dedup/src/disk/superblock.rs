//! The file `superblock`: what the folder is, in which format, and with which key it was written.

use super::crypt::StoreKey;

/// Version of the format of all files. See `docs/store-format.md`.
pub const FORMAT_VERSION: u32 = 1;

/// Size of the file in bytes.
pub(super) const SUPERBLOCK_SIZE: usize = 128;

const MAGIC: [u8; 8] = *b"SKYFSTOR";
/// Whether the key was made for one start, 0 or 1.
const EPHEMERAL_AT: usize = 48;
/// Bytes in front of the two checks.
const BODY: usize = 64;

/// Identity and bounds of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Made at random when the store is created.
    pub(super) id: [u8; 16],
    /// Seconds since 1970.
    pub(super) created: u64,
    /// Segments are no longer than this.
    pub(super) segment_bytes: u64,
    /// Numbers of segments below this one may have been used.
    pub(super) next_segment: u32,
    /// The key was made for one start: nobody can read what is there.
    pub(super) ephemeral: bool,
}

/// Why a superblock is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadSuperblock {
    /// Another file, or bits have changed.
    Damaged,
    /// Written in another version of the format.
    Version(u32),
}

impl Superblock {
    /// The bytes of the file.
    pub(super) fn write(&self, key: &StoreKey) -> [u8; SUPERBLOCK_SIZE] {
        let mut bytes = [0; SUPERBLOCK_SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.next_segment.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.id);
        bytes[32..40].copy_from_slice(&self.created.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.segment_bytes.to_le_bytes());
        bytes[EPHEMERAL_AT] = u8::from(self.ephemeral);
        let sum = checksum(&bytes[..BODY]);
        bytes[BODY..BODY + 32].copy_from_slice(&sum);
        let check = key.superblock_check(&bytes[..BODY]);
        bytes[BODY + 32..].copy_from_slice(&check);
        bytes
    }

    /// Reads the file without its key.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, BadSuperblock> {
        let bytes: &[u8; SUPERBLOCK_SIZE] = bytes.try_into().map_err(|_| BadSuperblock::Damaged)?;
        if bytes[..8] != MAGIC {
            return Err(BadSuperblock::Damaged);
        }
        // The version first: in another version the rest may be laid out in another way.
        let version = u32::from_le_bytes(field(bytes, 8));
        if version != FORMAT_VERSION {
            return Err(BadSuperblock::Version(version));
        }
        if bytes[BODY..BODY + 32] != checksum(&bytes[..BODY]) {
            return Err(BadSuperblock::Damaged);
        }
        Ok(Self {
            id: field(bytes, 16),
            created: u64::from_le_bytes(field(bytes, 32)),
            segment_bytes: u64::from_le_bytes(field(bytes, 40)),
            next_segment: u32::from_le_bytes(field(bytes, 12)),
            ephemeral: bytes[EPHEMERAL_AT] != 0,
        })
    }

    /// Whether these bytes, which [`read`](Self::read) took, were written with `key`.
    pub(super) fn is_of(bytes: &[u8], key: &StoreKey) -> bool {
        bytes.len() == SUPERBLOCK_SIZE && bytes[BODY + 32..] == key.superblock_check(&bytes[..BODY])
    }
}

/// `N` bytes at `at`.
fn field<const N: usize>(bytes: &[u8; SUPERBLOCK_SIZE], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// Against bits that fell over; the key's check is the one against malice.
fn checksum(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: Superblock = Superblock {
        id: [9; 16],
        created: 1_700_000_000,
        segment_bytes: 64 << 20,
        next_segment: 1024,
        ephemeral: true,
    };

    #[test]
    fn reading_undoes_writing_and_the_key_is_told() {
        let key = StoreKey::new(&[1; 32]);
        let bytes = BLOCK.write(&key);
        assert_eq!(Superblock::read(&bytes), Ok(BLOCK));
        assert!(Superblock::is_of(&bytes, &key));
        assert!(!Superblock::is_of(&bytes, &StoreKey::new(&[2; 32])));
    }

    #[test]
    fn changes_are_found() {
        let key = StoreKey::new(&[1; 32]);
        let bytes = BLOCK.write(&key);
        for length in 0..SUPERBLOCK_SIZE {
            assert_eq!(
                Superblock::read(&bytes[..length]),
                Err(BadSuperblock::Damaged)
            );
        }
        for at in 0..SUPERBLOCK_SIZE {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            let found = Superblock::read(&damaged);
            if (8..12).contains(&at) {
                let version = FORMAT_VERSION ^ (1 << (8 * (at - 8)));
                assert_eq!(found, Err(BadSuperblock::Version(version)));
            } else {
                assert!(
                    found.is_err() || !Superblock::is_of(&damaged, &key),
                    "byte {at}"
                );
            }
        }
    }
}
