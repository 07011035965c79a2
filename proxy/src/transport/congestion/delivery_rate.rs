//! Our own congestion controller: sends at the rate at which data is seen to arrive.
//!
//! Packet loss says little on a path between clouds, where a policer or a tired cable loses packets
//! on an empty link. This controller therefore measures instead of guessing, in the manner of BBR:
//! the rate at which the path delivers (largest of the last rounds) times the RTT it has without
//! queues (smallest of the last seconds) is what the path holds; a little more than that is kept
//! under way. It looks for more room every few rounds, and backs off when a queue stays or when
//! more is lost than the tolerated share.
//!
//! ```text
//!  Startup ──queue, loss or plateau──▶ Settle ──1 round──▶ Drain ──1 round──▶ Cruise
//!                                                            ▲                 │ every 6-9 rounds
//!                                                            └──1 round── Probe ◀┘
//!  any but Startup ──no minimum RTT for 10 s, or a queue that stays──▶ ProbeRtt ──▶ Cruise
//! ```
//!
//! Sans-IO: all events and times come in through [`quinn::congestion::Controller`]. quinn 0.11
//! shapes the design in four ways. Its pacer sends at 1 to 1.25 × window / smoothed RTT whatever the
//! controller thinks, so the *window* is the only handle and acknowledgements are the clock. Sending
//! is reported once per batch, so batches are logged by their time and an acknowledged packet finds
//! its batch by the time it was sent. Losses come as sums of bytes. And whether the application had
//! nothing to send is known only when acknowledgements arrive.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::sampler::Sampler;
use super::{Arrived, LinkEstimate, bytes_in, rate_over};

/// Window before anything is known, in packets: 58 kB, half a second at 1 Mbit/s.
const INITIAL_WINDOW_PACKETS: u64 = 48;

/// Packets that quinn's pacer lets go at once, at least, and how long it waits between bursts.
const BURST_PACKETS: u64 = 10;
const TIMER_STEP: Duration = Duration::from_millis(2);

/// Window below which quinn's bursts of ten packets no longer fit, in packets.
const MIN_WINDOW_PACKETS: u64 = 12;

/// Window over what was measured, while the path's rate is unknown. As quinn's pacer spreads the
/// window over the round and the measurement is a round old, the rate doubles per round.
const STARTUP_GAIN: f64 = 2.5;

/// Window while the rate of the full path is measured: the measurement that ended the start-up is
/// a round old and about a quarter too low.
const SETTLE_GAIN: f64 = 1.25;

/// Window in steady state. What exceeds 1 stands in the queue and keeps the bottleneck busy between
/// bursts, and covers the share of packets that is lost.
const CRUISE_GAIN: f64 = 1.08;

/// Window while looking for more room.
const PROBE_GAIN: f64 = 1.25;

/// Window while looking for the RTT without queues.
const PROBE_RTT_GAIN: f64 = 0.75;

/// Rounds without 25 % more rate after which the path counts as full.
const PLATEAU_ROUNDS: u32 = 3;
const PLATEAU_GROWTH: f64 = 1.25;

/// Rounds whose largest rate is believed.
const RATE_ROUNDS: usize = 10;

/// Rounds between two probes: this many plus 0 to 3, so that connections do not probe in step.
const CRUISE_ROUNDS: u32 = 6;

/// Age at which the smallest RTT is looked for anew.
const MIN_RTT_AGE: Duration = Duration::from_secs(10);

/// Shortest time between two searches that a standing queue asked for.
const MIN_RTT_SEARCH_GAP: Duration = Duration::from_secs(2);

/// A queue is noticed when packets are late by this share of the smallest RTT, within these bounds
/// (RFC 9406 allows up to 16 ms in slow start; at 1 Gbit/s half of that saves a megabyte of drops).
const QUEUE_SHARE: u32 = 8;
const QUEUE_MIN: Duration = Duration::from_millis(4);
const QUEUE_MAX: Duration = Duration::from_millis(8);

/// RTT samples in a row that must be late before a queue is believed; one that is not starts over.
/// Jitter is not late eight times in a row.
const QUEUE_SAMPLES: u32 = 8;

