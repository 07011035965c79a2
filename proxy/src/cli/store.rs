//! `skyferry store`: looks into the page store on disk, checks it, empties it.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;
use skyferry_dedup::disk::{self, Purge, Summary, Verified};
use skyferry_dedup::{DomainId, DomainKey};

use super::{EXIT_USAGE, StoreCommand, complain, fail, load_config, say};
use crate::config::{Config, DiskConfig};
use crate::seed::forget_progress;

/// How often the progress of a check is shown.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

pub(super) fn run(command: &StoreCommand) -> ExitCode {
    let file = match command {
        StoreCommand::Stat { config, .. }
        | StoreCommand::Verify { config, .. }
        | StoreCommand::Purge { config, .. } => config,
    };
    let config = match load_config(file) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let Some(store) = &config.store.disk else {
        complain(format_args!(
            "skyferry: {}: store.path is missing: this gateway keeps pages in memory only",
            file.display()
        ));
        return ExitCode::from(EXIT_USAGE);
    };
    match command {
        StoreCommand::Stat { json, .. } => stat(&config, store, *json),
        StoreCommand::Verify { json, .. } => verify(store, *json),
        StoreCommand::Purge {
            tenant, all, yes, ..
        } => {
            let what = match what_to_purge(&config, tenant.as_deref(), *all) {
                Ok(what) => what,
                Err(message) => {
                    complain(format_args!("skyferry: {message}"));
                    return ExitCode::from(EXIT_USAGE);
                }
            };
            if !yes {
                complain(format_args!(
                    "skyferry: this deletes pages in {} for good; say --yes if you mean it",
                    store.path.display()
                ));
                return ExitCode::from(EXIT_USAGE);
            }
            purge(store, what)
        }
    }
}

/// The public name of a tenant's pages; `None` where the tenant has no secret.
fn domain_of(config: &Config, tenant: &str) -> Option<DomainId> {
    let tenant = config.tenant(tenant)?;
    let secret = tenant.secret.as_ref()?;
    Some(DomainKey::derive(secret.as_bytes(), &tenant.name).id())
}

#[derive(Serialize)]
struct StatReport {
    folder: String,
    format_version: u32,
    id: String,
    created_unix_seconds: u64,
    bytes: u64,
    capacity_bytes: u64,
    segments: usize,
    tenants: Vec<TenantReport>,
}

#[derive(Serialize)]
struct TenantReport {
    /// The tenant's name; null where the configuration has none for this domain.
    tenant: Option<String>,
    domain: String,
    segments: u64,
    /// Records of sealed segments.
    sealed_pages: u64,
    bytes: u64,
}

impl StatReport {
    fn new(config: &Config, store: &DiskConfig, summary: &Summary) -> Self {
        let names: BTreeMap<[u8; 16], String> = config
            .tenants
            .iter()
            .filter_map(|t| Some((*domain_of(config, &t.name)?.as_bytes(), t.name.clone())))
            .collect();
        let mut tenants: BTreeMap<[u8; 16], TenantReport> = BTreeMap::new();
        for segment in &summary.segments {
            let domain = *segment.domain.as_bytes();
            let report = tenants.entry(domain).or_insert_with(|| TenantReport {
                tenant: names.get(&domain).cloned(),
                domain: hex(&domain),
                segments: 0,
                sealed_pages: 0,
                bytes: 0,
            });
            report.segments += 1;
            report.sealed_pages += u64::from(segment.records.unwrap_or(0));
            report.bytes += segment.bytes;
        }
        Self {
            folder: store.path.display().to_string(),
            format_version: summary.version,
            id: hex(&summary.id),
            created_unix_seconds: summary.created,
            bytes: summary.segments.iter().map(|segment| segment.bytes).sum(),
            capacity_bytes: store.size_bytes,
            segments: summary.segments.len(),
            tenants: tenants.into_values().collect(),
        }
    }
}

