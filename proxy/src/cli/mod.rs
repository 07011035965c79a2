//! The command line.
//!
//! Exit codes: 0 done, 1 it failed, 2 the command line or the configuration is wrong.

mod allocator;
mod gateway;
mod harden;
mod http;
mod live;
mod pki;
mod seed;
mod status;
mod store;
mod table;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::config::parse_size;
use crate::logging::LogFormat;
use crate::pki::{CA_DAYS, LEAF_DAYS, MAX_DAYS};
use crate::seed::Format;

/// Exit code for a wrong command line or configuration; clap uses the same.
const EXIT_USAGE: u8 = 2;

/// Carries live migrations of virtual machines between sites.
///
/// A gateway stands at each site. A hypervisor points its ordinary migration at
/// the local gateway; the gateway leaves out what the far side already holds,
/// compresses the rest, carries it over QUIC, and the far gateway hands the very
/// same bytes to the receiving hypervisor.
#[derive(Debug, Parser)]
#[command(name = "skyferry", version, verbatim_doc_comment, after_help = FIVE_COMMANDS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const FIVE_COMMANDS: &str = "\
Two gateways in five commands, beside copies of configs/gateway-a.toml and
configs/gateway-b.toml, which bring both up on one machine:
  skyferry pki init  --dir pki
  skyferry pki issue --dir pki --name edge-a
  skyferry pki issue --dir pki --name edge-b
  skyferry gateway --config gateway-a.toml
  skyferry gateway --config gateway-b.toml      # in another terminal
The files say what to change for two sites; docs/operation.md has every key.

Exit codes: 0 done, 1 it failed, 2 wrong command line or configuration.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a gateway until SIGTERM or SIGINT, then drain it
    Gateway(GatewayArgs),
    /// Check a configuration and the files it names; exit code 2 if anything is wrong
    CheckConfig {
        /// The configuration file
        file: PathBuf,
    },
    /// Make certificates for gateways
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Show migrations and links of a running gateway
    #[command(after_help = STATUS_COLUMNS)]
    Status(StatusArgs),
    /// Look into the page store on disk, check it, empty it
    #[command(subcommand)]
    Store(StoreCommand),
    /// Fill the page store from disk images, kernels and folders, before any guest has come
    ///
    /// Guests booted from a seeded image have much of their memory (page cache, libraries) at this site
    /// already when they are moved here. Works while the gateway runs, and while it does not. An
    /// interrupted run goes on where it was.
    Seed(SeedArgs),
}

#[derive(Debug, Args)]
struct GatewayArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How log lines on stderr look
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
    /// Least level to log (error, warn, info, debug, trace), or per module:
    /// info,skyferry::transport=debug
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "info",
        env = "SKYFERRY_LOG"
    )]
    log_level: String,
}

