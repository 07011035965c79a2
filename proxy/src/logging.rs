//! Logs: one line per event on stderr, as text or JSON.
//!
//! What belongs to a migration carries the field `migration`, the id that both gateways and the status
//! API use. Page contents are never logged, and nothing is logged per page: a level of `trace` is as
//! safe as `info`.
//!
//! Nothing waits for whoever reads them: a thread of its own writes, and lines for which it has no room any
//! more are counted and left out. A gateway whose terminal is halted or whose journal is stuck goes on.
//!
//! Levels: `error` the gateway cannot do its work, `warn` one migration or link suffers, `info`
//! what an operator wants to find later, `debug` how it came to that.

use std::io::IsTerminal;
use std::sync::{OnceLock, mpsc};
use std::time::Duration;
use std::{panic, thread};

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Lines that wait for being written, at most: some MiB.
const MAX_WAITING: usize = 8192;

/// How long the last lines may take at the end.
const LAST_LINES_WAIT: Duration = Duration::from_millis(1500);

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Lines that were left out because nobody took those before.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED
        .get()
        .map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Writes the last lines when it is dropped, and waits for that for a short while only.
#[derive(Debug)]
pub struct LastLines(Option<WorkerGuard>);

impl Drop for LastLines {
    fn drop(&mut self) {
        let (written, is_written) = mpsc::channel();
        let guard = self.0.take();
        // Where nobody takes lines any more it complains on stdout, which may be stuck as well.
        let writing = thread::Builder::new().spawn(move || {
            drop(guard);
            let _ = written.send(());
        });
        if writing.is_ok() {
            let _ = is_written.recv_timeout(LAST_LINES_WAIT);
        }
    }
}

/// Panics become lines like any other: what the standard library writes of them would wait for whoever reads
/// stderr.
fn log_panics() {
    panic::set_hook(Box::new(|info| {
        let reason = info.payload_as_str().unwrap_or_default();
        let location = info.location().map(ToString::to_string);
        tracing::error!(location, reason, "panicked");
    }));
}

/// Starts logging for the process; once only. `filter` is a level or a list such as
/// `info,skyferry::transport=debug`.
///
/// # Errors
/// When `filter` cannot be read.
pub fn init(format: LogFormat, filter: &str) -> Result<LastLines, ParseError> {
    let filter = EnvFilter::try_new(filter)?;
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(MAX_WAITING)
        .thread_name("log-writer")
        .finish(std::io::stderr());
    DROPPED.get_or_init(|| writer.error_counter());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Its report of a failed write is an `eprintln!`, which panics where stderr is gone.
        .log_internal_errors(false)
        .with_writer(writer);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
        // Fields stand beside `timestamp`, `level` and `message`. The module would take the name
        // `target`, which events use for the destination VM's address.
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_target(false)
            .with_span_list(false)
            .init(),
    }
    log_panics();
    Ok(LastLines(Some(guard)))
}
