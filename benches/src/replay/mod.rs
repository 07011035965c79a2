//! A day of a site, replayed against a store on disk with memory in front, in a minute or two.
//!
//! Guests of a few images move in and out all day. Between two moves a fifth of a guest's own pages
//! change; the rest it has in common with the others of its image. One tenant is away from the first to
//! the last quarter of the day, for longer than the time to live; at noon one image gets another
//! edition; in the afternoon a guest of twice the store comes by once. The gateway is restarted, and
//! killed in the middle of a move. All of it comes from one seed.
//!
//! The store's clock is the day's. It lives in a process of its own, so that it can be killed: see
//! [`live_if_asked`].

mod life;
mod traffic;

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use skyferry_dedup::PAGE_SIZE;

use skyferry_tests::bars::Bars;

const MIB: u64 = 1 << 20;
const PAGES_PER_MIB: u64 = 256;

/// The first hour of the day, in seconds since 1970: later than any time that a file gets from the
/// system's clock, so that those can be told apart.
const DAWN: u64 = 4_000_000_000;

/// Tells a process what it is to live through: plan, first move, folder.
const PART: &str = "SKYFERRY_REPLAY";
/// Begins the lines of such a process that are for us.
const MARK: &str = "replay:";

/// What happens at a site in a day.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name, for the process that keeps the store.
    name: &'static str,
    seed: u64,
    hours: u32,
    moves_per_hour: u32,
    guests: usize,
    images: usize,
    image_pages: u64,
    own_pages: u64,
    store_bytes: u64,
    memory_bytes: u64,
    ttl: Duration,
    rollout_hour: u32,
    scan_hour: u32,
    scan_pages: u64,
    /// Hours after which the store is closed and opened.
    restarts: &'static [u32],
    /// Moves in which the process is killed.
    kills: &'static [u32],
    /// Hours from the last kill until memory has to stay as it is.
    warm_up: u64,
    /// By how much it may grow after that, in percent.
    growth_percent: f64,
    /// Memory that the index may take for a page.
    index_bytes: f64,
    /// Shared pages that are found after the scan, per those that were found before.
    kept: f64,
}

impl Plan {
    /// A day of 40 guests, of four images, with a store of 512 MiB, through which some sixteen times as
    /// much passes.
    pub const DAY: Self = Self {
        name: "day",
        seed: 20_240_229,
        hours: 24,
        moves_per_hour: 24,
        guests: 40,
        images: 4,
        image_pages: 24 * PAGES_PER_MIB,
        own_pages: 16 * PAGES_PER_MIB,
        store_bytes: 512 * MIB,
        memory_bytes: 64 * MIB,
        ttl: Duration::from_secs(8 * 3600),
        rollout_hour: 12,
        scan_hour: 16,
        scan_pages: 1024 * PAGES_PER_MIB,
        restarts: &[3, 9, 14, 19],
        kills: &[40, 99],
        warm_up: 3,
        growth_percent: 5.0,
        index_bytes: 40.0,
        kept: 0.95,
    };

    /// The same with everything smaller by a factor of sixteen, for tests. What does not depend on the
    /// number of pages, such as the index's 64 tables, weighs more then.
    pub const SMALL: Self = Self {
        name: "small",
        moves_per_hour: 12,
        guests: 24,
        images: 3,
        image_pages: 2 * PAGES_PER_MIB,
        own_pages: 2 * PAGES_PER_MIB,
        store_bytes: 32 * MIB,
        memory_bytes: 4 * MIB,
        scan_pages: 64 * PAGES_PER_MIB,
        kills: &[20, 50],
        growth_percent: 12.0,
        index_bytes: 64.0,
        kept: 0.8,
        ..Self::DAY
    };

    fn named(name: &str) -> Option<Self> {
        [Self::DAY, Self::SMALL]
            .into_iter()
            .find(|plan| plan.name == name)
    }

    /// The plan with another seed.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    fn hour_of(&self, step: u32) -> u32 {
        step / self.moves_per_hour
    }

    fn time_of(&self, step: u32) -> u64 {
        DAWN + u64::from(step) * 3600 / u64::from(self.moves_per_hour)
    }
}

