//! What operators see: a real Prometheus scrapes both gateways while a guest moves through them, and
//! every query of the dashboard has an answer.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::process::wait_for;
use skyferry_tests::prometheus::{INTERVAL, Prometheus, Series, configs, promtool};
use skyferry_tests::scenario::{Passage, prove_it_goes_on, start_source};
use skyferry_tests::wan::Shape;

/// Time until what has happened shows in answers.
const SHOWN_LIMIT: Duration = Duration::from_secs(20);

/// Metrics that stay 0 at a gateway, or may, while one guest moves without trouble.
const MAY_BE_ZERO: &[&str] = &[
    // The commit takes one crossing of the link; a scrape need not fall into it.
    "skyferry_held_commits",
    "skyferry_oldest_held_commit_seconds",
    "skyferry_link_packets_lost_total",
    "skyferry_page_misses_total",
    "skyferry_refused_connections_total",
    "skyferry_store_evictions_total",
    // Pages are looked up where they arrive, and only those that crossed before.
    "skyferry_store_hits_total",
    "skyferry_store_misses_total",
    // Nobody seeds.
    "skyferry_seeded_pages_total",
    // The guest comes for the first time.
    "skyferry_manifests_adopted_total",
    // Trouble with the disk, and pages that nobody used for days.
    "skyferry_store_degraded",
    "skyferry_store_dropped_puts_total",
    "skyferry_store_expired_total",
    "skyferry_store_read_errors_total",
    "skyferry_store_write_errors_total",
];

/// Metrics that one side alone has: where the stream is parsed and encoded, and where digests are
/// compared.
const ONE_SIDED: &[(&str, Side)] = &[
    ("skyferry_blackout_seconds", Side::A),
    ("skyferry_commit_checks_total", Side::B),
    ("skyferry_compression_effort", Side::A),
    // The return path is a few bytes, gone before a scrape sees them.
    ("skyferry_in_flight_bytes", Side::A),
    ("skyferry_saved_bytes_total", Side::A),
    ("skyferry_frame_bytes_total", Side::A),
    ("skyferry_effort_bytes_total", Side::A),
    // The gateway that sends hears of the other one's store.
    ("skyferry_link_announced_pages", Side::A),
];

/// A store on disk, in each gateway's own folder: its metrics are there only with one.
const STORE: &str = "[store]\npath = \"store\"\nsize = \"256MiB\"\n";

/// A query of the dashboard.
struct Panel {
    title: String,
    query: String,
}

impl Panel {
    /// As Grafana sends it with one gateway chosen.
    fn query_for(&self, instance: &str) -> String {
        self.query
            .replace("$instance", &instance.replace('.', "\\\\."))
            .replace("$peer", ".*")
            .replace("$__rate_interval", "3s")
    }

    fn is_about(&self, metric: &str) -> bool {
        self.query.contains(metric)
    }

    /// Whether `best` is what the query should have answered for the gateway of a side.
    fn is_answered(&self, side: Side, best: f64) -> bool {
        let other_side = |(metric, at): &(&str, Side)| *at != side && self.is_about(metric);
        if ONE_SIDED.iter().any(other_side) {
            return true;
        }
        best > 0.0 || (best == 0.0 && MAY_BE_ZERO.iter().any(|metric| self.is_about(metric)))
    }
}

fn dashboard() -> Result<Vec<Panel>> {
    let text = fs::read_to_string(configs("grafana").join("skyferry.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let mut list = Vec::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        for target in panel["targets"].as_array().into_iter().flatten() {
            list.push(Panel {
                title: panel["title"].as_str().context("no title")?.to_owned(),
                query: target["expr"].as_str().context("no query")?.to_owned(),
            });
        }
    }
    Ok(list)
}

/// The best that each query has answered so far, by panel and side.
struct Seen<'a> {
    prometheus: &'a Prometheus,
    panels: &'a [Panel],
    gateways: &'a [String; 2],
    best: BTreeMap<(usize, usize), f64>,
}

impl Seen<'_> {
    /// Asks every query for every gateway once.
    fn look(&mut self) -> Result<()> {
        for (index, panel) in self.panels.iter().enumerate() {
            for (side, gateway) in self.gateways.iter().enumerate() {
                let answer = self.prometheus.query(&panel.query_for(gateway))?;
                let values = answer.iter().map(|series| series.value);
                let best = self.best.entry((index, side)).or_insert(f64::NAN);
                // `max` prefers whatever is not NaN.
                *best = values.fold(*best, f64::max);
            }
        }
        Ok(())
    }

    /// What has had no answer, or only 0 where there must be more.
    fn lacks(&self) -> Vec<String> {
        let lack = |(&(index, side), &best): (&(usize, usize), &f64)| {
            let (panel, side) = (&self.panels[index], [Side::A, Side::B][side]);
            let text = || format!("{}, {}: {best}: {}", side.name(), panel.title, panel.query);
            (!panel.is_answered(side, best)).then(text)
        };
        self.best.iter().filter_map(lack).collect()
    }
}

