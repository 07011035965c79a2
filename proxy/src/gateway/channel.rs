//! One channel of a migration: a hypervisor's connection and its counterpart at the peer.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use skyferry_dedup::{Announced, KnownPages, Manifest, ManifestId, Old, ShortId};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::link::{Conn, lock};
use crate::{
    config::WanConfig,
    session::{Acked, DeliveryBudget, InFrame, OutFrame, RecvError, RecvHalf, SendHalf, Transmit},
    wire::{
        ChannelNo, Control,
        control::{ResetCode, StreamKind},
    },
};

/// Frames of a direction that may be undelivered: half of what a peer must be able to put in order,
/// so that a source of tiny writes never passes that.
const MAX_FRAMES: usize = 8 << 10;
/// A direction that carries nothing for so long gives back memory that it would use again: channels of one
/// migration, and of others, may stand idle for long while one needs it.
pub(super) const IDLE: Duration = Duration::from_secs(3);

/// Frame boundaries remembered for comparing digests, newest last.
const BOUNDARIES: usize = 1024;

/// Why a channel ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Abort {
    pub(super) code: ResetCode,
    pub(super) reason: String,
    /// The peer said so, and need not be told.
    pub(super) from_peer: bool,
    /// The commit byte had been handed to the destination, as far as the far gateway knows.
    pub(super) released: bool,
    /// The source itself closed its socket.
    pub(super) source_left: bool,
}

impl Abort {
    pub(super) fn new(code: ResetCode, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self {
            code,
            reason,
            from_peer: false,
            released: false,
            source_left: false,
        }
    }
}

/// All stream bytes before `offset` have this digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Mark {
    pub(super) offset: u64,
    pub(super) digest: [u8; 16],
}

#[derive(Debug)]
struct Sending {
    half: SendHalf,
    budget: DeliveryBudget,
    /// The connection the channel is on; frames go out on this one only.
    generation: u64,
    /// When the peer last asked for pages.
    missed: Option<Instant>,
    /// Old pages of similar ones that the peer has asked for, and the last of them: frame and index.
    forgotten: u64,
    last_forgotten: (u64, u32),
}

/// Pages that arrived in answer to a miss.
#[derive(Debug)]
pub(super) struct ReceivedPages {
    /// The frame that refers to them.
    pub(super) seq: u64,
    /// Index of the reference, and contents.
    pub(super) pages: Vec<(u32, Vec<u8>)>,
    /// Their share of the memory limit.
    pub(super) permit: OwnedSemaphorePermit,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) no: ChannelNo,
    pub(super) kind: StreamKind,
    sending: Mutex<Sending>,
    receiving: Mutex<RecvHalf>,
    pages: Mutex<Vec<ReceivedPages>>,
    /// Answers to misses that are still to come.
    answers_due: AtomicU32,
    /// Lets one frame in when memory is short.
    pub(super) spare_frame: Arc<Semaphore>,
    /// Lets one answer to a miss in when memory is short.
    pub(super) spare_answer: Arc<Semaphore>,
    /// Generation of the connection that the channel is on, 0 for none.
    attached: watch::Sender<u64>,
    /// There may be room for more.
    pub(super) space: Notify,
    /// There may be a frame to transmit.
    pub(super) work: Notify,
    /// There may be something to decode.
    pub(super) arrived: Notify,
    /// Boundaries of frames that were accepted (near) or delivered (far).
    marks: Mutex<VecDeque<Mark>>,
    /// Near: the message that opens the channel at the peer.
    open_message: Mutex<Option<Control>>,
    /// Near: it may be opened.
    openable: AtomicBool,
    /// Far: what the peer was told when the channel came to an early end.
    last_word: Mutex<Option<Control>>,
    /// The far gateway has a connection to the target.
    pub(super) opened: CancellationToken,
    aborted: CancellationToken,
    abort: OnceLock<Abort>,
    /// It has ended early here, and nothing that is left of it will get anywhere.
    pub(super) given_up: CancellationToken,
    pending_reset: Mutex<Option<(u64, Abort)>>,
    /// A reset waits for frames.
    reset_waits: CancellationToken,
    /// How long an early end waits for frames without one being delivered.
    pub(super) patience: Duration,
    /// Near: the connection on which the far gateway is asked where it stands, 0 for none.
    resumed_on: AtomicU64,
    /// Near: what the far gateway said to a manifest that was asked for.
    adoption_answer: Mutex<Option<(ManifestId, bool)>>,
    /// Far: the manifest that was agreed on, until the decoder takes it.
    agreed: Mutex<Option<(ManifestId, Option<Arc<Manifest>>)>>,
    /// Nothing has been read that is not in a frame yet.
    pub(super) idle: AtomicBool,
    /// The hypervisor's socket takes no more.
    pub(super) write_broken: CancellationToken,
    /// The way to the hypervisor was lost: what became of it is not known.
    pub(super) socket_lost: AtomicBool,
    /// Its end was not in order, as far as the kernel knows.
    pub(super) socket_reset: AtomicBool,
}

