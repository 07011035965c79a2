//! Listeners that source VMs connect to.
//!
//! The channels of one migration arrive as separate connections to the same listener. They are
//! told to belong together by time: a connection joins the migration that is open on the listener,
//! unless it is a second main channel, or a channel of that migration has already ended.

use std::sync::{Arc, Mutex};

use skyferry_core::sniff::{Sniff, sniff};
use tokio::sync::Semaphore;
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
    wire::{MigrationId, control::StreamKind},
};

/// Connections of one listener that have not sent anything yet.
const MAX_SILENT: usize = 512;
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
    let silent = Arc::new(Semaphore::new(MAX_SILENT));
    loop {
        let socket = match listener.accept().await {
            Ok(socket) => socket,
            Err(e) => {
                // Out of descriptors or memory: give others time to end.
                warn!(listen = %ingress.listen, error = %e, "cannot accept");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(waiting) = silent.clone().try_acquire_owned() else {
            gateway.metrics.gateway.refused(RefusalReason::Limit);
            warn!(listen = %ingress.listen, "too many silent connections; one more refused");
            continue;
        };
        let (gateway, link, ingress, open) =
            (gateway.clone(), link.clone(), ingress.clone(), open.clone());
        tokio::spawn(async move {
            let Some((first, kind, seen)) = first_bytes(&ingress, &socket).await else {
                gateway.metrics.gateway.refused(RefusalReason::Silent);
                debug!(listen = %ingress.listen, "a connection closed without a word");
                return;
            };
            drop(waiting);
            let Some((migration, channel)) = join(&gateway, &link, &ingress, &open, kind, seen)
            else {
                socket.reset();
                return;
            };
            near::run_channel(&gateway, &ingress, &migration, &channel, socket, first).await;
        });
    }
}

/// Waits for the first bytes and tells what speaks. `None`: closed without a word.
async fn first_bytes(ingress: &Ingress, socket: &Socket) -> Option<(Vec<u8>, StreamKind, Sniff)> {
    let mut first = Vec::new();
    if ingress.first == First::Server {
        return Some((first, StreamKind::Opaque, Sniff::Other));
    }
    loop {
        socket.readable().await.ok()?;
        let room = FIRST_READ - first.len();
        let ended = match socket.try_read(&mut first, room) {
            Ok(0) if first.is_empty() => return None,
            Ok(count) => count == 0,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => return None,
        };
        match sniff(&first) {
            Sniff::NeedMore if !ended => {}
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
) -> Option<(Arc<Migration>, Arc<Channel>)> {
    let mut open = lock(open);
    let joinable = open.as_ref().filter(|migration| {
        !(migration.closing.is_cancelled() || kind == StreamKind::QemuMain && migration.has_main())
    });
    let migration = match joinable {
        Some(migration) => migration.clone(),
        None => {
            if gateway.draining.is_cancelled() {
                gateway.metrics.gateway.refused(RefusalReason::Draining);
                return None;
            }
            if gateway.migration_count() >= gateway.config.limits.migrations {
                gateway.metrics.gateway.refused(RefusalReason::Limit);
                warn!(listen = %ingress.listen, "too many migrations; one more refused");
                return None;
            }
            let migration = Arc::new(Migration::new(
                MigrationId(super::random()),
                link.clone(),
                ingress.target.to_string(),
                Some(ingress.listen.to_string()),
                gateway.domain(&ingress.tenant),
                gateway
                    .metrics
                    .migration
                    .for_peer(&link.peer, direction(link.role)),
                ingress.allow_no_return_path,
            ));
            info!(
                migration = %migration.id,
                listen = %ingress.listen,
                peer = link.peer,
                target = migration.target,
                first = ?seen,
                "migration begins"
            );
            link.add_migration(migration.clone());
            *open = Some(migration.clone());
            migration
        }
    };
    if seen == Sniff::QemuMultifd {
        migration.expect_main();
    }
    let channel = Arc::new(Channel::new(
        migration.next_channel_no(),
        kind,
        gateway.config.wan.delay_budget,
    ));
    if !migration.add_channel(
        channel.clone(),
        gateway.config.limits.channels_per_migration,
    ) {
        gateway.metrics.gateway.refused(RefusalReason::Limit);
        warn!(migration = %migration.id, "too many channels; one more refused");
        return None;
    }
    Some((migration, channel))
}
