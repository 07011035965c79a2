//! What a running gateway counts, and what its admin endpoint shows.

use std::sync::{Arc, Mutex};

use super::{
    Gateway,
    link::{Link, Role, lock},
    migration::direction,
};
use crate::{
    metrics::{LinkSample, PeerLinkMetrics, PeerMetrics, RefusalReason},
    status::{Direction, GatewayStatus, LinkStatus, StatusSource},
};

/// See the module's documentation.
pub(super) struct Source {
    gateway: Arc<Gateway>,
    links: Vec<Shown>,
    /// Held while sampled totals are carried over: an older sample must not come after a newer one.
    sampling: Mutex<()>,
}

/// A link that the configuration has a use for.
struct Shown {
    link: Arc<Link>,
    metrics: PeerLinkMetrics,
    migrations: PeerMetrics,
}

impl Gateway {
    /// Counts a refusal on a link.
    pub(super) fn refused(&self, link: &Link, reason: RefusalReason) {
        let metrics = &self.metrics.gateway;
        metrics.refused(reason, Some(&link.peer), direction(link.role));
    }

    /// Counts a refusal of a caller who is not known to be one of the peers.
    pub(super) fn refused_stranger(&self, reason: RefusalReason) {
        self.metrics.gateway.refused(reason, None, Direction::In);
    }

    /// The links that can carry migrations, in the order of the configuration: to a peer with an
    /// ingress, from a peer with an egress.
    fn usable_links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.config.peers.iter().flat_map(|peer| {
            let near = self.near.get(&peer.name);
            let far = self.far.get(&peer.name);
            let far = far.filter(|_| self.egress.contains_key(&peer.name));
            near.into_iter().chain(far)
        })
    }
}

impl Source {
    pub(super) fn new(gateway: Arc<Gateway>) -> Self {
        // Counters show from the start, not only after the first migration.
        let shown = |link: &Arc<Link>| {
            let direction = direction(link.role);
            let metrics = &gateway.metrics;
            metrics.gateway.expect_refusals(&link.peer, direction);
            Shown {
                link: link.clone(),
                metrics: metrics.link.for_peer(&link.peer, direction),
                migrations: metrics.migration.for_peer(&link.peer, direction),
            }
        };
        let links = gateway.usable_links().map(shown).collect();
        Self {
            gateway,
            links,
            sampling: Mutex::default(),
        }
    }

    fn link_status(&self, shown: &Shown) -> LinkStatus {
        let Shown { link, metrics, .. } = shown;
        let sample = sample(link);
        let dialled = || self.gateway.config.peer(&link.peer)?.address.as_ref();
        let address = match (link.current(), link.role) {
            (Some(conn), _) => Some(conn.quinn.remote_address().to_string()),
            (None, Role::Near) => dialled().map(ToString::to_string),
            (None, Role::Far) => None,
        };
        let no_news = || match link.role {
            Role::Near => "no answer yet".to_owned(),
            Role::Far => "the peer has not connected yet; it does once it has an ingress for \
                          this gateway"
                .to_owned(),
        };
        let error = match sample {
            Some(_) => None,
            None => Some(link.last_error().unwrap_or_else(no_news)),
        };
        #[expect(clippy::cast_precision_loss, reason = "a share for people")]
        let loss =
            |sample: &LinkSample| sample.packets_lost as f64 / (sample.packets_sent.max(1)) as f64;
        LinkStatus {
            peer: link.peer.clone(),
            direction: direction(link.role),
            address,
            up: sample.is_some(),
            rtt_seconds: sample.as_ref().map(|sample| sample.rtt_seconds),
            loss: sample.as_ref().map(loss),
            congestion_window_bytes: sample.as_ref().map(|s| s.congestion_window_bytes),
            sent_bytes: metrics.sent_bytes(),
            received_bytes: metrics.received_bytes(),
            error,
        }
    }
}

/// The connection that stands.
fn sample(link: &Link) -> Option<LinkSample> {
    let conn = link.current()?;
    let stats = conn.quinn.stats();
    Some(LinkSample {
        connection: conn.generation,
        rtt_seconds: stats.path.rtt.as_secs_f64(),
        congestion_window_bytes: stats.path.cwnd,
        packets_lost: stats.path.lost_packets,
        packets_sent: stats.path.sent_packets,
        sent_bytes: stats.udp_tx.bytes,
        received_bytes: stats.udp_rx.bytes,
        announced_pages: match link.role {
            Role::Near => link.announced().len() as u64,
            Role::Far => 0,
        },
    })
}

impl StatusSource for Source {
    fn status(&self) -> GatewayStatus {
        self.refresh_metrics();
        let gateway = &*self.gateway;
        let mut migrations: Vec<_> = gateway
            .links()
            .flat_map(|link| link.migrations())
            .map(|migration| migration.status())
            .collect();
        migrations.sort_by(|a, b| a.started_at.total_cmp(&b.started_at));
        GatewayStatus {
            name: gateway.config.gateway.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            draining: gateway.draining.is_cancelled(),
            links: self
                .links
                .iter()
                .map(|link| self.link_status(link))
                .collect(),
            migrations,
            recent: lock(&gateway.recent).iter().cloned().collect(),
        }
    }

    fn ready(&self) -> Result<(), String> {
        if self.gateway.draining.is_cancelled() {
            Err("draining".into())
        } else {
            Ok(())
        }
    }

    fn refresh_metrics(&self) {
        let _sampling = lock(&self.sampling);
        let gateway = &*self.gateway;
        for shown in &self.links {
            shown.metrics.observe(sample(&shown.link).as_ref());
            let running = shown.link.migrations();
            shown
                .migrations
                .observe_held_commits(running.iter().filter_map(|m| m.awaiting()));
        }
        gateway.metrics.store.observe(&gateway.store.stats());
        let (kept, bytes) = gateway.manifests.stats();
        let figures = &gateway.metrics.gateway;
        figures
            .manifests
            .set(i64::try_from(kept).unwrap_or(i64::MAX));
        figures
            .manifest_bytes
            .set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
