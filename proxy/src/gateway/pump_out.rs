//! From frames into a hypervisor's socket.
//!
//! Frames are decoded in order. One whose references can't be resolved asks for the pages and
//! waits; those behind it are begun meanwhile, so that a burst of misses costs one round trip and
//! not one each. What is written has been checked against the sender's digest. From a commit
//! candidate on nothing is written until the whole migration has been compared.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use skyferry_core::qemu::return_path::ReturnPath;
use skyferry_dedup::{
    ChannelDecoder, ChannelKind, DecodeLimits, DecodeStats, FinishError, Finished, FrameStats,
    PAGE_SIZE, Pending, announced_raw_len,
};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::{
    Gateway, SMALL_WORK,
    channel::{Abort, Channel, IDLE, Mark, ReceivedPages},
    far::{self, CommitVerdict, CommitWait},
    link::{MEMORY_UNIT, Role},
    migration::Migration,
    off_the_runtime,
    releases::Release,
    socket::Socket,
};
use crate::{
    metrics::CommitCheck,
    session::InFrame,
    wire::{
        Control, DataFlags,
        control::{ChannelPosition, MAX_MISSED, ResetCode, StreamKind},
        data::MAX_RAW_BYTES,
    },
};

/// Frames begun ahead of one that waits for pages, where there is memory for what they come to: what they
/// lack is asked for at once.
const MAX_BEGUN: usize = 64;
/// How often a held commit looks again whether the other channels have caught up.
const COMMIT_POLL: Duration = Duration::from_millis(2);

/// A frame between the two stages of decoding. `pending` is `None` for a bare end.
struct Begun {
    seq: u64,
    flags: DataFlags,
    wire_len: u64,
    pending: Option<Pending>,
    /// What the second stage came to, where it was done together with the first.
    finished: Option<Result<Finished, FinishError>>,
    /// The connection on which missing pages were asked for.
    asked: u64,
    /// Those that were not, as frames before this one bring them.
    deferred: Vec<u32>,
    /// Of the first frame nothing is asked; of those behind it, memory for what they come to, if there was
    /// any left.
    memory: Option<OwnedSemaphorePermit>,
}

/// Everything from the commit candidate on.
struct Held {
    /// The stream right before it.
    mark: Mark,
    chunks: Vec<Chunk>,
}

/// Verified bytes of one frame.
struct Chunk {
    seq: u64,
    bytes: Vec<u8>,
    /// The stream behind them.
    mark: Mark,
    /// The direction ends here.
    end: bool,
    /// Its share of what the link may have held back.
    _memory: Option<OwnedSemaphorePermit>,
}

pub(super) struct PumpOut<'a> {
    gateway: &'a Gateway,
    migration: &'a Arc<Migration>,
    channel: &'a Arc<Channel>,
    socket: &'a Socket,
    decoder: Option<ChannelDecoder>,
    begun: VecDeque<Begun>,
    held: Option<Held>,
    /// What the commit has waited for.
    waited: CommitWait,
    /// The stream behind the last frame that was finished.
    mark: Mark,
    return_path: Option<ReturnPath>,
}

impl<'a> PumpOut<'a> {
    pub(super) fn new(
        gateway: &'a Gateway,
        migration: &'a Arc<Migration>,
        channel: &'a Arc<Channel>,
        socket: &'a Socket,
    ) -> Self {
        let main = channel.kind == StreamKind::QemuMain;
        let forward = migration.role() == Role::Far;
        let kind = if main && forward {
            ChannelKind::QemuMain
        } else {
            ChannelKind::Opaque
        };
        let remote = migration.link.remote();
        let limits = DecodeLimits {
            max_raw: MAX_RAW_BYTES,
            max_places: remote.as_ref().map_or(0, |remote| remote.places),
            ..DecodeLimits::default()
        };
        let mut decoder = ChannelDecoder::new(kind, &migration.domain, limits);
        if let Some(remote) = remote {
            decoder.learn(remote.known);
        }
        Self {
            gateway,
            migration,
            channel,
            socket,
            decoder: Some(decoder),
            begun: VecDeque::new(),
            held: None,
            waited: CommitWait::default(),
            mark: Mark::default(),
            return_path: (main && !forward).then(ReturnPath::new),
        }
    }

