//! Page identity, page store and page codec: how two gateways speak of pages.
//!
//! One channel of a migration is a stream of bytes. [`ChannelEncoder`] turns it into *frames*: pages
//! of zeroes and pages that did not change cost nothing, pages that the peer holds become references,
//! changed pages and those that are like another one deltas, the rest is compressed in batches.
//! [`ChannelDecoder`] turns frames into the very same bytes, which a running digest proves. The format
//! is in `docs/protocol.md`, section "Page frames".
//!
//! ```text
//! bytes → core decoder → pieces ─┬ zero page ────────────────┐
//!                                ├ same as its place held ───┤
//!                                ├ known to the peer → id ───┼→ frame ═══ WAN ═══ frame → bytes
//!                                ├ changed → delta ┬ zstd ───┘             store ──┘ ↑ misses asked for
//!                                └ new → batch ────┘
//! ```
//!
//! Nothing here opens a socket, reads a clock or starts a task, and nothing allocates per page. A
//! wrong belief about what the peer holds is never an error: the decoder names the missing pages and
//! every frame keeps the pages that it refers to (see [`Retained`]).

mod announce;
mod chunk;
mod clock;
mod decoder;
mod delta;
mod digest;
pub mod disk;
mod effort;
mod encoder;
mod frame;
mod id;
mod known;
mod literals;
mod manifest;
mod memory_store;
mod page;
mod pending;
mod places;
mod program;
mod seeder;
mod similar;
mod store;
mod tiered;
mod varint;

pub use announce::{
    AnnounceError, Announced, AnnouncedPlace, Announcer, MAX_ANNOUNCEMENT, RunCheck, SegmentSource,
    SegmentState, StoreId,
};
pub use decoder::{ChannelDecoder, DecodeError, DecodeLimits, DecodeStats, FinishError, Finished};
pub use digest::StreamDigest;
pub use effort::{Activity, Effort, EffortControl};
pub use encoder::{ChannelEncoder, ChannelKind, EncodeError, EncodeOptions, Encoded, Flush};
pub use frame::{Carried, Frame, FrameStats, Old, Retained, Saved, announced_raw_len};
pub use known::KnownPages;
pub use literals::Matching;
pub use manifest::{MAX_CANDIDATES, Manifest, ManifestId, ManifestMatch, PlaceTable};
pub use memory_store::MemoryStore;
pub use page::{DomainId, DomainKey, Hasher, PAGE_SIZE, PageId, ShortId};
pub use pending::{FillError, Pending};
pub use seeder::{SeedCounts, SeedError, Seeder};
pub use store::{DiskState, DiskStats, PageStore, StoreStats};
pub use tiered::TieredStore;
