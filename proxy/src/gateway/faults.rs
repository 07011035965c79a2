//! Faults on purpose, for the end-to-end tests. Without the cargo feature `faults` none exists.

#[cfg(feature = "faults")]
use std::sync::atomic::{AtomicU64, Ordering};
use std::{sync::Arc, time::Duration};

use skyferry_dedup::PageStore;
#[cfg(feature = "faults")]
use skyferry_dedup::{DomainId, PAGE_SIZE, PageId, ShortId, StoreStats};

use super::link::Role;

/// Which faults to inject; from the environment variable `SKYFERRY_FAULTS`, a list such as
/// `corrupt-frame=20,delay-verdict-ms=5000,drop-stored-pages=10`.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Faults {
    #[cfg(feature = "faults")]
    corrupt_frame: Option<u64>,
    #[cfg(feature = "faults")]
    delay_verdict: Option<Duration>,
    #[cfg(feature = "faults")]
    drop_stored_pages: Option<u64>,
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
    pub(super) fn corrupt(self, _role: Role, _seq: u64, _bytes: &mut [u8]) {}

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
        let mut faults = Self::default();
        let text = std::env::var("SKYFERRY_FAULTS").unwrap_or_default();
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let value = |item: &str| item.split_once('=').and_then(|(_, v)| v.parse().ok());
            match item.split('=').next() {
                Some("corrupt-frame") => faults.corrupt_frame = value(item),
                Some("delay-verdict-ms") => {
                    faults.delay_verdict = value(item).map(Duration::from_millis);
                }
                Some("drop-stored-pages") => faults.drop_stored_pages = value(item),
                _ => tracing::error!(item, "unknown fault"),
            }
        }
        if !text.is_empty() {
            tracing::warn!(?faults, "faults are injected on purpose");
        }
        faults
    }

    /// Changes a byte of a decoded frame behind the decoder.
    pub(super) fn corrupt(self, role: Role, seq: u64, bytes: &mut [u8]) {
        if role == Role::Far
            && self.corrupt_frame == Some(seq)
            && let Some(byte) = bytes.last_mut()
        {
            *byte ^= 1;
        }
    }

    /// How long the destination's verdict is kept back.
    pub(super) fn delay_verdict(self) -> Option<Duration> {
        self.delay_verdict
    }

    /// The store as the gateway is to see it: one that forgets one in so many pages.
    pub(super) fn store(self, store: Arc<dyn PageStore>) -> Arc<dyn PageStore> {
        match self.drop_stored_pages {
            Some(one_in) => Arc::new(Forgetful {
                store,
                one_in,
                asked: AtomicU64::new(0),
            }),
            None => store,
        }
    }
}

/// A store that loses pages.
#[cfg(feature = "faults")]
struct Forgetful {
    store: Arc<dyn PageStore>,
    one_in: u64,
    asked: AtomicU64,
}

#[cfg(feature = "faults")]
impl PageStore for Forgetful {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        if self
            .asked
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(self.one_in)
        {
            self.store.remove(id);
        }
        self.store.get(id, out)
    }

    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.store.put(domain, id, contents);
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