    /// Runs until the direction's end has been passed on.
    pub(super) async fn run(mut self) -> Result<(), Abort> {
        loop {
            self.take_pages().await?;
            let mut progress = false;
            while self.may_begin()
                && let Some(frame) = self.channel.poll_frame()
            {
                self.begin(frame).await?;
                progress = true;
                if self.front_is_whole() {
                    break;
                }
            }
            if self.front_is_whole() {
                if self.finish_front().await? {
                    return Ok(());
                }
                progress = true;
            }
            if self.held.is_some() && self.try_release().await? {
                progress = true;
            }
            if self.channel.receiving_done() {
                return Ok(());
            }
            if !progress {
                if self.front_looks_again().await? {
                    continue;
                }
                self.ask_again().await;
                self.wait().await;
            }
        }
    }

    /// Whether another frame may be begun: it comes to far more than what it came in, and so do those
    /// before it, for each of which there must have been memory.
    fn may_begin(&self) -> bool {
        let behind_first = self.begun.iter().skip(1);
        self.begun.len() < MAX_BEGUN && behind_first.last().is_none_or(|last| last.memory.is_some())
    }

    fn front_is_whole(&self) -> bool {
        self.begun.front().is_some_and(|begun| {
            begun
                .pending
                .as_ref()
                .is_none_or(|p| p.missing().is_empty())
        })
    }

    /// A frame is finished: those behind it that wait for its pages take them from the store, while they
    /// are there.
    async fn deferred_look_again(&mut self) -> Result<(), Abort> {
        for at in 0..self.begun.len() {
            if !self.begun[at].deferred.is_empty() {
                self.look_again(at).await?;
                let begun = &mut self.begun[at];
                let missing = begun.pending.as_ref().map_or(&[][..], Pending::missing);
                begun.deferred.retain(|index| missing.contains(index));
            }
        }
        Ok(())
    }

    /// Looks for the first frame's missing pages among those that frames before it have brought. True when
    /// it misses none any more.
    async fn front_looks_again(&mut self) -> Result<bool, Abort> {
        let misses = |begun: &Begun| {
            let pending = begun.pending.as_ref();
            pending.is_some_and(|pending| !pending.missing().is_empty())
        };
        if !self.begun.front().is_some_and(misses) {
            return Ok(false);
        }
        self.look_again(0).await?;
        Ok(!self.begun.front().is_some_and(misses))
    }

    /// Looks for missing pages of a frame that has been begun in the store.
    async fn look_again(&mut self, at: usize) -> Result<(), Abort> {
        let Some(mut pending) = self.begun[at].pending.take() else {
            return Ok(());
        };
        let store = self.gateway.store.clone();
        let size = pending.missing().len() * PAGE_SIZE;
        let work = move || {
            pending.look_again(&*store);
            pending
        };
        let stage = &self.gateway.metrics.gateway.decode_seconds;
        self.begun[at].pending = Some(off_the_runtime(stage, size, work).await?);
        Ok(())
    }

    async fn wait(&mut self) {
        if self.held.is_some() {
            let mut request = self.migration.commit_request.subscribe();
            let requested = request.borrow_and_update().is_some();
            tokio::select! {
                () = self.channel.arrived.notified() => {}
                _ = request.changed() => {}
                () = tokio::time::sleep(COMMIT_POLL), if requested => {}
            }
        } else {
            let idle = self.begun.is_empty();
            if !idle {
                tokio::select! {
                    () = self.channel.arrived.notified() => {}
                    never = far::keep_fresh(self.migration, &mut self.waited) => never,
                }
                return;
            }
            if timeout(IDLE, self.channel.arrived.notified()).await.is_ok() {
                return;
            }
            if let Some(decoder) = &mut self.decoder {
                decoder.rest();
            }
            self.channel.arrived.notified().await;
        }
    }

    async fn begin(&mut self, frame: InFrame) -> Result<(), Abort> {
        let InFrame {
            seq,
            flags,
            payload,
            permit,
        } = frame;
        let wire_len = payload.len() as u64;
        let (pending, finished) = if payload.is_empty() {
            (None, None)
        } else {
            self.decode(seq, payload).await?
        };
        drop(permit);
        let raw_len = pending.as_ref().map_or(0, Pending::raw_len);
        let units = u32::try_from(raw_len.div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX);
        let memory = self.gateway.receive_memory.clone();
        let is_behind = !self.begun.is_empty();
        let memory = is_behind
            .then(|| memory.try_acquire_many_owned(units).ok())
            .flatten();
        self.begun.push_back(Begun {
            seq,
            flags,
            wire_len,
            pending,
            finished,
            asked: 0,
            deferred: Vec::new(),
            memory,
        });
        self.ask_again().await;
        Ok(())
    }