impl Channel {
    pub(super) fn new(no: ChannelNo, kind: StreamKind, wan: &WanConfig) -> Self {
        Self {
            no,
            kind,
            sending: Mutex::new(Sending {
                half: SendHalf::new(),
                budget: DeliveryBudget::new(wan.delay_budget),
                generation: 0,
                missed: None,
                forgotten: 0,
                last_forgotten: (0, 0),
            }),
            receiving: Mutex::default(),
            pages: Mutex::default(),
            answers_due: AtomicU32::new(0),
            spare_frame: Arc::new(Semaphore::new(1)),
            spare_answer: Arc::new(Semaphore::new(1)),
            attached: watch::Sender::new(0),
            space: Notify::new(),
            work: Notify::new(),
            arrived: Notify::new(),
            marks: Mutex::new(VecDeque::from([Mark::default()])),
            open_message: Mutex::default(),
            openable: AtomicBool::new(false),
            last_word: Mutex::default(),
            opened: CancellationToken::new(),
            aborted: CancellationToken::new(),
            abort: OnceLock::new(),
            given_up: CancellationToken::new(),
            pending_reset: Mutex::default(),
            reset_waits: CancellationToken::new(),
            patience: wan.outage_budget,
            resumed_on: AtomicU64::new(0),
            adoption_answer: Mutex::default(),
            agreed: Mutex::default(),
            idle: AtomicBool::new(false),
            write_broken: CancellationToken::new(),
            socket_lost: AtomicBool::new(false),
            socket_reset: AtomicBool::new(false),
        }
    }

    // --- sending ---------------------------------------------------------------------------

    pub(super) fn push(&self, frame: OutFrame) {
        lock(&self.sending).half.push(frame);
        self.work.notify_one();
    }

    /// The next frame for the connection of this generation. `Err` when the channel is on another.
    pub(super) fn poll_transmit(&self, generation: u64) -> Result<Option<Transmit>, ()> {
        let mut sending = lock(&self.sending);
        if sending.generation == generation {
            Ok(sending.half.poll_transmit())
        } else {
            Err(())
        }
    }

    /// Takes an acknowledgement; `None` when it can't be true.
    pub(super) fn on_ack(&self, next_seq: u64, rtt: Duration) -> Option<Acked> {
        let mut sending = lock(&self.sending);
        let acked = sending.half.on_ack(next_seq)?;
        let now = Instant::now();
        let mut took = acked.oldest.map_or(Duration::ZERO, |oldest| now - oldest);
        if sending.missed >= acked.oldest {
            // To ask for pages costs a round trip, which the destination can't help.
            took = took.saturating_sub(rtt);
        }
        sending
            .budget
            .on_delivered(now, rtt, acked.guest, acked.wire, took);
        drop(sending);
        self.space.notify_one();
        self.work.notify_one();
        Some(acked)
    }

