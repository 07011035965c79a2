//! The report: Markdown with a table for each guest, and charts.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::bars::{self, Bar};
use super::chart::{Chart, Group, Series};
use super::guests::Guest;
use super::results::{Cost, Results, Role, Setting};
use super::stats::Runs;
use super::way::Way;

const MIB: f64 = 1_048_576.0;

/// What every way is compared with in the tables.
const RIVAL: Way = Way::MultifdZstd1;

/// Ways that charts show; the tables have all.
const CHARTED: [Way; 8] = [
    Way::TcpBbr,
    Way::Xbzrle,
    Way::MultifdZstd1,
    Way::ZstdPipe,
    Way::Cold,
    Way::Warm,
    Way::Seeded,
    Way::Returning,
];

type Figure = fn(&Cost) -> f64;

/// A reason in a table is cut here.
const REASON_CHARS: usize = 90;

/// Writes the report and its charts into a folder; gives the paths. They are called `wan…`, and by the
/// link where that is not the one that the promises are about.
///
/// # Errors
/// When a file cannot be written.
pub fn write(results: &Results, setting: &Setting, folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let stem = stem(setting);
    let mut files = vec![(format!("{stem}.md"), markdown(results, setting))];
    for (name, chart) in charts(results, setting) {
        files.push((format!("{stem}-{name}.svg"), chart.svg()));
    }
    let mut paths = Vec::new();
    for (name, content) in files {
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        paths.push(path);
    }
    Ok(paths)
}

fn stem(setting: &Setting) -> String {
    if bars::are_about(setting) {
        return "wan".to_owned();
    }
    let Setting {
        rate_mbit,
        rtt_ms,
        loss_percent,
        ..
    } = setting;
    format!("wan-{rate_mbit}mbit-{rtt_ms}ms-{loss_percent}loss")
}

/// The charts by name.
#[must_use]
pub fn charts(results: &Results, setting: &Setting) -> Vec<(&'static str, Chart)> {
    let figures: [(&str, &str, &str, Figure); 3] = [
        ("bytes", "Bytes on the link", "MB", |cost| {
            cost.wire_bytes as f64 / 1e6
        }),
        ("time", "Time to move the guest", "s", |cost| {
            cost.total_secs
        }),
        (
            "blackout",
            "Time that the guest stands still",
            "ms",
            |cost| cost.blackout_secs * 1000.0,
        ),
    ];
    let chart = |title: &str, unit: &str, figure: Figure| {
        let guests = Guest::ALL.into_iter().map(|guest| {
            let values = CHARTED
                .map(|way| Runs::of(results, setting, guest.name, way).median(figure))
                .to_vec();
            Group {
                name: guest.name.to_owned(),
                values,
            }
        });
        let groups = guests.filter(|group| group.values.iter().any(Option::is_some));
        let series = CHARTED.map(|way| Series {
            name: short_title(way),
            rival: !way.is_ours(),
        });
        Chart {
            title: format!("{title}, {}", link(setting)),
            unit: unit.to_owned(),
            series: series.to_vec(),
            groups: groups.collect(),
        }
    };
    let drawn = figures
        .into_iter()
        .map(|(name, title, unit, figure)| (name, chart(title, unit, figure)));
    drawn.collect()
}

fn short_title(way: Way) -> String {
    match way {
        Way::ZstdPipe => "QEMU, pipe through zstd".to_owned(),
        Way::Warm => "Skyferry, warm".to_owned(),
        way => way.title().to_owned(),
    }
}

fn link(setting: &Setting) -> String {
    let loss = if setting.loss_percent > 0.0 {
        format!("{} % loss", setting.loss_percent)
    } else {
        "no loss".to_owned()
    };
    format!(
        "{} Mbit/s, {} ms, {loss}",
        setting.rate_mbit, setting.rtt_ms
    )
}

