//! Frames: what a channel's stream is cut into.
//!
//! The layout is in `docs/protocol.md`, section "Page frames". A frame is read and written in one
//! place each, [`Sections::read`] and [`Sections::write`].

use bytes::Bytes;

use crate::chunk::MIN_CHUNK;
use crate::digest::StreamDigest;
use crate::page::{PAGE_SIZE, PageId, ShortId};
use crate::varint;

/// Flag: the literals are a part of the channel's zstd stream (else they are stored).
const FLAG_ZSTD: u8 = 1;

/// A part of a channel's stream, ready for the wire.
#[derive(Debug, Clone)]
pub struct Frame {
    /// What the peer's decoder takes.
    pub payload: Bytes,
    /// Bytes of the stream in this frame, at least 1.
    pub raw_len: u32,
    /// The pages that the frame refers to; keep them until the peer has the frame.
    pub retained: Retained,
    /// The frame begins with a byte on which the destination may commit.
    pub held_from_start: bool,
    /// What the frame consists of.
    pub stats: FrameStats,
}

/// Counters of one frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FrameStats {
    /// Pages of zeroes, in whatever form the source sent them.
    pub zero_pages: u32,
    /// Pages equal to what their place held before: nothing was sent for them.
    pub same_pages: u32,
    /// Pages sent as references.
    pub ref_pages: u32,
    /// Bytes of the ids of pages and chunks.
    pub id_bytes: u32,
    /// Pages sent as deltas from what their place held before.
    pub delta_pages: u32,
    /// Bytes of those deltas, before compression.
    pub delta_bytes: u32,
    /// Pages sent as deltas from what another place holds.
    pub similar_pages: u32,
    /// Bytes of those deltas, before compression.
    pub similar_bytes: u32,
    /// Pages sent with their contents.
    pub batch_pages: u32,
    /// Bytes of the stream that belong to no page record.
    pub opaque_bytes: u32,
    /// Those of them that went as references.
    pub opaque_ref_bytes: u32,
    /// Contents of pages, deltas and opaque bytes before compression.
    pub literal_bytes: u32,
    /// The same after compression (or as they are, where that was not worth it).
    pub compressed_bytes: u32,
    /// Those that went as they are.
    pub stored_bytes: u32,
}

/// Bytes of page and chunk contents that did not have to cross the wire, by cause. What zero pages
/// save is not here: it depends on how the source wrote them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Saved {
    /// Pages that their place held already.
    pub same: u64,
    /// Pages and chunks that went by their id, less the ids.
    pub reference: u64,
    /// Pages that went as deltas, less the deltas.
    pub delta: u64,
    /// Pages that went as deltas from another place's, less the deltas.
    pub similar: u64,
    /// What compression took off the rest.
    pub compression: u64,
}

/// Bytes of a frame's payload, by what they carry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// Ids of pages and chunks.
    pub reference: u64,
    /// Deltas from what places held.
    pub delta: u64,
    /// Deltas from what other places hold.
    pub similar: u64,
    /// New pages.
    pub batch: u64,
    /// New bytes outside of pages.
    pub opaque: u64,
    /// Where all of it belongs, pages that are zero, unchanged or named by their place in the peer's
    /// store included; lengths and the digest.
    pub structure: u64,
}

impl FrameStats {
    /// What the `payload` bytes of the frame carry. What was compressed together is divided by the
    /// lengths before.
    #[must_use]
    pub fn carried(&self, payload: u64) -> Carried {
        let compressed = u64::from(self.compressed_bytes);
        let of_literals = |bytes: u64| match u64::from(self.literal_bytes) {
            0 => 0,
            all => bytes * compressed / all,
        };
        let reference = u64::from(self.id_bytes);
        let delta = of_literals(self.delta_bytes.into());
        let similar = of_literals(self.similar_bytes.into());
        let batch = of_literals(u64::from(self.batch_pages) * PAGE_SIZE as u64);
        Carried {
            reference,
            delta,
            similar,
            batch,
            opaque: compressed.saturating_sub(delta + similar + batch),
            structure: payload.saturating_sub(reference + compressed),
        }
    }

    /// What the frame saved. Chunks count as the shortest that there are, so for their ids rather too
    /// much is taken off.
    #[must_use]
    pub fn saved(&self) -> Saved {
        let pages = |count: u32| u64::from(count) * PAGE_SIZE as u64;
        let ids = u64::from(self.ref_pages) + u64::from(self.opaque_ref_bytes) / MIN_CHUNK as u64;
        let named = pages(self.ref_pages) + u64::from(self.opaque_ref_bytes);
        Saved {
            same: pages(self.same_pages),
            reference: named - ids * ShortId::SIZE as u64,
            delta: pages(self.delta_pages).saturating_sub(u64::from(self.delta_bytes)),
            similar: pages(self.similar_pages).saturating_sub(u64::from(self.similar_bytes)),
            compression: u64::from(self.literal_bytes.saturating_sub(self.compressed_bytes)),
        }
    }
}