    /// Whether the delivery budget leaves room for more.
    pub(super) fn may_accept(&self, rtt: Duration, window: u64) -> bool {
        let mut sending = lock(&self.sending);
        if sending.half.frames_in_flight() >= MAX_FRAMES {
            return false;
        }
        let (guest, wire) = (
            sending.half.guest_in_flight(),
            sending.half.wire_in_flight(),
        );
        sending.budget.may_accept(rtt, window, guest, wire)
    }

    /// Stream bytes accepted and not delivered.
    pub(super) fn guest_in_flight(&self) -> u64 {
        lock(&self.sending).half.guest_in_flight()
    }

    /// Nothing is sent any more; returns the stream bytes that were not delivered. They are nobody
    /// else's to count after this.
    pub(super) fn give_up_sending(&self) -> u64 {
        lock(&self.sending).half.give_up()
    }

    /// Frames accepted and not delivered.
    pub(super) fn frames_in_flight(&self) -> usize {
        lock(&self.sending).half.frames_in_flight()
    }

    /// Frames pushed so far.
    pub(super) fn pushed(&self) -> u64 {
        lock(&self.sending).half.next_seq()
    }

    /// Whether everything was sent and delivered, the end included.
    pub(super) fn sending_done(&self) -> bool {
        lock(&self.sending).half.done()
    }

    /// Old pages of similar ones that the peer has asked for.
    pub(super) fn forgotten(&self) -> u64 {
        lock(&self.sending).forgotten
    }

    /// The pages that a miss asks for, as the payload of the answer. They are believed to be gone
    /// at the peer; sending them makes them known again, but for old pages of deltas. `None`: no such
    /// frame or reference.
    pub(super) fn answer_miss(
        &self,
        seq: u64,
        indexes: &[u32],
        known: &KnownPages,
        announced: &Announced,
    ) -> Option<Vec<u8>> {
        if !indexes.is_sorted_by(|a, b| a < b) {
            return None;
        }
        let mut sending = lock(&self.sending);
        sending.missed = Some(Instant::now());
        let sending = &mut *sending;
        let frame = sending.half.frame(seq)?;
        let mut payload = Vec::with_capacity(4 + indexes.len() * (6 + skyferry_dedup::PAGE_SIZE));
        payload.extend_from_slice(&u32::try_from(indexes.len()).ok()?.to_le_bytes());
        let mut kept = Vec::new();
        for index in indexes {
            let page = frame.retained.page(*index)?;
            let id: ShortId = frame.retained.id(*index)?.short();
            match frame.retained.old(*index) {
                None => kept.push(id),
                Some(Old::OfPlace) => known.remove(&id),
                Some(Old::Similar) => {
                    known.remove(&id);
                    // What is asked for once more, after an outage, was forgotten once.
                    let this = (seq, *index);
                    if this > sending.last_forgotten {
                        sending.last_forgotten = this;
                        sending.forgotten += 1;
                    }
                }
            }
            // Where it was announced to be it is not.
            announced.remove(&id);
            payload.extend_from_slice(&index.to_le_bytes());
            payload.extend_from_slice(&u16::try_from(page.len()).ok()?.to_le_bytes());
            payload.extend_from_slice(page);
        }
        kept.iter().for_each(|id| known.insert(id));
        Some(payload)
    }

    // --- receiving -------------------------------------------------------------------------

    pub(super) fn wants_frame(&self, seq: u64) -> bool {
        lock(&self.receiving).wants(seq)
    }

    pub(super) fn is_next(&self, seq: u64) -> bool {
        lock(&self.receiving).next_seq() == seq
    }

    pub(super) fn on_frame(&self, frame: InFrame) -> Result<(), RecvError> {
        lock(&self.receiving).on_frame(frame)?;
        self.arrived.notify_one();
        Ok(())
    }

    /// Whether the next frame has arrived.
    pub(super) fn has_next(&self) -> bool {
        lock(&self.receiving).has_next()
    }

