//! How hard to compress: as hard as the link leaves time for, and no harder.
//!
//! An encoder that is slower than the link wastes the link, one that waits for the link wastes
//! processor time that could have saved bytes. The ladder below goes from copying to long windows and
//! high levels; [`EffortControl`] moves along it by what the encoder spent its time on.

use std::time::Duration;

use crate::literals::Matching::{self, LongDistance, OfLevel, Short};

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
    matching: Matching,
    /// Speed of the encoder on new pages, rung 3 being 1.
    speed: f64,
    /// Bytes before, by bytes after.
    ratio: f64,
    /// Memory of the compressor once its window is full, in KiB.
    memory_kib: u32,
}

/// Speeds and ratios are those of the whole encoder, in processor time, on the 614 MB stream of a
/// guest of 1.5 GiB with a full page cache, with zstd 1.5.7 (`pipeline` in `benches/`). They are only
/// compared with one another: what a guest's pages come to is measured as they pass.
const LADDER: [Rung; 10] = [
    rung(STORED, 19, OfLevel, 3.5, 1.0, 0),
    rung(-5, 19, OfLevel, 1.43, 2.52, 1_800),
    rung(1, 19, OfLevel, 1.15, 3.48, 1_800),
    rung(2, 20, OfLevel, 1.0, 3.64, 3_000),
    rung(3, 20, OfLevel, 0.8, 3.78, 3_600),
    rung(3, 21, OfLevel, 0.77, 3.81, 5_600),
    rung(3, 22, LongDistance, 0.53, 3.88, 6_000),
    rung(5, 22, OfLevel, 0.4, 4.0, 7_700),
    rung(6, 23, LongDistance, 0.23, 4.12, 12_900),
    rung(9, 23, Short, 0.17, 4.32, 19_800),
];

const fn rung(
    level: i32,
    window_log: u32,
    matching: Matching,
    speed: f64,
    ratio: f64,
    memory_kib: u32,
) -> Rung {
    Rung {
        level,
        window_log,
        matching,
        speed,
        ratio,
        memory_kib,
    }
}

/// A path with a smaller round-trip time than this stays within a site.
const LOCAL_RTT: Duration = Duration::from_millis(1);

impl Effort {
    /// Copying.
    pub const NONE: Self = Self(0);
    /// Where a channel begins between sites: 250 MB/s of new pages on a core of 2023, and within 2 % of the
    /// bytes of the next rung, which takes half as much time again.
    pub const START: Self = Self(5);
    /// Where a channel begins on a path with this round-trip time: where it is within a millisecond, the
    /// link is most likely faster than any compression.
    #[must_use]
    pub fn start(rtt: Duration) -> Self {
        if rtt < LOCAL_RTT {
            Self::NONE
        } else {
            Self::START
        }
    }

    /// The hardest there is.
    pub const MOST: Self = Self(LADDER.len() - 1);

    /// Number of rungs.
    pub const COUNT: usize = LADDER.len();

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

    /// How the window is searched.
    #[must_use]
    pub fn matching(self) -> Matching {
        self.rung().matching
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
    /// Bytes that went as they are, since compression would have brought nothing. They tell nothing of
    /// what a rung comes to. At rung 0 all bytes are compressed, to as many.
    pub stored_bytes: u64,
}

impl Activity {
    fn add(&mut self, other: &Self) {
        self.elapsed += other.elapsed;
        self.encoding += other.encoding;
        self.waiting_for_link += other.waiting_for_link;
        self.literal_bytes += other.literal_bytes;
        self.compressed_bytes += other.compressed_bytes;
        self.stored_bytes += other.stored_bytes;
    }

    fn sum<'a>(spans: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut sum = Self::default();
        for span in spans {
            sum.add(span);
        }
        sum
    }

    /// Whether the link was waited for.
    fn is_full(&self) -> bool {
        self.share(self.waiting_for_link) >= LINK_BOUND
    }

    /// What part of the time covered this is.
    fn share(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.elapsed.as_secs_f64().max(1e-6)
    }

