//! Keys of a store and the sealing of what lies in its segments.
//!
//! ```text
//! secret ─KDF→ store key ─┬─KDF→ superblock key: tells the right key from a wrong one
//!                         ├─KDF→ segment root ─keyed hash of a segment's header→ AES-256-GCM key
//!                         ├─KDF→ manifest root ─keyed hash of a file's header→ AES-256-GCM key
//!                         └─KDF→ uses root ─keyed hash of the file's header→ AES-256-GCM key
//! ```
//!
//! Every segment has 32 random bytes in its header, so it has a key of its own, and nonces are the
//! numbers of what is sealed with it. A segment is written once, front to back, by one process, and
//! never continued after a restart: no nonce is ever used twice with a key.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::segment::HEADER_SIZE;
use crate::page::ShortId;

/// Bytes that sealing adds.
pub(super) const TAG_SIZE: usize = 16;

/// Shortest secret that is taken for a key, in bytes: less could be guessed.
pub const MIN_SECRET: usize = 16;

const STORE_KEY_CONTEXT: &str = "skyferry v1 store key";
const SUPERBLOCK_CONTEXT: &str = "skyferry v1 store superblock";
const SEGMENT_CONTEXT: &str = "skyferry v1 store segments";
const MANIFEST_CONTEXT: &str = "skyferry v1 store manifests";
const USES_CONTEXT: &str = "skyferry v1 store uses";

/// Where the key of a store on disk comes from.
pub struct KeySource(Source);

enum Source {
    Derived(Box<[u8; 32]>),
    Ephemeral,
}

impl KeySource {
    /// A key from a secret that outlives the process: the contents of a key file or of a credential.
    /// `None` when it is shorter than [`MIN_SECRET`].
    #[must_use]
    pub fn secret(secret: &[u8]) -> Option<Self> {
        (secret.len() >= MIN_SECRET).then(|| {
            let key = blake3::derive_key(STORE_KEY_CONTEXT, secret);
            Self(Source::Derived(Box::new(key)))
        })
    }

    /// A random key that nobody knows after the store is closed. What is in the folder when it is
    /// opened is deleted.
    #[must_use]
    pub fn ephemeral() -> Self {
        Self(Source::Ephemeral)
    }

    /// Whether each start makes a key: what was stored is deleted then.
    #[must_use]
    pub fn is_ephemeral(&self) -> bool {
        matches!(self.0, Source::Ephemeral)
    }

    /// The key itself; each call with an ephemeral source makes another.
    pub(super) fn key(&self) -> Result<StoreKey, NoRandomness> {
        let key = match &self.0 {
            Source::Derived(key) => **key,
            Source::Ephemeral => random()?,
        };
        Ok(StoreKey::new(&key))
    }
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::Derived(_) => "KeySource(secret)",
            Source::Ephemeral => "KeySource(ephemeral)",
        })
    }
}

/// The system has no random numbers to give.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the system gives no random numbers")]
pub struct NoRandomness;

/// `N` random bytes.
pub(super) fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}

/// The key of a whole store, split by purpose.
pub(super) struct StoreKey {
    superblock: [u8; 32],
    segments: [u8; 32],
    manifests: [u8; 32],
    uses: [u8; 32],
}

impl StoreKey {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self {
            superblock: blake3::derive_key(SUPERBLOCK_CONTEXT, key),
            segments: blake3::derive_key(SEGMENT_CONTEXT, key),
            manifests: blake3::derive_key(MANIFEST_CONTEXT, key),
            uses: blake3::derive_key(USES_CONTEXT, key),
        }
    }

    /// What a superblock with these bytes carries when it was written with this key.
    pub(super) fn superblock_check(&self, bytes: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.superblock, bytes).as_bytes()
    }

    /// The cipher of a manifest's file, which is sealed as a whole, from its header.
    pub(super) fn manifest(&self, header: &[u8]) -> SegmentCipher {
        SegmentCipher::new(blake3::keyed_hash(&self.manifests, header).as_bytes())
    }

    /// The cipher of the file of uses, from its header.
    pub(super) fn uses(&self, header: &[u8]) -> SegmentCipher {
        SegmentCipher::new(blake3::keyed_hash(&self.uses, header).as_bytes())
    }

    /// The cipher of a segment and the check that its header carries, from the header before the check.
    pub(super) fn segment(
        &self,
        header: &[u8; HEADER_SIZE - CHECK_SIZE],
    ) -> (SegmentCipher, [u8; CHECK_SIZE]) {
        let mut hasher = blake3::Hasher::new_keyed(&self.segments);
        hasher.update(header);
        let mut output = hasher.finalize_xof();
        let (mut key, mut check) = ([0; 32], [0; CHECK_SIZE]);
        output.fill(&mut key);
        output.fill(&mut check);
        (SegmentCipher::new(&key), check)
    }
}

