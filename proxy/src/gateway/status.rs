//! What the admin endpoint shows of a running gateway.

use std::{collections::HashMap, sync::Arc};

use super::{
    Gateway,
    link::{Conn, Link, lock},
    migration::direction,
};
use crate::{
    config::Peer,
    metrics::{LinkSample, PeerLinkMetrics, PeerMetrics, StoreSample},
    status::{GatewayStatus, LinkStatus, StatusSource},
};

/// See the module's documentation.
pub(super) struct Source {
    gateway: Arc<Gateway>,
    links: HashMap<String, PeerLinkMetrics>,
    migrations: Vec<(Arc<Link>, PeerMetrics)>,
}

impl Source {
    pub(super) fn new(gateway: Arc<Gateway>) -> Self {
        let metrics = |name: &String| (name.clone(), gateway.metrics.link.for_peer(name));
        let links = gateway.far.keys().map(metrics).collect();
        // Counters show from the start, not only after the first migration.
        let migration_metrics = |link: &Arc<Link>| {
            let metrics = &gateway.metrics.migration;
            (
                link.clone(),
                metrics.for_peer(&link.peer, direction(link.role)),
            )
        };
        let migrations = gateway.links().map(migration_metrics).collect();
        Self {
            gateway,
            links,
            migrations,
        }
    }

    /// The connections that stand to a peer: ours to it first.
    fn connections(&self, peer: &str) -> Vec<Arc<Conn>> {
        let links = [self.gateway.near.get(peer), self.gateway.far.get(peer)];
        links
            .into_iter()
            .flatten()
            .filter_map(|link| link.current())
            .collect()
    }

    fn sample(&self, peer: &str) -> Option<LinkSample> {
        let connections = self.connections(peer);
        let path = connections.first()?.quinn.stats().path;
        let mut sample = LinkSample {
            rtt_seconds: path.rtt.as_secs_f64(),
            congestion_window_bytes: path.cwnd,
            packets_lost: 0,
            packets_sent: 0,
            sent_bytes: 0,
            received_bytes: 0,
        };
        for conn in connections {
            let stats = conn.quinn.stats();
            sample.packets_lost += stats.path.lost_packets;
            sample.packets_sent += stats.path.sent_packets;
            sample.sent_bytes += stats.udp_tx.bytes;
            sample.received_bytes += stats.udp_rx.bytes;
        }
        Some(sample)
    }

    fn link_status(&self, peer: &Peer) -> LinkStatus {
        let sample = self.sample(&peer.name);
        let address = match self.connections(&peer.name).first() {
            Some(conn) => Some(conn.quinn.remote_address().to_string()),
            None => peer.address.as_ref().map(ToString::to_string),
        };
        let error = |links: &HashMap<String, Arc<Link>>| links.get(&peer.name)?.last_error();
        let no_news = if self.gateway.near.contains_key(&peer.name) {
            "no answer yet"
        } else {
            "it has not connected yet; this gateway has no ingress for it and does not dial"
        };
        let metrics = self.links.get(&peer.name);
        #[expect(clippy::cast_precision_loss, reason = "a share for people")]
        let loss =
            |sample: &LinkSample| sample.packets_lost as f64 / (sample.packets_sent.max(1)) as f64;
        LinkStatus {
            peer: peer.name.clone(),
            address,
            up: sample.is_some(),
            rtt_seconds: sample.as_ref().map(|sample| sample.rtt_seconds),
            loss: sample.as_ref().map(loss),
            congestion_window_bytes: sample.as_ref().map(|s| s.congestion_window_bytes),
            sent_bytes: metrics.map_or(0, PeerLinkMetrics::sent_bytes),
            received_bytes: metrics.map_or(0, PeerLinkMetrics::received_bytes),
            error: if sample.is_some() {
                None
            } else {
                error(&self.gateway.near)
                    .or_else(|| error(&self.gateway.far))
                    .or_else(|| Some(no_news.to_owned()))
            },
        }
    }
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
            links: gateway
                .config
                .peers
                .iter()
                .map(|peer| self.link_status(peer))
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
        let gateway = &*self.gateway;
        for (peer, metrics) in &self.links {
            metrics.observe(self.sample(peer).as_ref());
        }
        for (link, metrics) in &self.migrations {
            let awaiting = link.migrations();
            metrics.observe_held_commits(awaiting.iter().filter_map(|m| m.awaiting()));
        }
        let stats = gateway.store.stats();
        gateway.metrics.store.observe(&StoreSample {
            bytes: stats.bytes,
            capacity_bytes: stats.capacity_bytes,
            pages: stats.pages,
            hits: stats.hits,
            misses: stats.misses,
            insertions: stats.insertions,
            evictions: stats.evictions,
        });
    }
}
