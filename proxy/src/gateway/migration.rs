//! One migration at this gateway: its channels, how far it is, and how it ends.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use skyferry_core::qemu::{Event, Phase};
use skyferry_dedup::{DomainKey, FrameStats, PAGE_SIZE, PlaceTable};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    channel::{Abort, Channel, Mark},
    channels::{Channels, Standing},
    end::End,
    link::{Link, Role, lock},
    releases::Near,
    socket::Socket,
};
use crate::{
    metrics::{MigrationResult, PeerMetrics},
    session::Class,
    status::{Direction, MigrationState, MigrationStatus},
    wire::{
        ChannelNo, Control, MigrationId,
        control::{ChannelDigest, ChannelPosition, ResetCode, StreamKind},
    },
};

/// Over how long rates are averaged for status.
const RATE_WINDOW: Duration = Duration::from_secs(3);

/// How soon a commit may be asked for again; who does it sooner is not answered.
const REPEAT_INTERVAL: Duration = Duration::from_millis(100);

/// What the near gateway asks the far one to compare before the commit byte is released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CommitRequest {
    pub(super) channel: ChannelNo,
    pub(super) digests: Vec<ChannelDigest>,
    /// The near gateway's clock when the source was still there.
    pub(super) clock: Duration,
    /// The connection it came on.
    pub(super) generation: u64,
    /// Who asks.
    pub(super) near: Near,
}

#[derive(Debug, Default)]
struct Progress {
    phase: Option<Phase>,
    opened: bool,
    stopped_at: Option<Instant>,
    blackout: Option<Duration>,
    /// Since when the commit has been asked for (near) or released (far).
    awaiting_since: Option<Instant>,
    /// Status word of the destination's SHUT message, once seen.
    verdict: Option<u32>,
    error: Option<Abort>,
    /// Far: the near gateway went away before it had passed the verdict on.
    verdict_lost: bool,
    /// The source closed its socket before there was a verdict.
    source_left: bool,
    /// The destination did so first.
    destination_left: bool,
    result: Option<MigrationResult>,
    finished_at: Option<Instant>,
    samples: VecDeque<Sample>,
}

/// Totals at a moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    guest: u64,
    wire: u64,
    ram: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Migration {
    pub(super) id: MigrationId,
    pub(super) link: Arc<Link>,
    pub(super) target: String,
    pub(super) ingress: Option<String>,
    pub(super) domain: DomainKey,
    pub(super) metrics: PeerMetrics,
    /// Near: a source that opens no return path is taken all the same.
    pub(super) allow_no_return_path: bool,
    /// Near: the source has none: it closes as soon as it has written everything.
    without_return_path: AtomicBool,
    started: Instant,
    started_at: SystemTime,
    channels: Mutex<Channels>,
    /// A main channel belongs to it, or did.
    had_main: AtomicBool,
    next_channel: AtomicU32,
    progress: Mutex<Progress>,
    guest_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    /// RAM that page records of any kind stood for.
    ram_bytes: AtomicU64,
    /// RAM that the stream announced, 0 while it has not.
    ram_total: AtomicU64,
    /// Near: the commit request may have reached the far gateway. From here on the source's socket
    /// stays open until the destination's verdict has been passed on.
    maybe_committed: AtomicBool,
    /// Near: the commit was requested.
    pub(super) requested: CancellationToken,
    /// Near: the socket of the main channel, as long as it is open.
    source: Mutex<Weak<Socket>>,
    /// Near: what a source's socket is kept open for may be over.
    pub(super) settled: Notify,
    /// Near: the process that the commit was asked of is gone; nobody knows what it released.
    far_forgot: AtomicBool,
    /// Far: the commit byte was handed to the destination. Near: the far gateway said so.
    released: AtomicBool,
    /// Near: the request as sent, to be repeated after a reconnect.
    commit_message: Mutex<Option<Control>>,
    /// Near: when it was last said because it was asked for.
    repeated: Mutex<Option<Instant>>,
    /// Far: the request as received.
    pub(super) commit_request: watch::Sender<Option<CommitRequest>>,
    /// Near: a channel may come that stays silent.
    expects_silent: AtomicBool,
    /// Near: a channel said that a main channel belongs to it.
    expects_main: AtomicBool,
    /// Near: there was a channel that is none of QEMU's.
    has_strays: AtomicBool,
    /// What the guest's RAM held when its main channel ended.
    table: Mutex<Option<PlaceTable>>,
    /// No channel joins any more.
    pub(super) closing: CancellationToken,
    /// Nothing about it is written into the log: there are too many like it.
    hushed: AtomicBool,
}