/// What was seen in an hour, or in the part of it before or after a kill.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Report {
    hour: u64,
    /// Pages held at its end.
    pages: u64,
    /// The most that the files took.
    bytes: u64,
    /// Memory of the index at its end.
    index_bytes: u64,
    /// Memory by the store's own count: index, pages, and the table of the peer.
    own_bytes: u64,
    /// Memory of the process.
    resident_bytes: u64,
    put_bytes: u64,
    written_bytes: u64,
    dropped: u64,
    errors: u64,
    evictions: u64,
    expired: u64,
    copied: u64,
    /// Pages of images: found, looked for.
    shared: [u64; 2],
    /// Guests' own pages.
    own: [u64; 2],
    /// Pages that the peer had been told of.
    believed: [u64; 2],
    /// How long opening took, if the hour began with it.
    open_micros: u64,
}

/// What a process told: an hour is over, or it is to be killed now.
fn parse(line: &str) -> Option<(Report, bool)> {
    let (what, report) = line.strip_prefix(MARK)?.trim().split_once(' ')?;
    Some((serde_json::from_str(report).ok()?, what == "kill"))
}

/// Does what a process has to do that [`run`] started: lives through a part of the day. Returns false in
/// any other process.
///
/// # Errors
/// When the store cannot be opened, or gives a page that was not put.
pub fn live_if_asked() -> Result<bool, Box<dyn Error>> {
    let Ok(part) = env::var(PART) else {
        return Ok(false);
    };
    let mut words = part.splitn(4, ' ');
    let mut word = || words.next().ok_or("a part with too few words");
    let plan = Plan::named(word()?).ok_or("no such plan")?;
    let plan = plan.with_seed(word()?.parse()?);
    let first = word()?.parse()?;
    let folder = Path::new(word()?);
    life::live(&plan, folder, first, |report, kill| {
        let what = if kill { "kill" } else { "hour" };
        // A test's harness leaves the line unfinished in which it tells of the test.
        println!("\n{MARK} {what} {}", serde_json::to_string(report)?);
        Ok(())
    })?;
    Ok(true)
}

/// What a day came to.
#[derive(Debug, Clone)]
pub struct Day {
    plan: Plan,
    reports: Vec<Report>,
    /// Reports of the process that lived to the end of the day.
    last_life: usize,
}

/// Replays the day in `folder`, which is the store's alone. `command` is to start a process that calls
/// [`live_if_asked`] and prints what that prints.
///
/// # Errors
/// When the process cannot be started, or fails.
pub fn run(
    plan: &Plan,
    folder: &Path,
    command: impl Fn() -> Command,
) -> Result<Day, Box<dyn Error>> {
    let mut day = Day {
        plan: plan.clone(),
        reports: Vec::new(),
        last_life: 0,
    };
    let mut first = 0;
    for &kill in plan.kills {
        let status = live(&mut day, first, folder, &command)?;
        if status.code().is_some() {
            return Err(format!("the process ended before it was killed: {status}").into());
        }
        set_times(folder, plan.time_of(kill))?;
        first = kill + 1;
    }
    let status = live(&mut day, first, folder, &command)?;
    let last = day.reports.last().map(|last| last.hour + 1);
    if !status.success() || last != Some(u64::from(plan.hours)) {
        return Err(format!("the day ended early: {status}").into());
    }
    Ok(day)
}

/// Has a process live through the day from move `first` on, until it is to be killed.
fn live(
    day: &mut Day,
    first: u32,
    folder: &Path,
    command: impl Fn() -> Command,
) -> Result<ExitStatus, Box<dyn Error>> {
    day.last_life = day.reports.len();
    let Plan { name, seed, .. } = &day.plan;
    let part = format!("{name} {seed} {first} {}", folder.display());
    let mut child = command().env(PART, part).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    for line in lines {
        let Some((report, kill)) = parse(&line?) else {
            continue;
        };
        day.reports.push(report);
        if kill {
            child.kill()?;
            break;
        }
    }
    Ok(child.wait()?)
}

/// Files get their times from the system's clock until the store notes a use: here they get the day's.
fn set_times(folder: &Path, now: u64) -> Result<(), Box<dyn Error>> {
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        let modified = path.metadata()?.modified()?.duration_since(UNIX_EPOCH)?;
        if modified.as_secs() < DAWN {
            let file = File::options().write(true).open(&path)?;
            file.set_modified(UNIX_EPOCH + Duration::from_secs(now))?;
        }
    }
    Ok(())
}

