//! The running digest of a stream.
//!
//! It covers every byte of the stream in order, except that the contents of each page count as the
//! 32 bytes of its id. So a page is hashed once on each side, for its name and for the digest. Both
//! hashes are keyed with the secret of the domain: nobody without it can construct two streams of
//! equal digest.

use crate::id::id_type;
use crate::page::{DomainKey, PageId};

id_type! {
    /// What a stream comes to up to some point: equal digests mean equal bytes.
    StreamDigest
}

/// The digest of a stream that goes on.
#[derive(Clone)]
pub(crate) struct RunningDigest {
    hasher: blake3::Hasher,
    /// Bytes not yet hashed: many small updates cost more than one large one.
    skeleton: Vec<u8>,
}

impl RunningDigest {
    pub(crate) fn new(key: &DomainKey) -> Self {
        Self {
            hasher: blake3::Hasher::new_keyed(&key.stream_key()),
            skeleton: Vec::new(),
        }
    }

    /// Adds bytes of the stream that are no page contents.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.skeleton.extend_from_slice(bytes);
    }

    /// Adds a page.
    pub(crate) fn page(&mut self, id: &PageId) {
        self.skeleton.extend_from_slice(id.as_bytes());
    }

    /// The digest up to here.
    pub(crate) fn settle(&mut self) -> StreamDigest {
        self.hasher.update(&self.skeleton);
        self.skeleton.clear();
        let mut digest = [0; StreamDigest::SIZE];
        self.hasher.finalize_xof().fill(&mut digest);
        StreamDigest(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Hasher;

    #[test]
    fn pages_count_as_their_ids_and_frames_do_not_count() {
        let key = DomainKey::from_bytes([1; 32]);
        let id = Hasher::new(&key).id(&[3; 4096]);
        let mut whole = RunningDigest::new(&key);
        whole.bytes(b"head");
        whole.page(&id);
        whole.bytes(b"tail");
        let mut parts = RunningDigest::new(&key);
        parts.bytes(b"he");
        parts.settle();
        parts.bytes(b"ad");
        parts.page(&id);
        parts.settle();
        parts.bytes(b"tail");
        assert_eq!(whole.settle(), parts.settle());

        let mut skeleton = b"head".to_vec();
        skeleton.extend_from_slice(id.as_bytes());
        skeleton.extend_from_slice(b"tail");
        let expected = blake3::keyed_hash(&key.stream_key(), &skeleton);
        assert_eq!(whole.settle().as_bytes()[..], expected.as_bytes()[..16]);
    }
}