impl Migration {
    pub(super) fn new(
        id: MigrationId,
        link: Arc<Link>,
        target: String,
        ingress: Option<String>,
        domain: DomainKey,
        metrics: PeerMetrics,
        allow_no_return_path: bool,
    ) -> Self {
        metrics.active.inc();
        Self {
            id,
            link,
            target,
            ingress,
            domain,
            metrics,
            allow_no_return_path,
            without_return_path: AtomicBool::new(false),
            started: Instant::now(),
            started_at: SystemTime::now(),
            channels: Mutex::default(),
            had_main: AtomicBool::new(false),
            next_channel: AtomicU32::new(0),
            progress: Mutex::default(),
            guest_bytes: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            ram_bytes: AtomicU64::new(0),
            ram_total: AtomicU64::new(0),
            maybe_committed: AtomicBool::new(false),
            requested: CancellationToken::new(),
            source: Mutex::default(),
            settled: Notify::new(),
            far_forgot: AtomicBool::new(false),
            released: AtomicBool::new(false),
            commit_message: Mutex::default(),
            repeated: Mutex::default(),
            commit_request: watch::Sender::new(None),
            expects_silent: AtomicBool::new(false),
            expects_main: AtomicBool::new(false),
            has_strays: AtomicBool::new(false),
            table: Mutex::default(),
            closing: CancellationToken::new(),
            hushed: AtomicBool::new(false),
        }
    }