    /// The first stage of decoding, and the second as well where it is this frame's turn and nothing is
    /// missing: a change of threads costs about as much as a tenth of the work.
    async fn decode(
        &mut self,
        seq: u64,
        payload: Vec<u8>,
    ) -> Result<(Option<Pending>, Option<Result<Finished, FinishError>>), Abort> {
        let mut decoder = self.take_decoder()?;
        if let Some(manifest) = self.channel.take_agreed() {
            decoder.agree(manifest);
        }
        let store = self.gateway.store.clone();
        let (faults, role) = (self.gateway.faults, self.migration.role());
        // A few bytes may stand for hundreds of pages, each to be read from a disk.
        let size = payload.len().max(announced_raw_len(&payload));
        let is_next = self.begun.is_empty() && size >= SMALL_WORK;
        if is_next {
            faults.panic_at(seq);
        }
        let work = move || {
            let mut begun = decoder.begin(&payload, &*store);
            drop(payload);
            let finished = match &mut begun {
                Ok(pending) if is_next && pending.missing().is_empty() => {
                    faults.corrupt(role, seq, pending);
                    Some(decoder.finish(pending, &*store))
                }
                _ => None,
            };
            (decoder, begun, finished)
        };
        let stage = &self.gateway.metrics.gateway.decode_seconds;
        let (decoder, begun, finished) = off_the_runtime(stage, size, work).await?;
        self.decoder = Some(decoder);
        let pending = begun.map_err(|e| {
            Abort::new(
                ResetCode::Internal,
                format!("frame {seq} cannot be decoded: {e}"),
            )
        })?;
        Ok((Some(pending), finished))
    }

    /// The second stage of decoding.
    async fn complete(
        &mut self,
        seq: u64,
        mut pending: Pending,
    ) -> Result<(Pending, Result<Finished, FinishError>), Abort> {
        let mut decoder = self.take_decoder()?;
        let store = self.gateway.store.clone();
        let faults = self.gateway.faults;
        faults.panic_at(seq);
        faults.corrupt(self.migration.role(), seq, &mut pending);
        let size = pending.raw_len();
        let work = move || {
            let result = decoder.finish(&mut pending, &*store);
            (decoder, pending, result)
        };
        let stage = &self.gateway.metrics.gateway.decode_seconds;
        let (decoder, pending, result) = off_the_runtime(stage, size, work).await?;
        self.decoder = Some(decoder);
        Ok((pending, result))
    }

    /// Asks for missing pages that were not asked for on the present connection, unless frames that have
    /// been begun bring them.
    async fn ask_again(&mut self) {
        let generation = self.channel.attached_generation();
        let mut requests = Vec::new();
        if let Some(front) = self.begun.front_mut()
            && let Some(pending) = &front.pending
            && front.asked == generation
        {
            // The frames before it are finished. What has not come with them never will.
            let mut indexes = std::mem::take(&mut front.deferred);
            indexes.retain(|index| pending.missing().contains(index));
            requests.push((front.seq, indexes));
        }
        for at in 0..self.begun.len() {
            let Some(pending) = &self.begun[at].pending else {
                continue;
            };
            if self.begun[at].asked == generation || pending.missing().is_empty() {
                continue;
            }
            let before = self.begun.iter().take(at);
            let before = before.filter_map(|begun| begun.pending.as_ref());
            let (indexes, deferred) = pending.missing_behind(before);
            let begun = &mut self.begun[at];
            (begun.asked, begun.deferred) = (generation, deferred);
            requests.push((begun.seq, indexes));
        }
        for (seq, indexes) in requests {
            self.ask(seq, &indexes).await;
        }
    }

    async fn ask(&self, seq: u64, indexes: &[u32]) {
        let asked = indexes.len() as u64;
        self.migration.metrics.page_misses.inc_by(asked);
        for indexes in indexes.chunks(MAX_MISSED) {
            let message = Control::Miss {
                migration: self.migration.id,
                channel: self.channel.no,
                seq,
                indexes: indexes.to_vec(),
            };
            self.channel.add_answer_due();
            self.migration.link.send(message).await;
        }
    }

