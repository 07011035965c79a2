//! A made-up migration between two fake ends, through a pair of gateways.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{End, FakeEnd, FakeListener, Sending, shut};
use crate::gateway::{Gateway, GatewayPair, Route, Side};
use crate::process::wait_for;

/// How long anything may take that is not slow on purpose.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A source that has begun to write, and the destination that was dialled for it.
#[derive(Debug)]
pub struct FakeMigration {
    /// The source's end.
    pub source: FakeEnd,
    /// The destination's end.
    pub destination: FakeEnd,
    /// What the source has begun to write.
    pub sending: Sending,
}

impl FakeMigration {
    /// Connects a source along `route`, lets it write `bytes`, and takes the call at the
    /// destination, which must come.
    ///
    /// # Errors
    /// When nobody listens at the ingress, or the destination is not dialled.
    pub fn begin(route: &Route, listener: &FakeListener, bytes: &[u8]) -> Result<Self> {
        let source = FakeEnd::connect(&route.listen)?;
        let sending = source.send_in_background(bytes.to_vec());
        let destination = listener.accept(LIMIT)?;
        Ok(Self {
            source,
            destination,
            sending,
        })
    }

    /// Bytes that the source has written and the destination has not read.
    #[must_use]
    pub fn between(&self) -> u64 {
        let read = self.destination.received_len() as u64;
        self.sending.sent().saturating_sub(read)
    }

    /// Makes sure that those are less than `limit` for `time`.
    ///
    /// # Errors
    /// When they were more.
    pub fn expect_between(&self, limit: u64, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let mut most = 0;
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
            most = most.max(self.between());
        }
        eprintln!("at most {most} bytes between source and destination, limit {limit}");
        ensure!(most < limit, "{most} bytes accepted and not delivered");
        Ok(())
    }

    /// The rest of a migration that goes well, after the source has begun to write `stream`: the
    /// destination reads all of it, says that its guest runs, and closes; the source reads that,
    /// then the end, and closes.
    ///
    /// # Errors
    /// When anything else happens.
    pub fn conclude(self, stream: &[u8]) -> Result<()> {
        let Self {
            source,
            destination,
            sending,
        } = self;
        destination
            .wait_received(stream.len(), LIMIT)
            .context("the destination")?;
        sending.finish(LIMIT)?;
        destination.expect_received(stream)?;
        destination.send(&shut(0))?;
        drop(destination);
        expect_verdict(&source, &shut(0))
    }
}

/// Makes sure that the source reads `answer`, and then the end of the stream.
///
/// # Errors
/// When it reads anything else.
pub fn expect_verdict(source: &FakeEnd, answer: &[u8]) -> Result<()> {
    let end = source.wait_end(LIMIT).context("the source")?;
    source.expect_received(answer).context("the source")?;
    ensure!(end == End::Closed, "the source reads {end:?}");
    Ok(())
}

/// Carries `stream` along a route, as a source and a destination do that agree.
///
/// # Errors
/// When it does not go well; the text has the gateways' logs.
pub fn migrate(pair: &GatewayPair, route: usize, stream: &[u8]) -> Result<()> {
    let route = pair.route(route);
    let run = || {
        let listener = FakeListener::bind(&route.target)?;
        FakeMigration::begin(route, &listener, stream)?.conclude(stream)
    };
    run().with_context(|| pair.explain())
}

/// Waits until `count` migrations are over at a gateway and returns them, latest first.
///
/// # Errors
/// When fewer are after [`LIMIT`].
pub fn wait_finished(gateway: &Gateway, count: usize) -> Result<Vec<Value>> {
    wait_for(
        &format!("{count} finished migrations"),
        LIMIT,
        || {
            let status = gateway.status()?;
            let running = status["migrations"].as_array().map_or(0, Vec::len);
            let recent = status["recent"].as_array().cloned().unwrap_or_default();
            Ok((running == 0 && recent.len() >= count).then_some(recent))
        },
        || format!("{:?}\n{}", gateway.status(), gateway.log_tail()),
    )
}

/// Makes sure that the latest migration has ended as `state` at both gateways; `count` are over.
///
/// # Errors
/// When it has not.
pub fn expect_state(pair: &GatewayPair, count: usize, state: &str) -> Result<()> {
    for side in [Side::A, Side::B] {
        let finished = wait_finished(pair.gateway(side), count)?;
        let latest = &finished[0];
        ensure!(
            latest["state"] == state,
            "{} says {latest}\n{}",
            side.name(),
            pair.explain()
        );
    }
    Ok(())
}
