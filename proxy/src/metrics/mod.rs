//! Metrics for Prometheus, each registered by the component that updates it.
//!
//! There is no global registry: the gateway makes one [`Registry`] and hands it to each component's
//! `register`. The parts that count in the data path ([`PeerMetrics`]) are resolved once per peer and
//! direction; an update is then one atomic addition. The label `direction` is that of the migration:
//! `out` from this site to the peer, `in` from the peer to this site; a link has that of the
//! migrations it carries. Every name here is in the table
//! of `docs/operation.md`.

mod follow;
mod gateway;
mod link;
mod migration;
mod process;
mod sent;
mod store;

pub use follow::FollowedCounter;
pub use gateway::{GatewayMetrics, RefusalReason};
pub use link::{LinkMetrics, LinkSample, PeerLinkMetrics};
pub use migration::{CommitCheck, MigrationMetrics, MigrationResult, PeerMetrics};
pub use process::ProcessMetrics;
pub use prometheus::Registry;
pub use sent::PeerSent;
pub use store::StoreMetrics;

use prometheus::core::Collector;
use prometheus::{Encoder, TextEncoder};

/// All of a gateway's metrics on one registry.
#[derive(Debug)]
pub struct Metrics {
    /// Refusals, build, certificate.
    pub gateway: GatewayMetrics,
    /// Migrations by peer and direction.
    pub migration: MigrationMetrics,
    /// Links by peer and direction.
    pub link: LinkMetrics,
    /// The page store.
    pub store: StoreMetrics,
}

impl Metrics {
    /// Makes and registers everything, the process's own figures included.
    ///
    /// # Errors
    /// When a name is registered twice: our bug.
    pub fn register(registry: &Registry, protocol: u32) -> Result<Self, prometheus::Error> {
        registry.register(Box::new(ProcessMetrics::new()?))?;
        Ok(Self {
            gateway: GatewayMetrics::register(registry, protocol)?,
            migration: MigrationMetrics::register(registry)?,
            link: LinkMetrics::register(registry)?,
            store: StoreMetrics::register(registry)?,
        })
    }
}

/// The registry in Prometheus's text format 0.0.4.
///
/// # Errors
/// When the encoder fails: our bug.
pub fn render(registry: &Registry) -> Result<String, prometheus::Error> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
}

/// Registers a metric and hands it back.
fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