#[derive(Debug, Subcommand)]
enum PkiCommand {
    /// Make a certificate authority: ca.pem and ca.key; and tenant.key, by which gateways know pages
    Init {
        /// Folder for it; made if missing
        #[arg(long)]
        dir: PathBuf,
        /// The CA's common name [default: "Skyferry CA" and a random number]
        #[arg(long, value_name = "CN")]
        name: Option<String>,
        /// Days of validity
        #[arg(long, default_value_t = CA_DAYS, value_parser = days())]
        days: u32,
    },
    /// Issue a gateway's certificate: NAME.pem and NAME.key
    Issue {
        /// Folder with ca.pem and ca.key
        #[arg(long)]
        dir: PathBuf,
        /// The gateway's name: gateway.name in its file, [[peer]] name elsewhere
        #[arg(long)]
        name: String,
        /// Days of validity
        #[arg(long, default_value_t = LEAF_DAYS, value_parser = days())]
        days: u32,
        /// A further DNS name or IP address to carry; may be given several times
        #[arg(long, value_name = "NAME")]
        san: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Show what the store holds; works while a gateway uses it
    Stat {
        /// The gateway's configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Read every page and check that it is what was stored; the gateway must be stopped
    Verify {
        /// The gateway's configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete stored pages for good; the gateway must be stopped
    #[command(group = clap::ArgGroup::new("what").required(true))]
    Purge {
        /// The gateway's configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// The pages of this tenant
        #[arg(long, value_name = "NAME", group = "what")]
        tenant: Option<String>,
        /// Everything, also a store of another version or with another key
        #[arg(long, group = "what")]
        all: bool,
        /// Do it
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
struct SeedArgs {
    /// The gateway's configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Whose guests will be moved here [default: the only tenant with a secret_file]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Most bytes to read a second, such as 50MiB [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = bytes_per_sec)]
    rate: Option<u64>,
    /// How the files named are to be read [default: qcow2 if they begin so and name no other file, else
    /// raw]; with qcow2 backing files are read, too, so trust who made the image
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Begin anew though an earlier run was interrupted
    #[arg(long)]
    restart: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Disk images (raw or qcow2), disks, files; and folders, of which all regular files are read
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
}

fn bytes_per_sec(text: &str) -> Result<u64, String> {
    let text = text.strip_suffix("/s").unwrap_or(text);
    parse_size(text)
        .filter(|&bytes| bytes > 0)
        .ok_or_else(|| "must be a size such as 50MiB, read each second".into())
}

fn days() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(MAX_DAYS))
}

const STATUS_COLUMNS: &str = "\
WIRE counts the bytes of migration frames, and RATIO is guest by wire bytes:
both leave out the overheads of QUIC, UDP and IP and what is sent again after
losses. SENT and RECEIVED of a link count the payload of UDP, all of QUIC's
overheads included; only the headers of UDP and IP come on top.";

#[derive(Debug, Args)]
struct StatusArgs {
    /// The gateway's admin endpoint
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9700")]
    admin: String,
    /// Take the admin endpoint from this configuration file instead
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    config: Option<PathBuf>,
    /// Print the status as JSON
    #[arg(long)]
    json: bool,
    /// Print once, though this is a terminal
    #[arg(long)]
    once: bool,
    /// Print again and again, though this is no terminal, or with --json
    #[arg(long, conflicts_with = "once")]
    watch: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    match Cli::parse().command {
        Command::Gateway(args) => gateway::run(&args),
        Command::CheckConfig { file } => check_config(&file),
        Command::Pki(command) => pki::run(&command),
        Command::Status(args) => status::run(&args),
        Command::Store(command) => store::run(&command),
        Command::Seed(args) => seed::run(&args),
    }
}

/// Loads a configuration, or says all that is wrong with it.
fn load_config(path: &std::path::Path) -> Result<Config, ExitCode> {
    Config::load(path).map_err(|errors| {
        complain(errors);
        ExitCode::from(EXIT_USAGE)
    })
}

fn check_config(path: &std::path::Path) -> ExitCode {
    let config = match load_config(path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    for warning in &config.warnings {
        complain(format_args!("{}: warning: {warning}", path.display()));
    }
    say(format_args!(
        "{}: good: gateway {}, peers: {}, ingress listeners: {}, egress rules: {}",
        path.display(),
        config.gateway.name,
        config.peers.len(),
        config.ingress.len(),
        config
            .egress
            .iter()
            .map(|egress| egress.allow.len())
            .sum::<usize>(),
    ));
    ExitCode::SUCCESS
}

/// Ends with an error message and code 1.
fn fail(message: impl std::fmt::Display) -> ExitCode {
    complain(format_args!("skyferry: {message}"));
    ExitCode::FAILURE
}

/// Writes a line to stdout. That nobody reads it (a closed pipe) changes nothing of what was done.
fn say(line: impl std::fmt::Display) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// Writes a line to stderr; that nobody reads it must not change how the program ends.
fn complain(line: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
