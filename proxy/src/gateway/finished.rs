//! What is remembered of the migrations of a link that are over.

use std::collections::{HashMap, VecDeque};

use crate::wire::{MigrationId, control::ChannelPosition};

/// Migrations remembered after their end: more than can run at once, so that none is forgotten before a
/// new connection has asked for it.
const MAX_FINISHED: usize = 8 << 10;
/// Ends of channels remembered, over all migrations. A peer that has heard of them says so, or is told so
/// (Close), upon which they are forgotten. All of them (700 KB) fit into the control stream's window: two
/// gateways may tell each other at once, before either reads.
const MAX_ENDS: usize = 16 << 10;

/// The migrations of a link that are over.
#[derive(Debug, Default)]
pub(super) struct Finished {
    migrations: HashMap<MigrationId, Over>,
    /// In the order of their ends, the latest at the back. One that was there twice counts by its later
    /// number.
    order: VecDeque<(MigrationId, u64)>,
    numbers: u64,
    /// All ends of channels that are remembered.
    ends: usize,
    /// A migration with a released commit byte is no longer among them.
    forgot_released: bool,
}

#[derive(Debug)]
struct Over {
    number: u64,
    released: bool,
    /// How many frames its channels have received that ended in order, until the peer knows that.
    ends: Vec<ChannelPosition>,
}

impl Finished {
    /// A migration is over: whether its commit byte was released, and what its peer may not have heard
    /// of.
    pub(super) fn remember(
        &mut self,
        id: MigrationId,
        released: bool,
        mut ends: Vec<ChannelPosition>,
    ) {
        let before = self.forget(id);
        // A name that is used again says nothing against what was.
        let released = released || before.is_some_and(|over| over.released);
        if self.ends + ends.len() > MAX_ENDS {
            ends.clear();
        }
        self.ends += ends.len();
        self.numbers += 1;
        let number = self.numbers;
        self.order.push_back((id, number));
        self.migrations.insert(
            id,
            Over {
                number,
                released,
                ends,
            },
        );
        if self.order.len() > MAX_FINISHED
            && let Some((oldest, number)) = self.order.pop_front()
            && self.migrations.get(&oldest).map(|over| over.number) == Some(number)
        {
            self.forgot_released |= self.forget(oldest).is_some_and(|over| over.released);
        }
    }

    fn forget(&mut self, id: MigrationId) -> Option<Over> {
        let over = self.migrations.remove(&id)?;
        self.ends -= over.ends.len();
        Some(over)
    }

    /// Whether this migration has been here and is over.
    pub(super) fn contains(&self, id: MigrationId) -> bool {
        self.migrations.contains_key(&id)
    }

    /// Whether it is remembered that this migration's commit byte was released.
    pub(super) fn has_released(&self, id: MigrationId) -> bool {
        self.migrations.get(&id).is_some_and(|over| over.released)
    }

    /// Whether the commit byte of a migration that does not run here (any more) may have been
    /// released: of one that is not remembered, nobody knows.
    pub(super) fn may_have_released(&self, id: MigrationId) -> bool {
        let over = self.migrations.get(&id);
        over.map_or(self.forgot_released, |over| over.released)
    }

    /// Where the channels of a migration ended, if the peer may not know.
    pub(super) fn ends(&self, id: MigrationId) -> &[ChannelPosition] {
        self.migrations.get(&id).map_or(&[], |over| &over.ends)
    }

    /// At most `most` migrations of whose ends the peer may not have heard.
    pub(super) fn unheard(&self, most: usize) -> Vec<(MigrationId, Vec<ChannelPosition>)> {
        let unheard = self.migrations.iter().filter(|(_, o)| !o.ends.is_empty());
        let unheard = unheard.map(|(id, over)| (*id, over.ends.clone()));
        unheard.take(most).collect()
    }

    /// The peer has heard of all ends of a migration.
    pub(super) fn forget_ends(&mut self, id: MigrationId) {
        if let Some(over) = self.migrations.get_mut(&id) {
            self.ends -= std::mem::take(&mut over.ends).len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> MigrationId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        MigrationId(bytes)
    }

    fn ends(count: u32) -> Vec<ChannelPosition> {
        let end = |channel| ChannelPosition {
            channel,
            next_seq: 7,
        };
        (0..count).map(end).collect()
    }

    /// "Not released" is the last word on a migration, so it is never said from forgetfulness.
    #[test]
    fn what_is_forgotten_may_have_been_released() {
        let mut finished = Finished::default();
        finished.remember(id(0), true, vec![]);
        for n in 1..MAX_FINISHED {
            finished.remember(id(n), false, vec![]);
        }
        assert!(finished.may_have_released(id(0)) && finished.contains(id(0)));
        assert!(!finished.may_have_released(id(1)));
        assert!(!finished.may_have_released(id(MAX_FINISHED)));
        finished.remember(id(MAX_FINISHED), false, vec![]);
        assert!(!finished.contains(id(0)));
        assert!(finished.may_have_released(id(0)));
        assert!(!finished.may_have_released(id(1)));
    }

    #[test]
    fn a_name_used_twice_is_remembered_from_its_later_end_on() {
        let mut finished = Finished::default();
        finished.remember(id(0), true, ends(3));
        finished.remember(id(0), false, ends(2));
        assert!(finished.may_have_released(id(0)));
        for n in 1..MAX_FINISHED {
            finished.remember(id(n), false, vec![]);
        }
        assert!(finished.contains(id(0)) && finished.contains(id(1)));
        assert_eq!(finished.ends(id(0)), ends(2));
        finished.remember(id(MAX_FINISHED), false, vec![]);
        assert!(!finished.contains(id(0)) && finished.contains(id(1)));
        assert_eq!(finished.ends, 0);
    }

    #[test]
    fn ends_are_bounded_and_forgotten_when_they_are_known() {
        let mut finished = Finished::default();
        for n in 0..17 {
            finished.remember(id(n), false, ends(1024));
        }
        assert_eq!(finished.ends, MAX_ENDS);
        assert_eq!(finished.ends(id(0)), ends(1024));
        assert!(finished.ends(id(16)).is_empty());
        assert_eq!(finished.unheard(1000).len(), 16);
        assert_eq!(finished.unheard(3).len(), 3);
        finished.forget_ends(id(0));
        assert!(finished.ends(id(0)).is_empty() && finished.contains(id(0)));
        assert_eq!(finished.unheard(1000).len(), 15);
        finished.remember(id(65), false, ends(1));
        assert_eq!(finished.ends(id(65)), ends(1));
    }
}