/// Points at which a standing queue is acted upon; a round scores 1 for a queue above
/// a quarter RTT, 3 for one above a whole RTT.
const STANDING_QUEUE_SCORE: u32 = 3;

/// Share of a round's packets that may be lost without counting as congestion.
const LOSS_TOLERANCE: f64 = 0.05;

/// What is left of the window's upper bound after a round with more loss than that.
const LOSS_BACKOFF: f64 = 0.85;

/// Batches closer together than this share of an RTT are remembered as one.
const LOG_SPACING: u32 = 512;

/// Longest that a peer may delay an acknowledgement, as QUIC has it; bounds the allowance for acks
/// that arrive in clumps.
const MAX_ACK_DELAY: Duration = Duration::from_millis(25);

/// What the controller is doing; also for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Multiplies the window each round until the path is full.
    Startup,
    /// Holds the window for a round, so that the rate of the full path is measured.
    Settle,
    /// Lets the queue run empty for a round.
    Drain,
    /// Steady state.
    Cruise,
    /// Sends more for a round, to see whether more arrives.
    Probe,
    /// Sends less for a round, to see the RTT without queues.
    ProbeRtt,
}

/// Builds a [`DeliveryRate`] per path.
#[derive(Clone, Debug, Default)]
pub struct DeliveryRateConfig {
    /// Rate that is not exceeded on average, in bytes of UDP payload per second.
    pub ceiling_bytes_per_sec: Option<u64>,
}

impl ControllerFactory for DeliveryRateConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(DeliveryRate::new(
            self.ceiling_bytes_per_sec,
            now,
            u64::from(current_mtu),
        ))
    }
}

/// The state of one path; see the module.
#[derive(Clone, Debug)]
pub struct DeliveryRate {
    ceiling: Option<u64>,
    mtu: u64,
    sampler: Sampler,
    rate: RateFilter,
    aggregation: Aggregation,
    round: Round,
    phase: Phase,
    /// Rounds since the phase began.
    phase_rounds: u32,
    /// Rounds that this cruise lasts.
    cruise_rounds: u32,
    /// The estimate when the last probe began.
    rate_before_probe: u64,
    /// Startup: the rate to beat, and rounds in which it was not beaten.
    plateau_rate: u64,
    plateau_rounds: u32,
    /// `None` before the first acknowledgement.
    min_rtt: Option<Duration>,
    min_rtt_at: Instant,
    /// Smallest RTT in this ProbeRtt phase.
    probed_rtt: Option<Duration>,
    /// When a standing queue last led to a search for the smallest RTT.
    searched_at: Option<Instant>,
    standing_queue: u32,
    /// The rate that was forgotten because of the queue that stands.
    forgotten_rate: Option<u64>,
    /// RTT samples in a row that show a queue.
    late_samples: u32,
    /// Bound that loss has taught; `None` when there is none.
    inflight_max: Option<u64>,
    smoothed_rtt: Duration,
    window: u64,
    arrived: Arrived,
    /// Bytes that had arrived before the acknowledgements being looked at.
    arrived_before: u64,
}

impl DeliveryRate {
    fn new(ceiling: Option<u64>, now: Instant, mtu: u64) -> Self {
        Self {
            ceiling,
            mtu,
            sampler: Sampler::new(now),
            rate: RateFilter::default(),
            aggregation: Aggregation::new(now),
            round: Round::default(),
            phase: Phase::Startup,
            phase_rounds: 0,
            cruise_rounds: CRUISE_ROUNDS,
            rate_before_probe: 0,
            plateau_rate: 0,
            plateau_rounds: 0,
            min_rtt: None,
            min_rtt_at: now,
            probed_rtt: None,
            searched_at: None,
            standing_queue: 0,
            forgotten_rate: None,
            late_samples: 0,
            inflight_max: None,
            smoothed_rtt: Duration::ZERO,
            window: INITIAL_WINDOW_PACKETS * mtu,
            arrived: Arrived::default(),
            arrived_before: 0,
        }
    }

