//! Logs: one line per event on stderr, as text or JSON.
//!
//! What belongs to a migration carries the field `migration`, the id that both gateways and the status
//! API use. Page contents are never logged, and nothing is logged per page: a level of `trace` is as
//! safe as `info`.
//!
//! Levels: `error` the gateway cannot do its work, `warn` one migration or link suffers, `info`
//! what an operator wants to find later, `debug` how it came to that.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging for the process; once only. `filter` is a level or a list such as
/// `info,skyferry::transport=debug`.
///
/// # Errors
/// When `filter` cannot be read.
pub fn init(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter = EnvFilter::try_new(filter)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Its report of a failed write is an `eprintln!`, which panics where stderr is gone.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
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
    Ok(())
}