/// What an old page, which a delta is made from, is to the page that goes as the delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Old {
    /// What its place held before.
    OfPlace,
    /// What another place holds.
    Similar,
}

/// Contents that the receiver needs besides the frame, in the order in which the frame refers to
/// them: pages and chunks by id, pages that their place holds already, old pages of deltas.
///
/// The sender keeps them until the frame is acknowledged, so that it can serve any miss whatever its
/// own store has forgotten since.
#[derive(Clone, Default)]
pub struct Retained {
    contents: Vec<u8>,
    pages: Vec<RetainedPage>,
}

#[derive(Clone, Copy)]
struct RetainedPage {
    id: PageId,
    /// Where it ends in the contents.
    end: u32,
    old: Option<Old>,
}

impl Retained {
    /// Contents of the page with this number, counted from 0.
    #[must_use]
    pub fn page(&self, index: u32) -> Option<&[u8]> {
        let index = index as usize;
        let start = match index.checked_sub(1) {
            Some(before) => self.pages.get(before)?.end,
            None => 0,
        };
        let end = self.pages.get(index)?.end;
        self.contents.get(start as usize..end as usize)
    }

    /// What the page with this number is as the old one of a delta, if it is one. A receiver that has to
    /// ask for it uses it and does not keep it.
    #[must_use]
    pub fn old(&self, index: u32) -> Option<Old> {
        self.pages.get(index as usize)?.old
    }

    /// Id of the page with this number.
    #[must_use]
    pub fn id(&self, index: u32) -> Option<PageId> {
        self.pages.get(index as usize).map(|page| page.id)
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether the frame refers to no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Bytes of memory that this takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.contents.capacity() + self.pages.capacity() * size_of::<RetainedPage>()
    }

    /// Adds a page. A frame's contents stay far below 4 GiB.
    pub fn push(&mut self, id: PageId, contents: &[u8], old: Option<Old>) {
        self.contents.extend_from_slice(contents);
        self.pages.push(RetainedPage {
            id,
            end: self.contents.len() as u32,
            old,
        });
    }

    /// Makes room for so many pages.
    pub(crate) fn reserve(&mut self, pages: usize) {
        self.contents.reserve(pages * PAGE_SIZE);
        self.pages.reserve(pages);
    }

    /// Gives back room that is more than an eighth too much: a frame may wait long.
    pub(crate) fn trim(&mut self) {
        if self.contents.capacity() - self.contents.len() > self.contents.len() / 8 {
            self.contents.shrink_to_fit();
            self.pages.shrink_to_fit();
        }
    }
}

impl std::fmt::Debug for Retained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Contents are secret.
        write!(f, "Retained({} pages)", self.len())
    }
}

/// A field of a frame that is larger than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error("cut off or malformed number")]
    Truncated,
    #[error("unknown flag")]
    UnknownFlag,
    #[error("length over its limit")]
    TooLong,
    #[error("sections that do not add up")]
    Inconsistent,
}

/// Bytes of the stream that a frame stands for, as its payload says without any check: how much work it
/// is, not how much memory it may take.
#[must_use]
pub fn announced_raw_len(payload: &[u8]) -> usize {
    let raw_len = payload
        .get(1..)
        .and_then(|mut rest| varint::read(&mut rest));
    usize::try_from(raw_len.unwrap_or(0)).unwrap_or(usize::MAX)
}

/// The parts of a frame's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sections<'a> {
    /// Bytes of the stream that the frame stands for.
    pub(crate) raw_len: usize,
    /// The digest of the stream up to the end of the frame.
    pub(crate) digest: StreamDigest,
    pub(crate) program: &'a [u8],
    /// Short ids, 16 bytes each.
    pub(crate) ids: &'a [u8],
    /// Length of the literals once unpacked.
    pub(crate) literal_len: usize,
    pub(crate) zstd: bool,
    pub(crate) literals: &'a [u8],
}

impl<'a> Sections<'a> {
    /// The payload, in memory of exactly its size: it may wait long for its acknowledgement.
    pub(crate) fn write(&self, head: &mut Vec<u8>) -> Bytes {
        head.clear();
        head.push(if self.zstd { FLAG_ZSTD } else { 0 });
        varint::write(self.raw_len as u64, head);
        head.extend_from_slice(self.digest.as_bytes());
        varint::write(self.program.len() as u64, head);
        varint::write((self.ids.len() / ShortId::SIZE) as u64, head);
        varint::write(self.literal_len as u64, head);
        let parts = [&head[..], self.program, self.ids, self.literals];
        Bytes::from(parts.concat())
    }