    /// Nothing about this migration is written into the log from now on. It is counted all the same.
    pub(super) fn hush(&self) {
        self.hushed.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_hushed(&self) -> bool {
        self.hushed.load(Ordering::Relaxed)
    }

    pub(super) fn role(&self) -> Role {
        self.link.role
    }

    // --- channels --------------------------------------------------------------------------

    pub(super) fn next_channel_no(&self) -> ChannelNo {
        self.next_channel.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds a channel; false when there are `limit` already, the number was taken before, or the
    /// migration is over.
    pub(super) fn add_channel(&self, channel: Arc<Channel>, limit: usize) -> bool {
        let is_main = channel.kind == StreamKind::QemuMain;
        let added = lock(&self.channels).add(channel, limit);
        if added {
            self.had_main.fetch_or(is_main, Ordering::Relaxed);
            self.link.registered.notify_waiters();
        }
        added
    }

    pub(super) fn channel(&self, no: ChannelNo) -> Option<Arc<Channel>> {
        lock(&self.channels).open.get(&no).cloned()
    }

    pub(super) fn channels(&self) -> Vec<Arc<Channel>> {
        lock(&self.channels).open.values().cloned().collect()
    }

    /// The channels that have not ended, and where those stand that have.
    pub(super) fn standing(&self) -> Standing {
        lock(&self.channels).standing()
    }

    /// The channel's directions have both ended in order: where they stand stays known.
    pub(super) fn on_ended(&self, channel: &Channel) {
        lock(&self.channels).on_ended(channel);
    }

    /// The peer says that it has no channel of this migration any more.
    pub(super) fn on_ends_known(&self) {
        lock(&self.channels).ends_known = true;
    }

    /// The ends of a migration that is over, all of them in order: the peer may not have heard of them.
    pub(super) fn unheard_ends(&self) -> Vec<ChannelPosition> {
        let channels = lock(&self.channels);
        if channels.broken || channels.ends_known {
            return Vec::new();
        }
        channels.ends()
    }

    /// A channel ended early.
    pub(super) fn on_broken(&self) {
        lock(&self.channels).broken = true;
    }

    /// Takes the channel out; true when it was the last.
    pub(super) fn remove_channel(&self, channel: &Channel) -> bool {
        let undelivered = i64::try_from(channel.give_up_sending()).unwrap_or(0);
        self.metrics.in_flight.sub(undelivered);
        let last = lock(&self.channels).remove(channel.no);
        self.settled.notify_waiters();
        last
    }

    /// Whether what arrived on a channel agrees with `wanted`; `None` while it has not got that
    /// far.
    pub(super) fn agrees(&self, no: ChannelNo, wanted: Mark) -> Option<bool> {
        lock(&self.channels).agrees(no, wanted)
    }

    /// Where the streams of all channels besides `main` stand, those that have ended included.
    /// `None` when one ended early.
    pub(super) fn other_marks(&self, main: ChannelNo) -> Option<Vec<(ChannelNo, Mark)>> {
        lock(&self.channels).other_marks(main)
    }

    pub(super) fn has_main(&self) -> bool {
        self.main().is_some()
    }

    /// The main channel, if one has joined.
    pub(super) fn main(&self) -> Option<Arc<Channel>> {
        let channels = lock(&self.channels);
        channels
            .open
            .values()
            .find(|channel| channel.kind == StreamKind::QemuMain)
            .cloned()
    }

    /// The source may open a channel on which nothing is said until its first page fault.
    pub(super) fn expect_silent_channel(&self) {
        self.expects_silent.store(true, Ordering::Release);
    }

    pub(super) fn expects_silent_channel(&self) -> bool {
        self.expects_silent.load(Ordering::Acquire) && !self.closing.is_cancelled()
    }

    /// A channel of several has joined whose main one will, too.
    pub(super) fn expect_main(&self) {
        self.expects_main.store(true, Ordering::Release);
    }

    pub(super) fn expects_main(&self) -> bool {
        self.expects_main.load(Ordering::Acquire)
    }

    /// A channel has joined that is none of QEMU's.
    pub(super) fn on_stray(&self) {
        self.has_strays.store(true, Ordering::Release);
    }

    pub(super) fn has_strays(&self) -> bool {
        self.has_strays.load(Ordering::Acquire)
    }

    /// Ends all channels early that have not ended in order and are only about to notice.
    pub(super) fn abort(&self, abort: &Abort) {
        let mut channels = self.channels();
        channels.retain(|channel| !channel.is_done());
        if channels.is_empty() {
            return;
        }
        self.note_error(abort);
        for channel in channels {
            channel.abort(abort.clone());
        }
    }

    // --- commit ----------------------------------------------------------------------------

    pub(super) fn set_without_return_path(&self) {
        self.without_return_path.store(true, Ordering::Release);
    }

    /// Near: whether the source waits for the destination's verdict. One that does not may close
    /// its socket before it.
    pub(super) fn awaits_verdict(&self) -> bool {
        !self.without_return_path.load(Ordering::Acquire)
    }

    pub(super) fn maybe_committed(&self) -> bool {
        self.maybe_committed.load(Ordering::Acquire)
    }

    /// The commit request is about to be sent: from now on only the destination's word ends this.
    /// False when a channel has ended early, and its source may have seen that: there is no request
    /// then.
    #[must_use]
    pub(super) fn set_maybe_committed(&self, message: Control) -> bool {
        // Whoever notes an early end under this lock either stops the request or sees it.
        let channels = lock(&self.channels);
        if channels.broken {
            return false;
        }
        *lock(&self.commit_message) = Some(message);
        self.maybe_committed.store(true, Ordering::Release);
        drop(channels);
        self.begin_awaiting();
        self.requested.cancel();
        true
    }

    /// Near: the process at the far end is another than the one that the commit was asked of.
    pub(super) fn on_far_forgot(&self) {
        self.far_forgot.store(true, Ordering::Release);
    }

    /// Near: the far gateway's last word, which holds for all time. Another process than the one
    /// that was asked has none.
    pub(super) fn on_last_word(&self, released: bool) {
        if released {
            if self.maybe_committed() {
                self.set_released();
            }
        } else if !self.released() && !self.far_forgot.load(Ordering::Acquire) {
            self.clear_maybe_committed();
        }
    }

    /// Near: the destination itself has ended its connection, so it does not run.
    pub(super) fn on_destination_ended(&self) {
        if !self.far_forgot.load(Ordering::Acquire) {
            self.clear_maybe_committed();
        }
    }

    fn clear_maybe_committed(&self) {
        self.maybe_committed.store(false, Ordering::Release);
        self.settled.notify_waiters();
    }

    fn begin_awaiting(&self) {
        lock(&self.progress)
            .awaiting_since
            .get_or_insert_with(Instant::now);
    }

    /// How long the verdict has been awaited: at the near gateway since the commit was asked for and
    /// until the verdict has been passed on, at the far one from the release to the migration's end.
    pub(super) fn awaiting(&self) -> Option<Duration> {
        if !self.maybe_committed() && !self.released() {
            return None;
        }
        let progress = lock(&self.progress);
        let passed_on = self.role() == Role::Near && progress.verdict.is_some();
        if passed_on || progress.result.is_some() {
            return None;
        }
        progress.awaiting_since.map(|since| since.elapsed())
    }

    /// Near: the source's socket stays open for the destination's verdict, whatever ends here: a close
    /// would let its guest run, and the destination's may do so already.
    pub(super) fn keeps_source_waiting(&self) -> bool {
        self.role() == Role::Near && self.maybe_committed() && self.verdict().is_none()
    }

    /// Near: the source's connection of the main channel.
    pub(super) fn set_source(&self, socket: &Arc<Socket>) {
        *lock(&self.source) = Arc::downgrade(socket);
    }

    /// Near: whether that stands, at this moment.
    pub(super) fn source_is_there(&self) -> bool {
        let source = lock(&self.source).upgrade();
        source.is_some_and(|socket| !socket.has_left())
    }

    /// Near: whether the request may be said once more for the asking: it is long, and a question short.
    pub(super) fn may_repeat_commit(&self) -> bool {
        let mut last = lock(&self.repeated);
        let may = last.is_none_or(|at| at.elapsed() >= REPEAT_INTERVAL);
        if may {
            *last = Some(Instant::now());
        }
        may
    }

    /// The request is not to be repeated: the source's guest runs again.
    pub(super) fn withdraw_commit(&self) {
        *lock(&self.commit_message) = None;
    }

    pub(super) fn commit_message(&self) -> Option<Control> {
        lock(&self.commit_message).clone()
    }

    pub(super) fn released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    /// Whether the destination may be running, or be about to: nothing but its word ends this.
    pub(super) fn past_commit(&self) -> bool {
        self.maybe_committed() || self.released()
    }

    pub(super) fn set_released(&self) {
        self.released.store(true, Ordering::Release);
        self.begin_awaiting();
        self.settled.notify_waiters();
    }

    // --- progress --------------------------------------------------------------------------

    pub(super) fn on_opened(&self) {
        lock(&self.progress).opened = true;
    }

    pub(super) fn was_opened(&self) -> bool {
        lock(&self.progress).opened
    }

    pub(super) fn on_event(&self, event: Event) {
        let Event::Phase(phase) = event else { return };
        let mut progress = lock(&self.progress);
        if matches!(
            phase,
            Phase::Switchover | Phase::DeviceState | Phase::Postcopy
        ) {
            progress.stopped_at.get_or_insert_with(Instant::now);
        }
        if progress.phase != Some(phase) && !self.is_hushed() {
            info!(migration = %self.id, %phase, round = phase.round(), "phase");
        }
        progress.phase = Some(phase);
    }

    /// The order on the wire of what is sent now.
    pub(super) fn class(&self) -> Class {
        if lock(&self.progress).stopped_at.is_some() {
            Class::Switchover
        } else {
            Class::Bulk
        }
    }

    /// The guest runs and bytes are plenty: worth waiting a moment for a full batch.
    pub(super) fn may_linger(&self) -> bool {
        matches!(
            lock(&self.progress).phase,
            Some(Phase::Setup | Phase::Precopy { .. })
        )
    }

    /// The destination's SHUT message has been seen (far) or passed on (near).
    pub(super) fn on_verdict(&self, status: u32) {
        let mut progress = lock(&self.progress);
        if progress.verdict.replace(status).is_some() {
            return;
        }
        if status == 0
            && let Some(stopped_at) = progress.stopped_at
        {
            let blackout = stopped_at.elapsed();
            progress.blackout = Some(blackout);
            self.metrics.blackout.observe(blackout.as_secs_f64());
        }
        drop(progress);
        self.settled.notify_waiters();
        if !self.is_hushed() {
            info!(migration = %self.id, status, "the destination's verdict");
        }
    }

    pub(super) fn verdict(&self) -> Option<u32> {
        lock(&self.progress).verdict
    }

    /// The source closed its socket, and the destination had not said anything.
    pub(super) fn on_source_left(&self) {
        let mut progress = lock(&self.progress);
        if progress.verdict.is_none() && !progress.destination_left {
            progress.source_left = true;
        }
    }

    /// The destination closed its socket, or its sending side.
    pub(super) fn on_destination_left(&self) {
        lock(&self.progress).destination_left = true;
    }

    /// Whether an end of this channel is one of the VM: those besides the main one may come and go.
    pub(super) fn speaks_for_it(&self, channel: &Channel) -> bool {
        channel.kind == StreamKind::QemuMain || !self.had_main.load(Ordering::Relaxed)
    }

    /// Whether these are connections of another protocol than QEMU's.
    pub(super) fn is_other_protocol(&self) -> bool {
        !self.had_main.load(Ordering::Relaxed) && !self.expects_main()
    }

    pub(super) fn note_error(&self, abort: &Abort) {
        // What is delivered has been handed to the source.
        let undelivered = self.main().is_some_and(|main| main.guest_in_flight() > 0);
        let mut progress = lock(&self.progress);
        if self.role() == Role::Far && abort.code == ResetCode::Unknown && undelivered {
            progress.verdict_lost = true;
        }
        if self.role() == Role::Far && abort.from_peer && abort.code == ResetCode::Endpoint {
            let first = progress.error.is_none() && !progress.destination_left;
            progress.source_left |= progress.verdict.is_none() && first;
        }
        if progress.error.is_none() && progress.result.is_none() {
            if !self.is_hushed() {
                warn!(migration = %self.id, code = %abort.code, reason = abort.reason, "migration ends");
            }
            progress.error = Some(abort.clone());
        }
    }

    /// Far: bytes were handed to the destination.
    pub(super) fn count_delivered(&self, guest: u64) {
        self.guest_bytes.fetch_add(guest, Ordering::Relaxed);
        self.metrics.guest_bytes.inc_by(guest);
    }

    pub(super) fn count_frame(&self, stats: &FrameStats, guest: u64, wire: u64) {
        self.guest_bytes.fetch_add(guest, Ordering::Relaxed);
        self.wire_bytes.fetch_add(wire, Ordering::Relaxed);
        let sent = stats.ref_pages + stats.delta_pages + stats.similar_pages + stats.batch_pages;
        let pages = stats.zero_pages + stats.same_pages + sent;
        self.ram_bytes
            .fetch_add(u64::from(pages) * PAGE_SIZE as u64, Ordering::Relaxed);
        let metrics = &self.metrics;
        metrics.guest_bytes.inc_by(guest);
        metrics.wire_bytes.inc_by(wire);
        metrics.pages_zero.inc_by(u64::from(stats.zero_pages));
        metrics.pages_same.inc_by(u64::from(stats.same_pages));
        metrics.pages_delta.inc_by(u64::from(stats.delta_pages));
        metrics.pages_similar.inc_by(u64::from(stats.similar_pages));
        metrics.pages_reference.inc_by(u64::from(stats.ref_pages));
        metrics.pages_batch.inc_by(u64::from(stats.batch_pages));
        metrics.opaque_bytes.inc_by(u64::from(stats.opaque_bytes));
        if self.role() == Role::Near {
            metrics.sent.frame(stats, wire);
        }
    }

    pub(super) fn on_ram_total(&self, bytes: u64) {
        self.ram_total.store(bytes, Ordering::Relaxed);
    }

    /// Adds a sample for the rates of the status.
    pub(super) fn sample(&self) {
        let now = Instant::now();
        let (guest, wire) = self.bytes();
        let ram = self.ram_bytes.load(Ordering::Relaxed);
        let mut progress = lock(&self.progress);
        progress.samples.push_back(Sample {
            at: now,
            guest,
            wire,
            ram,
        });
        while progress.samples.len() > 2 && now.duration_since(progress.samples[1].at) > RATE_WINDOW
        {
            progress.samples.pop_front();
        }
    }

    fn bytes(&self) -> (u64, u64) {
        (
            self.guest_bytes.load(Ordering::Relaxed),
            self.wire_bytes.load(Ordering::Relaxed),
        )
    }

    /// The main channel is over and has left this.
    pub(super) fn set_table(&self, table: PlaceTable) {
        *lock(&self.table) = Some(table);
    }

    pub(super) fn take_table(&self) -> Option<PlaceTable> {
        lock(&self.table).take()
    }

    // --- end -------------------------------------------------------------------------------

    /// All channels are gone: says how it ended. Only the first call counts.
    pub(super) fn finish(&self) -> bool {
        let result = {
            let mut progress = lock(&self.progress);
            if progress.result.is_some() {
                return false;
            }
            let is_understood = !matches!(progress.phase, Some(Phase::Opaque));
            let result = End {
                verdict: progress.verdict,
                verdict_lost: progress.verdict_lost,
                code: progress.error.as_ref().map(|abort| abort.code),
                committed: self.past_commit(),
                source_left: progress.source_left,
                opened: progress.opened,
                qemu: self.had_main.load(Ordering::Relaxed) && is_understood,
            }
            .result();
            progress.result = Some(result);
            progress.finished_at = Some(Instant::now());
            result
        };
        self.closing.cancel();
        self.clear_maybe_committed();
        self.metrics.active.dec();
        self.metrics.finished(result);
        if self.is_hushed() {
            return true;
        }
        let (guest_bytes, wire_bytes) = self.bytes();
        info!(
            migration = %self.id,
            result = result.as_str(),
            guest_bytes,
            wire_bytes,
            seconds = self.started.elapsed().as_secs_f64(),
            "migration finished"
        );
        true
    }

    fn state(&self, progress: &Progress, is_qemu: bool) -> MigrationState {
        if let Some(result) = progress.result {
            return match result {
                MigrationResult::Completed => MigrationState::Completed,
                MigrationResult::Failed => MigrationState::Failed,
                MigrationResult::Cancelled => MigrationState::Cancelled,
                MigrationResult::Refused => MigrationState::Refused,
                MigrationResult::Unknown => MigrationState::Unknown,
            };
        }
        if self.past_commit() {
            return MigrationState::AwaitingVerdict;
        }
        if self.link.current().is_none() {
            return MigrationState::Paused;
        }
        if !progress.opened {
            return MigrationState::Connecting;
        }
        match progress.phase {
            None if self.role() == Role::Far => MigrationState::Receiving,
            None if !is_qemu => MigrationState::Opaque,
            None | Some(Phase::Setup) => MigrationState::Setup,
            Some(Phase::Precopy { .. }) => MigrationState::Precopy,
            Some(Phase::Switchover) => MigrationState::Switchover,
            Some(Phase::DeviceState | Phase::Postcopy | Phase::End) => MigrationState::DeviceState,
            Some(Phase::Opaque) => MigrationState::Opaque,
        }
    }

    /// Seconds until the first pass over RAM is done; later passes depend on what the guest does.
    fn remaining(&self, phase: Option<Phase>, ram_total: u64, ram_rate: f64) -> Option<f64> {
        let first_pass = matches!(phase, Some(Phase::Setup | Phase::Precopy { round: 1 }));
        if !first_pass || ram_total == 0 || ram_rate <= 0.0 {
            return None;
        }
        let left = ram_total.saturating_sub(self.ram_bytes.load(Ordering::Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "an estimate for people")]
        let seconds = left as f64 / ram_rate;
        Some(seconds)
    }

    pub(super) fn status(&self) -> MigrationStatus {
        let (guest_bytes, wire_bytes) = self.bytes();
        let channels = u32::try_from(lock(&self.channels).open.len()).unwrap_or(u32::MAX);
        let is_qemu = self.has_main() || self.expects_main();
        let progress = lock(&self.progress);
        let [guest_rate, wire_rate, ram_rate] = rates(&progress.samples);
        let ram_total = self.ram_total.load(Ordering::Relaxed);
        let elapsed = match progress.finished_at {
            Some(at) => at.duration_since(self.started),
            None => self.started.elapsed(),
        };
        #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = (wire_bytes > 0).then(|| guest_bytes as f64 / wire_bytes as f64);
        MigrationStatus {
            id: self.id.to_string(),
            peer: self.link.peer.clone(),
            direction: direction(self.role()),
            ingress: self.ingress.clone(),
            target: self.target.clone(),
            state: self.state(&progress, is_qemu),
            round: progress.phase.and_then(Phase::round).unwrap_or(0),
            channels,
            guest_bytes,
            wire_bytes,
            ratio,
            guest_bytes_per_sec: guest_rate,
            wire_bytes_per_sec: wire_rate,
            ram_total_bytes: (ram_total > 0).then_some(ram_total),
            remaining_seconds: self.remaining(progress.phase, ram_total, ram_rate),
            started_at: self
                .started_at
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |since| since.as_secs_f64()),
            elapsed_seconds: elapsed.as_secs_f64(),
            blackout_seconds: progress.blackout.map(|blackout| blackout.as_secs_f64()),
            error: progress.error.as_ref().map(|abort| abort.reason.clone()),
        }
    }
}

/// The migration's direction as seen from this gateway.
pub(super) fn direction(role: Role) -> Direction {
    match role {
        Role::Near => Direction::Out,
        Role::Far => Direction::In,
    }
}

/// Guest, wire and RAM bytes per second.
fn rates(samples: &VecDeque<Sample>) -> [f64; 3] {
    let (Some(first), Some(last)) = (samples.front(), samples.back()) else {
        return [0.0; 3];
    };
    let seconds = last.at.duration_since(first.at).as_secs_f64();
    if seconds <= 0.0 {
        return [0.0; 3];
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = |before: u64, now: u64| (now - before) as f64 / seconds;
    [
        rate(first.guest, last.guest),
        rate(first.wire, last.wire),
        rate(first.ram, last.ram),
    ]
}
