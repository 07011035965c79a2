//! Faults on purpose, for the end-to-end tests. Without the cargo feature `faults` none exists.

#[cfg(feature = "faults")]
use std::{
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};
use std::{sync::Arc, time::Duration};

#[cfg(feature = "faults")]
use skyferry_dedup::{DomainId, PAGE_SIZE, PageId, ShortId, StoreStats};
use skyferry_dedup::{PageStore, Pending};

use super::link::Role;

/// Which faults to inject; from the environment variable `SKYFERRY_FAULTS`, a list such as
/// `corrupt-frame=20,delay-verdict-ms=5000,drop-stored-pages=0.3:1`:
///
/// - `corrupt-frame=N`: the frame of that number arrives with a wrong byte;
/// - `delay-verdict-ms=MS`: the destination's verdict is kept back so long;
/// - `drop-stored-pages=PROBABILITY[:SEED]`: the store loses a page, with that probability from 0 to
///   1, at the moment when it is asked for it. The log has the seed, which repeats the choice;
/// - `panic-at-frame=N`: the task of a channel that decodes its frame of that number panics;
/// - `panic-at-step=open|dial|end`: the task of a channel panics before it asks for the channel to be
///   opened (near), before it dials the target (far), or when it takes its leave.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Faults {
    #[cfg(feature = "faults")]
    corrupt_frame: Option<u64>,
    #[cfg(feature = "faults")]
    delay_verdict: Option<Duration>,
    #[cfg(feature = "faults")]
    drop_stored_pages: Option<Drops>,
    #[cfg(feature = "faults")]
    panic_at_frame: Option<u64>,
    #[cfg(feature = "faults")]
    panic_at_step: Option<Step>,
}

/// A step on a channel's way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Step {
    /// Near: the channel is to be opened at the peer.
    Open,
    /// Far: the target is to be dialled.
    Dial,
    /// The channel has ended.
    End,
}

/// How often a page is lost, and where the random numbers begin.
#[cfg(feature = "faults")]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Drops {
    probability: f64,
    seed: u64,
}

#[cfg(not(feature = "faults"))]
#[expect(
    clippy::unused_self,
    reason = "the same calls with and without the feature"
)]
impl Faults {
    pub(super) fn from_env() -> Self {
        Self::default()
    }

    /// Changes a byte of a decoded frame behind the decoder.
    pub(super) fn corrupt(self, _role: Role, _seq: u64, _frame: &mut Pending) {}

    /// Panics where a frame is decoded.
    pub(super) fn panic_at(self, _seq: u64) {}

    /// Panics at this step.
    pub(super) fn panic_at_step(self, _step: Step) {}

    /// How long the destination's verdict is kept back.
    pub(super) fn delay_verdict(self) -> Option<Duration> {
        None
    }

    /// The store as the gateway is to see it.
    pub(super) fn store(self, store: Arc<dyn PageStore>) -> Arc<dyn PageStore> {
        store
    }
}

#[cfg(feature = "faults")]
impl Faults {
    pub(super) fn from_env() -> Self {
        let text = std::env::var("SKYFERRY_FAULTS").unwrap_or_default();
        if text.is_empty() {
            return Self::default();
        }
        match text.parse() {
            Ok(faults) => {
                tracing::warn!(?faults, "faults are injected on purpose");
                faults
            }
            Err(item) => {
                tracing::error!(%item, "no such fault: none is injected");
                Self::default()
            }
        }
    }

    /// Changes a byte of a decoded frame behind the decoder.
    pub(super) fn corrupt(self, role: Role, seq: u64, frame: &mut Pending) {
        if role == Role::Far
            && self.corrupt_frame == Some(seq)
            && let Some(byte) = frame.out_mut().last_mut()
        {
            *byte ^= 1;
        }
    }

    /// Panics where a frame is decoded.
    pub(super) fn panic_at(self, seq: u64) {
        assert!(self.panic_at_frame != Some(seq), "a fault on purpose");
    }

    /// Panics at this step.
    pub(super) fn panic_at_step(self, step: Step) {
        assert!(self.panic_at_step != Some(step), "a fault on purpose");
    }

    /// How long the destination's verdict is kept back.
    pub(super) fn delay_verdict(self) -> Option<Duration> {
        self.delay_verdict
    }

    /// The store as the gateway is to see it: one that forgets.
    pub(super) fn store(self, store: Arc<dyn PageStore>) -> Arc<dyn PageStore> {
        match self.drop_stored_pages {
            Some(drops) => Arc::new(Forgetful {
                store,
                probability: drops.probability,
                random: AtomicU64::new(drops.seed),
            }),
            None => store,
        }
    }
}

#[cfg(feature = "faults")]
impl FromStr for Faults {
    type Err = String;

