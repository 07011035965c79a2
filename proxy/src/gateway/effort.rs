//! How hard one channel compresses, by what its pump spends its time on.

use std::time::{Duration, Instant};

use skyferry_dedup::{Activity, ChannelEncoder, Effort, EffortControl, FrameStats};

use super::{
    Gateway,
    link::{Link, Role},
    migration::Migration,
};
use crate::transport::Arrived;

/// How often the memory that the channels share is divided anew.
const SHARE_INTERVAL: Duration = Duration::from_secs(1);

/// How often the link is asked whether it is what the pump waits for, and how often while its rate is
/// still to be learnt.
const LINK_INTERVAL: Duration = Duration::from_millis(100);
const NEW_LINK_INTERVAL: Duration = Duration::from_millis(5);

/// See the module's documentation. Does nothing where the configuration says the level, and at the
/// far gateway.
#[derive(Debug)]
pub(super) struct Pace {
    control: Option<EffortControl>,
    activity: Activity,
    since: Instant,
    shared: Instant,
    set: Option<Effort>,
    /// What had arrived when the link was last asked, and when that was.
    arrived: Option<Arrived>,
    asked: Instant,
    /// Most of what arrived lately left more behind: to wait is to wait for the link. Otherwise it is
    /// the far end that takes its time, and fewer bytes would not help it.
    link_is_full: bool,
}

impl Pace {
    pub(super) fn new(gateway: &Gateway, migration: &Migration) -> Self {
        // What flows back to the source is small and must not wait.
        let adapts = gateway.config.compression.level.is_none() && migration.role() == Role::Near;
        let control = adapts.then(|| {
            let (rtt, _) = migration.link.path();
            let estimate = migration.link.estimate();
            let tells = estimate.is_some_and(|estimate| estimate.is_known.is_some());
            let start = Effort::start(rtt);
            let most = share(gateway, migration);
            if start == Effort::START && tells {
                EffortControl::on_unknown_link(Effort::NONE, most)
            } else {
                EffortControl::new(start, Effort::NONE, most)
            }
        });
        let now = Instant::now();
        let mut pace = Self {
            control,
            activity: Activity::default(),
            since: now,
            shared: now,
            set: None,
            arrived: None,
            asked: now,
            link_is_full: true,
        };
        pace.look_at(&migration.link);
        pace
    }

    /// The pump waited for the link from `start` until now.
    pub(super) fn waited(&mut self, start: Instant) {
        if self.link_is_full {
            self.activity.waiting_for_link += start.elapsed();
        }
    }

    /// Asks the link how fast it is, and whether it has more to send than it takes.
    fn look_at(&mut self, link: &Link) {
        let estimate = link.estimate();
        if let Some(control) = &mut self.control
            && control.is_beginning()
            && let Some(estimate) = estimate
        {
            let is_known = estimate.is_known.unwrap_or(true);
            control.on_link(estimate.rate_bytes_per_sec, is_known);
        }
        let before = self.arrived.take();
        self.arrived = estimate.and_then(|estimate| estimate.arrived);
        let full = before.zip(self.arrived);
        self.link_is_full = full.is_none_or(|(before, now)| left_more_behind(before, now));
    }

    /// The pump encoded from `start` until now.
    pub(super) fn encoded(&mut self, start: Instant) {
        self.activity.encoding += start.elapsed();
    }

    /// A frame came of it.
    pub(super) fn made(&mut self, migration: &Migration, stats: &FrameStats) {
        let [literals, compressed, stored] = [
            stats.literal_bytes,
            stats.compressed_bytes,
            stats.stored_bytes,
        ]
        .map(u64::from);
        if migration.role() == Role::Near {
            let sent = &migration.metrics.sent;
            sent.compressed(self.set, literals - stored);
            sent.compressed(Some(Effort::NONE), stored);
        }
        if self.set.is_some_and(Effort::is_none) {
            self.activity.literal_bytes += literals;
            self.activity.compressed_bytes += compressed;
        } else {
            self.activity.literal_bytes += literals - stored;
            self.activity.compressed_bytes += compressed - stored;
            self.activity.stored_bytes += stored;
        }
    }

    /// Lets the encoder go on as hard as there is time for.
    pub(super) fn apply(
        &mut self,
        gateway: &Gateway,
        migration: &Migration,
        encoder: &mut ChannelEncoder,
    ) {
        let Some(control) = &self.control else {
            return;
        };
        let now = Instant::now();
        let interval = if control.is_beginning() {
            NEW_LINK_INTERVAL
        } else {
            LINK_INTERVAL
        };
        if now - self.asked >= interval {
            self.asked = now;
            self.look_at(&migration.link);
        }
        let Some(control) = &mut self.control else {
            return;
        };
        if now - self.shared >= SHARE_INTERVAL {
            self.shared = now;
            control.limit(share(gateway, migration));
        }
        let mut activity = std::mem::take(&mut self.activity);
        activity.elapsed = now - self.since;
        self.since = now;
        let effort = control.observe(activity);
        if self.set != Some(effort) {
            self.set = Some(effort);
            tracing::debug!(migration = %migration.id, effort = effort.number(), "compression");
            migration
                .metrics
                .effort
                .set(i64::try_from(effort.number()).unwrap_or(0));
            encoder.set_effort(effort);
        }
    }
}

/// The hardest effort that this channel's part of the memory allows.
fn share(gateway: &Gateway, migration: &Migration) -> Effort {
    let channels = gateway.migration_count().max(1) * migration.channels().len().max(1);
    let most = gateway.config.compression.memory_bytes;
    Effort::within(most / u64::try_from(channels).unwrap_or(u64::MAX))
}

/// Whether more was waiting behind most of what arrived between two looks; also where nobody can tell.
fn left_more_behind(before: Arrived, now: Arrived) -> bool {
    // Less than before: another connection.
    let bytes = now.bytes.checked_sub(before.bytes);
    let waiting = now.with_more_waiting.checked_sub(before.with_more_waiting);
    match (bytes, waiting) {
        (Some(bytes), Some(waiting)) => waiting >= bytes / 2,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_full_when_most_of_what_arrives_left_more_behind() {
        let arrived = |bytes, with_more_waiting| Arrived {
            bytes,
            with_more_waiting,
        };
        let before = arrived(1000, 900);
        assert!(left_more_behind(before, arrived(2000, 1400)));
        assert!(!left_more_behind(before, arrived(2000, 1399)));
        // Nothing arrives at all, or the connection is another one.
        assert!(left_more_behind(before, before));
        assert!(left_more_behind(before, arrived(500, 0)));
    }
}