    /// What the controller knows.
    #[must_use]
    pub fn estimate(&self) -> LinkEstimate {
        let min_rtt = self.min_rtt.unwrap_or(self.smoothed_rtt);
        // Before the first full round the window is the best guess.
        let rate = match self.rate.max() {
            0 => rate_over(self.window, self.smoothed_rtt),
            rate => rate,
        };
        LinkEstimate {
            rate_bytes_per_sec: self.ceiling.map_or(rate, |ceiling| rate.min(ceiling)),
            is_known: Some(!matches!(self.phase, Phase::Startup | Phase::Settle)),
            min_rtt,
            rtt: self.smoothed_rtt,
            cwnd: self.window,
            arrived: Some(self.arrived),
        }
    }

    /// What the controller is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Rate × smallest RTT: what the path holds without a queue.
    fn bdp(&self) -> u64 {
        bytes_in(self.rate.max(), self.min_rtt.unwrap_or_default())
    }

    fn min_window(&self) -> u64 {
        MIN_WINDOW_PACKETS * self.mtu
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.phase_rounds = 0;
        self.standing_queue = 0;
        match phase {
            Phase::Probe => self.rate_before_probe = self.rate.max(),
            // Any number that differs between connections and cycles will do.
            Phase::Cruise => {
                self.cruise_rounds = CRUISE_ROUNDS + (self.sampler.delivered / self.mtu % 4) as u32;
            }
            Phase::ProbeRtt => self.probed_rtt = None,
            Phase::Startup | Phase::Settle | Phase::Drain => {}
        }
    }

    /// Sets the window from all that is known.
    fn update_window(&mut self, in_flight: u64) {
        let bdp = self.bdp();
        let scaled = |gain: f64| (bdp as f64 * gain) as u64;
        let clumps = self.aggregation.allowance(self.rate.max());
        let mut window = match self.phase {
            Phase::Startup => self.window.max(scaled(STARTUP_GAIN)),
            Phase::Settle => self.window.min(scaled(SETTLE_GAIN).max(in_flight / 2)),
            Phase::Drain => bdp + clumps / 2,
            Phase::Cruise => scaled(CRUISE_GAIN) + clumps,
            Phase::Probe => scaled(PROBE_GAIN) + clumps,
            Phase::ProbeRtt => scaled(PROBE_RTT_GAIN),
        };
        if let Some(max) = self.inflight_max {
            window = window.min(max);
        }
        if let Some(ceiling) = self.ceiling {
            window = window.min(bytes_in(ceiling, self.smoothed_rtt));
        }
        self.window = window.max(self.min_window());
    }

    fn on_rtt(&mut self, now: Instant, rtt: Duration) {
        if self.min_rtt.is_none_or(|min| rtt <= min) {
            self.min_rtt = Some(rtt);
            self.min_rtt_at = now;
        }
        if self.phase == Phase::ProbeRtt && self.phase_rounds > 0 {
            self.probed_rtt = Some(self.probed_rtt.map_or(rtt, |min| min.min(rtt)));
        }
        let min = self.min_rtt.unwrap_or(rtt);
        let late = rtt >= min + (min / QUEUE_SHARE).clamp(QUEUE_MIN, QUEUE_MAX);
        self.late_samples = if late { self.late_samples + 1 } else { 0 };
        self.round.on_rtt(rtt);
    }

    /// Whether more time has passed since the last packet than window and pacer account for: then
    /// the application had nothing to send. quinn says so too, but only at acknowledgements, and an
    /// application that writes in step with them is never caught.
    fn was_idle(&self, now: Instant) -> bool {
        let burst = self
            .smoothed_rtt
            .mul_f64((BURST_PACKETS * self.mtu) as f64 / self.window as f64);
        let paced = burst.max(TIMER_STEP) + TIMER_STEP;
        self.sampler.in_flight < self.window / 10 * 9
            && now.saturating_duration_since(self.sampler.sent_at) > paced
    }