/// The whole report.
#[must_use]
pub fn markdown(results: &Results, setting: &Setting) -> String {
    let mut text = String::from("# Side by side on an emulated WAN\n\n");
    text.push_str(
        "Written by `cargo xtask bench wan`; [README.md](README.md) says how it is measured.\n\n",
    );
    circumstances(&mut text, results, setting);
    let stem = stem(setting);
    for (name, chart) in charts(results, setting) {
        let _ = write!(text, "\n![{}]({stem}-{name}.svg)\n", chart.title);
    }
    text.push_str("\n## What is promised\n\n| | promise | figure | bound |\n|---|---|---:|---:|\n");
    for bar in bars::judge(results, setting) {
        promise(&mut text, &bar);
    }
    for guest in Guest::ALL {
        table(&mut text, results, setting, &guest);
    }
    text
}

fn promise(text: &mut String, bar: &Bar) {
    let figure = bar
        .figure
        .map_or_else(|| "–".to_owned(), |figure| format!("{figure:.3}"));
    let stretch = bar
        .stretch
        .map_or_else(String::new, |stretch| format!(" (better: {stretch})"));
    let _ = writeln!(
        text,
        "| {} | {} | {figure} | ≤ {}{stretch} |",
        bar.verdict, bar.name, bar.bound
    );
}

fn circumstances(text: &mut String, results: &Results, setting: &Setting) {
    let machine = &setting.machine;
    let _ = writeln!(
        text,
        "- Link: {}; a queue of one bandwidth-delay product, at least 64 KiB.",
        link(setting)
    );
    let _ = writeln!(
        text,
        "- Machine: {}, {} cores shared by everything, {} GiB, {}, Linux {}.",
        machine.cpu, machine.cores, machine.memory_gib, machine.system, machine.kernel
    );
    let _ = writeln!(
        text,
        "- QEMU {}, {}; guests under TCG; TCP with BBR unless it says cubic; other settings are QEMU's \
         defaults.",
        machine.qemu, machine.tools
    );
    let (mut revisions, mut sessions) = (BTreeSet::new(), BTreeSet::new());
    let mut load: f64 = 0.0;
    for (guest, way) in pairs() {
        let runs = Runs::of(results, setting, guest.name, way);
        if way.is_ours() {
            revisions.extend(runs.revisions().iter().cloned());
        }
        sessions.extend(runs.sessions().iter().copied());
        load = load.max(runs.load().unwrap_or(0.0));
    }
    let revisions: Vec<String> = revisions.into_iter().collect();
    let _ = writeln!(
        text,
        "- Gateways of revision {}; measured in {} session(s), before which the machine's load was at \
         most {load:.2}; a returning guest has worked for {} s; guests of size \"{}\".",
        revisions.join(", "),
        sessions.len(),
        setting.work_secs,
        setting.scale
    );
}

fn pairs() -> impl Iterator<Item = (Guest, Way)> {
    let guests = Guest::ALL.into_iter();
    guests.flat_map(|guest| Way::ALL.into_iter().map(move |way| (guest, way)))
}

