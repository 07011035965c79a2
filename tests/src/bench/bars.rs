//! What the project promises, held against the figures.

use std::fmt;

use super::guests::Guest;
use super::results::{Cost, Results, Setting};
use super::stats::Runs;
use super::way::Way;

/// The link that the promises are about.
pub const RATE_MBIT: u64 = 200;
/// Its round-trip time in ms.
pub const RTT_MS: u64 = 60;

/// A promise: a figure that must not be larger than its bound.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What is compared.
    pub name: String,
    /// `None` if it was not measured.
    pub figure: Option<f64>,
    /// Largest good value.
    pub bound: f64,
    /// What would be better still.
    pub stretch: Option<f64>,
    /// How it stands.
    pub verdict: Verdict,
}

/// How a promise stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept.
    Ok,
    /// It is not.
    Miss,
    /// What it takes was not measured.
    Skip,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Miss => "MISS",
            Self::Skip => "skip",
        })
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:4} {:66} ", self.verdict, self.name)?;
        match self.figure {
            Some(figure) => write!(f, "{figure:6.3}")?,
            None => f.write_str("     -")?,
        }
        write!(f, " <= {:.2}", self.bound)?;
        match self.stretch {
            Some(stretch) => write!(f, " (better: {stretch:.2})"),
            None => Ok(()),
        }
    }
}

/// A figure of a way, in words and as a function.
type Figure = (&'static str, fn(&Cost) -> f64);

const BYTES: Figure = ("bytes", |cost| cost.wire_bytes as f64);
const TIME: Figure = ("time", |cost| cost.total_secs);
const BLACKOUT: Figure = ("blackout", |cost| cost.blackout_secs);
const NONZERO: Figure = ("bytes of RAM that are not zero", |cost| {
    cost.nonzero_bytes as f64
});

struct Judge<'a> {
    results: &'a Results,
    setting: &'a Setting,
    bars: Vec<Bar>,
}

impl Judge<'_> {
    fn add(
        &mut self,
        guest: &Guest,
        (way, figure): (Way, Figure),
        (against, unit): (Way, Figure),
        bound: f64,
    ) -> &mut Bar {
        let runs = |way| Runs::of(self.results, self.setting, guest.name, way);
        let [ours, theirs] = [runs(way), runs(against)];
        let ratio = match (ours.median(figure.1), theirs.median(unit.1)) {
            (Some(ours), Some(theirs)) => Some(ours / theirs),
            _ => None,
        };
        // Ours may not fail; a rival that never arrives is no measure.
        let failed = !ours.failures().is_empty();
        let verdict = match ratio {
            _ if failed => Verdict::Miss,
            Some(ratio) if ratio <= bound => Verdict::Ok,
            Some(_) => Verdict::Miss,
            None => Verdict::Skip,
        };
        let against = if way == against {
            unit.0.to_owned()
        } else {
            format!("{} {}", against.name(), unit.0)
        };
        self.bars.push(Bar {
            name: format!("{}: {} {} / {against}", guest.name, way.name(), figure.0),
            figure: ratio,
            bound,
            stretch: None,
            verdict,
        });
        let last = self.bars.len() - 1;
        &mut self.bars[last]
    }
}

/// Whether the promises are about the link of this setting.
#[must_use]
pub fn are_about(setting: &Setting) -> bool {
    setting.rate_mbit == RATE_MBIT && setting.rtt_ms == RTT_MS && setting.loss_percent == 0.0
}