fn share([found, all]: [u64; 2]) -> f64 {
    found as f64 / all as f64
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

impl Day {
    fn total(&self, of: impl Fn(&Report) -> u64) -> f64 {
        self.reports.iter().map(of).sum::<u64>() as f64
    }

    fn most(&self, of: impl Fn(&Report) -> f64) -> f64 {
        self.reports.iter().map(of).fold(0.0, f64::max)
    }

    /// How much of the images was found in hours `from` to `until`.
    fn shared(&self, from: u32, until: u32) -> f64 {
        let hours = u64::from(from)..u64::from(until);
        let reports = self.reports.iter();
        let shared = reports.filter(|report| hours.contains(&report.hour));
        let [mut found, mut all] = [0; 2];
        for report in shared {
            found += report.shared[0];
            all += report.shared[1];
        }
        share([found, all])
    }

    /// By how much memory grew from the first to the last third of the time after the warm-up, in percent.
    fn growth(&self, of: impl Fn(&Report) -> u64) -> f64 {
        let last_life = &self.reports[self.last_life..];
        let begin = last_life.first().map_or(0, |first| first.hour) + self.plan.warm_up;
        let warm = last_life.iter().filter(|report| report.hour >= begin);
        let memory: Vec<f64> = warm.map(|report| of(report) as f64).collect();
        let third = memory.len() / 3;
        let first = mean(memory.iter().take(third).copied());
        let last = mean(memory.iter().rev().take(third).copied());
        (last / first - 1.0) * 100.0
    }

    /// Bytes put in the day per byte of the store.
    #[must_use]
    pub fn turnover(&self) -> f64 {
        self.total(|report| report.put_bytes) / self.plan.store_bytes as f64
    }

    /// Pages that went because they were too old.
    #[must_use]
    pub fn expired(&self) -> u64 {
        self.reports.iter().map(|report| report.expired).sum()
    }

    /// Adds the bars.
    pub fn add_bars(&self, bars: &mut Bars) {
        let capacity = self.plan.store_bytes as f64;
        let bytes = self.most(|report| report.bytes as f64 / capacity);
        bars.at_most("bytes on disk / configured, at any time", bytes, 1.0, "x");
        let index = self.most(|report| report.index_bytes as f64 / report.pages as f64);
        let most = self.plan.index_bytes;
        bars.at_most("memory of the index, at most", index, most, "bytes a page");
        let written =
            self.total(|report| report.written_bytes) / self.total(|report| report.put_bytes);
        bars.at_most("write amplification over the day", written, 1.3, "x");
        let most = self.plan.growth_percent;
        let resident = self.growth(|report| report.resident_bytes);
        bars.at_most(
            "growth of the process after warming up",
            resident,
            most,
            "%",
        );
        let own = self.growth(|report| report.own_bytes);
        bars.at_most("growth of what the store counts itself", own, most, "%");
        let scan = self.plan.scan_hour;
        let ratio = self.shared(scan + 1, scan + 3) / self.shared(scan - 2, scan);
        let least = self.plan.kept;
        bars.at_least(
            "shared pages found after / before a scan",
            ratio,
            least,
            "x",
        );
        let believed = share([
            self.reports.iter().map(|report| report.believed[0]).sum(),
            self.reports.iter().map(|report| report.believed[1]).sum(),
        ]);
        bars.at_least("pages there / what a peer was told of", believed, 0.95, "x");
        // Hours pass in seconds: now and then pages come faster than room is made for two tenants' new
        // segments and for copies at once.
        let put = self.total(|report| report.put_bytes) / PAGE_SIZE as f64;
        let dropped = self.total(|report| report.dropped) / put * 100.0;
        bars.at_most("pages dropped, per page put", dropped, 1.0, "%");
        let errors = self.total(|report| report.errors);
        bars.at_most("errors of the disk", errors, 0.0, "");
        bars.at_least("bytes put / size of the store", self.turnover(), 8.0, "x");
    }

    /// Prints a line for every hour.
    pub fn print(&self) {
        println!(
            "hour   pages  disk MiB  B/page  process MiB  counted MiB  put MiB  written  shared    own  told  open ms"
        );
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        for report in &self.reports {
            println!(
                "{:4} {:7} {:9.1} {:7.1} {:12.1} {:12.1} {:8.0} {:8.3} {:7.3} {:6.3} {:5.3} {:8.1}",
                report.hour,
                report.pages,
                mib(report.bytes),
                report.index_bytes as f64 / report.pages as f64,
                mib(report.resident_bytes),
                mib(report.own_bytes),
                mib(report.put_bytes),
                report.written_bytes as f64 / report.put_bytes as f64,
                share(report.shared),
                share(report.own),
                share(report.believed),
                report.open_micros as f64 / 1000.0,
            );
        }
        println!(
            "{} pages evicted, {} copied, {} expired",
            self.total(|report| report.evictions),
            self.total(|report| report.copied),
            self.expired(),
        );
    }
}
