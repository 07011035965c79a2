//! `skyferry gateway`.

use std::process::ExitCode;

use super::{EXIT_USAGE, GatewayArgs, allocator, complain, fail, harden, load_config};
use crate::gateway::RunError;
use crate::logging;

pub(super) fn run(args: &GatewayArgs) -> ExitCode {
    allocator::return_large_buffers();
    // Before any secret is read.
    if let Err(error) = harden::forbid_core_dumps() {
        return fail(format_args!("cannot turn core dumps off: {error}"));
    }
    let config = match load_config(&args.config) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let _log = match logging::init(args.log_format, &args.log_level) {
        Ok(log) => log,
        Err(error) => {
            let level = &args.log_level;
            complain(format_args!("skyferry: --log-level {level}: {error}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(format_args!("cannot start worker threads: {error}")),
    };
    match runtime.block_on(crate::gateway::run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            match error {
                // What the configuration says of it does not fit what is there.
                RunError::Store(_) => ExitCode::from(EXIT_USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
