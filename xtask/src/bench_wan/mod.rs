//! `cargo xtask bench wan`: many guests, many ways, side by side.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Args;
use skyferry_tests::bench::bars::{self, Verdict};
use skyferry_tests::bench::guests::{Guest, Scale};
use skyferry_tests::bench::machine::{Abilities, describe, load, revision};
use skyferry_tests::bench::report;
use skyferry_tests::bench::results::{Outcome, Record, Results, Setting};
use skyferry_tests::bench::scene::{self, Scene, Stage};
use skyferry_tests::bench::way::Way;
use skyferry_tests::gateway::{Build, build};
use skyferry_tests::guest::target_dir;

use crate::install;

/// A machine with more to do than this gives figures that mean little.
const QUIET_LOAD: f64 = 0.5;

/// What to measure, and over which link.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Runs of each way; the medians count. Runs that the file of results has already are not made
    /// again
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// Only these guests: idle, cache, writer-500, writer-4000, whole-pages, incompressible
    #[arg(long, value_delimiter = ',', value_parser = guest)]
    guests: Vec<Guest>,
    /// Only these ways (see docs/benchmarks), also for guests that are not usually moved so
    #[arg(long, value_delimiter = ',', value_parser = way)]
    ways: Vec<Way>,
    /// Rate of the link in Mbit/s
    #[arg(long, default_value_t = bars::RATE_MBIT, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rate: u64,
    /// Round-trip time of the link in ms
    #[arg(long, default_value_t = bars::RTT_MS, value_parser = clap::value_parser!(u64).range(0..=2000))]
    rtt: u64,
    /// Packets lost at random, in percent
    #[arg(long, default_value_t = 0.0, value_parser = percent)]
    loss: f64,
    /// How long a guest works at the other site before it returns, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=3600))]
    work: u64,
    /// After how many seconds a migration has failed
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(10..=3600))]
    limit: u64,
    /// Small guests and little work, to try the benchmark itself; the report goes beside the results
    #[arg(long)]
    quick: bool,
    /// Make runs again that the file of results has already
    #[arg(long)]
    again: bool,
    /// Only write the report of the latest results for this link and these guests
    #[arg(long)]
    report: bool,
    /// The file of results, a line of JSON for each move [default: bench-wan/results.jsonl in the
    /// target folder]
    #[arg(long)]
    results: Option<PathBuf>,
    /// Where the report goes [default: docs/benchmarks; with --quick, beside the results]
    #[arg(long)]
    output: Option<PathBuf>,
}

impl Options {
    /// Whether nothing is measured.
    pub(crate) fn only_reports(&self) -> bool {
        self.report
    }

    fn results(&self) -> PathBuf {
        let path = self.results.clone();
        path.unwrap_or_else(|| target_dir().join("bench-wan/results.jsonl"))
    }

    fn output(&self, scale: &str) -> PathBuf {
        match &self.output {
            Some(folder) => folder.clone(),
            None if scale == Scale::Quick.name() => self.results().with_file_name("report"),
            None => concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/benchmarks").into(),
        }
    }

    /// Whether a setting is that of the link and the guests asked for.
    fn is_about(&self, setting: &Setting) -> bool {
        setting.scale == self.scale().name()
            && (setting.rate_mbit, setting.rtt_ms) == (self.rate, self.rtt)
            && setting.loss_percent == self.loss
            && setting.work_secs == self.work().as_secs()
    }

    fn scale(&self) -> Scale {
        if self.quick {
            Scale::Quick
        } else {
            Scale::Full
        }
    }

    fn work(&self) -> Duration {
        const QUICK_SECS: u64 = 5;
        Duration::from_secs(if self.quick {
            self.work.min(QUICK_SECS)
        } else {
            self.work
        })
    }

    fn guests(&self) -> Vec<Guest> {
        if self.guests.is_empty() {
            Guest::ALL.to_vec()
        } else {
            self.guests.clone()
        }
    }

    /// The ways for a guest in a run: those asked for, else the usual ones.
    fn ways(&self, guest: &Guest, run: u32) -> Vec<Way> {
        let mut ways = Way::ALL.to_vec();
        if self.ways.is_empty() {
            ways.retain(|way| way.is_usual_for(guest, run));
        } else {
            ways.retain(|way| self.ways.contains(way));
        }
        ways
    }
}

/// The guest of this name, for the command line.
pub(crate) fn guest(name: &str) -> Result<Guest, String> {
    let names = || Guest::ALL.map(|guest| guest.name).join(", ");
    Guest::find(name).ok_or_else(|| format!("the guests are {}", names()))
}

fn way(name: &str) -> Result<Way, String> {
    let names = || Way::ALL.map(Way::name).join(", ");
    Way::find(name).ok_or_else(|| format!("the ways are {}", names()))
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("a number from 0 to 100".to_owned()),
    }
}

/// Measures what is still to be measured and writes the report; false if a bar was missed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut results = Results::open(&options.results())?;
    let setting = if options.report {
        let latest = results.records().iter().rev().map(|record| &record.setting);
        let fits = |setting: &&Setting| options.is_about(setting);
        let setting = latest
            .clone()
            .find(fits)
            .context("no results of this link")?;
        setting.clone()
    } else {
        let session = Session::prepare(options)?;
        session.run(options, &mut results)?;
        session.setting
    };
    publish(&results, &setting, &options.output(&setting.scale))
}