    /// Whether it says something of the rung in use.
    fn says_enough(&self) -> bool {
        let least = if self.share(self.encoding) >= ENCODER_BOUND {
            MIN_LITERALS_OF_A_SLOW_ONE
        } else {
            MIN_LITERALS
        };
        self.literal_bytes >= least && self.literal_bytes >= self.stored_bytes
    }

    /// Bytes per second that went to the link.
    #[expect(
        clippy::cast_precision_loss,
        reason = "rates need no more than a few digits"
    )]
    fn wire(&self) -> f64 {
        (self.compressed_bytes + self.stored_bytes) as f64 / self.elapsed.as_secs_f64().max(1e-6)
    }
}

/// How long activity is gathered before it counts as one span.
const SPAN: Duration = Duration::from_millis(300);
/// Spans that are looked at together: what a guest holds changes from span to span, a link does not.
const SPANS: usize = 4;
/// Of these, as many must have waited for the link, the last one included, for it to be taken to be full:
/// a link that has just begun is full at any rate.
const FULL_SPANS: usize = 3;
/// Spans in a row in which nothing waited for the link, after which an easier rung is tried: on a fast
/// network every span at a hard one is lost. Each time that it did not help it takes twice as many.
const UNFILLED_SPANS: usize = 3;
/// Most spans that a step waits for, once steps have often been taken back.
const MOST_PATIENCE: usize = 64;
/// Fewer literals than this in a span say nothing about speed; not even of an encoder that was busy with
/// them all the time.
const MIN_LITERALS: u64 = 512 * 1024;
const MIN_LITERALS_OF_A_SLOW_ONE: u64 = 64 * 1024;
/// Share of time waiting for the link from which it is taken to be full, and up to which it is not.
const LINK_BOUND: f64 = 0.1;
const LINK_IDLE: f64 = 0.02;
/// Share of time encoding from which the encoder is what everything waits for.
const ENCODER_BOUND: f64 = 0.8;
/// Shares of time encoding up to which two rungs are taken at once, and all of them.
const ENCODER_IDLE: f64 = 0.3;
const ENCODER_IDLE_BY_FAR: f64 = 0.1;
/// A link that took so many times what it took in the span before is still finding its rate.
const STILL_GROWING: f64 = 1.25;
/// A rung that is chosen to save bytes keeps the encoder busy for at most this share of time: other
/// work on the machine must not make it the bottleneck.
const BUSY_AT_MOST: f64 = 0.75;
/// Throughput that may be lost to a harder rung.
const NEAR_ENOUGH: f64 = 0.98;
/// How much faster than seen the link is believed to be after spans in which nothing waited for it:
/// at first, and when that has proved right time and again.
const HOPE: f64 = 0.5;
const HOPE_AT_MOST: f64 = 2.0;
/// Throughput that an easier rung must promise on top of the present one's: every change costs the
/// window.
const WORTH_A_STEP: f64 = 1.07;
/// Bytes per second that a link takes at most to be begun on with the hardest rung: a third of what
/// that makes on a core of 2023.
const SLOW_LINK: u64 = 4_000_000;

/// Chooses the rung for one channel. Has no clock: time comes in as [`Activity`].
///
/// The speed of the encoder and the ratio are measured on the rung in use and carried over to the
/// others in the ladder's proportions. The rate of the link is measured while it is full, and believed
/// to grow while it is not. Every change costs the compressor's window, so what is measured is looked
/// at over more than a second, and after a change all of it is measured anew.
#[derive(Debug)]
pub struct EffortControl {
    current: Effort,
    least: Effort,
    most: Effort,
    gathered: Activity,
    /// The last spans at this rung, the newest last.
    spans: Vec<Activity>,
    /// Bytes per second that the link takes, as far as known.
    link: Option<f64>,
    /// Share by which `link` grows when the link was not full.
    hope: f64,
    /// The rung that was left for an easier one, for a link that was hoped to be faster.
    hoped: Option<Effort>,
    /// The last spans, in a row, in which nothing waited for the link.
    unfilled: usize,
    /// Spans since the last step, and whether that was up.
    settled: usize,
    climbed: bool,
    /// Spans that a step down, or up, waits for.
    patience_down: usize,
    patience_up: usize,
    /// The channel has just begun, and how fast the link is has not been seen yet.
    beginning: bool,
}

