//! What a peer's store holds, told by the peer itself.
//!
//! A gateway that has a store on disk announces its contents to the peers that migrate to it: for
//! each segment the ids in the order in which they lie there. The sender learns so what the peer got
//! from other gateways, from seeding or before a restart, and it can name a run of pages by its place
//! in the peer's store instead of page by page.
//!
//! ```text
//! segments of the store → Announcer → messages ═══ WAN ═══ messages → Announced ← find ← encoder
//! ```
//!
//! Five bytes of each id are told. Among 2^26 pages one look-up in 16,000 finds a page that is not
//! the one meant; the check of a run ([`RunCheck`]) turns that into a miss.
//!
//! The layout is in `docs/protocol.md`, section "Announcements".

mod announced;
mod announcer;
mod message;

pub use announced::{Announced, AnnouncedPlace};
pub use announcer::{Announcer, SegmentSource, SegmentState};
pub use message::{AnnounceError, MAX_ANNOUNCEMENT};

use crate::page::ShortId;

/// Most segments that a peer may have announced at a time: 16 TiB at 64 MiB each.
pub(crate) const MAX_SEGMENTS: usize = 1 << 18;

/// Most records of one segment.
pub(crate) const MAX_RECORDS: u32 = 1 << 22;

/// Bytes of an id that are announced.
const PREFIX_SIZE: usize = 5;

/// Identity of a store: another one, or one that was emptied, has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoreId(pub [u8; 16]);

/// A running check over the ids of a run of pages, in order.
///
/// It guards against mistakes (a prefix that two pages share, a store that was restored), not against
/// malice: what a frame decodes to is covered by the digest of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunCheck(u64);

impl Default for RunCheck {
    fn default() -> Self {
        Self(0x5bf0_3635_d1e8_95c3)
    }
}

