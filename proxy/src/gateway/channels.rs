//! The channels of a migration: those that stand, and what stays known of those that have ended.

use std::{collections::BTreeMap, sync::Arc};

use super::channel::{Channel, Mark};
use crate::wire::{ChannelNo, control::ChannelPosition};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Channels {
    pub(super) open: BTreeMap<ChannelNo, Arc<Channel>>,
    /// Those that ended in order.
    ended: BTreeMap<ChannelNo, Ended>,
    /// A channel ended early.
    pub(super) broken: bool,
    /// Far: the peer has heard of all ends.
    pub(super) ends_known: bool,
    /// The last channel is gone, and with it the migration: none joins any more.
    closed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Ended {
    /// Where its stream stood.
    mark: Mark,
    /// Frames that were received.
    received: u64,
}

impl Channels {
    /// Adds a channel; false when there are `limit` already, the number was taken before, or the last
    /// one has ended.
    pub(super) fn add(&mut self, channel: Arc<Channel>, limit: usize) -> bool {
        let taken = self.open.contains_key(&channel.no) || self.ended.contains_key(&channel.no);
        let full = self.open.len() + self.ended.len() >= limit;
        if self.closed || full || taken {
            return false;
        }
        self.open.insert(channel.no, channel);
        true
    }

    /// Takes note of where a channel stands that has ended in order.
    pub(super) fn on_ended(&mut self, channel: &Channel) {
        let ended = Ended {
            mark: channel.mark(),
            received: channel.recv_position(),
        };
        self.ended.insert(channel.no, ended);
    }

    /// Takes a channel out; true when it was the last.
    pub(super) fn remove(&mut self, no: ChannelNo) -> bool {
        self.open.remove(&no);
        self.closed = self.open.is_empty();
        self.closed
    }

    /// Where the channels stand that have ended in order and are gone.
    pub(super) fn ends(&self) -> Vec<ChannelPosition> {
        let gone = |no: &ChannelNo| !self.open.contains_key(no);
        let ends = self.ended.iter().filter(|(no, _)| gone(no));
        let position = |(no, ended): (&ChannelNo, &Ended)| ChannelPosition {
            channel: *no,
            next_seq: ended.received,
        };
        ends.map(position).collect()
    }

    /// Whether what arrived on a channel agrees with `wanted`; `None` while it has not got that
    /// far.
    pub(super) fn agrees(&self, no: ChannelNo, wanted: Mark) -> Option<bool> {
        match self.open.get(&no) {
            Some(channel) => channel.agrees(wanted),
            // Nothing was sent on a channel that has not been opened here yet.
            None if wanted == Mark::default() => Some(true),
            None => Some(self.ended.get(&no).map(|ended| ended.mark) == Some(wanted)),
        }
    }

    /// Where the streams of all channels besides `main` stand, those that have ended included.
    /// `None` when one ended early.
    pub(super) fn other_marks(&self, main: ChannelNo) -> Option<Vec<(ChannelNo, Mark)>> {
        if self.broken {
            return None;
        }
        let open = self
            .open
            .values()
            .map(|channel| (channel.no, channel.mark()));
        let ended = self.ended.iter().map(|(no, ended)| (*no, ended.mark));
        Some(open.chain(ended).filter(|(no, _)| *no != main).collect())
    }
}