    /// Puts pages that arrived where they belong.
    async fn take_pages(&mut self) -> Result<(), Abort> {
        for ReceivedPages { seq, pages, permit } in self.channel.take_pages() {
            // An answer that came twice, or for a frame that is done, is not an error.
            let Some(begun) = self.begun.iter_mut().find(|begun| begun.seq == seq) else {
                continue;
            };
            let Some(pending) = &mut begun.pending else {
                continue;
            };
            for (index, page) in pages {
                if pending.missing().contains(&index) {
                    pending.fill(index, &page).map_err(|e| {
                        let reason = format!("page {index} for frame {seq}: {e}");
                        Abort::new(ResetCode::Internal, reason)
                    })?;
                }
            }
            drop(permit);
        }
        Ok(())
    }

    /// Checks the first frame and hands it on. True when it was the last of the direction.
    async fn finish_front(&mut self) -> Result<bool, Abort> {
        let Some(Begun {
            seq,
            flags,
            wire_len,
            pending,
            finished,
            ..
        }) = self.begun.pop_front()
        else {
            return Ok(false);
        };
        let before = self.mark;
        let mut bytes = Vec::new();
        if let Some(mut pending) = pending {
            let result = match finished {
                Some(result) => result,
                None => {
                    let (left, result) = self.complete(seq, pending).await?;
                    pending = left;
                    result
                }
            };
            match result {
                Ok(Finished {
                    bytes: out,
                    stats,
                    digest,
                }) => {
                    self.count(&stats, wire_len);
                    let offset = before.offset + out.len() as u64;
                    self.mark = Mark {
                        offset,
                        digest: *digest.as_bytes(),
                    };
                    bytes = out;
                    self.deferred_look_again().await?;
                }
                Err(FinishError::Missing(_)) => {
                    // Only a whole frame is finished; should one not be, it waits like any other.
                    let pending = Some(pending);
                    self.begun.push_front(Begun {
                        seq,
                        flags,
                        wire_len,
                        pending,
                        finished: None,
                        asked: 0,
                        deferred: Vec::new(),
                        memory: None,
                    });
                    return Ok(false);
                }
                Err(e @ FinishError::Mismatch) => {
                    self.migration.metrics.commit_check(CommitCheck::Mismatch);
                    return Err(Abort::new(
                        ResetCode::DigestMismatch,
                        format!("frame {seq}: {e}"),
                    ));
                }
            }
        }
        if flags.unheld && self.write_held().await? {
            return Ok(true);
        }
        if flags.held && self.held.is_none() {
            self.held = Some(Held {
                mark: before,
                chunks: Vec::new(),
            });
        }
        let mut chunk = Chunk {
            seq,
            bytes,
            mark: self.mark,
            end: flags.end,
            _memory: None,
        };
        let Some(held) = &mut self.held else {
            return self.write(chunk).await;
        };
        // Empty ones are not free either.
        let units = u32::try_from(chunk.bytes.len() / MEMORY_UNIT + 1).unwrap_or(u32::MAX);
        let memory = self.migration.link.held_memory.clone();
        let permit = memory
            .try_acquire_many_owned(units)
            .map_err(|_| Abort::new(ResetCode::Internal, "too much behind the commit byte"))?;
        chunk = Chunk {
            _memory: Some(permit),
            ..chunk
        };
        held.chunks.push(chunk);
        Ok(false)
    }

    /// Hands bytes to the socket. True when they were the last of the direction.
    async fn write(&mut self, chunk: Chunk) -> Result<bool, Abort> {
        let Chunk {
            seq,
            bytes,
            mark,
            end,
            ..
        } = chunk;
        let is_far = self.migration.role() == Role::Far;
        if !self.channel.write_broken.is_cancelled() {
            match self.socket.write_all(&bytes).await {
                Ok(()) if is_far => self.migration.count_delivered(bytes.len() as u64),
                Ok(()) => {}
                Err(e) => {
                    // Soon the channel ends for it; what comes is dropped.
                    tracing::debug!(migration = %self.migration.id, error = %e, "the socket takes no more");
                    self.channel.on_socket_error(&e);
                    self.channel.write_broken.cancel();
                }
            }
        }
        // What a source does not hear any more is of no use to it.
        let matters = is_far || self.channel.kind != StreamKind::QemuMain;
        if matters && self.channel.write_broken.is_cancelled() && !self.migration.past_commit() {
            // Nobody got them, so nobody is told that somebody did: nothing is committed on them.
            return Ok(false);
        }
        if let Some(return_path) = &mut self.return_path {
            return_path.feed(&bytes);
            if let Some(status) = return_path.shut_seen() {
                self.migration.on_verdict(status);
            }
        }
        if end {
            if self.migration.role() == Role::Near && self.migration.speaks_for_it(self.channel) {
                self.migration.on_destination_left();
            }
            // A socket that the other side has closed already can't be closed once more.
            let _ = self.socket.end_writing();
        }
        if is_far {
            if end && !self.migration.past_commit() && self.migration.speaks_for_it(self.channel) {
                self.migration.on_source_left();
            }
            self.channel.add_mark(mark);
        }
        if let Some(decoder) = &mut self.decoder {
            decoder.recycle(bytes);
        }
        self.channel.on_delivered(seq + 1);
        // On a connection that the channel is not on yet it would overtake the word on where this side
        // stands, and contradict it. It is said when the channel is.
        let generation = self.channel.attached_generation();
        let conn = self.migration.link.current();
        if let Some(conn) = conn.filter(|conn| conn.generation == generation) {
            let position = ChannelPosition {
                channel: self.channel.no,
                next_seq: seq + 1,
            };
            conn.send(far::ack(self.migration.id, position)).await;
        }
        self.channel.check_pending_reset();
        Ok(end)
    }