impl RunCheck {
    /// Takes the next id in.
    pub fn add(&mut self, id: &ShortId) {
        // Ids are keyed hashes: any of their bits are as good as random.
        let word = id.shard_hash();
        self.0 = (self.0.rotate_left(7) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// The check of the ids so far.
    #[must_use]
    pub fn value(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The part of an id that is announced, as a number.
fn prefix(id: &ShortId) -> u64 {
    let mut bytes = [0; 8];
    bytes[..PREFIX_SIZE].copy_from_slice(&id.as_bytes()[..PREFIX_SIZE]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::page::{DomainKey, Hasher};

    fn id(n: u64) -> ShortId {
        let hasher = Hasher::new(&DomainKey::from_bytes([8; 32]));
        hasher.id(&n.to_le_bytes()).short()
    }

    /// A store's segments, by number.
    #[derive(Default)]
    struct Segments(BTreeMap<u32, Vec<ShortId>>);

    impl SegmentSource for Segments {
        fn segments(&self, out: &mut Vec<SegmentState>) {
            out.extend(self.0.iter().map(|(&segment, ids)| SegmentState {
                segment,
                records: ids.len() as u32,
            }));
        }

        fn ids(&self, segment: u32, from: u32, most: usize, out: &mut Vec<ShortId>) {
            if let Some(ids) = self.0.get(&segment) {
                out.extend(ids.iter().skip(from as usize).take(most));
            }
        }
    }

    /// Lets the announcer say everything it has to say.
    fn tell(announcer: &mut Announcer, segments: &Segments, announced: &Announced, most: usize) {
        let mut message = Vec::new();
        loop {
            message.clear();
            let more = announcer.next(segments, most, &mut message);
            assert!(message.len() <= most);
            announced.apply(&message).unwrap();
            if !more {
                return;
            }
        }
    }

    fn check(segments: &Segments, announced: &Announced) {
        for (&segment, ids) in &segments.0 {
            for (record, id) in ids.iter().enumerate() {
                let place = announced.find(id).unwrap();
                assert_eq!(
                    (place.segment, place.record as usize),
                    (segment, record),
                    "{id:?}"
                );
            }
        }
    }

    #[test]
    fn the_sender_learns_what_comes_and_what_goes() {
        let mut segments = Segments::default();
        segments.0.insert(4, (0..1000).map(id).collect());
        segments.0.insert(9, (1000..1010).map(id).collect());
        let announced = Announced::new(1 << 20);
        let mut announcer = Announcer::new(StoreId([1; 16]), &announced.position());
        tell(&mut announcer, &segments, &announced, 300);
        check(&segments, &announced);
        assert_eq!(announced.len(), 1010);
        assert_eq!(announced.find(&id(5000)), None);

        segments.0.get_mut(&9).unwrap().extend((2000..2100).map(id));
        segments.0.remove(&4);
        tell(&mut announcer, &segments, &announced, 64);
        check(&segments, &announced);
        assert_eq!(announced.find(&id(0)), None);
        assert_eq!(announced.find(&id(2099)).map(|p| p.record), Some(109));
    }

    #[test]
    fn a_new_connection_goes_on_where_the_last_one_ended() {
        let mut segments = Segments::default();
        segments.0.insert(1, (0..500).map(id).collect());
        segments.0.insert(2, (500..900).map(id).collect());
        let announced = Announced::new(1 << 20);
        let store = StoreId([1; 16]);
        let mut announcer = Announcer::new(store, &announced.position());
        let mut message = Vec::new();
        announcer.next(&segments, 2000, &mut message);
        announced.apply(&message).unwrap();

        segments.0.remove(&1);
        segments.0.insert(3, vec![id(7)]);
        let before = announced.len();
        let mut announcer = Announcer::new(store, &announced.position());
        let mut rest = Vec::new();
        assert!(!announcer.next(&segments, MAX_ANNOUNCEMENT, &mut rest));
        announced.apply(&rest).unwrap();
        check(&segments, &announced);
        assert!(rest.len() < (900 - before) * PREFIX_SIZE + 60);
    }

    #[test]
    fn another_store_makes_everything_unknown() {
        let mut segments = Segments::default();
        segments.0.insert(1, (0..50).map(id).collect());
        let announced = Announced::new(1 << 20);
        let mut announcer = Announcer::new(StoreId([1; 16]), &announced.position());
        tell(&mut announcer, &segments, &announced, 1000);
        segments.0.clear();
        segments.0.insert(1, vec![id(77)]);
        let mut announcer = Announcer::new(StoreId([2; 16]), &announced.position());
        tell(&mut announcer, &segments, &announced, 1000);
        check(&segments, &announced);
        assert_eq!(announced.find(&id(0)), None);
        assert_eq!(announced.len(), 1);
    }

    #[test]
    fn a_full_table_learns_no_more_and_stays_within_its_bytes() {
        let mut segments = Segments::default();
        for segment in 0..20 {
            let first = u64::from(segment) * 10_000;
            let ids = (first..first + 10_000).map(id).collect();
            segments.0.insert(segment, ids);
        }
        let capacity = 3 << 20;
        let announced = Announced::new(capacity);
        let mut announcer = Announcer::new(StoreId([1; 16]), &announced.position());
        tell(&mut announcer, &segments, &announced, MAX_ANNOUNCEMENT);
        assert!(announced.bytes() <= capacity, "{}", announced.bytes());
        assert!(announced.len() > 60_000, "{}", announced.len());
        // The newest come first.
        assert!(announced.find(&id(199_999)).is_some());
        assert!(announced.find(&id(0)).is_none());
        // What is dropped makes room.
        let newest: Vec<u32> = (10..20).collect();
        newest.iter().for_each(|no| {
            segments.0.remove(no);
        });
        segments.0.insert(30, (900_000..910_000).map(id).collect());
        tell(&mut announcer, &segments, &announced, MAX_ANNOUNCEMENT);
        assert!(announced.find(&id(905_000)).is_some());
        assert!(announced.bytes() <= capacity);
    }

    #[test]
    fn ids_of_a_run_have_a_check() {
        let check = |ids: &[u64]| {
            let mut check = RunCheck::default();
            ids.iter().for_each(|&n| check.add(&id(n)));
            check.value()
        };
        assert_eq!(check(&[1, 2, 3]), check(&[1, 2, 3]));
        assert_ne!(check(&[1, 2, 3]), check(&[1, 3, 2]));
        assert_ne!(check(&[1, 2]), check(&[1, 2, 3]));
        assert_ne!(check(&[]), 0);
    }

    proptest! {
        /// Whatever a store goes through, the sender ends up knowing just what is there.
        #[test]
        fn the_table_follows_the_store(
            steps in prop::collection::vec((0..4_u8, 0..8_u32, 0..200_u64), 1..60),
            most in 40..2000_usize,
        ) {
            let mut segments = Segments::default();
            let announced = Announced::new(4 << 20);
            let store = StoreId([1; 16]);
            let mut announcer = Announcer::new(store, &announced.position());
            let mut fresh = 0;
            let mut gone = Vec::new();
            // Those that the sender has no room for at the moment.
            let mut left_out = BTreeMap::new();
            for (step, segment, n) in steps {
                match step {
                    // Ids are in one segment only, and numbers of segments are not used again.
                    0 if !gone.contains(&segment) && !left_out.contains_key(&segment) => {
                        let ids = (fresh..fresh + n).map(id);
                        segments.0.entry(segment).or_default().extend(ids);
                        fresh += n;
                    }
                    1 if segments.0.remove(&segment).is_some() => gone.push(segment),
                    2 => announcer = Announcer::new(store, &announced.position()),
                    3 => {
                        if let Some(ids) = segments.0.remove(&segment) {
                            left_out.insert(segment, ids);
                        } else if let Some(ids) = left_out.remove(&segment) {
                            segments.0.insert(segment, ids);
                        }
                    }
                    _ => {}
                }
                let mut message = Vec::new();
                announcer.next(&segments, most, &mut message);
                announced.apply(&message).unwrap();
            }
            tell(&mut announcer, &segments, &announced, most);
            check(&segments, &announced);
            let there: usize = segments.0.values().map(Vec::len).sum();
            let found = (0..fresh).filter(|&n| announced.find(&id(n)).is_some()).count();
            prop_assert_eq!(found, there);
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let announced = Announced::new(1 << 20);
            let _ = announced.apply(&bytes);
            prop_assert!(announced.bytes() <= 1 << 20);
        }
    }
}
