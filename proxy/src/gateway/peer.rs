//! What is known of a peer, whichever of the two gateways began to talk.

use std::sync::{Arc, Mutex};

use skyferry_dedup::{Announced, KnownPages};

use super::link::lock;
use crate::wire::InstanceId;

/// Shared by both links to a peer: what it sent us it need not be sent when the guest goes back.
#[derive(Debug)]
pub(super) struct PeerKnowledge {
    known: Mutex<Option<(InstanceId, Arc<KnownPages>)>>,
    /// What it has announced of its store on disk.
    pub(super) announced: Arc<Announced>,
}

impl PeerKnowledge {
    /// Nothing is known. What the peer announces may take so much memory.
    pub(super) fn new(announced_bytes: u64) -> Self {
        let bytes = usize::try_from(announced_bytes).unwrap_or(usize::MAX);
        Self {
            known: Mutex::default(),
            announced: Arc::new(Announced::new(bytes)),
        }
    }

    /// The pages that this process at the peer is believed to hold; none yet when it is another than
    /// before. A set that is made has room for `capacity_pages`.
    pub(super) fn known(&self, instance: InstanceId, capacity_pages: u64) -> Arc<KnownPages> {
        let mut known = lock(&self.known);
        match &*known {
            Some((of, pages)) if *of == instance => pages.clone(),
            _ => {
                let pages = Arc::new(KnownPages::new(capacity_pages));
                *known = Some((instance, pages.clone()));
                pages
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_links_share_what_is_known_until_the_peer_restarts() {
        let peer = PeerKnowledge::new(1 << 20);
        let known = peer.known([1; 16], 100);
        assert!(Arc::ptr_eq(&known, &peer.known([1; 16], 50)));
        let fresh = peer.known([2; 16], 100);
        assert!(!Arc::ptr_eq(&known, &fresh));
        assert!(Arc::ptr_eq(&fresh, &peer.known([2; 16], 100)));
    }
}
