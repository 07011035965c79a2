//! Every file in `configs/` loads, and names only metrics that exist; what texts for people say of
//! configuration and metrics is true.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use skyferry::config::{Config, Congestion, First};
use skyferry::metrics::{CommitCheck, LinkSample, Metrics, MigrationResult, Registry, render};
use skyferry::pki;
use skyferry::status::Direction;
use skyferry_dedup::{DiskStats, Effort, StoreStats};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

/// All metrics after a little of everything has happened.
fn exposition() -> String {
    let registry = Registry::new();
    let metrics = Metrics::register(&registry, 1).unwrap();
    for direction in [Direction::Out, Direction::In] {
        let peer = metrics.migration.for_peer("edge-b", direction);
        peer.finished(MigrationResult::Completed);
        peer.commit_check(CommitCheck::Agreed);
        peer.blackout.observe(0.3);
        peer.queue.observe(0.1);
        let link = metrics.link.for_peer("edge-b", direction);
        link.observe(Some(&LinkSample::default()));
        metrics.gateway.expect_refusals("edge-b", direction);
    }
    metrics.store.observe(&StoreStats {
        disk: Some(DiskStats::default()),
        ..StoreStats::default()
    });
    metrics.gateway.set_certificate_expiry(1_800_000_000);
    render(&registry).unwrap()
}

/// Names that a query may use.
fn exported() -> BTreeSet<String> {
    let text = exposition();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(['{', ' ']).next().unwrap().to_owned())
        .collect()
}

/// Words in `text` that look like our metrics.
fn used(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| {
            (word.starts_with("skyferry_") || word.starts_with("process_")) && !word.contains(':')
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_example_gateway_loads() {
    let mut seen = 0;
    for entry in fs::read_dir(configs()).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("pki");
        pki::init(&keys, None, pki::CA_DAYS).unwrap();
        for name in ["edge-a", "edge-b"] {
            pki::issue(&keys, name, &[], pki::LEAF_DAYS).unwrap();
        }
        let copy = dir.path().join(file.file_name().unwrap());
        fs::copy(&file, &copy).unwrap();
        match Config::load(&copy) {
            Ok(config) => assert_eq!(config.warnings, Vec::<String>::new(), "{}", file.display()),
            Err(errors) => panic!("{errors}"),
        }
        seen += 1;
    }
    assert!(seen >= 2, "only {seen} examples found");
}

#[test]
fn dashboard_and_rules_name_metrics_that_exist() {
    let exported = exported();
    let dashboard = fs::read_to_string(configs().join("grafana/skyferry.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&dashboard).unwrap();
    let rules = fs::read_to_string(configs().join("prometheus/skyferry.rules.yml")).unwrap();
    let tests = fs::read_to_string(configs().join("prometheus/skyferry.rules.test.yml")).unwrap();
    for (file, text) in [
        ("dashboard", &dashboard),
        ("rules", &rules),
        ("rule tests", &tests),
    ] {
        let unknown: Vec<String> = used(text).difference(&exported).cloned().collect();
        assert!(unknown.is_empty(), "{file}: no such metrics: {unknown:?}");
    }
    // And nothing is exported that nobody can look at.
    let shown = used(&dashboard);
    let base = |name: &str| {
        ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name)
            .to_owned()
    };
    let shown: BTreeSet<String> = shown.iter().map(|name| base(name)).collect();
    let missing: BTreeSet<String> = exported
        .iter()
        .map(|name| base(name))
        .filter(|name| name.starts_with("skyferry_") && !shown.contains(name))
        .collect();
    let known = ["skyferry_draining", "skyferry_log_lines_dropped_total"];
    let known = known.map(str::to_owned).into();
    assert_eq!(missing, known, "exported and not on the dashboard");
}

#[test]
fn every_metric_is_in_the_manual() {
    let manual = read("docs/operation.md");
    for line in exposition().lines() {
        let Some(rest) = line.strip_prefix("# TYPE ") else {
            continue;
        };
        let name = rest.split(' ').next().unwrap();
        assert!(
            manual.contains(&format!("`{name}")),
            "{name} is not in docs/operation.md"
        );
    }
}

/// Text of a file of the repository.
fn read(path: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(file).unwrap()
}

/// A configuration in which only what has no default is given.
fn defaults() -> Config {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    pki::issue(dir.path(), "edge-a", &[], pki::LEAF_DAYS).unwrap();
    let text = "[gateway]\nname = \"edge-a\"\n[wan]\nlisten = \"127.0.0.1:0\"\n[tls]\nca = \
                \"ca.pem\"\ncert = \"edge-a.pem\"\nkey = \"edge-a.key\"\n[[peer]]\nname = \
                \"edge-b\"\naddress = \"10.0.0.9:7700\"\n[[egress]]\npeer = \"edge-b\"\nallow = \
                [\"10.0.0.5:4444\"]\n[[ingress]]\nlisten = \"127.0.0.1:4444\"\npeer = \
                \"edge-b\"\ntarget = \"10.0.0.5:4444\"\n[store]\npath = \"store\"\n";
    Config::parse(&dir.path().join("gateway.toml"), text).unwrap()
}

/// A time, size or word as the manual writes defaults.
fn time(time: Duration) -> String {
    match time.as_millis() {
        ms if ms % 86_400_000 == 0 => format!("\"{}d\"", ms / 86_400_000),
        ms if ms % 60_000 == 0 => format!("\"{}m\"", ms / 60_000),
        ms if ms % 1000 == 0 => format!("\"{}s\"", ms / 1000),
        ms => format!("\"{ms}ms\""),
    }
}

fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 30) {
        format!("\"{}GiB\"", bytes >> 30)
    } else {
        format!("\"{}MiB\"", bytes >> 20)
    }
}