    /// How late the luckiest packet of the round was.
    fn round_delay(&self) -> Duration {
        match (self.round.min_rtt, self.min_rtt) {
            (Some(round), Some(min)) if self.round.rtt_samples >= QUEUE_SAMPLES => {
                round.saturating_sub(min)
            }
            _ => Duration::ZERO,
        }
    }

    /// Whether a queue has just begun to build: during start-up each round waited for before saying
    /// so would double it.
    fn has_queue(&self) -> bool {
        self.late_samples >= QUEUE_SAMPLES
    }

    /// A round is over: everything sent at its beginning has been answered for.
    fn on_round_end(&mut self, now: Instant, in_flight: u64) {
        let delay = self.round_delay();
        let min_rtt = self.min_rtt.unwrap_or_default();
        if !self.round.is_app_limited {
            self.rate.next_round();
        }
        self.aggregation.next_round();
        self.phase_rounds += 1;
        let is_lossy = self.round.is_lossy(self.mtu);
        if is_lossy {
            self.on_lossy_round(in_flight);
        }
        match self.phase {
            Phase::Startup => self.on_startup_round(is_lossy),
            Phase::Settle => self.enter(Phase::Drain),
            Phase::Drain
                if self.rate.max() as f64 > self.rate_before_probe as f64 * 1.1
                    && self.rate_before_probe > 0
                    && !is_lossy =>
            {
                self.enter(Phase::Probe);
            }
            Phase::Drain => self.enter(Phase::Cruise),
            Phase::Probe => {
                if !is_lossy && let Some(max) = self.inflight_max {
                    let raised = (max as f64 * PROBE_GAIN) as u64;
                    // Once it no longer binds, it has nothing left to say.
                    self.inflight_max = (raised < 2 * self.bdp()).then_some(raised);
                }
                self.enter(Phase::Drain);
            }
            Phase::ProbeRtt if self.phase_rounds >= 2 => {
                self.on_rtt_probed(now);
                self.enter(Phase::Cruise);
            }
            Phase::ProbeRtt => {}
            Phase::Cruise => self.on_cruise_round(now, delay, min_rtt),
        }
        self.round = Round::default();
    }

    fn on_startup_round(&mut self, is_lossy: bool) {
        if self.round.is_app_limited {
            return;
        }
        let rate = self.rate.max();
        if rate as f64 >= self.plateau_rate as f64 * PLATEAU_GROWTH {
            self.plateau_rate = rate;
            self.plateau_rounds = 0;
        } else {
            self.plateau_rounds += 1;
        }
        if self.plateau_rounds >= PLATEAU_ROUNDS || is_lossy {
            self.enter(Phase::Drain);
        }
    }

    fn on_cruise_round(&mut self, now: Instant, delay: Duration, min_rtt: Duration) {
        self.standing_queue = match delay {
            _ if self.round.is_app_limited => 0,
            delay if delay > min_rtt + QUEUE_MIN => self.standing_queue + 3,
            delay if delay > min_rtt / 4 + QUEUE_MIN => self.standing_queue + 1,
            _ => 0,
        };
        if self.standing_queue == 0 {
            self.forgotten_rate = None;
        } else if self.standing_queue >= STANDING_QUEUE_SCORE {
            self.standing_queue = 0;
            if self.on_standing_queue(now) {
                return;
            }
        }
        if !self.round.is_app_limited
            && now.saturating_duration_since(self.min_rtt_at) > MIN_RTT_AGE
        {
            self.enter(Phase::ProbeRtt);
        } else if self.phase_rounds >= self.cruise_rounds && !self.round.is_app_limited {
            self.enter(Phase::Probe);
        }
    }

    /// Either the path has become slower, then the old rate must be forgotten; or longer, or others
    /// fill its queue, then its smallest RTT must be learnt anew. Tries the first, then the second.
    /// Says whether the phase has changed.
    fn on_standing_queue(&mut self, now: Instant) -> bool {
        let rate = self.rate.max();
        if self.forgotten_rate.is_none() && self.rate.forget_old() {
            self.forgotten_rate = Some(rate);
            return false;
        }
        let may_search = self
            .searched_at
            .is_none_or(|at| now.saturating_duration_since(at) > MIN_RTT_SEARCH_GAP);
        if may_search {
            self.searched_at = Some(now);
            self.enter(Phase::ProbeRtt);
        }
        may_search
    }

