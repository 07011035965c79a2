//! The near role on a new connection: what it tells the far gateway of what was begun on those before.

use std::time::Instant;

use tracing::info;

use super::{
    channel::{Abort, Channel},
    far,
    link::{Conn, Link},
    migration::Migration,
    near::{self, attach, close, reset_message},
    rest,
};
use crate::wire::{
    Control, MigrationId,
    control::{ChannelPosition, MAX_MIGRATIONS, ResetCode, StreamKind},
};

/// What is to be said on a new connection.
#[derive(Debug, Default)]
pub(super) struct Takeover {
    pub(super) messages: Vec<Control>,
    /// Migrations that are over, of which Close is said again.
    pub(super) over: Vec<MigrationId>,
}

/// A new connection takes over: queues what we have as its first message, and returns the messages
/// that resume it. Called under the lock under which channels are opened, so that a channel is
/// opened on the old connection and resumed on this one, or opened on this one.
pub(super) fn take_over(link: &Link, conn: &Conn) -> Takeover {
    let migrations = link.migrations();
    let room = MAX_MIGRATIONS.saturating_sub(migrations.len());
    // Asked behind those that run: one that ends meanwhile is among both, not among none.
    let over = link.finished().unheard(room);
    let running = migrations.iter().map(|m| m.id);
    let over_ids = over.iter().map(|(id, _)| *id);
    conn.send_first(Control::Live {
        migrations: running.chain(over_ids).collect(),
    });
    let mut takeover = Takeover::default();
    for migration in &migrations {
        let mut standing = migration.standing();
        standing.open.retain(|channel| channel.is_openable());
        let open = standing.open.iter().map(|channel| {
            channel.ask_position(conn.generation);
            ChannelPosition {
                channel: channel.no,
                next_seq: channel.recv_position(),
            }
        });
        takeover.resume(migration.id, open.collect(), standing.ends);
        if standing.over {
            // About to be finished; its task may have said so on the connection before.
            takeover.close(migration.id);
        }
    }
    for (id, ends) in over {
        takeover.resume(id, Vec::new(), ends);
        takeover.close(id);
    }
    takeover
}

impl Takeover {
    /// Resumes a migration with channels at these positions; of those that have ended here in order
    /// the last acknowledgement may have been lost with the connection.
    fn resume(
        &mut self,
        migration: MigrationId,
        open: Vec<ChannelPosition>,
        ends: Vec<ChannelPosition>,
    ) {
        // Before the question: whoever answers that has heard of them.
        let acks = ends.iter().map(|end| far::ack(migration, *end));
        self.messages.extend(acks);
        let channels: Vec<_> = open.into_iter().chain(ends).collect();
        if !channels.is_empty() {
            self.messages.push(Control::Resume {
                migration,
                channels,
            });
        }
    }

    fn close(&mut self, migration: MigrationId) {
        self.messages.push(close(migration));
        self.over.push(migration);
    }
}

/// Waits until the far gateway has acted on what was said on this connection so far, the Close of
/// these migrations included, and forgets where they ended. What is not heard while the connection
/// stands, or in good time, is said again on the next one.
pub(super) async fn forget_when_heard(link: &Link, conn: &Conn, over: &[MigrationId]) {
    if !over.is_empty() && conn.settle().await {
        let mut finished = link.finished();
        over.iter().for_each(|id| finished.forget_ends(*id));
    }
}

/// The far gateway says where it stands.
pub(super) async fn on_resumed(
    link: &Link,
    conn: &Conn,
    id: MigrationId,
    known: bool,
    released: bool,
    positions: &[ChannelPosition],
) {
    let Some(migration) = link.migration(id) else {
        // One that is over, of which Close comes behind the question.
        return;
    };
    // Of a migration that it has forgotten the far gateway says that it may have been released, which
    // can't be for one whose commit was never asked for.
    let released = released && migration.maybe_committed();
    if released {
        migration.set_released();
    }
    if !known && (migration.was_opened() || released) {
        let mut abort = Abort::new(
            ResetCode::Unknown,
            "the peer does not know the migration any more",
        );
        abort.from_peer = true;
        abort.released = released;
        migration.abort(&abort);
        // For those that have ended here already and wait for this.
        migration.on_last_word(released);
        return;
    }
    if known {
        migration.on_opened();
    }
    if link.lines.resumptions.lets_pass(Instant::now()) {
        info!(migration = %id, released, "resumed");
    }
    // Of those that have ended here since the question.
    for end in migration.standing().ends {
        if positions.iter().any(|p| p.channel == end.channel) {
            conn.send(far::ack(id, end)).await;
        }
    }
    for channel in migration
        .channels()
        .iter()
        .filter(|channel| channel.take_position_asked(conn.generation))
    {
        let position = positions
            .iter()
            .find(|position| position.channel == channel.no);
        if let Some(abort) = channel.abort_reason() {
            on_resumed_behind_the_end(&migration, channel, conn, &abort, position).await;
            continue;
        }
        match position {
            Some(position) => attach(&migration, channel, conn, position.next_seq).await,
            None if channel.opened.is_cancelled() => {
                let mut abort = Abort::new(ResetCode::Unknown, "the channel ended at the peer");
                abort.from_peer = true;
                abort.released = released;
                channel.abort(abort);
            }
            None => {
                if let Some(message) = channel.open_message() {
                    conn.send(message).await;
                    attach(&migration, channel, conn, 0).await;
                }
            }
        }
    }
    if let Some(message) = near::commit_message(&migration) {
        conn.send(message).await;
    }
}