impl EffortControl {
    /// Begins at `start`, and never leaves `least..=most`.
    #[must_use]
    pub fn new(start: Effort, least: Effort, most: Effort) -> Self {
        let most = most.max(least);
        Self {
            current: start.clamp(least, most),
            least,
            most,
            gathered: Activity::default(),
            spans: Vec::with_capacity(SPANS + 1),
            link: None,
            hope: HOPE,
            hoped: None,
            unfilled: 0,
            settled: 0,
            climbed: false,
            patience_down: UNFILLED_SPANS,
            patience_up: SPANS,
            beginning: false,
        }
    }

    /// Begins with the hardest rung while the link, as far as [seen](Self::on_link), is slow enough for
    /// it: most links are not, but until that shows they take less than the hardest rung makes, and
    /// on one that is slow everything else costs bytes.
    #[must_use]
    pub fn on_unknown_link(least: Effort, most: Effort) -> Self {
        Self {
            beginning: true,
            ..Self::new(Effort::MOST, least, most)
        }
    }

    /// Whether the rate of the link is still of interest.
    #[must_use]
    pub fn is_beginning(&self) -> bool {
        self.beginning
    }

    /// The link takes so many bytes per second by now; `is_known`: that is all there is.
    pub fn on_link(&mut self, rate: u64, is_known: bool) {
        if rate > SLOW_LINK {
            self.begin_at_start();
        } else if is_known {
            self.beginning = false;
        }
    }

