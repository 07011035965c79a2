//! What the far gateway's store holds, told to the near one.
//!
//! ```text
//! near: Interest (what it knows, its tenants' keys) → far: one stream of announcements, as pages come
//! ```
//!
//! The stream goes after all others, and what is on it is never waited for: it saves bytes, nothing
//! depends on it.

use std::{sync::Arc, time::Duration};

use quinn::RecvStream;
use skyferry_dedup::{
    Announcer, DomainId, DomainKey, MAX_ANNOUNCEMENT, SegmentSource, SegmentState, ShortId,
    StoreId, TieredStore,
};
use tokio::{task::spawn_blocking, time::sleep};
use tracing::debug;

use super::{
    Gateway,
    connection::LinkError,
    link::{Conn, Link},
};
use crate::wire::{
    Control, DataFlags, DataHeader, DataKind, MigrationId,
    control::{Interest, MAX_KNOWN_SEGMENTS},
};

/// Bytes of one message: few enough that applying one takes less than a millisecond.
const MESSAGE: usize = 32 << 10;
/// How often the store is looked at for something new.
const POLL: Duration = Duration::from_secs(1);
/// After everything else.
const PRIORITY: i32 = i32::MIN;
/// Memory that the near gateway needs for one page.
const BYTES_PER_PAGE: u64 = 30;

/// What the near gateway tells first: who it is allowed to hear of, and what it has heard already.
pub(super) fn interest(gateway: &Gateway, link: &Link) -> Control {
    let announced = link.announced();
    let (mut store, mut segments) = announced.position();
    if segments.len() > MAX_KNOWN_SEGMENTS {
        announced.clear();
        (store, segments) = announced.position();
    }
    let of_peer = gateway.config.ingress.iter();
    let mut tenants: Vec<&str> = of_peer
        .filter(|ingress| ingress.peer == link.peer)
        .map(|ingress| ingress.tenant.as_str())
        .collect();
    tenants.sort_unstable();
    tenants.dedup();
    let keys = tenants.iter().map(|tenant| gateway.domain(tenant));
    Control::Interest(Interest {
        store: store.0,
        capacity_pages: gateway.config.store.peer_index_bytes / BYTES_PER_PAGE,
        segments: segments
            .iter()
            .map(|state| (state.segment, state.records))
            .collect(),
        domains: keys.map(|key| *key.as_bytes()).collect(),
    })
}

/// The near gateway says what it wants to hear: from now on it does.
pub(super) fn on_interest(
    gateway: &Arc<Gateway>,
    conn: &Arc<Conn>,
    interest: Interest,
) -> Result<(), LinkError> {
    if !conn.begin_announcements() {
        return Err(LinkError::Protocol("a second interest".into()));
    }
    let (gateway, conn) = (gateway.clone(), conn.clone());
    tokio::spawn(async move {
        let ended = tokio::select! {
            closed = conn.quinn.closed() => closed.to_string(),
            Err(error) = announce(&gateway, &conn, interest) => error,
        };
        debug!(reason = ended, "no more announcements");
    });
    Ok(())
}

enum Never {}

async fn announce(gateway: &Gateway, conn: &Conn, interest: Interest) -> Result<Never, String> {
    let mut stream = conn.quinn.open_uni().await.map_err(|e| e.to_string())?;
    // Urgency is a wish; a stream that is gone shows on the first write.
    let _ = stream.set_priority(PRIORITY);
    let header = DataHeader {
        kind: DataKind::Announcements,
        flags: DataFlags::default(),
        migration: MigrationId([0; 16]),
        channel: 0,
        seq: 0,
        len: 0,
    };
    let written = stream.write_all(&header.encode()).await;
    written.map_err(|e| e.to_string())?;
    let domain = |key: &[u8; 32]| DomainKey::from_bytes(*key).id();
    let mut feed = Feed {
        tiers: gateway.tiers.clone(),
        domains: interest.domains.iter().map(domain).collect(),
        most_pages: interest.capacity_pages,
    };
    let segments = interest.segments.iter();
    let states = segments.map(|&(segment, records)| SegmentState { segment, records });
    let position = (StoreId(interest.store), states.collect());
    let mut announcer = Announcer::new(feed.store(gateway), &position);
    let mut seen = None;
    loop {
        let changes = feed.changes();
        while seen != Some(changes) {
            let mut message = vec![0; 4];
            let work = move || {
                let more = announcer.next(&feed, MESSAGE, &mut message);
                (announcer, feed, message, more)
            };
            let more;
            (announcer, feed, message, more) =
                spawn_blocking(work).await.map_err(|e| e.to_string())?;
            let length = message.len() - 4;
            if length > 0 {
                // At most `MESSAGE`.
                message[..4].copy_from_slice(&(length as u32).to_le_bytes());
                let written = stream.write_all(&message).await;
                written.map_err(|e| e.to_string())?;
            }
            if !more || length == 0 {
                seen = Some(changes);
            }
        }
        sleep(POLL).await;
    }
}

/// The segments that one peer may hear of.
struct Feed {
    tiers: Option<Arc<TieredStore>>,
    domains: Vec<DomainId>,
    /// What the peer has room for.
    most_pages: u64,
}

impl Feed {
    /// Whose segments these are. A gateway without a store on disk says so: with another id, what an
    /// earlier process announced is void.
    fn store(&self, gateway: &Gateway) -> StoreId {
        let of_disk = self.tiers.as_ref().map(|tiers| tiers.disk().id());
        of_disk.unwrap_or(StoreId(gateway.instance))
    }

    fn changes(&self) -> u64 {
        self.tiers
            .as_ref()
            .map_or(0, |tiers| tiers.disk().changes())
    }
}

impl SegmentSource for Feed {
    fn segments(&self, out: &mut Vec<SegmentState>) {
        if let Some(tiers) = &self.tiers {
            let disk = tiers.disk();
            disk.most_useful(&self.domains, self.most_pages, MAX_KNOWN_SEGMENTS, out);
        }
    }

    fn ids(&self, segment: u32, from: u32, most: usize, out: &mut Vec<ShortId>) {
        if let Some(tiers) = &self.tiers {
            tiers.disk().segment_ids(segment, from, most, out);
        }
    }
}

/// The near gateway hears what the far one has.
pub(super) async fn receive(
    link: &Link,
    conn: &Conn,
    mut stream: RecvStream,
) -> Result<(), LinkError> {
    if !conn.begin_announcements() {
        let reason = "a second stream of announcements";
        return Err(LinkError::Protocol(reason.into()));
    }
    let lost = |e: quinn::ReadExactError| LinkError::Connection(e.to_string());
    let announced = link.announced();
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length).await.map_err(lost)?;
        let length = u32::from_le_bytes(length) as usize;
        if length == 0 || length > MAX_ANNOUNCEMENT {
            return Err(LinkError::Protocol(format!(
                "an announcement of {length} bytes"
            )));
        }
        let mut message = vec![0; length];
        stream.read_exact(&mut message).await.map_err(lost)?;
        let Some(_turn) = link.turn(conn.generation).await else {
            return Ok(());
        };
        let table = announced.clone();
        let applied = spawn_blocking(move || table.apply(&message)).await;
        let applied = applied.map_err(|e| LinkError::Connection(e.to_string()))?;
        if let Err(error) = applied {
            // The next connection begins anew.
            announced.clear();
            return Err(LinkError::Protocol(error.to_string()));
        }
    }
}
