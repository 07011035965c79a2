//! What is kept of guests that left or came, for when they come back: see [`Manifest`].
//!
//! ```text
//! near: candidates → encoder finds one like the stream → Adopt ─→ far: has it? pins it for the channel
//!       encoder adopts it              ←────────────────── Adopted
//! ```
//!
//! Both gateways of a migration make the same manifest at its end. A gateway compares and asks for
//! only those that it made together with this very peer, in this domain; the peer may have forgotten
//! its own, then the channel goes on without.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
};

use skyferry_dedup::{
    DomainId, MAX_CANDIDATES, Manifest, ManifestId, ManifestMatch, PlaceTable, TieredStore,
};
use tracing::{debug, info, warn};

use super::{
    Gateway,
    channel::Channel,
    link::{Conn, Link, Role, lock},
    migration::Migration,
};
use crate::wire::{ChannelNo, Control, MigrationId, control::StreamKind};

/// Most manifests kept, however small.
const MAX_KEPT: usize = 1024;

/// Manifests of this gateway, with the peers they were made with, those used last in front.
#[derive(Debug)]
pub(super) struct Manifests {
    most_bytes: usize,
    kept: Mutex<Kept>,
    /// Where they survive a restart, too.
    tiers: Option<Arc<TieredStore>>,
    /// Held while files are written and deleted.
    writing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Kept {
    latest: VecDeque<(String, Arc<Manifest>)>,
    bytes: usize,
}

impl Kept {
    /// Takes out what was not used for longest of the peer that takes the most room, never the one in
    /// front: many guests of one peer do not push another's out.
    fn let_go(&mut self) -> Option<(String, Arc<Manifest>)> {
        let mut rooms: HashMap<&str, usize> = HashMap::new();
        for (peer, manifest) in &self.latest {
            *rooms.entry(peer).or_default() += manifest.bytes();
        }
        let room = |at: usize| rooms.get(self.latest[at].0.as_str());
        let at = (1..self.latest.len()).max_by_key(|&at| (room(at), at))?;
        let gone = self.latest.remove(at)?;
        self.bytes -= gone.1.bytes();
        Some(gone)
    }
}

impl Manifests {
    /// Keeps as many as take `most_bytes`, on disk, too, where there is one.
    pub(super) fn new(most_bytes: u64, tiers: Option<Arc<TieredStore>>) -> Self {
        Self {
            most_bytes: usize::try_from(most_bytes).unwrap_or(usize::MAX),
            kept: Mutex::default(),
            tiers,
            writing: Mutex::default(),
        }
    }

    /// Reads those on disk, which takes a second for each GiB or two. They are older than all that has
    /// been kept meanwhile.
    pub(super) fn load(&self) {
        let Some(tiers) = &self.tiers else { return };
        let _writing = lock(&self.writing);
        for (peer, manifest) in tiers.disk().load_manifests(self.most_bytes as u64) {
            let size = manifest.bytes();
            let mut kept = lock(&self.kept);
            if kept.bytes + size <= self.most_bytes {
                kept.bytes += size;
                kept.latest.push_back((peer, Arc::new(manifest)));
            }
        }
    }

    /// Keeps one, in place of those that were not used for longest.
    fn keep(&self, peer: &str, manifest: Manifest) {
        let size = manifest.bytes();
        if size > self.most_bytes {
            debug!(manifest = %manifest.id(), size, "too large to be kept");
            return;
        }
        let manifest = Arc::new(manifest);
        let _writing = lock(&self.writing);
        self.take_out(peer, manifest.id());
        let mut oldest = Vec::new();
        {
            let mut kept = lock(&self.kept);
            kept.bytes += size;
            kept.latest.push_front((peer.into(), manifest.clone()));
            while (kept.bytes > self.most_bytes || kept.latest.len() > MAX_KEPT)
                && let Some(last) = kept.let_go()
            {
                oldest.push(last);
            }
        }
        let Some(tiers) = &self.tiers else { return };
        for (peer, manifest) in oldest {
            tiers.disk().delete_manifest(&peer, manifest.id());
        }
        if let Err(error) = tiers.disk().save_manifest(peer, &manifest) {
            warn!(%error, "what a guest held is not kept on disk");
        }
    }

    /// Those that a stream to this peer may be like.
    pub(super) fn candidates(&self, peer: &str, domain: &DomainId) -> Vec<Arc<Manifest>> {
        let kept = lock(&self.kept);
        let of_peer =
            |(of, manifest): &&(String, Arc<Manifest>)| of == peer && manifest.domain() == domain;
        let candidates = kept.latest.iter().filter(of_peer).take(MAX_CANDIDATES);
        candidates.map(|(_, manifest)| manifest.clone()).collect()
    }

