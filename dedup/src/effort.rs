//! How hard to compress: as hard as the link leaves time for, and no harder.
//!
//! An encoder that is slower than the link wastes the link, one that waits for the link wastes
//! processor time that could have saved bytes. The ladder below goes from copying to long windows and
//! high levels; [`EffortControl`] moves along it by what the encoder spent its time on.

use std::time::Duration;

/// Literals are copied as they are.
const STORED: i32 = 0;

/// A rung of the ladder. Higher ones make fewer bytes in more time and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Effort(usize);

/// How a rung is done and what it takes.
#[derive(Debug, Clone, Copy)]
struct Rung {
    /// zstd level, [`STORED`] for none.
    level: i32,
    window_log: u32,
    long_distance: bool,
    /// Speed of the encoder on new pages, rung 3 being 1.
    speed: f64,
    /// Bytes before, by bytes after.
    ratio: f64,
    /// Memory of the compressor once its window is full, in KiB.
    memory_kib: u32,
}

/// Measured on the 616 MB stream of a guest of 1.5 GiB with a full page cache, flushed every 256 KiB,
/// with zstd 1.5.7. Speeds and ratios are only compared with one another: what a guest's pages come
/// to is measured as they pass.
const LADDER: [Rung; 8] = [
    rung(STORED, 19, false, 8.0, 1.0, 0),
    rung(-5, 19, false, 1.7, 2.4, 1_300),
    rung(1, 19, false, 1.18, 3.34, 1_400),
    rung(2, 20, false, 1.0, 3.51, 2_100),
    rung(3, 22, true, 0.52, 3.73, 6_000),
    rung(5, 22, true, 0.33, 3.85, 8_100),
    rung(6, 23, true, 0.25, 3.96, 12_900),
    rung(9, 23, true, 0.15, 4.05, 20_700),
];

const fn rung(
    level: i32,
    window_log: u32,
    long_distance: bool,
    speed: f64,
    ratio: f64,
    memory_kib: u32,
) -> Rung {
    Rung {
        level,
        window_log,
        long_distance,
        speed,
        ratio,
        memory_kib,
    }
}

impl Effort {
    /// Copying.
    pub const NONE: Self = Self(0);
    /// Where a channel begins: fast, and within 7 % of the bytes of rungs of half the speed.
    pub const START: Self = Self(3);
    /// The hardest there is.
    pub const MOST: Self = Self(LADDER.len() - 1);

    /// The rung's number, 0 for copying.
    #[must_use]
    pub fn number(self) -> usize {
        self.0
    }

    /// Whether literals are copied as they are.
    #[must_use]
    pub fn is_none(self) -> bool {
        self.rung().level == STORED
    }

    /// zstd level.
    #[must_use]
    pub fn level(self) -> i32 {
        self.rung().level
    }

    /// How far back compression looks, as a power of two in bytes.
    #[must_use]
    pub fn window_log(self) -> u32 {
        self.rung().window_log
    }

    /// Whether the whole window is searched for long matches.
    #[must_use]
    pub fn long_distance(self) -> bool {
        self.rung().long_distance
    }

    /// The hardest rung whose compressor takes at most `bytes`.
    #[must_use]
    pub fn within(bytes: u64) -> Self {
        let fits = |rung: &Rung| u64::from(rung.memory_kib) * 1024 <= bytes;
        Self(LADDER.iter().rposition(fits).unwrap_or(0))
    }

    fn rung(self) -> &'static Rung {
        &LADDER[self.0]
    }
}

/// What an encoder did since it last said so.
#[derive(Debug, Clone, Copy, Default)]
pub struct Activity {
    /// Time covered.
    pub elapsed: Duration,
    /// Of that, encoding.
    pub encoding: Duration,
    /// Of that, waiting for the link to take what was made.
    pub waiting_for_link: Duration,
    /// Bytes compressed, before.
    pub literal_bytes: u64,
    /// The same, after.
    pub compressed_bytes: u64,
}

/// How long activity is gathered before it says anything.
const INTERVAL: Duration = Duration::from_millis(300);
/// Fewer literals than this in an interval say nothing about speed.
const MIN_LITERALS: u64 = 512 * 1024;
/// Share of time waiting for the link from which it is taken to be full.
const LINK_BOUND: f64 = 0.1;
/// Share of time encoding from which the encoder is what everything waits for.
const ENCODER_BOUND: f64 = 0.8;
/// A rung that is chosen to save bytes keeps the encoder busy for at most this share of time: other
/// work on the machine must not make it the bottleneck.
const BUSY_AT_MOST: f64 = 0.75;
/// Throughput that may be lost to a harder rung.
const NEAR_ENOUGH: f64 = 0.98;
/// How much faster than seen the link is believed to be after an interval in which nothing waited
/// for it: at first, and once that has often proved wrong.
const HOPE_AT_MOST: f64 = 0.5;
const HOPE_AT_LEAST: f64 = 0.004;
/// Up goes one rung in this time: a link that has just begun is still finding its rate, and an
/// encoder that is too slow keeps it from ever finding it.
const CLIMB_INTERVAL: Duration = Duration::from_secs(1);
/// Throughput that an easier rung must promise on top of the present one's: every change costs the
/// window.
const WORTH_A_STEP: f64 = 1.07;

