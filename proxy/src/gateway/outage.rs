//! A link that stays away for longer than the outage budget.

use std::sync::Arc;

use tokio::time::timeout;

use super::{Gateway, channel::Abort, link::Link};
use crate::wire::control::ResetCode;

/// Gives up the link's migrations when it stays away for too long, as both gateways do. Those past
/// their commit wait for as long as it takes: the source for the destination's verdict, and the
/// destination's verdict for the source.
pub(super) async fn watch(gateway: Arc<Gateway>, link: Arc<Link>) {
    let budget = gateway.config.wan.outage_budget;
    let mut conns = link.watch();
    loop {
        // The sender lives as long as the link.
        let _ = conns.wait_for(Option::is_none).await;
        let back = timeout(budget, conns.wait_for(Option::is_some))
            .await
            .is_ok();
        if back {
            continue;
        }
        let why = link
            .last_error()
            .map_or(String::new(), |error| format!(": {error}"));
        let reason = format!(
            "the link to {} was away for more than {budget:?}{why}",
            link.peer
        );
        for migration in link.migrations().iter().filter(|m| !m.past_commit()) {
            migration.abort(&Abort::new(ResetCode::Outage, reason.clone()));
        }
        let _ = conns.wait_for(Option::is_some).await;
    }
}
