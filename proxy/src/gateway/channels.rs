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

/// A migration's channels at one moment.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// Those that have not ended.
    pub(super) open: Vec<Arc<Channel>>,
    /// Where those stand that have ended in order and are gone.
    pub(super) ends: Vec<ChannelPosition>,
    /// The last one is gone: the migration is over, or about to be.
    pub(super) over: bool,
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

    pub(super) fn standing(&self) -> Standing {
        Standing {
            open: self.open.values().cloned().collect(),
            ends: self.ends(),
            over: self.closed,
        }
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytes::Bytes;
    use skyferry_dedup::Retained;

    use crate::{
        gateway::{
            channel::Abort,
            rig::{join, near_link, near_migration},
        },
        session::{Class, InFrame, OutFrame},
        wire::{DataFlags, control::ResetCode},
    };

    /// A reset in its last moment could take back bytes that the VMM has not read yet.
    #[test]
    fn what_has_ended_in_order_is_not_ended_early() {
        let link = near_link();
        let migration = near_migration(&link);
        let channel = join(&migration);
        let abort = Abort::new(ResetCode::Outage, "the link was away");
        let flags = DataFlags {
            end: true,
            ..DataFlags::default()
        };
        channel.push(OutFrame {
            payload: Bytes::new(),
            flags,
            raw_len: 0,
            retained: Retained::default(),
            class: Class::Urgent,
            accepted_at: Instant::now(),
            permits: Vec::new(),
        });
        let frame = InFrame {
            seq: 0,
            flags,
            payload: Vec::new(),
            permit: None,
        };
        channel.on_frame(frame).unwrap();
        assert!(channel.poll_frame().is_some());
        channel.on_delivered(1);
        assert!(channel.on_ack(1, Duration::ZERO).is_some() && channel.is_done());
        migration.abort(&abort);
        assert_eq!(channel.abort_reason(), None);
        assert_eq!(migration.status().error, None);
        // One that still waits for its last frame is.
        migration.remove_channel(&channel);
        let migration = near_migration(&link);
        let channel = join(&migration);
        migration.abort(&abort);
        assert_eq!(channel.abort_reason(), Some(abort));
    }
}