#[test]
fn a_real_prometheus_sees_a_guest_move() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    let panels = dashboard()?;
    ensure!(panels.len() >= 30, "only {} queries", panels.len());
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        more: STORE.to_owned(),
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(100, 20).with_loss(0.002), &setup)?;
    let admins = [Side::A, Side::B].map(|side| pair.gateway(side).admin_address());
    let gateways = admins.map(|address| address.to_string());
    let prometheus = Prometheus::start(admins)?;
    let mut instances = prometheus.label_values("skyferry_build_info", "instance")?;
    instances.sort();
    let mut expected = gateways.to_vec();
    expected.sort();
    ensure!(instances == expected, "{instances:?}, not {expected:?}");
    let link = |series: &Series| {
        let label = |name: &str| series.labels[name].as_str().unwrap_or("none").to_owned();
        [label("instance"), label("peer"), label("direction")]
    };
    let answer = prometheus.query("skyferry_link_up")?;
    let mut links: Vec<_> = answer.iter().map(link).collect();
    links.sort();
    // One ingress at A: the link is dialled there, and nothing else can be used.
    let mut expected = [(0, Side::B.name(), "out"), (1, Side::A.name(), "in")]
        .map(|(at, peer, way)| [gateways[at].clone(), peer.to_owned(), way.to_owned()]);
    expected.sort();
    ensure!(links == expected, "{links:?}, not {expected:?}");

    let mut source = start_source(&image)?;
    let done = AtomicBool::new(false);
    let (arrival, seen) = thread::scope(|scope| {
        let observer = scope.spawn(|| -> Result<Seen<'_>> {
            let mut seen = Seen {
                prometheus: &prometheus,
                panels: &panels,
                gateways: &gateways,
                best: BTreeMap::new(),
            };
            while !done.load(Ordering::Relaxed) {
                seen.look()?;
                // Leaves the processor to the guests.
                thread::sleep(INTERVAL * 3);
            }
            Ok(seen)
        });
        let arrival = Passage::along(&image, pair.route(0)).run(&mut source, |_| {});
        done.store(true, Ordering::Relaxed);
        (arrival, observer.join())
    });
    let mut arrival = arrival.with_context(|| pair.explain())?;
    let mut seen = seen.map_err(|_| anyhow::anyhow!("the observer panicked"))??;
    prove_it_goes_on(&mut source, &mut arrival.destination)?;

    wait_for(
        "end of the migration in Prometheus",
        SHOWN_LIMIT,
        || {
            let query = "skyferry_migrations_finished_total{result=\"completed\"} == 1";
            let finished = prometheus.query(query)?;
            Ok((finished.len() == 2).then_some(()))
        },
        || pair.explain(),
    )?;
    // The longest look back with several scrapes: what happens last shows in rates, too.
    thread::sleep(INTERVAL * 3);
    seen.look()?;
    let lacks = seen.lacks();
    ensure!(
        lacks.is_empty(),
        "queries without data:\n{}\n{}",
        lacks.join("\n"),
        prometheus.log_tail()
    );
    eprintln!("{} queries answered for both gateways", panels.len());

    let alerts = prometheus.query("count_over_time(ALERTS[10m])")?;
    ensure!(alerts.is_empty(), "alerts without a reason: {alerts:?}");
    for record in ["skyferry:guest_bytes:rate1m", "skyferry:link_loss:ratio5m"] {
        ensure!(!prometheus.query(record)?.is_empty(), "nothing in {record}");
    }
    for side in [Side::A, Side::B] {
        let text = pair.gateway(side).metrics()?;
        promtool(&["check", "metrics"], &configs("prometheus"), Some(&text))
            .with_context(|| side.name())?;
    }
    Ok(())
}

/// A corrupted frame ends in a failed migration, which raises the alerts meant for that and no other:
/// above all not the one that sends operators looking for a guest that runs twice.
#[test]
fn a_corrupted_frame_raises_its_alerts_only() -> Result<()> {
    let image = GuestImage::prepare(&GuestSpec::TINY)?;
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        faults: [String::new(), "corrupt-frame=20".to_owned()],
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(100, 20), &setup)?;
    let admins = [Side::A, Side::B].map(|side| pair.gateway(side).admin_address());
    let prometheus = Prometheus::start(admins)?;
    let mut source = start_source(&image)?;
    let moved = Passage::along(&image, pair.route(0)).run(&mut source, |_| {});
    ensure!(moved.is_err(), "a corrupted frame went unnoticed");
    source.wait_status("running", SHOWN_LIMIT)?;
    let firing = || -> Result<Vec<String>> {
        let alerts = prometheus.query("sum by (alertname) (ALERTS)")?;
        let name = |series: &Series| series.labels["alertname"].as_str().map(str::to_owned);
        Ok(alerts.iter().filter_map(name).collect())
    };
    let expected = ["SkyferryCommitMismatch", "SkyferryMigrationsFailing"];
    wait_for(
        "alerts",
        SHOWN_LIMIT,
        || Ok((firing()?.len() >= expected.len()).then_some(())),
        || pair.explain(),
    )?;
    thread::sleep(INTERVAL * 5);
    let mut firing = firing()?;
    firing.sort();
    ensure!(firing == expected, "{firing:?}\n{}", pair.explain());
    let failed = "skyferry_migrations_finished_total{result=\"failed\"} == 1";
    ensure!(prometheus.query(failed)?.len() == 2, "{}", pair.explain());
    Ok(())
}

#[test]
fn the_rules_hold() -> Result<()> {
    let dir = configs("prometheus");
    promtool(&["check", "rules", "skyferry.rules.yml"], &dir, None)?;
    promtool(&["check", "config", "prometheus.yml"], &dir, None)?;
    promtool(&["test", "rules", "skyferry.rules.test.yml"], &dir, None)?;
    Ok(())
}