    fn begin_at_start(&mut self) {
        if std::mem::take(&mut self.beginning) {
            self.change(Effort::START.clamp(self.least, self.most));
            self.climbed = false;
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
        if self.current > self.most {
            self.change(self.most);
        }
    }

    /// Takes note of what the encoder did; returns the rung to use from now on.
    pub fn observe(&mut self, activity: Activity) -> Effort {
        self.gathered.add(&activity);
        if self.gathered.elapsed >= SPAN {
            let span = std::mem::take(&mut self.gathered);
            if span.says_enough() {
                self.on_span(span);
            }
        }
        self.current
    }

    fn on_span(&mut self, span: Activity) {
        if self.beginning && span.share(span.encoding) >= ENCODER_BOUND {
            // Nor will the link show how fast it is.
            self.begin_at_start();
            return;
        }
        let unfilled = span.share(span.waiting_for_link) <= LINK_IDLE
            && span.share(span.encoding) >= ENCODER_BOUND;
        self.unfilled = if unfilled { self.unfilled + 1 } else { 0 };
        self.settled += 1;
        if self.climbed && self.settled == 2 * self.patience_up {
            // The last step up has proved right.
            self.patience_up = (self.patience_up / 2).max(SPANS);
        }
        self.spans.push(span);
        if self.spans.len() > SPANS {
            self.spans.remove(0);
        }
        let full: Vec<&Activity> = self.spans.iter().filter(|span| span.is_full()).collect();
        if span.is_full() && full.len() >= FULL_SPANS {
            let link = Activity::sum(full).wire();
            self.on_full_link(&Activity::sum(&self.spans), link);
        } else if self.unfilled >= self.patience_down {
            let last = self.spans.last_chunk::<UNFILLED_SPANS>();
            self.on_unfilled_link(&Activity::sum(last.into_iter().flatten()));
        }
        // Otherwise the source is what everything waits for, or it is too early to say.
    }

    fn on_full_link(&mut self, seen: &Activity, link: f64) {
        let mistaken = self.hoped.take();
        if mistaken.is_some() {
            self.hope = HOPE;
            self.patience_down = (self.patience_down * 2).min(MOST_PATIENCE);
        }
        self.link = Some(link);
        let best = self.best(seen, link);
        if best < self.current {
            self.change(best);
        } else if let Some(left) = mistaken.filter(|_| best > self.current) {
            self.change(best.min(left));
        } else if best > self.current && self.settled >= self.patience_up {
            // Few rungs at a time above the start, unless there is time in plenty: a link that has just
            // begun is still finding its rate, and an encoder that is too slow keeps it from finding it.
            let grows = self
                .spans
                .last_chunk()
                .is_some_and(|[before, last]| last.wire() > before.wire() * STILL_GROWING);
            let next = match seen.share(seen.encoding) {
                _ if self.current < Effort::START => Effort::START,
                busy if busy <= ENCODER_IDLE_BY_FAR && !grows => best,
                busy if busy <= ENCODER_IDLE => Effort(self.current.0 + 2),
                _ => Effort(self.current.0 + 1),
            };
            self.change(best.min(next));
        }
    }

    fn on_unfilled_link(&mut self, seen: &Activity) {
        let before = self.hoped.take();
        if before.is_some() {
            self.hope = (self.hope * 2.0).min(HOPE_AT_MOST);
            self.patience_down = (self.patience_down / 2).max(UNFILLED_SPANS);
        }
        // Hope is for so much more than was seen, not than was hoped for last.
        let known = seen.wire().max(self.link.unwrap_or(0.0));
        self.link = Some(known);
        let best = self.best(seen, known * (1.0 + self.hope));
        if best < self.current {
            // The rung to come back to is the first that was left.
            self.hoped = before.or(Some(self.current));
            self.change(best);
        }
    }

    /// Everything is measured anew at another rung.
    fn change(&mut self, to: Effort) {
        let up = to > self.current;
        if self.climbed && !up && self.settled < 2 * self.patience_up {
            self.patience_up = (self.patience_up * 2).min(MOST_PATIENCE);
        }
        self.climbed = up;
        self.current = to;
        self.settled = 0;
        self.unfilled = 0;
        self.spans.clear();
    }

    /// The hardest rung that costs no throughput on a link of so many bytes per second.
    #[expect(
        clippy::cast_precision_loss,
        reason = "rates need no more than a few digits"
    )]
    fn best(&self, seen: &Activity, link: f64) -> Effort {
        let here = self.current.rung();
        let literals = seen.literal_bytes as f64;
        // What a rung with a speed and a ratio of 1 would come to.
        let speed = literals / seen.encoding.as_secs_f64().max(1e-6) / here.speed;
        let ratio = literals / seen.compressed_bytes.max(1) as f64 / here.ratio;
        let rungs = &LADDER[self.least.0..=self.most.0];
        let of_link = |rung: &Rung| match rung.level {
            // However well the pages would compress.
            STORED => link,
            _ => link * ratio * rung.ratio,
        };
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
                stored_bytes: 0,
            });
        }
        let best = (0..LADDER.len())
            .map(|n| (speed * LADDER[n].speed).min(link * LADDER[n].ratio))
            .fold(0.0, f64::max);
        (control.current().number(), frames * frame / clock / best)
    }

    /// 300 ms in which the link was waited for when nothing was encoded.
    fn span(literals: f64, encoding: f64, ratio: f64) -> Activity {
        Activity {
            elapsed: Duration::from_millis(300),
            encoding: Duration::from_secs_f64(encoding),
            waiting_for_link: Duration::from_secs_f64(0.3 - encoding),
            literal_bytes: literals as u64,
            compressed_bytes: (literals / ratio) as u64,
            stored_bytes: 0,
        }
    }

    fn control() -> EffortControl {
        EffortControl::new(Effort::START, Effort::NONE, Effort::MOST)
    }

    #[test]
    fn a_slow_link_gets_the_hardest_rung() {
        let (rung, rate) = run(&mut control(), 2.5e6, 300e6, 20);
        assert_eq!(rung, Effort::MOST.number());
        assert!(rate > 0.95, "{rate}");
        // In one step, as soon as the link is known.
        assert_eq!(
            run(&mut control(), 2.5e6, 300e6, 2).0,
            Effort::MOST.number()
        );
    }

    /// Pages that compress to a tenth, on a processor that other work takes: the link is not full, but
    /// would be with such pages as they are.
    #[test]
    fn what_compresses_well_is_never_copied_over_a_slow_link() {
        let mut control = control();
        for _ in 0..100 {
            let rung = control.current().rung();
            let ratio = if rung.level == STORED {
                1.0
            } else {
                2.6 * rung.ratio
            };
            let literals = 0.3 * (60e6 * rung.speed).min(25e6 * ratio);
            let encoding = literals / (60e6 * rung.speed);
            control.observe(span(literals, encoding, ratio));
            assert!(!control.current().is_none());
        }
    }

    /// A link of 50 MB/s and 300 ms whose window doubles with every round trip: what it took so far says
    /// little of what it will take.
    #[test]
    fn a_link_that_is_still_growing_is_no_slow_one() {
        let mut control = control();
        let mut link = 0.8e6;
        while link < 50e6 {
            let rung = control.current().rung();
            let literals = 0.3 * link * rung.ratio;
            let encoding = literals / (300e6 * rung.speed);
            control.observe(Activity {
                elapsed: Duration::from_millis(300),
                encoding: Duration::from_secs_f64(encoding),
                waiting_for_link: Duration::from_secs_f64((0.3 - encoding).max(0.0)),
                literal_bytes: literals as u64,
                compressed_bytes: (link * 0.3) as u64,
                stored_bytes: 0,
            });
            assert!(control.current().number() <= Effort::START.number() + 2);
            link *= 2.0;
        }
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
    fn a_slow_link_has_the_hardest_rung_from_the_beginning() {
        let begin = || EffortControl::on_unknown_link(Effort::NONE, Effort::MOST);
        let mut control = begin();
        for rate in [100_000, 900_000, 2_500_000] {
            control.on_link(rate, false);
            assert_eq!(control.current(), Effort::MOST);
        }
        control.on_link(2_500_000, true);
        assert!(!control.is_beginning());
        // What is seen of the link later is up to the spans.
        control.on_link(25_000_000, true);
        assert_eq!(run(&mut control, 2.5e6, 300e6, 20).0, Effort::MOST.number());

        // Any other leaves it as soon as it shows how fast it is.
        let mut control = begin();
        control.on_link(3_000_000, false);
        control.on_link(5_000_000, false);
        assert_eq!(control.current(), Effort::START);
        control.on_link(3_000_000, false);
        assert_eq!(control.current(), Effort::START);
    }

    /// A link looks slow to a sender that has nothing to send yet.
    #[test]
    fn an_encoder_that_is_too_slow_for_the_hardest_rung_does_not_begin_with_it_for_long() {
        let mut control = EffortControl::on_unknown_link(Effort::NONE, Effort::MOST);
        control.on_link(1_000_000, false);
        control.observe(span(3e6, 0.28, 4.0));
        assert_eq!(control.current(), Effort::START);
        let mut control = EffortControl::on_unknown_link(Effort(2), Effort(4));
        assert_eq!(control.current(), Effort(4));
        control.on_link(9_000_000, false);
        assert_eq!(control.current(), Effort(4));
    }

    #[test]
    fn a_path_within_a_site_begins_with_none() {
        assert_eq!(Effort::start(Duration::from_micros(900)), Effort::NONE);
        assert_eq!(Effort::start(Duration::from_millis(1)), Effort::START);
        let begin = || EffortControl::new(Effort::NONE, Effort::NONE, Effort::MOST);
        assert_eq!(run(&mut begin(), 1.25e9, 300e6, 10).0, 0);
        // It may be a slow link all the same.
        let mut control = begin();
        assert_eq!(
            run(&mut control, 12.5e6, 300e6, 2).0,
            Effort::START.number()
        );
        assert!(run(&mut control, 12.5e6, 300e6, 20).0 > Effort::START.number());
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

    /// Spans in which the pages compress well or badly, and fast or slowly, follow one another.
    #[test]
    fn what_a_guest_holds_moves_nothing() {
        for seed in 1..20_u64 {
            let mut control = control();
            let mut random = seed;
            let mut draw = || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                0.6 + 0.8 * (random % 1000) as f64 / 1000.0
            };
            let mut rungs = Vec::new();
            for _ in 0..200 {
                let rung = control.current().rung();
                let (speed, ratio) = (160e6 * rung.speed * draw(), rung.ratio * draw());
                let literals = 0.3 * speed.min(25e6 * ratio);
                let encoding = literals / speed;
                control.observe(span(literals, encoding, ratio));
                rungs.push(control.current().number());
            }
            let changes = rungs.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(changes <= 12, "seed {seed}: {rungs:?}");
        }
    }

    #[test]
    fn limits_hold() {
        let mut control = EffortControl::new(Effort::START, Effort(2), Effort(4));
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
        assert_eq!(Effort::within(4 << 20), Effort(4));
        assert_eq!(Effort::within(5 << 20), Effort(4));
        assert_eq!(Effort::within(13 << 20), Effort(8));
        assert_eq!(Effort::within(u64::MAX), Effort::MOST);
    }

    /// Bytes that nothing can be made of pass as fast as they are hashed; what follows them is compressed.
    #[test]
    fn random_bytes_say_nothing_of_what_comes_behind_them() {
        let mut control = control();
        let link = 25e6;
        for random in [0.0, 0.9] {
            for _ in 0..40 {
                let bytes = 0.3 * link * (1.0 - random);
                control.observe(Activity {
                    stored_bytes: (0.3 * link * random) as u64,
                    compressed_bytes: bytes as u64,
                    // At rung 5, on a processor that makes as much of it as the link takes.
                    ..span(bytes * 3.81, 0.24 * (1.0 - random) + 0.01, 3.81)
                });
            }
            assert!(
                control.current() <= Effort(Effort::START.number() + 1),
                "{:?} with {random} of them random",
                control.current()
            );
        }
    }

    #[test]
    fn a_very_slow_encoder_leaves_the_hardest_rung() {
        let mut control = EffortControl::on_unknown_link(Effort::NONE, Effort::MOST);
        control.on_link(1_000_000, false);
        control.observe(span(300e3, 0.299, 4.0));
        assert_eq!(control.current(), Effort::START);
        let mut control = EffortControl::new(Effort::MOST, Effort::NONE, Effort::MOST);
        for _ in 0..10 {
            control.observe(span(300e3, 0.299, 4.0));
        }
        assert!(control.current() < Effort::START);
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

    /// The decision record has the ladder, rung by rung.
    #[test]
    fn the_decision_record_has_this_ladder() {
        const RECORD: &str = "../docs/adr/0011-compression-follows-the-link.md";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(RECORD);
        let record = std::fs::read_to_string(path).unwrap();
        let rows: Vec<[&str; 2]> = record
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| ")?.split(" | ");
                Some([cells.next()?, cells.next()?])
            })
            .filter(|[rung, _]| rung.parse::<usize>().is_ok())
            .collect();
        let named = |rung: &Rung| match (rung.level, 1_u32 << rung.window_log) {
            (STORED, _) => "none".to_owned(),
            (level, window) => {
                let matching = match rung.matching {
                    OfLevel => "",
                    LongDistance => ", long distance",
                    Short => ", short matches",
                };
                let window = match window >> 20 {
                    0 => format!("{} KiB", window >> 10),
                    mib => format!("{mib} MiB"),
                };
                format!("{level}, {window}{matching}")
            }
        };
        let ladder = LADDER.iter().enumerate();
        let ladder: Vec<_> = ladder
            .map(|(number, rung)| [number.to_string(), named(rung)])
            .collect();
        assert_eq!(rows, ladder);
    }
}
