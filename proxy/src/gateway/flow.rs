//! One channel between its socket and the link, in both directions, until both have ended.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    Gateway,
    channel::{Abort, Channel},
    link::Role,
    migration::Migration,
    near,
    pump_in::{Ended, PumpIn},
    pump_out::PumpOut,
    socket::Socket,
    transmit::transmit,
};
use crate::{
    session::{Class, OutFrame},
    wire::{
        DataFlags,
        control::{ResetCode, StreamKind},
    },
};

/// How a channel came to its end.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Both directions ended in order, and everything was delivered.
    Closed,
    /// Ended early.
    Aborted(Abort),
}

/// How long the end of a source's stream may take to be delivered before it becomes a reset.
const SOURCE_LEFT_WAIT: Duration = Duration::from_secs(10);

/// How long a VMM that takes no more bytes has to close its side before that counts as a reset.
const BROKEN_SOCKET_WAIT: Duration = Duration::from_secs(1);
/// How often the socket of a VM that has ended its side is looked at.
const BROKEN_SOCKET_POLL: Duration = Duration::from_millis(100);

/// Runs a channel. `first` are bytes already read from the socket.
pub(super) async fn run(
    gateway: &Arc<Gateway>,
    migration: &Arc<Migration>,
    channel: &Arc<Channel>,
    socket: &Socket,
    first: Vec<u8>,
) -> Outcome {
    let Some(pump_in) = PumpIn::new(gateway, migration, channel, socket, first) else {
        return Outcome::Aborted(Abort::new(ResetCode::Internal, "the peer was never met"));
    };
    let inward = async {
        let ended = tokio::select! {
            ended = pump_in.run() => ended?,
            () = broken_for_long(migration, channel) => Ended::Reset,
        };
        pass_on_end(gateway, migration, channel, ended).await
    };
    let is_source = migration.role() == Role::Near && channel.kind == StreamKind::QemuMain;
    let outward = PumpOut::new(gateway, migration, channel, socket).run();
    let passed_on = CancellationToken::new();
    let both = async {
        let inward = async {
            inward.await?;
            if is_source && migration.awaits_verdict() {
                tokio::select! {
                    () = delivered(channel) => {}
                    abort = left_for_long(migration) => return Err(abort),
                }
            } else if !is_source {
                tokio::select! {
                    () = passed_on.cancelled() => {}
                    abort = gone_behind_its_end(migration, channel, socket) => return Err(abort),
                }
            }
            Ok(())
        };
        let outward = async {
            outward.await?;
            passed_on.cancel();
            Ok(())
        };
        tokio::try_join!(inward, outward)?;
        delivered(channel).await;
        Ok(())
    };
    tokio::select! {
        result = both => match result {
            Ok(()) => Outcome::Closed,
            Err(abort) => Outcome::Aborted(abort),
        },
        abort = channel.until_aborted() => Outcome::Aborted(abort),
        abort = near::left_behind_the_commit(migration, socket), if is_source => Outcome::Aborted(abort),
        never = transmit(migration, channel) => never,
    }
}

/// Waits until everything that was accepted, the end included, has been delivered.
async fn delivered(channel: &Channel) {
    while !channel.sending_done() {
        channel.space.notified().await;
    }
}

/// A source closes its socket in one go, so whoever waits for it to read or for its last bytes to
/// be delivered may wait for ever: the link can be down, the destination stuck.
async fn left_for_long(migration: &Migration) -> Abort {
    tokio::time::sleep(SOURCE_LEFT_WAIT).await;
    let mut abort = Abort::new(ResetCode::Endpoint, "the source closed its connection");
    abort.source_left = true;
    abort.released = migration.released();
    abort
}

async fn broken_for_long(migration: &Migration, channel: &Channel) {
    channel.write_broken.cancelled().await;
    loop {
        let before = channel.pushed();
        tokio::time::sleep(BROKEN_SOCKET_WAIT).await;
        let silent = channel.is_idle() && channel.pushed() == before;
        if silent || !migration.is_other_protocol() {
            return;
        }
    }
}

/// Passes on that the hypervisor closed its socket.
async fn pass_on_end(
    gateway: &Gateway,
    migration: &Migration,
    channel: &Channel,
    ended: Ended,
) -> Result<(), Abort> {
    if migration.speaks_for_it(channel) {
        match migration.role() {
            Role::Near => migration.on_source_left(),
            Role::Far => migration.on_destination_left(),
        }
    }
    if migration.role() == Role::Far
        && migration.verdict().is_some()
        && let Some(delay) = gateway.faults.delay_verdict()
    {
        tokio::time::sleep(delay).await;
    }
    let in_order = ended == Ended::Closed
        && if migration.is_other_protocol() {
            !channel.socket_reset.load(Ordering::Acquire)
        } else {
            !channel.write_broken.is_cancelled()
        };
    if migration.role() == Role::Near
        && migration.maybe_committed()
        && migration.awaits_verdict()
        && migration.verdict().is_none()
    {
        // The source's guest runs again: whatever is not released yet must never be.
        migration.withdraw_commit();
        let mut abort = Abort::new(ResetCode::Endpoint, "the source left before the verdict");
        abort.source_left = true;
        return Err(abort);
    }
    // Behind the verdict every end is an orderly one: nothing must make it look like a failure.
    if migration.verdict().is_some() || in_order {
        let end = DataFlags {
            end: true,
            ..DataFlags::default()
        };
        channel.push(OutFrame {
            payload: bytes::Bytes::new(),
            flags: end,
            raw_len: 0,
            retained: skyferry_dedup::Retained::default(),
            class: Class::Urgent,
            accepted_at: Instant::now(),
            permits: Vec::new(),
        });
        return Ok(());
    }
    Err(broken_off(migration, channel))
}

fn broken_off(migration: &Migration, channel: &Channel) -> Abort {
    let mut abort = if migration.role() == Role::Far && channel.socket_lost.load(Ordering::Acquire)
    {
        // Not the VM's word: it may be running.
        Abort::new(
            ResetCode::Outage,
            "the connection to the VM's side was lost",
        )
    } else {
        Abort::new(ResetCode::Endpoint, "the VM's side reset the connection")
    };
    abort.source_left = migration.role() == Role::Near;
    abort.released = migration.released();
    abort
}

/// A VM that has closed its connection altogether, and not its sending side alone, says so with an end in order
/// first; that it takes no more shows when it has been sent something. Its other side must learn of that: what it
/// sends is lost. Once the destination may run, nothing but its word ends the migration.
async fn gone_behind_its_end(migration: &Migration, channel: &Channel, socket: &Socket) -> Abort {
    loop {
        tokio::select! {
            () = channel.write_broken.cancelled() => {}
            () = tokio::time::sleep(BROKEN_SOCKET_POLL) => {}
        }
        if migration.past_commit() || migration.verdict().is_some() {
            std::future::pending::<()>().await;
        }
        if let Some(error) = socket.broken() {
            channel.on_socket_error(&error);
            channel.write_broken.cancel();
        }
        if channel.write_broken.is_cancelled() {
            return broken_off(migration, channel);
        }
    }
}