fn table(text: &mut String, results: &Results, setting: &Setting, guest: &Guest) {
    let runs_of = |way| Runs::of(results, setting, guest.name, way);
    let measured = |way: &Way| {
        let runs = runs_of(*way);
        runs.tried() > 0 || runs.is_unavailable()
    };
    let ways: Vec<Way> = Way::ALL.into_iter().filter(measured).collect();
    if ways.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n## {}: {}\n", guest.name, guest.about);
    text.push_str(
        "| way | time s | blackout ms | link MB | × zstd 1 | CPU s: gateway or pipe, source | \
         destination | QEMU, source | destination | peak MiB: gateway or pipe, source | destination | \
         QEMU, source | destination | runs |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let rival = runs_of(RIVAL).median(|cost| cost.wire_bytes as f64);
    for way in ways {
        row(text, way, &runs_of(way), rival);
    }
}

fn row(text: &mut String, way: Way, runs: &Runs, rival: Option<f64>) {
    let title = way.title();
    if runs.is_unavailable() {
        let _ = writeln!(text, "| {title} | not available in this build |");
        return;
    }
    if runs.done().is_empty() {
        let _ = writeln!(text, "| {title} | failed: {} |", reason(runs));
        return;
    }
    let bytes = runs
        .median(|cost| cost.wire_bytes as f64)
        .filter(|b| *b > 0.0);
    let ratio = match (bytes, rival) {
        (Some(bytes), Some(rival)) => Some(bytes / rival),
        _ => None,
    };
    let mut cells = vec![
        digits(runs.median(|cost| cost.total_secs), 2),
        digits(runs.median(|cost| cost.blackout_secs * 1000.0), 0),
        digits(bytes.map(|bytes| bytes / 1e6), 1),
        digits(ratio, 2),
    ];
    let roles = [Role::Source, Role::Destination];
    for qemu in [false, true] {
        cells.extend(roles.map(|role| digits(runs.cpu_secs(role, qemu), 1)));
    }
    for qemu in [false, true] {
        let mib = |role| runs.peak_rss_bytes(role, qemu).map(|bytes| bytes / MIB);
        cells.extend(roles.map(|role| digits(mib(role), 0)));
    }
    let mut count = runs.done().len().to_string();
    if !runs.failures().is_empty() {
        let _ = write!(count, " of {}; {}", runs.tried(), reason(runs));
    }
    let _ = writeln!(text, "| {title} | {} | {count} |", cells.join(" | "));
}

/// Why the first of the runs failed that did.
fn reason(runs: &Runs) -> String {
    let reason = runs.failures().first().map_or("", String::as_str);
    let reason: String = reason.chars().take(REASON_CHARS).collect();
    reason.replace('|', "/")
}

fn digits(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}

#[cfg(test)]
mod tests {
    use super::super::results::Outcome;
    use super::super::results::tests::{cost, record, setting};
    use super::*;

    fn results() -> (tempfile::TempDir, Results) {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::open(&dir.path().join("results")).unwrap();
        let outcomes = [
            (Way::TcpBbr, Outcome::Failed("migration | not over".into())),
            (Way::MultifdZstd1, Outcome::Done(cost(10.0, 100_000_000))),
            (Way::Cold, Outcome::Done(cost(5.0, 75_000_000))),
            (Way::Seeded, Outcome::Unavailable),
        ];
        for (way, outcome) in outcomes {
            results.add(record("idle", way, 1, outcome)).unwrap();
        }
        (dir, results)
    }

    #[test]
    fn the_report_has_all_that_was_tried() {
        let (dir, results) = results();
        let paths = write(&results, &setting(), &dir.path().join("report")).unwrap();
        assert_eq!(paths.len(), 4);
        assert!(paths[0].ends_with("report/wan.md"));
        let other = Setting {
            rate_mbit: 20,
            loss_percent: 0.5,
            ..setting()
        };
        assert_eq!(stem(&other), "wan-20mbit-60ms-0.5loss");
        let text = fs::read_to_string(&paths[0]).unwrap();
        let line = |start: &str| {
            let found = text.lines().find(|line| line.starts_with(start));
            found.unwrap_or_else(|| panic!("no line \"{start}\" in\n{text}"))
        };
        assert!(
            line("| Skyferry, cold |")
                .starts_with("| Skyferry, cold | 5.00 | 500 | 75.0 | 0.75 | 1.5 | – |")
        );
        assert!(line("| QEMU, TCP BBR |").ends_with("| failed: migration / not over |"));
        assert!(line("| Skyferry, seeded |").contains("not available in this build"));
        assert!(!text.contains("## cache"));
        let columns = |line: &str| line.matches('|').count();
        assert_eq!(
            columns(line("| way |")),
            columns(line("| Skyferry, cold |"))
        );
    }

    #[test]
    fn charts_show_guests_that_have_figures() {
        let (_dir, results) = results();
        for (_, chart) in charts(&results, &setting()) {
            assert_eq!(chart.groups.len(), 1);
            assert_eq!(chart.groups[0].values.iter().flatten().count(), 2);
        }
    }
}
