//! What a guest's RAM held when it left: the table of places at the end of a migration, kept by both
//! gateways, for when it comes back.
//!
//! ```text
//! table of places ─ end of the migration → Manifest ─ guest comes back → fills the holes of the new table
//! ```
//!
//! Both gateways make the same manifest of the same migration, so its id is enough to agree on it. A
//! manifest holds ids only. What they stand for is in the page stores, and may be lost there like any
//! other page. The format is in `docs/protocol.md`, section "Manifests".

use std::fmt;
use std::sync::Arc;

use crate::id::id_type;
use crate::page::{DomainId, Hasher, ShortId};
use crate::places::{CHUNK_BYTES, CHUNK_PAGES, Chunk, NOTHING, Place, Places};

/// Pages of a stream that are compared with the candidates before one is chosen.
const SAMPLE: u32 = 1024;
/// A manifest is worth its while when one in so many pages of the sample is where it was...
const MIN_SHARE: u32 = 8;
/// ... and at least so many are.
const MIN_HITS: u32 = 16;

/// Most manifests that a stream is compared with.
pub const MAX_CANDIDATES: usize = 16;

id_type! {
    /// Identity of a manifest, the same wherever it was made. It depends on the domain's key.
    ManifestId
}

/// The table of a channel that is over, as it was.
pub struct PlaceTable {
    pub(crate) places: Places,
    /// Names of the blocks, by number.
    pub(crate) names: Vec<Box<[u8]>>,
    pub(crate) hasher: Hasher,
}

impl PlaceTable {
    /// Makes the manifest. Takes time for hashing the whole table, some 2 ms for each GiB of guest.
    /// `None` when the table is empty.
    #[must_use]
    pub fn into_manifest(self) -> Option<Manifest> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut last = None;
        for (number, index, chunk) in self.places.into_chunks() {
            if last != Some(number) {
                last = Some(number);
                let name = self.names.get(number as usize)?.clone();
                let chunks = Vec::new();
                blocks.push(Block { name, chunks });
            }
            blocks.last_mut()?.chunks.push((index, chunk));
        }
        (!blocks.is_empty()).then(|| Manifest::new(blocks, &self.hasher))
    }
}

impl fmt::Debug for PlaceTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlaceTable").finish_non_exhaustive()
    }
}

/// A block of RAM by its name, which is the same in the guest's next stream where its number may not.
struct Block {
    name: Box<[u8]>,
    /// Chunks with their numbers, in ascending order.
    chunks: Vec<(u64, Chunk)>,
}

/// What the places of a guest's RAM held: ids by block and page.
pub struct Manifest {
    id: ManifestId,
    domain: DomainId,
    blocks: Vec<Block>,
}

impl Manifest {
    fn new(blocks: Vec<Block>, hasher: &Hasher) -> Self {
        let mut hash = hasher.of_manifest();
        write(&blocks, &mut |bytes| {
            hash.update(bytes);
        });
        let mut id = [0; ManifestId::SIZE];
        hash.finalize_xof().fill(&mut id);
        Self {
            id: ManifestId(id),
            domain: *hasher.domain(),
            blocks,
        }
    }

    /// A manifest from its canonical form, which the caller has authenticated together with its names.
    /// `None` when it is cut off or has more.
    pub(crate) fn read(id: ManifestId, domain: DomainId, mut bytes: &[u8]) -> Option<Self> {
        let mut blocks = Vec::new();
        for _ in 0..take_u32(&mut bytes)? {
            let (length, rest) = bytes.split_first()?;
            let (name, rest) = rest.split_at_checked(usize::from(*length))?;
            bytes = rest;
            let mut chunks = Vec::new();
            for _ in 0..take_u32(&mut bytes)? {
                let (index, rest) = bytes.split_first_chunk()?;
                let (ids, rest) = rest.split_first_chunk::<CHUNK_BYTES>()?;
                bytes = rest;
                let mut chunk = Box::new([ShortId::from_bytes(NOTHING); CHUNK_PAGES as usize]);
                for (id, bytes) in chunk.iter_mut().zip(ids.as_chunks().0) {
                    *id = ShortId::from_bytes(*bytes);
                }
                chunks.push((u64::from_le_bytes(*index), chunk));
            }
            let name = name.into();
            blocks.push(Block { name, chunks });
        }
        bytes.is_empty().then_some(Self { id, domain, blocks })
    }

    /// Appends the canonical form.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        write(&self.blocks, &mut |bytes| out.extend_from_slice(bytes));
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> ManifestId {
        self.id
    }