    /// The smallest RTT of the emptied path is known.
    fn on_rtt_probed(&mut self, now: Instant) {
        let (Some(rtt), Some(known)) = (self.probed_rtt, self.min_rtt) else {
            return;
        };
        if let Some(rate) = self.forgotten_rate.take()
            && rtt > known + known / QUEUE_SHARE
        {
            // The path is longer, so what looked like a lower rate was a window too small for it.
            self.rate.on_sample(rate, false);
        }
        self.min_rtt = Some(rtt);
        self.min_rtt_at = now;
    }

    /// More was lost in the round than a bad path loses.
    fn on_lossy_round(&mut self, in_flight: u64) {
        let used = self.window.min(in_flight + self.round.lost);
        let reduced = (used as f64 * LOSS_BACKOFF) as u64;
        // What really arrived fits by definition.
        let fits = bytes_in(self.rate.latest(), self.min_rtt.unwrap_or_default());
        let bound = reduced.max(fits).max(self.min_window());
        self.inflight_max = Some(self.inflight_max.map_or(bound, |max| max.min(bound)));
        self.rate.forget_old();
    }
}

impl Controller for DeliveryRate {
    fn on_sent(&mut self, now: Instant, bytes: u64, _: u64) {
        if self.sampler.in_flight == 0 {
            // A path that carried nothing of ours had no queue of ours: no need to look again.
            self.min_rtt_at = now;
        }
        if self.was_idle(now) {
            self.sampler.on_application_limit();
        }
        let spacing = self.min_rtt.unwrap_or_default() / LOG_SPACING;
        self.sampler.on_sent(now, bytes, spacing);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, rtt: &RttEstimator) {
        self.smoothed_rtt = rtt.get();
        self.sampler.on_ack(now, sent, bytes);
        self.arrived.bytes += bytes;
        self.round.delivered += bytes;
        self.aggregation.on_ack(now, bytes, self.rate.max());
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        let acked = self.arrived.bytes - self.arrived_before;
        self.arrived_before = self.arrived.bytes;
        if !app_limited {
            self.arrived.with_more_waiting += acked;
        }
        let Some(sample) = self.sampler.on_end_acks(now, in_flight, app_limited) else {
            return;
        };
        self.on_rtt(now, sample.rtt);
        // A sample shorter than the path is a clump of acknowledgements, not a rate.
        let is_believable = sample.interval >= self.min_rtt.unwrap_or_default();
        if is_believable {
            let rate = rate_over(sample.delivered, sample.interval);
            self.rate.on_sample(rate, sample.is_app_limited);
            if !sample.is_app_limited {
                self.round.is_app_limited = false;
            }
        }
        if self.phase == Phase::Startup && self.has_queue() {
            // Full just now: the rate of the full path shows only in the round to come.
            self.update_window(in_flight);
            self.enter(Phase::Settle);
            self.sampler.restart_round();
            self.round = Round::default();
        } else if sample.is_round_end {
            self.on_round_end(now, in_flight);
        }
        self.update_window(in_flight);
    }