    /// The one that was made with this peer in this domain, which is being used.
    fn find(&self, peer: &str, domain: &DomainId, id: ManifestId) -> Option<Arc<Manifest>> {
        let mut kept = lock(&self.kept);
        let wanted = |(of, manifest): &(String, Arc<Manifest>)| {
            of == peer && manifest.id() == id && manifest.domain() == domain
        };
        let at = kept.latest.iter().position(wanted)?;
        let used = kept.latest.remove(at)?;
        let manifest = used.1.clone();
        kept.latest.push_front(used);
        Some(manifest)
    }

    /// The peer does not have it any more.
    fn forget(&self, peer: &str, id: ManifestId) {
        self.take_out(peer, id);
        if let Some(tiers) = &self.tiers {
            tiers.disk().delete_manifest(peer, id);
        }
    }

    fn take_out(&self, peer: &str, id: ManifestId) {
        let mut kept = lock(&self.kept);
        let is_it = |(of, manifest): &(String, Arc<Manifest>)| of == peer && manifest.id() == id;
        if let Some(at) = kept.latest.iter().position(is_it)
            && let Some((_, manifest)) = kept.latest.remove(at)
        {
            kept.bytes -= manifest.bytes();
        }
    }

    /// How many there are, and their bytes.
    pub(super) fn stats(&self) -> (usize, usize) {
        let kept = lock(&self.kept);
        (kept.latest.len(), kept.bytes)
    }
}

/// The migration is over. If its guest has moved, both sides keep what its RAM held.
pub(super) fn on_finished(gateway: &Arc<Gateway>, migration: &Migration) {
    let table = migration.take_table().filter(|_| migration.released());
    let Some(table) = table.filter(|_| gateway.config.limits.manifests_bytes > 0) else {
        return;
    };
    let (gateway, peer, id) = (gateway.clone(), migration.link.peer.clone(), migration.id);
    // Hashing it takes a while, and nobody waits for it.
    tokio::task::spawn_blocking(move || {
        if let Some(manifest) = PlaceTable::into_manifest(table) {
            debug!(migration = %id, ?manifest, "kept for the guest's return");
            gateway.manifests.keep(&peer, manifest);
        }
    });
}

/// Near: the way of one main channel to a manifest.
#[derive(Debug, Default)]
pub(super) struct Adoption {
    /// What the stream is like, the best in front: the one that is being asked for.
    matches: VecDeque<ManifestMatch>,
    /// The connection on which it was asked for.
    asked_on: u64,
}

impl Adoption {
    /// The encoder has found what the stream is like.
    pub(super) fn begin(&mut self, matches: Vec<ManifestMatch>) {
        self.matches = matches.into();
    }

    /// Asks for what is to be asked for. Returns the manifest that the encoder is to adopt, once the
    /// peer has agreed to one.
    pub(super) async fn advance(
        &mut self,
        gateway: &Gateway,
        migration: &Migration,
        channel: &Channel,
    ) -> Option<Arc<Manifest>> {
        let first = self.matches.front()?;
        let id = first.manifest.id();
        match channel.adoption_answer(id) {
            Some(true) => {
                let ManifestMatch {
                    manifest,
                    hits,
                    sample,
                } = self.matches.pop_front()?;
                self.matches.clear();
                gateway.metrics.gateway.manifests_adopted.inc();
                info!(
                    migration = %migration.id,
                    manifest = %id,
                    hits,
                    sample,
                    places = manifest.places(),
                    "the guest was here before; what it held then is built upon"
                );
                return Some(manifest);
            }
            Some(false) => {
                gateway.manifests.forget(&migration.link.peer, id);
                self.matches.pop_front();
                self.asked_on = 0;
            }
            None => {}
        }
        let id = self.matches.front()?.manifest.id();
        // An answer that was lost with its connection is asked for again on the next.
        let generation = channel.attached_generation();
        if generation != 0 && generation != self.asked_on {
            self.asked_on = generation;
            let adopt = Control::Adopt {
                migration: migration.id,
                channel: channel.no,
                manifest: *id.as_bytes(),
            };
            migration.link.send(adopt).await;
        }
        None
    }
}

/// Far: the near gateway wants to build on a manifest.
pub(super) async fn on_adopt(
    gateway: &Gateway,
    link: &Link,
    conn: &Conn,
    id: MigrationId,
    no: ChannelNo,
    manifest: [u8; 16],
) {
    let Some((migration, channel)) = link.channel(id, no) else {
        return;
    };
    let wanted = ManifestId::from_bytes(manifest);
    let agreed = channel.kind == StreamKind::QemuMain && migration.role() == Role::Far && {
        let domain = migration.domain.id();
        let found = gateway.manifests.find(&link.peer, &domain, wanted);
        channel.agree(wanted, found)
    };
    debug!(migration = %id, manifest = %wanted, agreed, "the peer asks for what the guest held");
    conn.send(Control::Adopted {
        migration: id,
        channel: no,
        manifest,
        agreed,
    })
    .await;
}

/// Near: the far gateway's answer.
pub(super) fn on_adopted(link: &Link, id: MigrationId, no: ChannelNo, of: [u8; 16], agreed: bool) {
    if let Some((_, channel)) = link.channel(id, no) {
        channel.set_adoption_answer(ManifestId::from_bytes(of), agreed);
    }
}

#[cfg(test)]
mod tests {
    use skyferry_core::qemu::synthetic::SyntheticStream;
    use skyferry_dedup::{ChannelEncoder, ChannelKind, DomainKey, EncodeOptions, Flush};