/// Chooses the rung for one channel. Has no clock: time comes in as [`Activity`].
///
/// The speed of the encoder and the ratio are measured on the rung in use and carried over to the
/// others in the ladder's proportions. The rate of the link is measured while it is full, and believed
/// to grow while it is not.
#[derive(Debug)]
pub struct EffortControl {
    current: Effort,
    least: Effort,
    most: Effort,
    gathered: Activity,
    /// Bytes per second that the link takes, as far as known.
    link: Option<f64>,
    /// Share by which `link` grows in an interval in which the link was not full.
    hope: f64,
    /// Since the last change of the rung.
    settled: Duration,
    /// The last step was down, for a link that was hoped to be faster.
    hoped: bool,
}

impl EffortControl {
    /// Begins at [`Effort::START`], and never leaves `least..=most`.
    #[must_use]
    pub fn new(least: Effort, most: Effort) -> Self {
        let most = most.max(least);
        Self {
            current: Effort::START.clamp(least, most),
            least,
            most,
            gathered: Activity::default(),
            link: None,
            hope: HOPE_AT_MOST,
            settled: Duration::ZERO,
            hoped: false,
        }
    }

    /// The rung to use now.
    #[must_use]
    pub fn current(&self) -> Effort {
        self.current
    }

    /// Other channels have come or gone: this one may take no more than `most`.
    pub fn limit(&mut self, most: Effort) {
        self.most = most.max(self.least);
        self.current = self.current.min(self.most);
    }

