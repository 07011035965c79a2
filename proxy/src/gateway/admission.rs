//! Room for one more migration: how `limits.migrations` is shared between the peers.

use std::sync::Arc;

use super::{
    Gateway,
    link::{Link, lock},
    migration::Migration,
};

impl Gateway {
    /// Makes a migration of `link` and adds it to those that run. `None`: there is no room for it.
    pub(super) fn begin_migration(
        &self,
        link: &Link,
        make: impl FnOnce() -> Migration,
    ) -> Option<Arc<Migration>> {
        // Two at once must not both take the last place.
        let _turn = lock(&self.admission);
        let count = |peer: &str| -> usize {
            let links = [self.near.get(peer), self.far.get(peer)];
            let links = links.into_iter().flatten();
            links.map(|link| link.migration_count()).sum()
        };
        let peers = self.config.peers.iter().map(|peer| peer.name.as_str());
        let others: Vec<usize> = peers.filter(|name| *name != link.peer).map(count).collect();
        if !has_room(self.config.limits.migrations, count(&link.peer), &others) {
            return None;
        }
        let migration = Arc::new(make());
        link.add_migration(migration.clone());
        Some(migration)
    }
}

/// Whether a peer that has `own` migrations may have one more. Half of `limit` is kept in equal shares,
/// one for each peer, so that none can take all; the rest is for whoever comes first.
fn has_room(limit: usize, own: usize, others: &[usize]) -> bool {
    let peers = others.len() + 1;
    let share = limit / 2 / peers;
    let beyond = |count: &usize| count.saturating_sub(share);
    let taken: usize = others.iter().map(beyond).sum();
    own < share || taken + beyond(&own) < limit - share * peers
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many migrations `whose` can begin beside those of the others.
    fn fill(limit: usize, counts: &mut [usize], whose: usize) -> usize {
        let others = |counts: &[usize]| -> Vec<usize> {
            let others = counts.iter().enumerate().filter(|(i, _)| *i != whose);
            others.map(|(_, count)| *count).collect()
        };
        let before = counts[whose];
        while has_room(limit, counts[whose], &others(counts)) {
            counts[whose] += 1;
            assert!(counts.iter().sum::<usize>() <= limit);
        }
        counts[whose] - before
    }

    #[test]
    fn a_single_peer_has_all_the_room() {
        for limit in [1, 2, 5, 64] {
            assert_eq!(fill(limit, &mut [0], 0), limit);
        }
    }

    #[test]
    fn a_greedy_peer_leaves_each_other_one_its_share() {
        let mut counts = [0; 4];
        assert_eq!(fill(64, &mut counts, 2), 64 - 3 * 8);
        for whose in [0, 1, 3] {
            assert_eq!(fill(64, &mut counts, whose), 8);
        }
        assert_eq!(counts.iter().sum::<usize>(), 64);
        // What one gives back of the common part another may have.
        counts[2] -= 10;
        assert_eq!(fill(64, &mut counts, 0), 10);
        assert_eq!(fill(64, &mut counts, 2), 0);
        counts[2] = 0;
        assert_eq!(fill(64, &mut counts, 1), 22);
        assert_eq!(fill(64, &mut counts, 2), 8);
    }

    #[test]
    fn more_peers_than_room_share_it_as_they_come() {
        let mut counts = [0; 5];
        assert_eq!(fill(3, &mut counts, 4), 3);
        assert_eq!(fill(3, &mut counts, 0), 0);
    }
}