/// Size of the check at the end of a segment header.
pub(super) const CHECK_SIZE: usize = 32;

/// The tag does not fit: damaged, or sealed as something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unauthentic;

/// Seals and opens what lies in one segment, or in another file with a key of its own.
pub(super) struct SegmentCipher(LessSafeKey);

/// What is sealed; part of the nonce.
#[derive(Clone, Copy)]
enum Kind {
    Record = 1,
    ChunkTable = 2,
    Footer = 3,
    Whole = 4,
    Uses = 5,
}

impl SegmentCipher {
    #[expect(
        clippy::expect_used,
        reason = "the key has the length of the algorithm, nothing else can be wrong"
    )]
    fn new(key: &[u8; 32]) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, key).expect("a key of 32 bytes");
        Self(LessSafeKey::new(key))
    }

    /// Appends record `number` with `id`, sealed, to `out`.
    pub(super) fn seal_record(
        &self,
        number: u32,
        id: &ShortId,
        contents: &[u8],
        out: &mut Vec<u8>,
    ) {
        self.seal(Kind::Record, number, id.as_bytes(), contents, out);
    }

    /// Opens record `number` into `out`, which has the length of the contents. It must have been put
    /// under exactly this `id`.
    pub(super) fn open_record(
        &self,
        number: u32,
        id: &ShortId,
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Unauthentic> {
        let (body, tag) = sealed.split_at_checked(out.len()).ok_or(Unauthentic)?;
        let aad = Aad::from(id.as_bytes());
        self.0
            .open_separate_gather(nonce(Kind::Record, number), aad, body, tag, out)
            .map_err(|_| Unauthentic)
    }

    /// Appends the table of the chunk that begins with record `first` to `out`.
    pub(super) fn seal_chunk_table(
        &self,
        first: u32,
        head: &[u8],
        table: &[u8],
        out: &mut Vec<u8>,
    ) {
        self.seal(Kind::ChunkTable, first, head, table, out);
    }

    /// Opens a chunk's table in place.
    pub(super) fn open_chunk_table<'a>(
        &self,
        first: u32,
        head: &[u8],
        table: &'a mut [u8],
    ) -> Result<&'a [u8], Unauthentic> {
        self.open(Kind::ChunkTable, first, head, table)
    }

    /// Seals all that a file has behind its header, in place.
    #[expect(
        clippy::expect_used,
        reason = "sealing fails for inputs of 64 GiB only, far above the size of any file"
    )]
    pub(super) fn seal_whole(&self, body: &mut Vec<u8>) {
        self.0
            .seal_in_place_append_tag(nonce(Kind::Whole, 0), Aad::empty(), body)
            .expect("a message far below the limit");
    }

    /// Opens all that a file has behind its header, in place.
    pub(super) fn open_whole<'a>(&self, sealed: &'a mut [u8]) -> Result<&'a [u8], Unauthentic> {
        self.open(Kind::Whole, 0, &[], sealed)
    }

    /// Appends the uses of the records of segment `number` to `out`.
    pub(super) fn seal_uses(&self, number: u32, head: &[u8], uses: &[u8], out: &mut Vec<u8>) {
        self.seal(Kind::Uses, number, head, uses, out);
    }

    /// Opens the uses of the records of segment `number` in place.
    pub(super) fn open_uses<'a>(
        &self,
        number: u32,
        head: &[u8],
        sealed: &'a mut [u8],
    ) -> Result<&'a [u8], Unauthentic> {
        self.open(Kind::Uses, number, head, sealed)
    }

    /// Appends the footer to `out`.
    pub(super) fn seal_footer(&self, trailer: &[u8], footer: &[u8], out: &mut Vec<u8>) {
        self.seal(Kind::Footer, 0, trailer, footer, out);
    }

    /// Opens the footer in place.
    pub(super) fn open_footer<'a>(
        &self,
        trailer: &[u8],
        footer: &'a mut [u8],
    ) -> Result<&'a [u8], Unauthentic> {
        self.open(Kind::Footer, 0, trailer, footer)
    }

    #[expect(
        clippy::expect_used,
        reason = "sealing fails for inputs of 64 GiB only, far above the size of a segment"
    )]
    fn seal(&self, kind: Kind, number: u32, aad: &[u8], plain: &[u8], out: &mut Vec<u8>) {
        let at = out.len();
        out.extend_from_slice(plain);
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce(kind, number), Aad::from(aad), &mut out[at..])
            .expect("a message far below the limit");
        out.extend_from_slice(tag.as_ref());
    }

    fn open<'a>(
        &self,
        kind: Kind,
        number: u32,
        aad: &[u8],
        sealed: &'a mut [u8],
    ) -> Result<&'a [u8], Unauthentic> {
        self.0
            .open_in_place(nonce(kind, number), Aad::from(aad), sealed)
            .map(|plain| &*plain)
            .map_err(|_| Unauthentic)
    }
}