    /// The error is the item that is unknown or has a wrong value.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut faults = Self::default();
        for item in text.split(',') {
            let (name, value) = item.split_once('=').ok_or(item)?;
            let number = || value.parse().map_err(|_| item.to_owned());
            match name {
                "corrupt-frame" => faults.corrupt_frame = Some(number()?),
                "panic-at-frame" => faults.panic_at_frame = Some(number()?),
                "panic-at-step" => {
                    faults.panic_at_step = Some(match value {
                        "open" => Step::Open,
                        "dial" => Step::Dial,
                        "end" => Step::End,
                        _ => return Err(item.to_owned()),
                    });
                }
                "delay-verdict-ms" => {
                    faults.delay_verdict = Some(Duration::from_millis(number()?));
                }
                "drop-stored-pages" => {
                    faults.drop_stored_pages = Some(Drops::parse(value).ok_or(item)?);
                }
                _ => return Err(item.to_owned()),
            }
        }
        Ok(faults)
    }
}

#[cfg(feature = "faults")]
impl Drops {
    /// `PROBABILITY[:SEED]`; without a seed it is any.
    fn parse(text: &str) -> Option<Self> {
        let (probability, seed) = match text.split_once(':') {
            Some((probability, seed)) => (probability, seed.parse().ok()?),
            None => (text, u64::from_le_bytes(*super::random().first_chunk()?)),
        };
        let probability = probability.parse().ok()?;
        (0.0..=1.0)
            .contains(&probability)
            .then_some(Self { probability, seed })
    }
}

/// A store that loses pages at the worst moment: after the peer was told that they are there, when
/// they are needed.
#[cfg(feature = "faults")]
struct Forgetful {
    store: Arc<dyn PageStore>,
    probability: f64,
    /// State of the generator SplitMix64; a step for each page asked for.
    random: AtomicU64,
}

#[cfg(feature = "faults")]
impl Forgetful {
    fn forgets(&self) -> bool {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self
            .random
            .fetch_add(STEP, Ordering::Relaxed)
            .wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        unit < self.probability
    }
}

#[cfg(feature = "faults")]
impl PageStore for Forgetful {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        if self.forgets() {
            self.store.remove(id);
        }
        self.store.get(id, out)
    }

    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.store.put(domain, id, contents);
    }

    fn prefetch(&self, ids: &[ShortId]) {
        self.store.prefetch(ids);
    }

    fn records(
        &self,
        domain: &DomainId,
        segment: u32,
        first: u32,
        count: u32,
        out: &mut Vec<ShortId>,
    ) {
        self.store.records(domain, segment, first, count, out);
    }

    fn contains(&self, id: &ShortId) -> bool {
        self.store.contains(id)
    }

    fn remove(&self, id: &ShortId) -> bool {
        self.store.remove(id)
    }

    fn stats(&self) -> StoreStats {
        self.store.stats()
    }

    fn capacity_pages(&self) -> u64 {
        self.store.capacity_pages()
    }
}

#[cfg(feature = "faults")]
#[cfg(test)]
mod tests {
    use skyferry_dedup::{DomainKey, Hasher, MemoryStore};

    use super::*;

    #[test]
    fn lists_are_read_and_anything_else_is_named() {
        let faults: Faults = "corrupt-frame=20,drop-stored-pages=0.25:7".parse().unwrap();
        let drops = Drops {
            probability: 0.25,
            seed: 7,
        };
        assert_eq!(faults.corrupt_frame, Some(20));
        assert_eq!(faults.drop_stored_pages, Some(drops));
        for wrong in [
            "corrupt-frame",
            "corrupt-frame=x",
            "drop-stored-pages=1.5",
            "drop-stored-pages=-1",
            "drop-stored-pages=NaN",
            "drop-stored-pages=0.5:x",
            "no-such=1",
            "",
        ] {
            assert_eq!(wrong.parse::<Faults>().unwrap_err(), wrong);
        }
    }

    /// Which of 1000 pages a store loses when each is asked for.
    fn lost(drop_stored_pages: &str) -> Vec<u32> {
        let faults: Faults = format!("drop-stored-pages={drop_stored_pages}")
            .parse()
            .unwrap();
        let store = faults.store(Arc::new(MemoryStore::new(16 << 20)));
        let hasher = Hasher::new(&DomainKey::from_bytes([5; 32]));
        let mut out = [0; PAGE_SIZE];
        (0..1000_u32)
            .filter(|n| {
                let contents = n.to_le_bytes();
                let id = hasher.id(&contents);
                store.put(hasher.domain(), &id, &contents);
                store.get(&id.short(), &mut out).is_none()
            })
            .collect()
    }

    #[test]
    fn pages_are_lost_at_random_and_a_seed_repeats_it() {
        assert_eq!(lost("0.25:7"), lost("0.25:7"));
        assert_ne!(lost("0.25:7"), lost("0.25:8"));
        assert_ne!(lost("0.25"), lost("0.25"));
        assert!((200..300).contains(&lost("0.25:7").len()));
        assert_eq!((lost("0:1").len(), lost("1:1").len()), (0, 1000));
    }
}
