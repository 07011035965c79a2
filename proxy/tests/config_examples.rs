//! Every file in `configs/` loads, and names only metrics that exist.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use skyferry::config::Config;
use skyferry::metrics::{CommitCheck, LinkSample, Metrics, MigrationResult, Registry, render};
use skyferry::pki;
use skyferry::status::Direction;
use skyferry_dedup::{DiskStats, StoreStats};

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
        pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
        for name in ["edge-a", "edge-b"] {
            pki::issue(dir.path(), name, &[], pki::LEAF_DAYS).unwrap();
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
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operation.md");
    let manual = fs::read_to_string(manual).unwrap();
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

#[test]
fn the_manual_has_the_true_defaults() {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    pki::issue(dir.path(), "edge-a", &[], pki::LEAF_DAYS).unwrap();
    let text = "[gateway]\nname = \"edge-a\"\n[wan]\nlisten = \"127.0.0.1:0\"\n[tls]\nca = \
                \"ca.pem\"\ncert = \"edge-a.pem\"\nkey = \"edge-a.key\"\n[[peer]]\nname = \
                \"edge-b\"\n[[egress]]\npeer = \"edge-b\"\nallow = [\"10.0.0.5:4444\"]\n";
    let config = Config::parse(&dir.path().join("gateway.toml"), text).unwrap();
    let millis = |time: std::time::Duration| match time.as_millis() {
        ms if ms % 60_000 == 0 => format!("\"{}m\"", ms / 60_000),
        ms if ms % 1000 == 0 => format!("\"{}s\"", ms / 1000),
        ms => format!("\"{ms}ms\""),
    };
    let mib = |bytes: u64| format!("\"{}MiB\"", bytes >> 20);
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operation.md");
    let manual = fs::read_to_string(manual).unwrap();
    for (key, default) in [
        (
            "gateway.drain_timeout",
            millis(config.gateway.drain_timeout),
        ),
        ("wan.delay_budget", millis(config.wan.delay_budget)),
        ("wan.outage_budget", millis(config.wan.outage_budget)),
        ("wan.keep_alive", millis(config.wan.keep_alive)),
        ("wan.idle_timeout", millis(config.wan.idle_timeout)),
        (
            "wan.socket_buffer",
            mib(config.wan.socket_buffer_bytes as u64),
        ),
        (
            "wan.max_udp_payload",
            config.wan.max_udp_payload.to_string(),
        ),
        (
            "egress[].dial_timeout",
            millis(config.egress[0].dial_timeout),
        ),
        ("store.memory", mib(config.store.memory_bytes)),
        ("compression.memory", mib(config.compression.memory_bytes)),
        ("limits.migrations", config.limits.migrations.to_string()),
        (
            "limits.channels_per_migration",
            config.limits.channels_per_migration.to_string(),
        ),
        ("limits.places", mib(config.limits.places_bytes)),
        ("limits.in_flight", mib(config.limits.in_flight_bytes)),
    ] {
        let row = format!("| `{key}` | `{default}` |");
        assert!(manual.contains(&row), "{row} is not in docs/operation.md");
    }
}

/// Runs promtool, or says that it is missing.
fn promtool(arguments: &[&str], input: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("promtool");
    command
        .args(arguments)
        .current_dir(configs().join("prometheus"));
    if let Some(input) = input {
        let file = dir.path().join("input");
        fs::write(&file, input).unwrap();
        command.stdin(fs::File::open(file).unwrap());
    }
    let output = match command.output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: promtool is missing (apt-get install prometheus)");
            return;
        }
        Err(error) => panic!("promtool: {error}"),
    };
    assert!(
        output.status.success(),
        "promtool {arguments:?}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn metrics_pass_promtool() {
    promtool(&["check", "metrics"], Some(&exposition()));
}

#[test]
fn rules_pass_promtool() {
    promtool(&["check", "rules", "skyferry.rules.yml"], None);
    promtool(&["check", "config", "prometheus.yml"], None);
    promtool(&["test", "rules", "skyferry.rules.test.yml"], None);
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
    // Eight reasons out; seven in, and two for callers without a name.
    assert_eq!(refusals_by_direction, [8, 9]);
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