fn nonce(kind: Kind, number: u32) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[0] = kind as u8;
    nonce[NONCE_LEN - 4..].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_open_only_as_what_they_were_sealed() {
        let cipher = SegmentCipher::new(&[7; 32]);
        let (id, other) = (ShortId::from_bytes([1; 16]), ShortId::from_bytes([2; 16]));
        let mut sealed = Vec::new();
        cipher.seal_record(5, &id, b"contents", &mut sealed);
        assert_eq!(sealed.len(), 8 + TAG_SIZE);
        let open = |number, id: &ShortId, sealed: &[u8], length| {
            let mut out = vec![0; length];
            cipher
                .open_record(number, id, sealed, &mut out)
                .map(|()| out)
        };
        assert_eq!(open(5, &id, &sealed, 8), Ok(b"contents".to_vec()));
        assert_eq!(open(6, &id, &sealed, 8), Err(Unauthentic));
        assert_eq!(open(5, &other, &sealed, 8), Err(Unauthentic));
        assert_eq!(open(5, &id, &sealed, 7), Err(Unauthentic));
        assert_eq!(open(5, &id, &sealed[..23], 8), Err(Unauthentic));
        assert_eq!(open(5, &id, &sealed[..7], 8), Err(Unauthentic));
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 0x10;
            assert_eq!(open(5, &id, &damaged, 8), Err(Unauthentic));
        }
        let mut table = Vec::new();
        cipher.seal_chunk_table(5, b"head", b"contents", &mut table);
        assert_ne!(table, sealed);
        assert!(cipher.open_footer(b"head", &mut table.clone()).is_err());
        assert!(
            cipher
                .open_chunk_table(5, b"Head", &mut table.clone())
                .is_err()
        );
        assert_eq!(
            cipher.open_chunk_table(5, b"head", &mut table),
            Ok(&b"contents"[..])
        );
    }

    #[test]
    fn short_secrets_are_refused_and_no_key_shows() {
        assert!(KeySource::secret(&[1; MIN_SECRET - 1]).is_none());
        let source = KeySource::secret(&[1; MIN_SECRET]).unwrap();
        assert_eq!(format!("{source:?}"), "KeySource(secret)");
        let check = |source: &KeySource| source.key().unwrap().superblock_check(b"x");
        assert_eq!(check(&source), check(&source));
        let fresh = KeySource::ephemeral();
        assert_ne!(check(&fresh), check(&fresh));
    }
}