fn word(matches: bool, word: &str) -> String {
    if matches {
        format!("\"{word}\"")
    } else {
        format!("not \"{word}\"")
    }
}

fn true_defaults() -> BTreeMap<&'static str, String> {
    let config = defaults();
    let (gateway, wan, limits) = (config.gateway, config.wan, config.limits);
    let (egress, ingress) = (&config.egress[0], &config.ingress[0]);
    let disk = config.store.disk.as_ref().unwrap();
    let is_auto = wan.congestion == Congestion::Auto;
    [
        ("gateway.drain_timeout", time(gateway.drain_timeout)),
        ("wan.congestion", word(is_auto, "auto")),
        ("wan.delay_budget", time(wan.delay_budget)),
        ("wan.outage_budget", time(wan.outage_budget)),
        ("wan.keep_alive", time(wan.keep_alive)),
        ("wan.idle_timeout", time(wan.idle_timeout)),
        ("wan.socket_buffer", size(wan.socket_buffer_bytes as u64)),
        ("wan.max_udp_payload", wan.max_udp_payload.to_string()),
        ("egress[].dial_timeout", time(egress.dial_timeout)),
        (
            "ingress[].first",
            word(ingress.first == First::Client, "client"),
        ),
        (
            "ingress[].allow_no_return_path",
            ingress.allow_no_return_path.to_string(),
        ),
        (
            "ingress[].tenant",
            word(ingress.tenant == "default", "default"),
        ),
        ("store.memory", size(config.store.memory_bytes)),
        ("store.size", size(disk.size_bytes)),
        ("store.ttl", time(disk.ttl)),
        ("store.peer_index", size(config.store.peer_index_bytes)),
        (
            "compression.level",
            word(config.compression.level.is_none(), "auto"),
        ),
        ("compression.memory", size(config.compression.memory_bytes)),
        ("limits.migrations", limits.migrations.to_string()),
        (
            "limits.channels_per_migration",
            limits.channels_per_migration.to_string(),
        ),
        ("limits.places", size(limits.places_bytes)),
        ("limits.manifests", size(limits.manifests_bytes)),
        ("limits.in_flight", size(limits.in_flight_bytes)),
    ]
    .into()
}