    pub(super) fn poll_frame(&self) -> Option<InFrame> {
        lock(&self.receiving).poll_frame()
    }

    pub(super) fn on_delivered(&self, next_seq: u64) {
        lock(&self.receiving).on_delivered(next_seq);
    }

    pub(super) fn delivered(&self) -> u64 {
        lock(&self.receiving).delivered()
    }

    /// The frame that must come next on a new connection.
    pub(super) fn recv_position(&self) -> u64 {
        lock(&self.receiving).next_seq()
    }

    pub(super) fn receiving_done(&self) -> bool {
        lock(&self.receiving).done()
    }

    /// A miss is about to be sent: one answer will come.
    pub(super) fn add_answer_due(&self) {
        self.answers_due.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether an answer to a miss is due; it is not any more then.
    pub(super) fn take_answer_due(&self) -> bool {
        let one_less = |due: u32| due.checked_sub(1);
        self.answers_due
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
    }

    pub(super) fn on_pages(&self, pages: ReceivedPages) {
        lock(&self.pages).push(pages);
        self.arrived.notify_one();
    }

    pub(super) fn take_pages(&self) -> Vec<ReceivedPages> {
        std::mem::take(&mut *lock(&self.pages))
    }

    // --- connection ------------------------------------------------------------------------

    /// Puts the channel on a connection whose far end waits for `next_seq`. False when that can't
    /// be.
    #[must_use]
    pub(super) fn attach(&self, generation: u64, next_seq: u64) -> bool {
        let mut sending = lock(&self.sending);
        if !sending.half.rewind(next_seq) {
            return false;
        }
        sending.generation = generation;
        drop(sending);
        // What was asked for on the old connection is asked for again on this one.
        self.answers_due.store(0, Ordering::Relaxed);
        self.attached.send_replace(generation);
        self.work.notify_one();
        self.arrived.notify_one();
        true
    }

    /// Follows the connection that the channel is on.
    pub(super) fn attachment(&self) -> watch::Receiver<u64> {
        self.attached.subscribe()
    }

    pub(super) fn attached_generation(&self) -> u64 {
        *self.attached.borrow()
    }

    /// Waits until the channel is on the link's current connection and returns it.
    pub(super) async fn connected(&self, link: &super::link::Link) -> Arc<Conn> {
        let mut conns = link.watch();
        let mut attached = self.attachment();
        loop {
            let conn = conns.borrow_and_update().clone();
            let generation = *attached.borrow_and_update();
            if let Some(conn) = conn
                && conn.generation == generation
            {
                return conn;
            }
            tokio::select! {
                // The senders live as long as the link and the channel.
                _ = conns.changed() => {}
                _ = attached.changed() => {}
            }
        }
    }

    /// The far gateway is about to be asked on this connection where the channel stands.
    pub(super) fn ask_position(&self, generation: u64) {
        self.resumed_on.store(generation, Ordering::Release);
    }

    /// Whether it was asked on this connection and has not answered before.
    pub(super) fn take_position_asked(&self, generation: u64) -> bool {
        let asked = &self.resumed_on;
        asked
            .compare_exchange(generation, 0, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The channel may be opened at the peer from now on.
    pub(super) fn mark_openable(&self) {
        self.openable.store(true, Ordering::Release);
    }

    pub(super) fn is_openable(&self) -> bool {
        self.openable.load(Ordering::Acquire)
    }

    /// The message that opens the channel at the peer.
    pub(super) fn set_open_message(&self, message: Control) {
        *lock(&self.open_message) = Some(message);
    }

    pub(super) fn open_message(&self) -> Option<Control> {
        lock(&self.open_message).clone()
    }

    /// The channel has come to an early end and nothing of it is left but this message, and what it
    /// says goes behind.
    pub(super) fn set_last_word(&self, message: Control) {
        *lock(&self.last_word) = Some(message);
    }

    pub(super) fn last_word(&self) -> Option<Control> {
        lock(&self.last_word).clone()
    }

    // --- manifests -------------------------------------------------------------------------

    /// What the far gateway has said to this manifest; it is forgotten with this.
    pub(super) fn adoption_answer(&self, id: ManifestId) -> Option<bool> {
        let mut answer = lock(&self.adoption_answer);
        answer
            .take_if(|(of, _)| *of == id)
            .map(|(_, agreed)| agreed)
    }

    pub(super) fn set_adoption_answer(&self, id: ManifestId, agreed: bool) {
        *lock(&self.adoption_answer) = Some((id, agreed));
    }

    /// The near gateway asks for a manifest, which is `found` here or not. Whether it may be adopted:
    /// a channel has one only, and one that was agreed on stays so.
    pub(super) fn agree(&self, id: ManifestId, found: Option<Arc<Manifest>>) -> bool {
        let mut agreed = lock(&self.agreed);
        match &*agreed {
            Some((before, _)) => *before == id,
            None if found.is_some() => {
                *agreed = Some((id, found));
                true
            }
            None => false,
        }
    }

    /// The manifest for the decoder, once.
    pub(super) fn take_agreed(&self) -> Option<Arc<Manifest>> {
        lock(&self.agreed)
            .as_mut()
            .and_then(|(_, manifest)| manifest.take())
    }

    // --- digests ---------------------------------------------------------------------------

    pub(super) fn add_mark(&self, mark: Mark) {
        let mut marks = lock(&self.marks);
        if marks.len() == BOUNDARIES {
            marks.pop_front();
        }
        marks.push_back(mark);
    }

    /// The newest mark.
    pub(super) fn mark(&self) -> Mark {
        lock(&self.marks).back().copied().unwrap_or_default()
    }

    /// Whether what was delivered agrees with `mark`; `None` while it has not got that far.
    pub(super) fn agrees(&self, mark: Mark) -> Option<bool> {
        let marks = lock(&self.marks);
        let newest = marks.back().copied().unwrap_or_default();
        if newest.offset < mark.offset {
            return None;
        }
        Some(marks.iter().rev().any(|own| *own == mark))
    }

    // --- end -------------------------------------------------------------------------------

    /// Whether both directions have ended in order and everything was delivered.
    pub(super) fn is_done(&self) -> bool {
        self.sending_done() && self.receiving_done()
    }

    /// Ends the channel early; the first reason counts. One that has ended early before is given up.
    pub(super) fn abort(&self, abort: Abort) {
        if self.abort.set(abort).is_err() {
            self.given_up.cancel();
        }
        self.aborted.cancel();
    }

    /// The channel has come to an early end, for this reason if there was none before.
    pub(super) fn note_end(&self, abort: Abort) {
        let _ = self.abort.set(abort);
        self.aborted.cancel();
    }

    /// The peer ends the channel behind the frame before `after_seq`. False: it has ended here
    /// already, for a reason that was not the peer's.
    pub(super) fn abort_after(&self, after_seq: u64, abort: Abort) -> bool {
        let mut pending = lock(&self.pending_reset);
        if self.ended_here() {
            self.given_up.cancel();
            return false;
        }
        *pending = Some((after_seq, abort));
        drop(pending);
        self.check_pending_reset();
        self.reset_waits.cancel();
        true
    }

    /// Carries out a reset whose time has come.
    pub(super) fn check_pending_reset(&self) {
        let delivered = self.delivered();
        self.carry_out_reset(|after_seq| after_seq <= delivered);
    }

    fn carry_out_reset(&self, due: impl Fn(u64) -> bool) {
        let mut pending = lock(&self.pending_reset);
        if let Some((after_seq, abort)) = pending.take_if(|(after, _)| due(*after)) {
            tracing::debug!(channel = self.no, after_seq, "reset takes effect");
            self.abort(abort);
        }
    }

    /// The channel has come to an early end; returns the reason that counts. What the peer has said
    /// of it before does, even where that waited for frames.
    pub(super) fn end(&self, abort: Abort) -> Abort {
        let mut pending = lock(&self.pending_reset);
        let said = pending
            .take()
            .filter(|_| !abort.from_peer && !abort.source_left);
        let abort = said.map_or(abort, |(_, said)| said);
        self.note_end(abort.clone());
        self.abort_reason().unwrap_or(abort)
    }

    /// Whether the channel was ended early by this gateway.
    pub(super) fn ended_here(&self) -> bool {
        self.abort.get().is_some_and(|abort| !abort.from_peer)
    }

    /// Waits until the channel is ended early. A reset that waits for frames of which none comes
    /// takes effect without them.
    pub(super) async fn until_aborted(&self) -> Abort {
        let overdue = async {
            self.reset_waits.cancelled().await;
            loop {
                let before = self.delivered();
                tokio::time::sleep(self.patience).await;
                if self.delivered() == before {
                    self.carry_out_reset(|_| true);
                }
            }
        };
        tokio::select! {
            () = self.aborted.cancelled() => {}
            never = overdue => never,
        }
        self.abort_reason()
            .unwrap_or_else(|| Abort::new(ResetCode::Internal, "no reason given"))
    }

    pub(super) fn abort_reason(&self) -> Option<Abort> {
        self.abort.get().cloned()
    }

    /// Takes note of how the hypervisor's socket failed. The kernel says it once, to whoever asks
    /// first.
    pub(super) fn on_socket_error(&self, error: &std::io::Error) {
        if !super::socket::ended_by_its_peer(error) {
            self.socket_lost.store(true, Ordering::Release);
        }
        // Behind an end in order nothing else is said than that nobody takes any more.
        if error.kind() != std::io::ErrorKind::BrokenPipe {
            self.socket_reset.store(true, Ordering::Release);
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use skyferry_dedup::{DomainKey, Hasher, Retained};

    use super::*;
    use crate::{
        gateway::rig::{join, near_link, near_migration},
        session::Class,
        wire::DataFlags,
    };

    #[test]
    fn what_the_peer_has_forgotten_is_counted_once_and_known_again_where_it_keeps_it() {
        let hasher = Hasher::new(&DomainKey::from_bytes([1; 32]));
        let page = |fill: u8| [fill; skyferry_dedup::PAGE_SIZE];
        let mut retained = Retained::default();
        let uses = [
            (1, None),
            (2, Some(Old::OfPlace)),
            (3, Some(Old::Similar)),
            // The same page once more, as itself.
            (3, None),
            (4, Some(Old::Similar)),
        ];
        for (fill, old) in uses {
            retained.push(hasher.id(&page(fill)), &page(fill), old);
        }
        let channel = join(&near_migration(&near_link()));
        channel.push(OutFrame {
            payload: Bytes::from_static(b"frame"),
            flags: DataFlags::default(),
            raw_len: 0,
            retained,
            class: Class::Bulk,
            accepted_at: Instant::now(),
            permits: Vec::new(),
        });
        let (known, announced) = (KnownPages::new(100), Announced::new(0));
        let is_known = |fill| known.contains(&hasher.id(&page(fill)).short());
        let all = [0, 1, 2, 3, 4];
        (1..=4).for_each(|fill| known.insert(&hasher.id(&page(fill)).short()));
        for _ in 0..2 {
            let answer = channel.answer_miss(0, &all, &known, &announced);
            assert!(answer.is_some_and(|payload| payload.len() > 5 * skyferry_dedup::PAGE_SIZE));
            assert_eq!([1, 2, 3, 4].map(is_known), [true, false, true, false]);
            assert_eq!(channel.forgotten(), 2);
        }
        assert!(
            channel
                .answer_miss(0, &[2, 1], &known, &announced)
                .is_none()
        );
        assert!(channel.answer_miss(0, &[5], &known, &announced).is_none());
        assert!(channel.answer_miss(1, &[0], &known, &announced).is_none());
    }
}