    /// The domain that its page ids belong to.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// Bytes of memory that it takes, to a few.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let chunks: usize = self.blocks.iter().map(|block| block.chunks.len()).sum();
        chunks * CHUNK_BYTES
    }

    /// Number of places that hold something.
    #[must_use]
    pub fn places(&self) -> u64 {
        let chunks = self.blocks.iter().flat_map(|block| &block.chunks);
        let held = |chunk: &Chunk| chunk.iter().filter(|id| *id.as_bytes() != NOTHING).count();
        chunks.map(|(_, chunk)| held(chunk) as u64).sum()
    }

    /// What this page of the block held.
    fn get(&self, name: &[u8], page: u64) -> Option<&ShortId> {
        let block = self.blocks.iter().find(|block| *block.name == *name)?;
        let (index, at) = Place::split_page(page);
        let found = block
            .chunks
            .binary_search_by_key(&index, |(index, _)| *index);
        let id = &block.chunks.get(found.ok()?)?.1[at];
        (*id.as_bytes() != NOTHING).then_some(id)
    }

    /// Chunks of those blocks that have a number, with it, in the manifest's order.
    pub(crate) fn chunks(
        &self,
        number: impl Fn(&[u8]) -> Option<u32>,
    ) -> impl Iterator<Item = (u32, u64, &Chunk)> {
        self.blocks.iter().flat_map(move |block| {
            let number = number(&block.name);
            let chunks = block.chunks.iter();
            chunks.filter_map(move |(index, chunk)| Some((number?, *index, chunk)))
        })
    }
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*number))
}

/// The canonical form, of which the id is a hash.
fn write(blocks: &[Block], out: &mut impl FnMut(&[u8])) {
    out(&(blocks.len() as u32).to_le_bytes());
    for block in blocks {
        // A name has at most 255 bytes.
        out(&[block.name.len() as u8]);
        out(&block.name);
        out(&(block.chunks.len() as u32).to_le_bytes());
        for (index, chunk) in &block.chunks {
            out(&index.to_le_bytes());
            chunk.iter().for_each(|id| out(id.as_bytes()));
        }
    }
}

impl fmt::Debug for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names and ids are secret.
        write!(f, "Manifest({}, {} bytes)", self.id, self.bytes())
    }
}

/// A manifest that a stream is like.
#[derive(Debug, Clone)]
pub struct ManifestMatch {
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// Pages of the sample that are where they were.
    pub hits: u32,
    /// Pages of the sample.
    pub sample: u32,
}

/// Compares the first pages of a stream with what guests held that left.
#[derive(Default)]
pub(crate) struct Search {
    candidates: Vec<ManifestMatch>,
    looked: u32,
}

impl Search {
    /// The first of `candidates` are looked at; where two are alike, the earlier one is taken.
    pub(crate) fn new(candidates: Vec<Arc<Manifest>>) -> Self {
        let candidate = |manifest| ManifestMatch {
            manifest,
            hits: 0,
            sample: 0,
        };
        let candidates = candidates.into_iter().take(MAX_CANDIDATES);
        Self {
            candidates: candidates.map(candidate).collect(),
            looked: 0,
        }
    }

    /// Whether there is something to compare with.
    pub(crate) fn goes_on(&self) -> bool {
        !self.candidates.is_empty() && self.looked < SAMPLE
    }

    /// A page that is not zero.
    pub(crate) fn look(&mut self, name: &[u8], page: u64, id: &ShortId) {
        self.looked += 1;
        for candidate in &mut self.candidates {
            let is_there = candidate.manifest.get(name, page) == Some(id);
            candidate.hits += u32::from(is_there);
        }
    }

    /// The candidates that are worth adopting, the best first, once the sample is whole.
    pub(crate) fn take_matches(&mut self) -> Option<Vec<ManifestMatch>> {
        if self.looked < SAMPLE || self.candidates.is_empty() {
            return None;
        }
        let mut matches = std::mem::take(&mut self.candidates);
        matches.retain(|found| found.hits >= MIN_HITS.max(self.looked / MIN_SHARE));
        matches
            .iter_mut()
            .for_each(|found| found.sample = self.looked);
        // Stable: the earlier of two that are alike stays in front.
        matches.sort_by_key(|found| std::cmp::Reverse(found.hits));
        Some(matches)
    }
}

/// The number of the block with this name, among those defined.
pub(crate) fn number_of(names: &[Box<[u8]>], name: &[u8]) -> Option<u32> {
    let at = names.iter().position(|known| **known == *name)?;
    u32::try_from(at).ok()
}
