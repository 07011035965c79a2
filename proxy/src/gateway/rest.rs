//! What a channel that has come to an early end still owes: the bytes that were accepted before it.
//!
//! A guest's stream that breaks off is of no use to anybody, and the sooner both sides know, the better. What a
//! connection of another protocol has brought before its VM left counts to the last byte, as it would without
//! gateways.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::{
    Gateway,
    channel::{Abort, Channel},
    migration::Migration,
    socket::Socket,
    transmit::transmit,
};
use crate::wire::control::ResetCode;

/// How long a VM's kernel may take none of the last bytes that were written for it.
const TAKING_WAIT: Duration = Duration::from_secs(10);
/// How long it may take to take them all.
const TAKING_LIMIT: Duration = Duration::from_secs(120);
/// How often it is looked at.
const TAKING_POLL: Duration = Duration::from_millis(10);

/// Whether what was accepted before this end is still to be delivered.
pub(super) fn counts(migration: &Migration, abort: &Abort) -> bool {
    abort.code == ResetCode::Endpoint && migration.is_other_protocol()
}

/// Whether the VM is given time to take what was written for it before its connection ends so. The peer may
/// have forgotten a connection that came to its end while the link was away, when all of it had arrived here.
pub(super) fn is_worth_taking(migration: &Migration, abort: &Abort) -> bool {
    let ended = matches!(abort.code, ResetCode::Endpoint | ResetCode::Unknown);
    abort.from_peer && ended && migration.is_other_protocol()
}

/// Sends what was accepted before the end, until all of it is delivered or cannot be any more: the channel has
/// ended at the peer as well, or is given up here.
pub(super) async fn deliver(migration: &Migration, channel: &Channel) {
    let delivered = async {
        while channel.frames_in_flight() > 0 {
            channel.space.notified().await;
        }
    };
    // Nobody takes what comes, and memory is reserved for it.
    let dropping = async {
        loop {
            while channel.poll_frame().is_some() {}
            channel.arrived.notified().await;
        }
    };
    tokio::select! {
        () = delivered => {}
        () = channel.given_up.cancelled() => {}
        () = standstill(channel) => {}
        never = dropping => never,
        never = transmit(migration, channel) => never,
    }
}

/// Waits until nothing has been delivered for as long as a link may be away.
async fn standstill(channel: &Channel) {
    loop {
        let before = channel.frames_in_flight();
        tokio::time::sleep(channel.patience).await;
        if channel.frames_in_flight() == before {
            return;
        }
    }
}

/// Waits until the VM's kernel has taken what was written: the reset that follows would throw it away.
/// A gateway that has waited long enough for what runs does not wait for this.
pub(super) async fn taken(gateway: &Gateway, socket: &Socket) {
    tokio::select! {
        () = gateway.giving_up.cancelled() => {}
        _ = timeout(TAKING_LIMIT, all_taken(socket)) => {}
    }
}

async fn all_taken(socket: &Socket) {
    let mut unread = Vec::new();
    let (mut left, mut since) = (socket.unsent(), Instant::now());
    while left > 0 && since.elapsed() < TAKING_WAIT {
        // What is left to read makes the kernel throw away what is left to send.
        unread.clear();
        let _ = socket.try_read(&mut unread, 64 << 10);
        tokio::time::sleep(TAKING_POLL).await;
        let now = socket.unsent();
        if now != left {
            (left, since) = (now, Instant::now());
        }
    }
}
