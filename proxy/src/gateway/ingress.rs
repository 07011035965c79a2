//! Listeners that source VMs connect to.
//!
//! The channels of one migration arrive as separate connections to the same listener. They are
//! told to belong together by time: a connection joins the migration that is open on the listener,
//! unless it is a second main channel, or a channel of that migration has already ended.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use skyferry_core::sniff::{Sniff, sniff};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Gateway,
    channel::Channel,
    link::{Link, lock},
    migration::{Migration, direction},
    near,
    socket::{Listener, Socket},
};
use crate::{
    config::{First, Ingress},
    metrics::RefusalReason,
    wire::{
        MigrationId,
        control::{MAX_MIGRATIONS, StreamKind},
    },
};

/// Connections of one listener that have not sent anything yet.
const MAX_SILENT: usize = 512;
/// How long a connection may be silent before it counts as one that is so by its nature.
const SILENT_CHANNEL_WAIT: Duration = Duration::from_millis(100);
/// Bytes read to tell protocols apart.
const FIRST_READ: usize = 64 << 10;

/// Accepts connections for as long as the gateway runs. While it drains, running migrations may
/// still open channels; new ones are refused.
pub(super) async fn run(
    gateway: Arc<Gateway>,
    link: Arc<Link>,
    ingress: Arc<Ingress>,
    listener: Listener,
) {
    let open: Arc<Mutex<Option<Arc<Migration>>>> = Arc::default();
    let silent: Arc<Mutex<VecDeque<CancellationToken>>> = Arc::default();
    loop {
        let socket = match listener.accept().await {
            Ok(socket) => socket,
            Err(e) => {
                // Out of descriptors or memory: give others time to end.
                warn!(listen = %ingress.listen, error = %e, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let waiting = CancellationToken::new();
        make_room(&gateway, &link, &ingress, &silent, waiting.clone());
        let (gateway, link, ingress, open, silent) = (
            gateway.clone(),
            link.clone(),
            ingress.clone(),
            open.clone(),
            silent.clone(),
        );
        tokio::spawn(async move {
            let spoken = tokio::select! {
                spoken = first_bytes(&ingress, &open, &socket) => spoken,
                () = waiting.cancelled() => None,
            };
            waiting.cancel();
            lock(&silent).retain(|other| !other.is_cancelled());
            let Some((first, kind, seen)) = spoken else {
                gateway.refused(&link, RefusalReason::Silent);
                debug!(listen = %ingress.listen, "a connection ended without a word");
                return;
            };
            // A migration of QEMU's is in the clear as a whole, or within TLS.
            let stray = seen == Sniff::Tls || seen == Sniff::Other && !first.is_empty();
            let Some((migration, channel)) =
                join(&gateway, &link, &ingress, &open, kind, seen, stray)
            else {
                socket.reset();
                return;
            };
            near::run_channel(&gateway, &ingress, &migration, &channel, socket, first).await;
        });
    }
}

/// Adds a connection to those that have not spoken; where they are too many, the oldest is closed.
fn make_room(
    gateway: &Gateway,
    link: &Link,
    ingress: &Ingress,
    silent: &Mutex<VecDeque<CancellationToken>>,
    newcomer: CancellationToken,
) {
    let mut silent = lock(silent);
    silent.push_back(newcomer);
    if silent.len() > MAX_SILENT
        && let Some(oldest) = silent.pop_front()
    {
        gateway.refused(link, RefusalReason::Limit);
        warn!(listen = %ingress.listen, "too many silent connections; the oldest is closed");
        oldest.cancel();
    }
}

/// Waits for the first bytes and tells what speaks. `None`: closed without a word, or with fewer
/// than any protocol begins with. No bytes at all: a channel on which the source is silent by its
/// nature, or one on which the server speaks first.
async fn first_bytes(
    ingress: &Ingress,
    open: &Mutex<Option<Arc<Migration>>>,
    socket: &Socket,
) -> Option<(Vec<u8>, StreamKind, Sniff)> {
    let mut first = Vec::new();
    if ingress.first == First::Server {
        return Some((first, StreamKind::Opaque, Sniff::Other));
    }
    loop {
        let readable = tokio::time::timeout(SILENT_CHANNEL_WAIT, socket.readable()).await;
        match readable {
            Ok(readable) => readable.ok()?,
            Err(_) => {
                // QEMU's channel for urgent pages of postcopy says nothing until the first fault,
                // and its destination does not go on before it is there.
                let expected = lock(open)
                    .as_ref()
                    .is_some_and(|m| m.expects_silent_channel());
                if first.is_empty() && expected {
                    return Some((first, StreamKind::Opaque, Sniff::Other));
                }
                continue;
            }
        }
        let room = FIRST_READ - first.len();
        let ended = match socket.try_read(&mut first, room) {
            Ok(0) if first.is_empty() => return None,
            Ok(count) => count == 0,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => return None,
        };
        match sniff(&first) {
            Sniff::NeedMore if ended => return None,
            Sniff::NeedMore => {}
            Sniff::QemuMain => return Some((first, StreamKind::QemuMain, Sniff::QemuMain)),
            seen => return Some((first, StreamKind::Opaque, seen)),
        }
    }
}

/// Finds or makes the migration of a connection.
fn join(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    ingress: &Ingress,
    open: &Mutex<Option<Arc<Migration>>>,
    kind: StreamKind,
    seen: Sniff,
    stray: bool,
) -> Option<(Arc<Migration>, Arc<Channel>)> {
    let mut open = lock(open);
    let current = open
        .as_ref()
        .filter(|m| !m.closing.is_cancelled() && !m.maybe_committed());
    // What is none of QEMU's channels does not belong to a migration of QEMU, whichever comes first.
    let apart = stray && current.is_some_and(|m| m.has_main() || m.expects_main());
    let qemu = matches!(seen, Sniff::QemuMain | Sniff::QemuMultifd);
    let main = matches!(seen, Sniff::QemuMain | Sniff::QemuPostcopyResume);
    let joinable = current.filter(|m| {
        let second = main && m.has_main();
        !(apart || second || qemu && m.has_strays())
    });
    let migration = match joinable {
        Some(migration) => migration.clone(),
        None => {
            if gateway.draining.is_cancelled() {
                gateway.refused(link, RefusalReason::Draining);
                return None;
            }
            let make = || {
                let metrics = &gateway.metrics.migration;
                Migration::new(
                    MigrationId(super::random()),
                    link.clone(),
                    ingress.target.to_string(),
                    Some(ingress.listen.to_string()),
                    gateway.domain(&ingress.tenant),
                    metrics.for_peer(&link.peer, direction(link.role)),
                    ingress.allow_no_return_path,
                )
            };
            let fits = link.migration_count() < MAX_MIGRATIONS;
            let Some(migration) = fits.then(|| gateway.begin_migration(link, make)).flatten()
            else {
                gateway.refused(link, RefusalReason::Limit);
                warn!(listen = %ingress.listen, "too many migrations; one more refused");
                return None;
            };
            // Whoever can connect here can cause any number of them.
            if link.lines.migrations.lets_pass(Instant::now()) {
                info!(
                    migration = %migration.id,
                    listen = %ingress.listen,
                    peer = link.peer,
                    target = migration.target,
                    first = %seen,
                    "migration begins"
                );
            } else {
                migration.hush();
            }
            if !apart {
                *open = Some(migration.clone());
            }
            migration
        }
    };
    if seen == Sniff::QemuMultifd {
        migration.expect_main();
    }
    if stray {
        migration.on_stray();
    }
    let channel = Arc::new(Channel::new(
        migration.next_channel_no(),
        kind,
        &gateway.config.wan,
    ));
    if !migration.add_channel(
        channel.clone(),
        gateway.config.limits.channels_per_migration,
    ) {
        gateway.refused(link, RefusalReason::Limit);
        warn!(migration = %migration.id, "too many channels; one more refused");
        return None;
    }
    Some((migration, channel))
}