    /// Splits a payload. All lengths are within `max_raw` or the payload afterwards.
    pub(crate) fn read(payload: &'a [u8], max_raw: usize) -> Result<Self, LayoutError> {
        let (&flags, mut rest) = payload.split_first().ok_or(LayoutError::Truncated)?;
        if flags & !FLAG_ZSTD != 0 {
            return Err(LayoutError::UnknownFlag);
        }
        let zstd = flags & FLAG_ZSTD != 0;
        let raw_len = length(&mut rest, max_raw)?;
        let (digest, mut rest) = rest
            .split_first_chunk::<{ StreamDigest::SIZE }>()
            .ok_or(LayoutError::Truncated)?;
        let program_len = length(&mut rest, payload.len())?;
        let references = length(&mut rest, max_raw / MIN_CHUNK)?;
        // Every literal byte is a byte of the stream.
        let literal_len = length(&mut rest, raw_len)?;
        let (program, rest) = rest
            .split_at_checked(program_len)
            .ok_or(LayoutError::Truncated)?;
        let (ids, literals) = rest
            .split_at_checked(references * ShortId::SIZE)
            .ok_or(LayoutError::Truncated)?;
        if raw_len == 0 || !zstd && literals.len() != literal_len {
            return Err(LayoutError::Inconsistent);
        }
        let digest = StreamDigest::from_bytes(*digest);
        Ok(Self {
            raw_len,
            digest,
            program,
            ids,
            literal_len,
            zstd,
            literals,
        })
    }
}

fn length(input: &mut &[u8], limit: usize) -> Result<usize, LayoutError> {
    let value = varint::read(input).ok_or(LayoutError::Truncated)?;
    usize::try_from(value)
        .ok()
        .filter(|&value| value <= limit)
        .ok_or(LayoutError::TooLong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sections() -> Sections<'static> {
        Sections {
            raw_len: 300,
            digest: StreamDigest::from_bytes([0xd1; 16]),
            program: &[0x28, 0x11],
            ids: &[0x1d; 16],
            literal_len: 3,
            zstd: false,
            literals: b"abc",
        }
    }

    /// docs/protocol.md, "Page frames", layout.
    #[test]
    fn golden() {
        let payload = sections().write(&mut Vec::new());
        let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = "d1".repeat(16);
        let id = "1d".repeat(16);
        assert_eq!(hex, format!("00ac02{digest}0201032811{id}616263"));
        assert_eq!(Sections::read(&payload, 4096), Ok(sections()));
        assert_eq!(announced_raw_len(&payload), 300);
        assert_eq!(announced_raw_len(&payload[..2]), 0);
        assert_eq!(announced_raw_len(&[]), 0);
    }

    #[test]
    fn savings_add_up() {
        let stats = FrameStats {
            same_pages: 2,
            ref_pages: 3,
            delta_pages: 4,
            delta_bytes: 100,
            similar_pages: 5,
            similar_bytes: 300,
            opaque_ref_bytes: 2048,
            literal_bytes: 1000,
            compressed_bytes: 400,
            ..FrameStats::default()
        };
        let saved = Saved {
            same: 2 * 4096,
            reference: 3 * 4080 + 2 * 1008,
            delta: 4 * 4096 - 100,
            similar: 5 * 4096 - 300,
            compression: 600,
        };
        assert_eq!(stats.saved(), saved);
        assert_eq!(FrameStats::default().saved(), Saved::default());
    }

    #[test]
    fn what_a_frame_carries_adds_up_to_its_payload() {
        let stats = FrameStats {
            id_bytes: 48,
            delta_pages: 4,
            delta_bytes: 100,
            similar_pages: 5,
            similar_bytes: 300,
            batch_pages: 1,
            literal_bytes: 4096 + 504,
            compressed_bytes: 2300,
            ..FrameStats::default()
        };
        let carried = Carried {
            reference: 48,
            delta: 50,
            similar: 150,
            batch: 2048,
            opaque: 52,
            structure: 200,
        };
        assert_eq!(stats.carried(2548), carried);
        assert_eq!(FrameStats::default().carried(0), Carried::default());
    }

    #[test]
    fn refusals() {
        let payload = sections().write(&mut Vec::new());
        for cut in 0..payload.len() {
            assert!(Sections::read(&payload[..cut], 4096).is_err(), "{cut}");
        }
        let mut longer = payload.to_vec();
        longer.push(0);
        assert_eq!(
            Sections::read(&longer, 4096),
            Err(LayoutError::Inconsistent)
        );
        let mut flag = payload.to_vec();
        flag[0] = 2;
        assert_eq!(Sections::read(&flag, 4096), Err(LayoutError::UnknownFlag));
        // Longer than allowed, more references than pages, more literals than bytes.
        assert_eq!(Sections::read(&payload, 299), Err(LayoutError::TooLong));
        assert_eq!(Sections::read(&payload, 1023), Err(LayoutError::TooLong));
        let literals = Sections {
            literal_len: 301,
            ..sections()
        }
        .write(&mut Vec::new());
        assert_eq!(Sections::read(&literals, 4096), Err(LayoutError::TooLong));
        let nothing = Sections {
            raw_len: 0,
            literal_len: 0,
            literals: &[],
            ..sections()
        };
        let nothing = nothing.write(&mut Vec::new());
        assert_eq!(
            Sections::read(&nothing, 4096),
            Err(LayoutError::Inconsistent)
        );
    }
}