    /// Looks whether what is held may go; true when it went.
    async fn try_release(&mut self) -> Result<bool, Abort> {
        let Some(held) = &self.held else {
            return Ok(false);
        };
        let request = self.migration.commit_request.borrow().clone();
        let Some(request) = request.filter(|request| request.channel == self.channel.no) else {
            return Ok(false);
        };
        let verdict = far::check_commit(
            self.migration,
            self.channel.no,
            held.mark,
            &request,
            &mut self.waited,
        );
        match verdict.await? {
            CommitVerdict::Wait => Ok(false),
            CommitVerdict::Release => {
                // The byte must not wait behind others, or the destination has it long after the check.
                if self.channel.abort_reason().is_some() || !self.socket.is_sent() {
                    return Ok(false);
                }
                if let Some(error) = self.socket.broken() {
                    self.channel.on_socket_error(&error);
                    self.channel.write_broken.cancel();
                    let reason = "the destination closed its connection before the commit";
                    return Err(Abort::new(ResetCode::Endpoint, reason));
                }
                let release = Release {
                    near: request.near,
                    migration: self.migration.id,
                };
                let noted = self.gateway.releases.note(release);
                noted.map_err(|e| {
                    let reason = format!("the release of the commit byte cannot be noted: {e}");
                    Abort::new(ResetCode::Internal, reason)
                })?;
                self.migration.metrics.commit_check(CommitCheck::Agreed);
                // Set before the byte is written: whoever asks in between learns the worse.
                self.migration.set_released();
                self.migration.commit_request.send_replace(None);
                let offset = self.held.as_ref().map_or(0, |held| held.mark.offset);
                self.write_held().await?;
                if !self.migration.is_hushed() {
                    tracing::info!(migration = %self.migration.id, offset, "digests agree; commit byte released");
                }
                self.migration
                    .link
                    .send(Control::Committed {
                        migration: self.migration.id,
                    })
                    .await;
                Ok(true)
            }
        }
    }

    /// Writes what was held. True when the end of the direction was among it.
    async fn write_held(&mut self) -> Result<bool, Abort> {
        let mut ended = false;
        for chunk in self.held.take().map(|held| held.chunks).unwrap_or_default() {
            ended |= self.write(chunk).await?;
        }
        Ok(ended)
    }

    fn take_decoder(&mut self) -> Result<ChannelDecoder, Abort> {
        self.decoder
            .take()
            .ok_or_else(|| Abort::new(ResetCode::Internal, "the decoder is gone"))
    }

    fn count(&self, stats: &DecodeStats, wire: u64) {
        if self.migration.role() == Role::Far {
            let stats = FrameStats {
                zero_pages: stats.zero_pages,
                same_pages: stats.same_pages,
                ref_pages: stats.ref_pages,
                delta_pages: stats.delta_pages,
                similar_pages: stats.similar_pages,
                batch_pages: stats.batch_pages,
                opaque_bytes: stats.opaque_bytes,
                ..FrameStats::default()
            };
            // The guest's bytes count when the destination has got them.
            self.migration.count_frame(&stats, 0, wire);
        }
    }
}

impl Drop for PumpOut<'_> {
    fn drop(&mut self) {
        if self.migration.role() == Role::Far
            && self.channel.kind == StreamKind::QemuMain
            && let Some(decoder) = &mut self.decoder
        {
            self.migration.set_table(decoder.take_table());
        }
    }
}