    use super::*;

    /// What a guest held; another one for each number.
    fn manifest(key: &DomainKey, number: u64) -> Manifest {
        manifest_of(key, number, 20)
    }

    fn manifest_of(key: &DomainKey, number: u64, pages: u64) -> Manifest {
        let name = format!("ram{number}");
        let blocks = [(name.as_str(), pages)];
        let stream = SyntheticStream::builder().blocks(&blocks).build();
        let options = EncodeOptions::default();
        let mut encoder = ChannelEncoder::new(ChannelKind::QemuMain, key, options);
        let encoded = encoder.encode(&stream.bytes, Flush::Hard, None, None);
        assert!(encoded.unwrap().frame.is_some());
        encoder.take_table().into_manifest().unwrap()
    }

    #[test]
    fn a_peer_finds_its_own_and_pushes_out_its_own() {
        let key = DomainKey::from_bytes([1; 32]);
        let (domain, other) = (key.id(), DomainKey::from_bytes([2; 32]).id());
        let size = manifest(&key, 0).bytes() as u64;
        let manifests = Manifests::new(4 * size, None);
        let first = manifest(&key, 0).id();
        manifests.keep("edge-b", manifest(&key, 0));
        for number in 1..20 {
            manifests.keep("edge-c", manifest(&key, number));
        }
        assert_eq!(manifests.stats(), (4, 4 * size as usize));
        let latest = manifests.candidates("edge-c", &domain);
        let ids: Vec<_> = latest.iter().map(|manifest| manifest.id()).collect();
        assert_eq!(ids, [19, 18, 17].map(|number| manifest(&key, number).id()));
        assert!(manifests.candidates("edge-c", &other).is_empty());
        // Another peer, or another tenant, has nothing of it.
        assert!(manifests.find("edge-b", &domain, first).is_some());
        assert!(manifests.find("edge-c", &domain, first).is_none());
        assert!(manifests.find("edge-b", &other, first).is_none());
        // What is used goes to the front, what is kept twice is kept once.
        assert!(manifests.find("edge-c", &domain, ids[2]).is_some());
        assert_eq!(manifests.candidates("edge-c", &domain)[0].id(), ids[2]);
        manifests.keep("edge-c", manifest(&key, 17));
        assert_eq!(manifests.stats().0, 4);
        manifests.forget("edge-b", first);
        assert!(manifests.find("edge-b", &domain, first).is_none());
        assert_eq!(manifests.stats(), (3, 3 * size as usize));
    }

    /// Even if its peer has more than any other then.
    #[test]
    fn the_guest_that_has_just_moved_is_kept() {
        let key = DomainKey::from_bytes([1; 32]);
        let small = |number| manifest_of(&key, number, 20);
        let large = |number| manifest_of(&key, number, 60);
        let most = large(0).bytes() + small(0).bytes();
        let manifests = Manifests::new(most as u64, None);
        manifests.keep("edge-b", small(0));
        manifests.keep("edge-b", small(1));
        for number in 2..5 {
            manifests.keep("edge-c", large(number));
            let latest = manifests.candidates("edge-c", &key.id());
            assert_eq!(latest.len(), 1);
            assert_eq!(latest[0].id(), large(number).id());
            let others = manifests.candidates("edge-b", &key.id());
            assert_eq!(others.len(), 1);
            assert_eq!(others[0].id(), small(1).id());
        }
    }
}
