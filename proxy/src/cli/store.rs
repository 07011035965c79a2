//! `skyferry store`: looks into the page store on disk, checks it, empties it.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use skyferry_dedup::disk::{self, Purge, Summary, Verified};
use skyferry_dedup::{DomainId, DomainKey};

use super::{EXIT_USAGE, StoreCommand, complain, fail, load_config, say};
use crate::config::{Config, DiskConfig};
use crate::seed::forget_progress;

/// How often the progress of a check is shown: on a terminal, and where it may end up in a log.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
const LOG_INTERVAL: Duration = Duration::from_secs(10);

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
        StoreCommand::Verify { json, .. } => verify(&config, store, *json),
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
    manifests: ManifestsReport,
}

/// What guests held that left.
#[derive(Default, Serialize)]
struct ManifestsReport {
    count: u64,
    bytes: u64,
    /// When the oldest was written; null where there is none.
    oldest_unix_seconds: Option<u64>,
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
    manifests: u64,
}

impl StatReport {
    fn new(config: &Config, store: &DiskConfig, summary: &Summary) -> Self {
        let names: BTreeMap<[u8; 16], String> = config
            .tenants
            .iter()
            .filter_map(|t| Some((*domain_of(config, &t.name)?.as_bytes(), t.name.clone())))
            .collect();
        let mut tenants: BTreeMap<[u8; 16], TenantReport> = BTreeMap::new();
        let mut of_domain = |domain: &DomainId, add: &dyn Fn(&mut TenantReport)| {
            let bytes = *domain.as_bytes();
            add(tenants.entry(bytes).or_insert_with(|| TenantReport {
                tenant: names.get(&bytes).cloned(),
                domain: domain.to_string(),
                segments: 0,
                sealed_pages: 0,
                bytes: 0,
                manifests: 0,
            }));
        };
        for segment in &summary.segments {
            of_domain(&segment.domain, &|report| {
                report.segments += 1;
                report.sealed_pages += u64::from(segment.records.unwrap_or(0));
                report.bytes += segment.bytes;
            });
        }
        for manifest in &summary.manifests {
            of_domain(&manifest.domain, &|report| report.manifests += 1);
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
            manifests: ManifestsReport {
                count: summary.manifests.len() as u64,
                bytes: summary.manifests.iter().map(|m| m.bytes).sum(),
                oldest_unix_seconds: summary.manifests.first().map(|oldest| oldest.written),
            },
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
            "  tenant {}: {}, {} segments, {} pages in sealed ones, {} guests remembered",
            tenant.tenant.as_deref().unwrap_or("(unknown)"),
            mib(tenant.bytes),
            tenant.segments,
            tenant.sealed_pages,
            tenant.manifests
        ));
    }
    let manifests = &report.manifests;
    if let Some(oldest) = manifests.oldest_unix_seconds {
        say(format_args!(
            "  guests remembered: {} in {}, the oldest for {}",
            manifests.count,
            mib(manifests.bytes),
            since(oldest)
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
    manifests: u64,
    manifest_bytes: u64,
    /// Files of manifests that cannot be read.
    damaged_manifests: Vec<String>,
    /// Files of manifests that are larger than `limits.manifests` admits.
    oversized_manifests: Vec<String>,
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
        let names = |paths: &[PathBuf]| {
            paths
                .iter()
                .map(|path| path.display().to_string())
                .collect()
        };
        Self {
            segments: verified.segments,
            pages: verified.records,
            bytes: verified.bytes,
            cut_segments: verified.cut,
            damaged: damaged.collect(),
            manifests: verified.manifests,
            manifest_bytes: verified.manifest_bytes,
            damaged_manifests: names(&verified.damaged_manifests),
            oversized_manifests: names(&verified.oversized_manifests),
        }
    }
}

fn verify(config: &Config, store: &DiskConfig, json: bool) -> ExitCode {
    let on_terminal = io::stderr().is_terminal();
    let interval = if on_terminal {
        PROGRESS_INTERVAL
    } else {
        LOG_INTERVAL
    };
    let mut shown = Instant::now();
    let most = config.limits.manifests_bytes;
    let verified = disk::verify(&store.path, &store.key, most, |read, total| {
        if shown.elapsed() >= interval || on_terminal && read == total {
            shown = Instant::now();
            let share = (read * 100).checked_div(total).unwrap_or(100);
            let text = format!("{share:3} % of {}", mib(total));
            // That nobody reads it must not end the check.
            let _ = if on_terminal {
                write!(io::stderr().lock(), "\r{text}")
            } else {
                writeln!(io::stderr().lock(), "{text}")
            };
        }
        true
    });
    if on_terminal {
        complain("");
    }
    let report = match verified {
        Ok(verified) => VerifyReport::from(verified),
        Err(error) => return fail(&error),
    };
    let good = report.damaged.is_empty() && report.damaged_manifests.is_empty();
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
    if report.manifests > 0 {
        say(format_args!(
            "{} remembered guests ({}) are what was kept",
            report.manifests,
            mib(report.manifest_bytes)
        ));
    }
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
    for path in &report.damaged_manifests {
        complain(format_args!("{path}: cannot be read"));
    }
    for path in &report.oversized_manifests {
        complain(format_args!(
            "{path}: not read, larger than limits.manifests admits; the gateway deletes it when it starts"
        ));
    }
    if good {
        ExitCode::SUCCESS
    } else {
        fail("the store is damaged; the gateway does without what cannot be read")
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
        Ok(purged) => {
            // What was seeded is gone; that it is read again is all that this is for.
            if let Err(error) = forget_progress(&store.path) {
                complain(format_args!("skyferry: warning: {error}"));
            }
            say(format_args!(
                "deleted {} segments and {} remembered guests, {}",
                purged.segments,
                purged.manifests,
                mib(purged.bytes)
            ));
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

/// How long ago a time in seconds since 1970 was.
fn since(time: u64) -> String {
    const HOUR: u64 = 3600;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let age = now.map_or(0, |now| now.as_secs()).saturating_sub(time);
    match age {
        _ if age >= 48 * HOUR => format!("{} days", age / (24 * HOUR)),
        _ if age >= 2 * HOUR => format!("{} hours", age / HOUR),
        _ => format!("{} minutes", age / 60),
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
