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
use std::sync::OnceLock;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Lines that wait for being written, at most: some MiB.
const MAX_WAITING: usize = 8192;

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

/// Starts logging for the process; once only. What is returned writes the last lines when it is dropped,
/// and waits for that no longer than a second. `filter` is a level or a list such as
/// `info,skyferry::transport=debug`.
///
/// # Errors
/// When `filter` cannot be read.
pub fn init(format: LogFormat, filter: &str) -> Result<WorkerGuard, ParseError> {
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
    Ok(guard)
}