    /// Takes note of what the encoder did; returns the rung to use from now on.
    pub fn observe(&mut self, activity: Activity) -> Effort {
        let gathered = &mut self.gathered;
        gathered.elapsed += activity.elapsed;
        gathered.encoding += activity.encoding;
        gathered.waiting_for_link += activity.waiting_for_link;
        gathered.literal_bytes += activity.literal_bytes;
        gathered.compressed_bytes += activity.compressed_bytes;
        if gathered.elapsed >= INTERVAL {
            let gathered = std::mem::take(gathered);
            if gathered.literal_bytes >= MIN_LITERALS {
                self.decide(&gathered);
            }
        }
        self.current
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "rates need no more than a few digits"
    )]
    fn decide(&mut self, gathered: &Activity) {
        let seconds = gathered.elapsed.as_secs_f64();
        let encoding = gathered.encoding.as_secs_f64().max(1e-6);
        let wire = gathered.compressed_bytes as f64 / seconds;
        let full = gathered.waiting_for_link.as_secs_f64() / seconds >= LINK_BOUND;
        let mistaken = full && self.hoped;
        if full {
            if mistaken {
                self.hope = (self.hope / 4.0).max(HOPE_AT_LEAST);
            }
            self.link = Some(wire);
        } else if encoding / seconds < ENCODER_BOUND {
            // The source is what everything waits for: nothing to learn, nothing to win.
            return;
        } else {
            if self.hoped {
                self.hope = (self.hope * 2.0).min(HOPE_AT_MOST);
            }
            self.link = Some(wire.max(self.link.unwrap_or(0.0) * (1.0 + self.hope)));
        }
        let here = self.current.rung();
        let speed = gathered.literal_bytes as f64 / encoding / here.speed;
        let ratio =
            gathered.literal_bytes as f64 / gathered.compressed_bytes.max(1) as f64 / here.ratio;
        let best = self.best(speed, ratio, self.link.unwrap_or(wire));
        self.settled += gathered.elapsed;
        self.hoped = !full && best < self.current;
        let may_climb = mistaken || self.settled >= CLIMB_INTERVAL;
        if best < self.current || best > self.current && may_climb {
            self.settled = Duration::ZERO;
            self.current = best.min(Effort(self.current.0 + 1));
        }
    }

    /// The hardest rung that costs no throughput; `speed` and `ratio` are those of a ladder's 1.
    fn best(&self, speed: f64, ratio: f64, link: f64) -> Effort {
        let rungs = &LADDER[self.least.0..=self.most.0];
        let of_link = |rung: &Rung| link * ratio * rung.ratio;
        let throughput = |rung: &Rung| (speed * rung.speed).min(of_link(rung));
        let most = rungs.iter().map(throughput).fold(0.0, f64::max);
        let good = |rung: &Rung| {
            let relaxed = of_link(rung) <= speed * rung.speed * BUSY_AT_MOST;
            throughput(rung) >= most || relaxed && throughput(rung) >= most * NEAR_ENOUGH
        };
        let best = Effort(self.least.0 + rungs.iter().rposition(good).unwrap_or(0));
        let stay = best < self.current && throughput(self.current.rung()) * WORTH_A_STEP >= most;
        if stay { self.current } else { best }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a channel for some seconds on a link (bytes/s) with a processor that does rung 3 at
    /// `speed` bytes/s; returns the rung and the share of time lost against the better of both.
    fn run(control: &mut EffortControl, link: f64, speed: f64, seconds: u32) -> (usize, f64) {
        let frame = 256.0 * 1024.0;
        let mut clock = 0.0;
        let mut frames = 0.0;
        while clock < f64::from(seconds) {
            let rung = control.current();
            // Encoder and link work side by side; the slower one is waited for.
            let encode = frame / (speed * rung.rung().speed);
            let send = frame / rung.rung().ratio / link;
            let elapsed = encode.max(send);
            clock += elapsed;
            frames += 1.0;
            control.observe(Activity {
                elapsed: Duration::from_secs_f64(elapsed),
                encoding: Duration::from_secs_f64(encode),
                waiting_for_link: Duration::from_secs_f64(elapsed - encode),
                literal_bytes: frame as u64,
                compressed_bytes: (frame / rung.rung().ratio) as u64,
            });
        }
        let best = (0..LADDER.len())
            .map(|n| (speed * LADDER[n].speed).min(link * LADDER[n].ratio))
            .fold(0.0, f64::max);
        (control.current().number(), frames * frame / clock / best)
    }

    fn control() -> EffortControl {
        EffortControl::new(Effort::NONE, Effort::MOST)
    }

    #[test]
    fn a_slow_link_gets_the_hardest_rung() {
        let (rung, rate) = run(&mut control(), 2.5e6, 300e6, 20);
        assert_eq!(rung, Effort::MOST.number());
        assert!(rate > 0.95, "{rate}");
    }

    #[test]
    fn a_fast_network_gets_none() {
        let (rung, rate) = run(&mut control(), 5e9, 300e6, 20);
        assert_eq!(rung, 0);
        assert!(rate > 0.9, "{rate}");
    }

    #[test]
    fn between_them_neither_link_nor_encoder_waits_for_long() {
        for link in [12.5e6, 25e6, 50e6, 125e6, 250e6] {
            for speed in [150e6, 300e6, 500e6] {
                let mut control = control();
                run(&mut control, link, speed, 10);
                let (rung, rate) = run(&mut control, link, speed, 60);
                assert!(rate > 0.85, "{link} {speed}: rung {rung}, {rate}");
            }
        }
    }

    #[test]
    fn it_follows_a_link_that_changes() {
        let mut control = control();
        run(&mut control, 2.5e6, 300e6, 20);
        let (rung, _) = run(&mut control, 1e9, 300e6, 20);
        assert!(rung <= 2, "{rung}");
        let (rung, _) = run(&mut control, 2.5e6, 300e6, 20);
        assert_eq!(rung, Effort::MOST.number());
    }

    #[test]
    fn it_comes_to_rest() {
        let mut control = control();
        run(&mut control, 40e6, 300e6, 120);
        let mut changes = 0;
        let mut before = control.current();
        for _ in 0..60 {
            run(&mut control, 40e6, 300e6, 1);
            changes += u32::from(control.current() != before);
            before = control.current();
        }
        assert!(changes <= 6, "{changes} changes in a minute");
    }

    #[test]
    fn limits_hold() {
        let mut control = EffortControl::new(Effort(2), Effort(4));
        assert_eq!(run(&mut control, 1e6, 300e6, 20).0, 4);
        assert_eq!(run(&mut control, 5e9, 300e6, 60).0, 2);
        let mut control = self::control();
        run(&mut control, 1e6, 300e6, 20);
        control.limit(Effort(5));
        assert_eq!(control.current().number(), 5);
        assert_eq!(run(&mut control, 1e6, 300e6, 20).0, 5);
    }

    #[test]
    fn memory_limits_the_ladder() {
        assert_eq!(Effort::within(0), Effort::NONE);
        assert_eq!(Effort::within(4 << 20), Effort(3));
        assert_eq!(Effort::within(13 << 20), Effort(6));
        assert_eq!(Effort::within(u64::MAX), Effort::MOST);
    }

    #[test]
    fn little_activity_says_nothing() {
        let mut control = control();
        for _ in 0..100 {
            control.observe(Activity {
                elapsed: Duration::from_secs(1),
                waiting_for_link: Duration::from_secs(1),
                literal_bytes: 1000,
                ..Activity::default()
            });
        }
        assert_eq!(control.current(), Effort::START);
    }
}
