//! Page identity: what makes two pages the same page, and for whom.

use std::fmt;

use crate::id::id_type;

/// Size in bytes of the pages that are named, stored and referred to.
///
/// It is the page size of x86 guests and of most others; pages of another size pass as other bytes.
pub const PAGE_SIZE: usize = 4096;

/// A page of zeroes, to compare with.
pub(crate) static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// BLAKE3 context strings: one secret, one key per purpose.
const DOMAIN_CONTEXT: &str = "skyferry v1 dedup domain key";
const STREAM_CONTEXT: &str = "skyferry v1 stream digest key";
const MANIFEST_CONTEXT: &str = "skyferry v1 manifest id key";
const DOMAIN_ID_CONTEXT: &str = "skyferry v1 dedup domain id";

/// The secret under which one tenant's pages get their names.
///
/// Tenants with different keys never share a page id, so nobody learns by guessing what another
/// tenant's memory holds. Both gateways of a migration need the same key.
#[derive(Clone, PartialEq, Eq)]
pub struct DomainKey([u8; 32]);

impl DomainKey {
    /// Derives the key of `tenant` from a secret of any length that the gateways share.
    #[must_use]
    pub fn derive(secret: &[u8], tenant: &str) -> Self {
        let mut kdf = blake3::Hasher::new_derive_key(DOMAIN_CONTEXT);
        // The length keeps (secret, tenant) pairs apart that concatenate to the same bytes.
        kdf.update(&(secret.len() as u64).to_le_bytes());
        kdf.update(secret);
        kdf.update(tenant.as_bytes());
        Self(*kdf.finalize().as_bytes())
    }

    /// A key from its 32 bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the key. They are secret.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The public name of this domain: it tells domains apart and gives nothing of the key away.
    #[must_use]
    pub fn id(&self) -> DomainId {
        let derived = blake3::derive_key(DOMAIN_ID_CONTEXT, &self.0);
        let mut id = [0; DomainId::SIZE];
        id.copy_from_slice(&derived[..DomainId::SIZE]);
        DomainId(id)
    }

    /// The key of the running stream digest in this domain.
    pub(crate) fn stream_key(&self) -> [u8; 32] {
        blake3::derive_key(STREAM_CONTEXT, &self.0)
    }
}

impl fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DomainKey(..)")
    }
}

id_type! {
    /// The public name of a domain, the same wherever its key is known.
    DomainId
}

/// The identity of a page: BLAKE3 of its contents, keyed with the domain key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId([u8; 32]);

impl PageId {
    /// All 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The form in which a page is referred to.
    #[must_use]
    pub fn short(&self) -> ShortId {
        let mut short = [0; ShortId::SIZE];
        short.copy_from_slice(&self.0[..ShortId::SIZE]);
        ShortId(short)
    }
}

impl fmt::Debug for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageId({})", self.short())
    }
}

id_type! {
    /// The first 16 bytes of a [`PageId`].
    ///
    /// 128 bits of a keyed hash: among 2^40 pages (4 PiB) the chance of any collision is below 2^-48,
    /// and a collision is found (the full hash goes into the stream digest), never delivered.
    ShortId
}

impl ShortId {
    /// Well-mixed bits for a hash table: the id is a keyed hash already.
    pub(crate) fn table_hash(&self) -> u64 {
        self.word(0)
    }

    /// Bits independent of [`table_hash`](Self::table_hash), to choose a shard with.
    pub(crate) fn shard_hash(&self) -> u64 {
        self.word(8)
    }

    fn word(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(word)
    }
}

/// Names pages in one domain.
#[derive(Clone)]
pub struct Hasher {
    key: [u8; 32],
    zero: PageId,
    domain: DomainId,
}

impl Hasher {
    /// A hasher for the domain of `key`.
    #[must_use]
    pub fn new(key: &DomainKey) -> Self {
        Self {
            key: key.0,
            zero: PageId(*blake3::keyed_hash(&key.0, &ZERO_PAGE).as_bytes()),
            domain: key.id(),
        }
    }

    /// The domain whose names these are.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// The id of a page (or of a shorter chunk): one pass over its bytes.
    #[must_use]
    pub fn id(&self, contents: &[u8]) -> PageId {
        PageId(*blake3::keyed_hash(&self.key, contents).as_bytes())
    }

    /// A hash that names manifests of this domain.
    pub(crate) fn of_manifest(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&blake3::derive_key(MANIFEST_CONTEXT, &self.key))
    }

    /// The id of the page of zeroes.
    #[must_use]
    pub fn zero_id(&self) -> PageId {
        self.zero
    }

    /// Whether `page` is a whole page of zeroes.
    #[must_use]
    pub fn is_zero(&self, page: &[u8]) -> bool {
        // A comparison with a constant page stops at the first difference and runs at memory speed.
        page == ZERO_PAGE
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_and_secrets_have_their_own_ids() {
        let page = [7; PAGE_SIZE];
        let id = |secret: &[u8], tenant| Hasher::new(&DomainKey::derive(secret, tenant)).id(&page);
        assert_eq!(id(b"s", "a"), id(b"s", "a"));
        assert_ne!(id(b"s", "a"), id(b"s", "b"));
        assert_ne!(id(b"s", "a"), id(b"t", "a"));
        // The border between secret and tenant counts.
        assert_ne!(id(b"sa", "b"), id(b"s", "ab"));
    }

    #[test]
    fn ids_follow_the_documented_derivation() {
        let key = DomainKey::from_bytes([3; 32]);
        let hasher = Hasher::new(&key);
        let page = [9; PAGE_SIZE];
        let expected = blake3::keyed_hash(&[3; 32], &page);
        assert_eq!(hasher.id(&page).as_bytes(), expected.as_bytes());
        assert_eq!(
            hasher.id(&page).short().as_bytes()[..],
            expected.as_bytes()[..16]
        );
        assert_eq!(hasher.zero_id(), hasher.id(&ZERO_PAGE));
        assert_ne!(key.stream_key(), *key.as_bytes());
        let derived = blake3::derive_key("skyferry v1 dedup domain id", &[3; 32]);
        assert_eq!(key.id().as_bytes()[..], derived[..16]);
        assert_eq!(*hasher.domain(), key.id());
    }

    #[test]
    fn zero_means_a_whole_page_of_zeroes() {
        let hasher = Hasher::new(&DomainKey::from_bytes([0; 32]));
        assert!(hasher.is_zero(&[0; PAGE_SIZE]));
        assert!(!hasher.is_zero(&[0; PAGE_SIZE - 1]));
        let mut page = [0; PAGE_SIZE];
        page[PAGE_SIZE - 1] = 1;
        assert!(!hasher.is_zero(&page));
    }

    #[test]
    fn secrets_do_not_show() {
        let key = DomainKey::from_bytes([0xab; 32]);
        assert_eq!(
            format!("{key:?} {:?}", Hasher::new(&key)),
            "DomainKey(..) Hasher(..)"
        );
    }
}