/// The table of keys says what really holds where a key is left out, for every key that has a
/// default.
#[test]
fn the_manual_has_the_true_defaults() {
    let manual = read("docs/operation.md");
    let mut expected = true_defaults();
    assert_eq!(defaults().wan.max_rate_bytes_per_sec, None);
    let rows = manual.lines().filter_map(|line| {
        let (key, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        let default = rest
            .split(" |")
            .next()?
            .strip_prefix('`')?
            .strip_suffix('`')?;
        key.contains('.').then_some((key, default))
    });
    for (key, default) in rows {
        let held = expected.remove(key);
        let held = held.unwrap_or_else(|| panic!("{key} is not compared with the manual"));
        assert_eq!(held, default, "{key} in docs/operation.md");
    }
    assert!(
        expected.is_empty(),
        "not in docs/operation.md: {expected:?}"
    );
}

/// Blocks of TOML in a text for people.
fn toml_blocks(text: &str) -> impl Iterator<Item = &str> {
    let mut parts = text.split("```toml\n");
    parts.next();
    parts.map(|part| part.split("```").next().unwrap())
}

/// Whoever copies a configuration out of a text has one that works: each is complete, is read without
/// a warning, and `check-config` finds nothing wrong with it.
#[test]
fn every_configuration_in_the_texts_loads() {
    let mut seen = 0;
    for file in [
        "README.md",
        "docs/operation.md",
        "docs/troubleshooting.md",
        "docs/security.md",
    ] {
        for text in toml_blocks(&read(file)) {
            let dir = tempfile::tempdir().unwrap();
            let keys = dir.path().join("pki");
            pki::init(&keys, None, pki::CA_DAYS).unwrap();
            for name in ["edge-a", "edge-b"] {
                pki::issue(&keys, name, &[], pki::LEAF_DAYS).unwrap();
            }
            let path = dir.path().join("gateway.toml");
            fs::write(&path, text).unwrap();
            match Config::load(&path) {
                Ok(config) => assert_eq!(config.warnings, Vec::<String>::new(), "{file}: {text}"),
                Err(errors) => panic!("{file}: {errors}\n{text}"),
            }
            let mut command = Command::new(env!("CARGO_BIN_EXE_skyferry"));
            let output = command.arg("check-config").arg(&path).output().unwrap();
            assert!(output.status.success(), "{file}: {output:?}\n{text}");
            seen += 1;
        }
    }
    assert!(seen >= 2, "only {seen} found");
}

/// What people are told of the hardest effort is what the ladder ends with.
#[test]
fn texts_know_how_far_the_ladder_of_efforts_goes() {
    let most = Effort::MOST;
    let (last, level, mib) = (
        most.number(),
        most.level(),
        (1_u64 << most.window_log()) >> 20,
    );
    let zstd = format!("zstd {level} with a window of {mib} MiB");
    for (file, words) in [
        (
            "configs/grafana/skyferry.json",
            format!("0 copies, {last} is {zstd}."),
        ),
        (
            "docs/operation.md",
            format!("rung of the compression ladder that was last chosen, 0 (none) to {last}."),
        ),
        (
            "docs/operation.md",
            format!("from none on a fast network to {zstd}"),
        ),
        (
            "docs/operation.md",
            format!("begins at zstd {}, ", Effort::START.level()),
        ),
        (
            "docs/adr/0011-compression-follows-the-link.md",
            format!("A channel begins at rung {}, ", Effort::START.number()),
        ),
    ] {
        assert!(read(file).contains(&words), "{words:?} is not in {file}");
    }
    let help = format!(
        "# HELP skyferry_compression_effort Rung of the compression ladder that was last chosen, 0 (none) to {last} (out)."
    );
    assert!(exposition().lines().any(|line| line == help), "{help}");
}

/// What concerns migrations or links can be told apart by peer and direction; the rest is one per
/// gateway.
#[test]
fn series_carry_peer_and_direction() {
    let of_the_gateway = [
        "skyferry_build_info",
        "skyferry_certificate_expiry_timestamp_seconds",
        "skyferry_draining",
        "skyferry_log_lines_dropped_total",
        "skyferry_manifest_bytes",
        "skyferry_manifests",
        "skyferry_manifests_adopted_total",
        "skyferry_seeded_pages_total",
        "skyferry_stage_cpu_seconds_total",
    ];
    let text = exposition();
    let mut refusals_by_direction = [0; 2];
    for line in text.lines().filter(|line| line.starts_with("skyferry_")) {
        let name = line.split(['{', ' ']).next().unwrap();
        let both = line.contains("direction=\"") && line.contains("peer=\"");
        let one = of_the_gateway.contains(&name) || name.starts_with("skyferry_store_");
        assert!(both != one, "{line}");
        if name == "skyferry_refused_connections_total" {
            refusals_by_direction[usize::from(line.contains("\"in\""))] += 1;
        }
    }
    // Eight reasons out; seven in, and three for callers without a name.
    assert_eq!(refusals_by_direction, [8, 10]);
}

/// A change here is a change of what operators' dashboards rely on: say so in the changelog.
#[test]
fn exported_names_are_as_agreed() {
    let text = exposition();
    let types: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .collect();
    let expected = [
        "process_cpu_seconds_total counter",
        "process_max_fds gauge",
        "process_open_fds gauge",
        "process_resident_memory_bytes gauge",
        "process_start_time_seconds gauge",
        "process_threads gauge",
        "process_virtual_memory_bytes gauge",
        "skyferry_blackout_seconds histogram",
        "skyferry_build_info gauge",
        "skyferry_certificate_expiry_timestamp_seconds gauge",
        "skyferry_commit_checks_total counter",
        "skyferry_compression_effort gauge",
        "skyferry_draining gauge",
        "skyferry_effort_bytes_total counter",
        "skyferry_frame_bytes_total counter",
        "skyferry_guest_bytes_total counter",
        "skyferry_held_commits gauge",
        "skyferry_in_flight_bytes gauge",
        "skyferry_link_announced_pages gauge",
        "skyferry_link_congestion_window_bytes gauge",
        "skyferry_link_packets_lost_total counter",
        "skyferry_link_packets_sent_total counter",
        "skyferry_link_received_bytes_total counter",
        "skyferry_link_rtt_seconds gauge",
        "skyferry_link_sent_bytes_total counter",
        "skyferry_link_up gauge",
        "skyferry_log_lines_dropped_total counter",
        "skyferry_manifest_bytes gauge",
        "skyferry_manifests gauge",
        "skyferry_manifests_adopted_total counter",
        "skyferry_migrations_active gauge",
        "skyferry_migrations_finished_total counter",
        "skyferry_oldest_held_commit_seconds gauge",
        "skyferry_opaque_bytes_total counter",
        "skyferry_page_misses_total counter",
        "skyferry_pages_total counter",
        "skyferry_queue_seconds histogram",
        "skyferry_refused_connections_total counter",
        "skyferry_saved_bytes_total counter",
        "skyferry_seeded_pages_total counter",
        "skyferry_stage_cpu_seconds_total counter",
        "skyferry_store_bytes gauge",
        "skyferry_store_capacity_bytes gauge",
        "skyferry_store_degraded gauge",
        "skyferry_store_dropped_puts_total counter",
        "skyferry_store_evictions_total counter",
        "skyferry_store_expired_total counter",
        "skyferry_store_hits_total counter",
        "skyferry_store_index_bytes gauge",
        "skyferry_store_insertions_total counter",
        "skyferry_store_misses_total counter",
        "skyferry_store_pages gauge",
        "skyferry_store_put_bytes_total counter",
        "skyferry_store_read_errors_total counter",
        "skyferry_store_write_errors_total counter",
        "skyferry_store_written_bytes_total counter",
        "skyferry_wire_bytes_total counter",
    ];
    assert_eq!(types, expected);
}