    fn on_congestion_event(
        &mut self,
        _: Instant,
        _: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.sampler.in_flight = self.sampler.in_flight.saturating_sub(lost_bytes);
        if lost_bytes == 0 {
            // The network marked packets instead of dropping them.
            self.round.is_marked = true;
        } else if is_persistent_congestion {
            // The path was gone for a while. What it carried before is the best guess for after,
            // taken at half.
            let bound = (self.bdp() / 2).max(self.min_window());
            self.inflight_max = Some(bound);
            self.window = self.window.min(bound);
        } else {
            self.round.lost += lost_bytes;
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = u64::from(new_mtu);
        self.window = self.window.max(self.min_window());
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window;
        metrics.pacing_rate = Some(self.estimate().rate_bytes_per_sec.saturating_mul(8));
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW_PACKETS * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What one round trip has shown so far.
#[derive(Clone, Debug)]
struct Round {
    delivered: u64,
    lost: u64,
    /// The network has marked packets (ECN).
    is_marked: bool,
    /// No rate sample of this round says anything about the path.
    is_app_limited: bool,
    min_rtt: Option<Duration>,
    rtt_samples: u32,
}

impl Default for Round {
    fn default() -> Self {
        Self {
            delivered: 0,
            lost: 0,
            is_marked: false,
            is_app_limited: true,
            min_rtt: None,
            rtt_samples: 0,
        }
    }
}

impl Round {
    fn on_rtt(&mut self, rtt: Duration) {
        self.min_rtt = Some(self.min_rtt.map_or(rtt, |min| min.min(rtt)));
        self.rtt_samples = self.rtt_samples.saturating_add(1);
    }

    /// Whether more was lost than [`LOSS_TOLERANCE`], beyond what chance explains: two standard
    /// deviations and one packet.
    fn is_lossy(&self, mtu: u64) -> bool {
        let lost = self.lost as f64 / mtu as f64;
        let expected = (self.lost + self.delivered) as f64 / mtu as f64 * LOSS_TOLERANCE;
        self.is_marked || lost > expected + 2.0 * expected.sqrt() + 1.0
    }
}

/// The largest rates of the last rounds, the current one in front.
#[derive(Clone, Debug)]
struct RateFilter {
    rounds: VecDeque<u64>,
}

impl Default for RateFilter {
    fn default() -> Self {
        Self {
            rounds: VecDeque::from([0]),
        }
    }
}

impl RateFilter {
    fn max(&self) -> u64 {
        self.rounds.iter().copied().max().unwrap_or(0)
    }

    /// The largest rate of the current and the last round.
    fn latest(&self) -> u64 {
        self.rounds.iter().take(2).copied().max().unwrap_or(0)
    }

    /// An application-limited sample is a lower bound of what the path carries, nothing more.
    fn on_sample(&mut self, rate: u64, is_app_limited: bool) {
        if (!is_app_limited || rate > self.max())
            && let Some(current) = self.rounds.front_mut()
        {
            *current = rate.max(*current);
        }
    }

    fn next_round(&mut self) {
        self.rounds.push_front(0);
        self.rounds.truncate(RATE_ROUNDS);
    }

    /// Keeps only what the last two rounds showed. Says whether that changed anything.
    fn forget_old(&mut self) -> bool {
        let before = self.max();
        if self.latest() > 0 {
            self.rounds.truncate(2);
        }
        (self.max() as f64) < before as f64 * 0.95
    }
}

/// How far acknowledgements run ahead of the rate: they arrive in clumps when hosts are busy or
/// radio links gather packets, and the window must cover the wait for the next clump.
#[derive(Clone, Debug)]
struct Aggregation {
    epoch_start: Instant,
    epoch_bytes: u64,
    /// Largest excess per round, the current round in front.
    rounds: VecDeque<u64>,
}

impl Aggregation {
    fn new(now: Instant) -> Self {
        Self {
            epoch_start: now,
            epoch_bytes: 0,
            rounds: VecDeque::from([0]),
        }
    }

    fn on_ack(&mut self, now: Instant, bytes: u64, rate: u64) {
        let expected = bytes_in(rate, now.saturating_duration_since(self.epoch_start));
        if self.epoch_bytes <= expected {
            self.epoch_start = now;
            self.epoch_bytes = bytes;
        } else {
            self.epoch_bytes += bytes;
        }
        let expected = bytes_in(rate, now.saturating_duration_since(self.epoch_start));
        let excess = self.epoch_bytes.saturating_sub(expected);
        if let Some(current) = self.rounds.front_mut() {
            *current = excess.max(*current);
        }
    }

    fn next_round(&mut self) {
        self.rounds.push_front(0);
        self.rounds.truncate(RATE_ROUNDS);
    }

    fn allowance(&self, rate: u64) -> u64 {
        let excess = self.rounds.iter().copied().max().unwrap_or(0);
        excess.min(bytes_in(rate, MAX_ACK_DELAY))
    }
}
