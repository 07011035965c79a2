//! Migration over QMP: settings, progress, outcome, blackout.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::launch::Qemu;

/// How often a running migration is looked at. QEMU renews its estimate every 100 ms.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

/// How long an address may stay taken: a child that is being started holds a copy of every socket
/// until it becomes another program.
const TAKEN_LIMIT: Duration = Duration::from_secs(3);

/// Several connections with compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multifd {
    /// Connections for pages, beside the main one.
    pub channels: u8,
    /// zstd level; `None` sends pages as they are.
    pub zstd_level: Option<u8>,
}

/// Capabilities and parameters. Source and destination get the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationSettings {
    /// Capability `return-path`.
    pub return_path: bool,
    /// Capability `multifd`.
    pub multifd: Option<Multifd>,
    /// Capability `xbzrle`.
    pub xbzrle: bool,
    /// Capability `pause-before-switchover`.
    pub pause_before_switchover: bool,
    /// Parameter `max-bandwidth`, in bytes per second; 0 is no limit.
    pub max_bytes_per_sec: u64,
    /// Parameter `downtime-limit`.
    pub downtime_limit: Duration,
}

impl Default for MigrationSettings {
    fn default() -> Self {
        Self {
            return_path: true,
            multifd: None,
            xbzrle: false,
            pause_before_switchover: false,
            max_bytes_per_sec: 0,
            downtime_limit: Duration::from_millis(300),
        }
    }
}

/// One look at a migration (`query-migrate`).
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// When QEMU was asked.
    pub at: Instant,
    /// `setup`, `active`, `device`, `completed`, `failed`, …; `none` before the first.
    pub status: String,
    /// Time since the start.
    pub total: Duration,
    /// Bytes that QEMU has written.
    pub transferred_bytes: u64,
    /// Bytes of RAM still to go.
    pub remaining_bytes: u64,
    /// Zero pages so far.
    pub zero_pages: u64,
    /// Pages sent as they are so far.
    pub normal_pages: u64,
    /// QEMU's estimate of its bandwidth, in Mbit/s.
    pub mbps: f64,
    /// How often QEMU has collected the dirty bitmap.
    pub rounds: u64,
    /// QEMU's own idea of the downtime; only once completed.
    pub downtime: Option<Duration>,
    /// Why it failed.
    pub error: Option<String>,
}

impl Progress {
    fn parse(at: Instant, value: &Value) -> Self {
        let ram = &value["ram"];
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        Self {
            at,
            status: value["status"].as_str().unwrap_or("none").to_owned(),
            total: Duration::from_millis(number(&value["total-time"])),
            transferred_bytes: number(&ram["transferred"]),
            remaining_bytes: number(&ram["remaining"]),
            zero_pages: number(&ram["duplicate"]),
            normal_pages: number(&ram["normal"]),
            mbps: ram["mbps"].as_f64().unwrap_or(0.0),
            rounds: number(&ram["dirty-sync-count"]),
            downtime: value["downtime"].as_u64().map(Duration::from_millis),
            error: value["error-desc"].as_str().map(str::to_owned),
        }
    }

    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self.status.as_str(), "completed" | "failed" | "cancelled")
    }
}

/// How a migration went.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The last look.
    pub end: Progress,
    /// All looks, in order.
    pub samples: Vec<Progress>,
}

impl Outcome {
    /// # Errors
    /// Unless the migration has completed; the text has QEMU's reason and logs.
    pub fn expect_completed(self, source: &Qemu) -> Result<Self> {
        if self.end.status != "completed" {
            let reason = self.end.error.as_deref().unwrap_or("no reason given");
            let status = &self.end.status;
            bail!(
                "migration from {}: {status}, {reason}\n{}",
                source.label(),
                source.explain()
            );
        }
        Ok(self)
    }
}