fn stat(config: &Config, store: &DiskConfig, json: bool) -> ExitCode {
    let summary = match disk::stat(&store.path) {
        Ok(summary) => summary,
        Err(error) => return fail(&error),
    };
    let report = StatReport::new(config, store, &summary);
    if json {
        return say_json(&report);
    }
    say(format_args!(
        "page store {}: {} of {} in {} segments, format {}",
        report.folder,
        mib(report.bytes),
        mib(report.capacity_bytes),
        report.segments,
        report.format_version
    ));
    for tenant in &report.tenants {
        say(format_args!(
            "  tenant {}: {}, {} segments, {} pages in sealed ones",
            tenant.tenant.as_deref().unwrap_or("(unknown)"),
            mib(tenant.bytes),
            tenant.segments,
            tenant.sealed_pages
        ));
    }
    ExitCode::SUCCESS
}

#[derive(Serialize)]
struct VerifyReport {
    segments: u64,
    pages: u64,
    bytes: u64,
    cut_segments: u64,
    damaged: Vec<DamagedReport>,
}

#[derive(Serialize)]
struct DamagedReport {
    segment: u32,
    /// Records that cannot be read; null when not even their number can be told.
    records: Option<u32>,
}

impl From<Verified> for VerifyReport {
    fn from(verified: Verified) -> Self {
        let damaged = verified.damaged.iter().map(|damaged| DamagedReport {
            segment: damaged.number,
            records: damaged.records,
        });
        Self {
            segments: verified.segments,
            pages: verified.records,
            bytes: verified.bytes,
            cut_segments: verified.cut,
            damaged: damaged.collect(),
        }
    }
}

fn verify(store: &DiskConfig, json: bool) -> ExitCode {
    let shows = io::stderr().is_terminal();
    let mut shown = Instant::now();
    let verified = disk::verify(&store.path, &store.key, |read, total| {
        if shows && (shown.elapsed() >= PROGRESS_INTERVAL || read == total) {
            shown = Instant::now();
            let share = (read * 100).checked_div(total).unwrap_or(100);
            // That nobody reads it must not end the check.
            let _ = write!(io::stderr().lock(), "\r{share:3} % of {}", mib(total));
        }
        true
    });
    if shows {
        complain("");
    }
    let report = match verified {
        Ok(verified) => VerifyReport::from(verified),
        Err(error) => return fail(&error),
    };
    let good = report.damaged.is_empty();
    if json {
        let said = say_json(&report);
        return if good { said } else { ExitCode::FAILURE };
    }
    say(format_args!(
        "{} pages ({}) in {} whole segments are what was stored",
        report.pages,
        mib(report.bytes),
        report.segments
    ));
    if report.cut_segments > 0 {
        say(format_args!(
            "{} segments were not sealed: what was being written at a stop may be missing",
            report.cut_segments
        ));
    }
    for damaged in &report.damaged {
        let what = match damaged.records {
            Some(records) => format!("{records} pages cannot be read"),
            None => "cannot be read at all".to_owned(),
        };
        complain(format_args!("segment {}: {what}", damaged.segment));
    }
    if good {
        ExitCode::SUCCESS
    } else {
        fail("the store is damaged; the gateway does without these pages")
    }
}

fn what_to_purge(config: &Config, tenant: Option<&str>, all: bool) -> Result<Purge, String> {
    let Some(name) = tenant.filter(|_| !all) else {
        return Ok(Purge::All);
    };
    if config.tenant(name).is_none() {
        let known: Vec<&str> = config.tenants.iter().map(|t| t.name.as_str()).collect();
        let known = known.join(", ");
        return Err(format!("there is no tenant \"{name}\"; known: {known}"));
    }
    domain_of(config, name)
        .map(Purge::Domain)
        .ok_or_else(|| format!(
            "tenant \"{name}\" has no secret_file, so nothing tells its pages from others; use --all"
        ))
}

fn purge(store: &DiskConfig, what: Purge) -> ExitCode {
    match disk::purge(&store.path, what) {
        Ok((segments, bytes)) => {
            // What was seeded is gone; that it is read again is all that this is for.
            if let Err(error) = forget_progress(&store.path) {
                complain(format_args!("skyferry: warning: {error}"));
            }
            say(format_args!("deleted {segments} segments, {}", mib(bytes)));
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error),
    }
}

pub(super) fn say_json(report: &impl Serialize) -> ExitCode {
    match serde_json::to_string_pretty(report) {
        Ok(text) => {
            say(text);
            ExitCode::SUCCESS
        }
        Err(error) => fail(error),
    }
}

fn mib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let mib = bytes as f64 / f64::from(1 << 20);
    format!("{mib:.1} MiB")
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