/// A channel that has ended here is kept for the far gateway's word: it has not heard of the end, or
/// has nothing any more that could release the commit byte.
async fn on_resumed_behind_the_end(
    migration: &Migration,
    channel: &Channel,
    conn: &Conn,
    abort: &Abort,
    stands: Option<&ChannelPosition>,
) {
    if abort.from_peer {
        return;
    }
    let Some(position) = stands else {
        channel.given_up.cancel();
        if channel.kind == StreamKind::QemuMain {
            migration.on_last_word(migration.released());
        }
        return;
    };
    conn.send(reset_message(migration, channel, abort)).await;
    if rest::counts(migration, abort) {
        attach(migration, channel, conn, position.next_seq).await;
    }
}

/// Another process is at the far end: what the one before knew is lost, whether a commit byte was
/// released included, unless that is `remembered`: what this one answers to Resume is the last word then.
pub(super) fn on_restart(link: &Link, remembered: bool) {
    if remembered {
        return;
    }
    for migration in link
        .migrations()
        .iter()
        .filter(|migration| migration.was_opened() || migration.maybe_committed())
    {
        // A request that was not answered may have been followed all the same: it is not made again
        // at a destination that may be running.
        migration.on_far_forgot();
        migration.withdraw_commit();
        let mut abort = Abort::new(ResetCode::Unknown, "the far gateway was restarted");
        abort.from_peer = true;
        abort.released = true;
        migration.abort(&abort);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::gateway::rig::{Pair, join, near_link, near_migration};

    /// What a new connection is told of a migration whose only channel has just ended: in order, or
    /// early. Its task has not finished it yet, and has said Close on the connection before, if any.
    async fn told_of(in_order: bool) -> Vec<Control> {
        let pair = Pair::new().await;
        let (conn, mut queue) = Conn::new(pair.near.clone(), 2);
        let link = near_link();
        let migration = near_migration(&link);
        link.add_migration(migration.clone());
        let channel = join(&migration);
        if in_order {
            migration.on_ended(&channel);
        } else {
            migration.on_broken();
        }
        assert!(migration.remove_channel(&channel));
        let takeover = take_over(&link, &conn);
        let live = Control::Live {
            migrations: vec![migration.id],
        };
        assert_eq!(queue.try_recv(), Ok(live));
        assert_eq!(takeover.over, [migration.id]);
        takeover.messages
    }

    /// The far gateway would remember the end of such a migration, or keep its channels, for as long
    /// as it runs.
    #[tokio::test(start_paused = true)]
    async fn close_is_said_again_of_a_migration_that_is_about_to_be_finished() {
        let id = MigrationId([1; 16]);
        let messages = told_of(true).await;
        let end = ChannelPosition {
            channel: 0,
            next_seq: 0,
        };
        let resume = Control::Resume {
            migration: id,
            channels: vec![end],
        };
        assert_eq!(messages, [far::ack(id, end), resume, close(id)]);
        assert_eq!(told_of(false).await, [close(id)]);
    }

    /// A channel that has not joined yet is no reason to give up a migration that has just begun.
    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_of_a_migration_without_channels_yet() {
        let pair = Pair::new().await;
        let (conn, _queue) = Conn::new(pair.near.clone(), 2);
        let link = near_link();
        link.add_migration(near_migration(&link));
        let takeover = take_over(&link, &conn);
        assert!(takeover.messages.is_empty() && takeover.over.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn ends_are_remembered_until_close_was_heard() {
        let pair = Pair::new().await;
        let (conn, _queue) = Conn::new(pair.near.clone(), 1);
        let link = near_link();
        let id = MigrationId([1; 16]);
        let end = ChannelPosition {
            channel: 0,
            next_seq: 3,
        };
        link.finished().remember(id, false, vec![end]);
        // What it answers to Resume says nothing of the Close behind that.
        on_resumed(&link, &conn, id, true, false, &[end]).await;
        let over = [id];
        let silence = timeout(
            Duration::from_secs(600),
            forget_when_heard(&link, &conn, &over),
        );
        assert!(silence.await.is_ok(), "waited for ever");
        assert_eq!(link.finished().ends(id), [end], "nothing was heard");
        let heard = async { conn.on_pong(2, Duration::ZERO) };
        tokio::join!(biased; forget_when_heard(&link, &conn, &over), heard);
        assert!(link.finished().ends(id).is_empty());
    }
}