/// Writes the report and prints the bars; false if one was missed.
fn publish(results: &Results, setting: &Setting, folder: &Path) -> Result<bool> {
    for path in report::write(results, setting, folder)? {
        println!("wrote {}", path.display());
    }
    println!();
    let bars = bars::judge(results, setting);
    for bar in &bars {
        println!("{bar}");
    }
    Ok(bars.iter().all(|bar| bar.verdict != Verdict::Miss))
}

/// A benchmark that runs.
struct Session {
    stage: Stage,
    setting: Setting,
    revision: String,
    /// Seconds since the epoch.
    start: u64,
    /// Of the machine, before it.
    load: Option<f64>,
}

impl Session {
    fn prepare(options: &Options) -> Result<Self> {
        scene::check()?;
        // Before anything is built, which is work, too.
        let load = load();
        install::ensure(&[install::QEMU, install::GCC, install::ZSTD, install::SOCAT])?;
        install::ensure_package_lists();
        let program = build(Build::Release)?.to_owned();
        let abilities = Abilities::of(&program)?;
        let machine = describe()?;
        if let Some(load) = load.filter(|load| *load > QUIET_LOAD) {
            println!("the machine is busy (load {load}): do not compare these figures with others");
        }
        let stage = Stage {
            scale: options.scale(),
            rate_mbit: options.rate,
            rtt_ms: options.rtt,
            loss_percent: options.loss,
            work: options.work(),
            limit: Duration::from_secs(options.limit),
            program,
            abilities,
        };
        let setting = Setting {
            scale: options.scale().name().to_owned(),
            rate_mbit: options.rate,
            rtt_ms: options.rtt,
            loss_percent: options.loss,
            work_secs: options.work().as_secs(),
            machine,
        };
        Ok(Self {
            stage,
            setting,
            revision: revision(),
            start: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
            load,
        })
    }

    fn record(&self, guest: &Guest, way: Way, run: u32, outcome: Outcome) -> Record {
        Record {
            setting: self.setting.clone(),
            guest: guest.name.to_owned(),
            way: way.name().to_owned(),
            run,
            revision: self.revision.clone(),
            session: self.start,
            load: self.load,
            outcome,
        }
    }

    /// All ways in turn, run after run, so that what drifts drifts for all.
    fn run(&self, options: &Options, results: &mut Results) -> Result<()> {
        let mut work = Vec::new();
        for run in 1..=options.runs {
            for guest in options.guests() {
                let mut ways = options.ways(&guest, run);
                ensure!(!ways.is_empty(), "no way is left for {}", guest.name);
                ways.retain(|way| {
                    let wanted = self.record(&guest, *way, run, Outcome::Unavailable);
                    options.again || !results.has(&wanted)
                });
                let scenes = Scene::of(&ways).into_iter();
                work.extend(scenes.map(|scene| (run, guest, scene)));
            }
        }
        let start = Instant::now();
        let all = work.len();
        for (done, (run, guest, scene)) in work.into_iter().enumerate() {
            if done > 0 {
                let each = start.elapsed() / u32::try_from(done)?;
                let left = each * u32::try_from(all - done)?;
                println!(
                    "-- {done} of {all} done, about {} min left",
                    left.as_secs() / 60 + 1
                );
            }
            let mut note = |way: Way, outcome: Outcome| {
                show(run, &guest, way, &outcome);
                results.add(self.record(&guest, way, run, outcome))
            };
            self.stage.play(&guest, &scene, &mut note)?;
        }
        Ok(())
    }
}

fn show(run: u32, guest: &Guest, way: Way, outcome: &Outcome) {
    let (guest, way) = (guest.name, way.name());
    print!("run {run} {guest:14} {way:14} ");
    match outcome {
        Outcome::Done(cost) => println!(
            "{:6.2} s, blackout {:5.0} ms, {:7.1} MB on the link for {:7.1} MB",
            cost.total_secs,
            cost.blackout_secs * 1000.0,
            cost.wire_bytes as f64 / 1e6,
            cost.guest_bytes as f64 / 1e6,
        ),
        Outcome::Failed(reason) => println!("failed: {reason}"),
        Outcome::Unavailable => println!("not available in this build"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let line = Line::try_parse_from([&["wan"], arguments].concat())?;
        Ok(line.options)
    }

    #[test]
    fn guests_and_ways_are_chosen_by_name() {
        let usual = parse(&[]).unwrap();
        assert_eq!(usual.guests(), Guest::ALL);
        assert!(!usual.ways(&Guest::IDLE, 1).contains(&Way::Loopback));
        assert!(usual.ways(&Guest::WRITER_500, 1).contains(&Way::Loopback));
        let chosen = parse(&["--guests", "idle,cache", "--ways", "loopback,cold"]).unwrap();
        assert_eq!(chosen.guests(), [Guest::IDLE, Guest::CACHE]);
        assert_eq!(chosen.ways(&Guest::IDLE, 2), [Way::Cold, Way::Loopback]);
        assert!(parse(&["--ways", "pigeon"]).is_err());
        assert!(parse(&["--loss", "101"]).is_err());
    }

    #[test]
    fn a_quick_run_leaves_the_published_report_alone() {
        let quick = parse(&["--quick", "--results", "/tmp/a/results.jsonl"]).unwrap();
        assert_eq!(quick.output("quick"), Path::new("/tmp/a/report"));
        assert!(quick.output("full").ends_with("docs/benchmarks"));
        assert!(quick.work() <= Duration::from_secs(5));
    }
}
