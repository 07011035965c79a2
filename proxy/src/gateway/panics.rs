//! A panic ends the piece of work that it happened in, and nothing else.
//!
//! What a task shares with others is behind locks, and as it was before one call or behind it; so a
//! fault in one channel, or in what one connection brings, is an early end of that like any other.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use tokio::runtime::Handle;
use tracing::error;

use super::{
    Gateway,
    channel::{Abort, Channel},
    link::Role,
    migration::Migration,
};
use crate::wire::{Control, control::ResetCode};

/// The work has panicked. What and where is in the log already.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panicked;

/// Waits for `work`, which is not gone on with once it has panicked.
pub(super) async fn caught<T>(work: impl Future<Output = T>) -> Result<T, Panicked> {
    let mut work = pin!(work);
    poll_fn(
        |context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
            Ok(polled) => polled.map(Ok),
            Err(_) => Poll::Ready(Err(Panicked)),
        },
    )
    .await
}

/// How a channel ends in whose work there was a panic.
pub(super) fn abort() -> Abort {
    Abort::new(ResetCode::Internal, "a fault inside the gateway")
}

/// Takes a channel out of its migration, and the migration out of those that run, when the channel's
/// task panics where nothing catches that: while it takes its leave.
pub(super) struct LeaveOnPanic {
    gateway: Arc<Gateway>,
    migration: Arc<Migration>,
    channel: Arc<Channel>,
}

impl LeaveOnPanic {
    pub(super) fn new(
        gateway: &Arc<Gateway>,
        migration: &Arc<Migration>,
        channel: &Arc<Channel>,
    ) -> Self {
        Self {
            gateway: gateway.clone(),
            migration: migration.clone(),
            channel: channel.clone(),
        }
    }
}

impl Drop for LeaveOnPanic {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if self.migration.keeps_source_waiting() {
            // The migration stays, so that the gateway does not stop of its own accord.
            error!(
                migration = %self.migration.id,
                "a fault inside the gateway: the source is kept waiting. Find out where the guest \
                 runs, then quit the other one by hand"
            );
            return;
        }
        // In a task of its own, where one more panic does no more harm.
        if let Ok(runtime) = Handle::try_current() {
            let (gateway, migration) = (self.gateway.clone(), self.migration.clone());
            runtime.spawn(leave(gateway, migration, self.channel.clone()));
        }
    }
}

async fn leave(gateway: Arc<Gateway>, migration: Arc<Migration>, channel: Arc<Channel>) {
    let abort = abort();
    migration.on_broken();
    migration.note_error(&abort);
    let last = migration.remove_channel(&channel);
    if last {
        gateway.finish(&migration);
    }
    // The peer may have heard nothing yet.
    let reset = Control::Reset {
        migration: migration.id,
        channel: channel.no,
        after_seq: 0,
        code: abort.code,
        released: migration.released(),
        reason: abort.reason,
    };
    migration.link.send(reset).await;
    if last && migration.role() == Role::Near {
        let close = Control::Close {
            migration: migration.id,
        };
        migration.link.send(close).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_ends_with_its_panic() {
        let done = caught(async {
            tokio::task::yield_now().await;
            7
        });
        assert_eq!(done.await.ok(), Some(7));
        let failed = caught(async {
            tokio::task::yield_now().await;
            assert_eq!(1, 2, "a fault on purpose");
        });
        assert!(failed.await.is_err());
    }
}