/// All promises; none is judged unless the link is the one that they are about.
#[must_use]
pub fn judge(results: &Results, setting: &Setting) -> Vec<Bar> {
    let mut judge = Judge {
        results,
        setting,
        bars: Vec::new(),
    };
    let rival = Way::MultifdZstd1;
    let cold = (Way::Cold, BYTES);
    for (guest, bound, stretch) in [
        (Guest::WRITER_500, 0.85, 0.75),
        (Guest::WRITER_4000, 0.75, 0.65),
    ] {
        judge.add(&guest, cold, (rival, BYTES), bound).stretch = Some(stretch);
        judge.add(&guest, (Way::Cold, TIME), (rival, TIME), 0.9);
        judge.add(&guest, (Way::Cold, BLACKOUT), (rival, BLACKOUT), 0.8);
    }
    for guest in [Guest::WRITER_500, Guest::CACHE] {
        for way in [Way::Warm, Way::WarmRestart] {
            judge.add(&guest, (way, BYTES), (Way::ColdSibling, BYTES), 0.5);
        }
        judge.add(&guest, (Way::Returning, BYTES), cold, 0.10);
    }
    // Nearly nothing of this guest changes while it is away.
    let returning = (Way::Returning, BYTES);
    judge.add(&Guest::IDLE, returning, (Way::Returning, NONZERO), 0.02);
    judge.add(&Guest::CACHE, (Way::Seeded, BYTES), cold, 0.7);
    judge.add(&Guest::WRITER_500, (Way::Cold20Mbit, BYTES), cold, 0.92);
    let copy = (Way::LoopbackCopy, TIME);
    judge.add(&Guest::WRITER_500, (Way::Loopback, TIME), copy, 2.0);
    if !are_about(setting) {
        for bar in &mut judge.bars {
            bar.verdict = Verdict::Skip;
        }
    }
    judge.bars
}

#[cfg(test)]
mod tests {
    use super::super::results::Outcome;
    use super::super::results::tests::{cost, record, setting};
    use super::*;

    fn results(outcomes: Vec<(Way, Outcome)>) -> (tempfile::TempDir, Results) {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::open(&dir.path().join("results")).unwrap();
        for (way, outcome) in outcomes {
            let guest = Guest::WRITER_500.name;
            results.add(record(guest, way, 1, outcome)).unwrap();
        }
        (dir, results)
    }

    fn verdict(bars: &[Bar], name: &str) -> Verdict {
        let bar = bars.iter().find(|bar| bar.name == name);
        bar.unwrap_or_else(|| panic!("no bar \"{name}\"")).verdict
    }

    #[test]
    fn promises_are_kept_missed_or_not_measured() {
        let (_dir, results) = results(vec![
            (Way::Cold, Outcome::Done(cost(9.5, 80))),
            (Way::MultifdZstd1, Outcome::Done(cost(10.0, 100))),
        ]);
        let bars = judge(&results, &setting());
        let bytes = "writer-500: cold bytes / multifd-zstd1 bytes";
        assert_eq!(verdict(&bars, bytes), Verdict::Ok);
        let time = "writer-500: cold time / multifd-zstd1 time";
        assert_eq!(verdict(&bars, time), Verdict::Miss);
        let seeded = "cache: seeded bytes / cold bytes";
        assert_eq!(verdict(&bars, seeded), Verdict::Skip);
        let other = Setting {
            loss_percent: 1.0,
            ..setting()
        };
        let bars = judge(&results, &other);
        assert!(bars.iter().all(|bar| bar.verdict == Verdict::Skip));
    }

    #[test]
    fn a_move_of_ours_that_failed_is_a_miss_and_one_of_theirs_is_not() {
        let failed = || Outcome::Failed("broken pipe".into());
        let name = "writer-500: cold bytes / multifd-zstd1 bytes";
        let (_dir, ours) = results(vec![
            (Way::Cold, failed()),
            (Way::MultifdZstd1, Outcome::Done(cost(10.0, 100))),
        ]);
        assert_eq!(verdict(&judge(&ours, &setting()), name), Verdict::Miss);
        let (_dir, theirs) = results(vec![
            (Way::Cold, Outcome::Done(cost(9.5, 80))),
            (Way::MultifdZstd1, failed()),
        ]);
        assert_eq!(verdict(&judge(&theirs, &setting()), name), Verdict::Skip);
    }

    #[test]
    fn a_line_says_verdict_name_figure_and_bound() {
        let bar = Bar {
            name: "a / b".into(),
            figure: Some(0.8),
            bound: 0.75,
            stretch: Some(0.5),
            verdict: Verdict::Miss,
        };
        let words: Vec<String> = bar
            .to_string()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        let expected = "MISS a / b 0.800 <= 0.75 (better: 0.50)";
        assert_eq!(words.join(" "), expected);
    }
}