impl Qemu {
    /// Sets capabilities and parameters; on a destination before [`Self::listen`].
    ///
    /// # Errors
    /// When this QEMU does not know one of them.
    pub fn configure_migration(&self, settings: &MigrationSettings) -> Result<()> {
        let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
        let capabilities = json!([
            capability("events", true),
            capability("return-path", settings.return_path),
            capability("xbzrle", settings.xbzrle),
            capability("pause-before-switchover", settings.pause_before_switchover),
            capability("multifd", settings.multifd.is_some()),
        ]);
        let arguments = json!({"capabilities": capabilities});
        self.qmp().execute("migrate-set-capabilities", arguments)?;
        let mut parameters = json!({
            "max-bandwidth": settings.max_bytes_per_sec,
            "downtime-limit": u64::try_from(settings.downtime_limit.as_millis())?,
        });
        if let Some(multifd) = settings.multifd {
            parameters["multifd-channels"] = json!(multifd.channels);
            if let Some(level) = multifd.zstd_level {
                parameters["multifd-compression"] = json!("zstd");
                parameters["multifd-zstd-level"] = json!(level);
            }
        }
        self.qmp().execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Listens for a migration (`tcp:HOST:PORT`, `unix:PATH`).
    ///
    /// # Errors
    /// When the address cannot be bound for three seconds.
    pub fn listen(&self, uri: &str) -> Result<()> {
        let end = Instant::now() + TAKEN_LIMIT;
        let taken = |error: &anyhow::Error| format!("{error:#}").contains("already in use");
        loop {
            let outcome = self.qmp().execute("migrate-incoming", json!({"uri": uri}));
            if !outcome.as_ref().is_err_and(taken) || Instant::now() > end {
                return outcome.map(|_| ());
            }
            thread::sleep(SAMPLE_INTERVAL);
        }
    }

    /// Starts a migration; returns at once.
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn start_migration(&self, uri: &str) -> Result<()> {
        self.qmp()
            .execute("migrate", json!({"uri": uri}))
            .map(|_| ())
    }

    /// Goes on after the pause before the switchover.
    ///
    /// # Errors
    /// When the migration is not there.
    pub fn continue_migration(&self) -> Result<()> {
        let arguments = json!({"state": "pre-switchover"});
        self.qmp()
            .execute("migrate-continue", arguments)
            .map(|_| ())
    }

    /// Cancels the migration.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn cancel_migration(&self) -> Result<()> {
        self.qmp().execute("migrate_cancel", json!({})).map(|_| ())
    }

    /// How the migration stands.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn migration(&self) -> Result<Progress> {
        let at = Instant::now();
        Ok(Progress::parse(
            at,
            &self.qmp().execute("query-migrate", json!({}))?,
        ))
    }

    /// Watches a migration until it is over, showing each look to `watch`.
    ///
    /// # Errors
    /// When it is not over within `limit`, or QEMU has gone.
    pub fn wait_migration(
        &self,
        limit: Duration,
        mut watch: impl FnMut(&Progress),
    ) -> Result<Outcome> {
        let end = Instant::now() + limit;
        let mut samples = Vec::new();
        loop {
            let progress = self.migration().with_context(|| self.explain())?;
            watch(&progress);
            samples.push(progress.clone());
            if progress.is_final() {
                return Ok(Outcome {
                    end: progress,
                    samples,
                });
            }
            if Instant::now() > end {
                bail!(
                    "migration not over after {limit:?}\n{progress:?}\n{}",
                    self.explain()
                );
            }
            thread::sleep(SAMPLE_INTERVAL);
        }
    }
}

/// The guest's real downtime: from `STOP` at the source to `RESUME` at the destination, by the time
/// stamps that both QEMUs put on their events (one host, one clock).
///
/// # Errors
/// When one of the events did not come within a few seconds.
pub fn blackout(source: &Qemu, destination: &Qemu) -> Result<Duration> {
    let limit = Duration::from_secs(10);
    let resumed = destination.qmp().wait_event("RESUME", limit)?;
    let stopped = source
        .qmp()
        .last_event("STOP")
        .context("the source guest never stopped")?;
    Ok(resumed.at.saturating_sub(stopped.at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_qemus_answer() {
        let answer = json!({
            "status": "completed", "total-time": 8100, "downtime": 211,
            "ram": {"transferred": 181_000_000u64, "remaining": 0, "mbps": 178.5,
                    "duplicate": 250_000, "normal": 140_000, "dirty-sync-count": 3},
        });
        let progress = Progress::parse(Instant::now(), &answer);
        assert!(progress.is_final());
        assert_eq!(progress.downtime, Some(Duration::from_millis(211)));
        assert_eq!((progress.rounds, progress.mbps), (3, 178.5));
        let progress = Progress::parse(Instant::now(), &json!({}));
        assert_eq!(progress.status, "none");
        assert!(!progress.is_final());
    }
}
