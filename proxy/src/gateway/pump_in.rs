//! From a hypervisor's socket into frames.
//!
//! Reads no faster than what was read before is delivered ([`DeliveryBudget`]), encodes on the
//! blocking pool, and tells the migration what the encoder saw: phases, the return path, the byte
//! on which the destination commits.
//!
//! [`DeliveryBudget`]: crate::session::DeliveryBudget

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use skyferry_core::qemu::return_path::ReturnPath;
use skyferry_core::qemu::{CommitMark, Event, Phase};
use skyferry_dedup::{
    ChannelEncoder, ChannelKind, EncodeOptions, Encoded, Flush, Frame, KnownPages, PageStore,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    Gateway,
    channel::{Abort, Channel, IDLE, Mark},
    effort::Pace,
    link::{MEMORY_UNIT, Role, Shared},
    manifests::Adoption,
    migration::Migration,
    near,
    socket::Socket,
};
use crate::{
    session::{Class, OutFrame},
    wire::{
        DataFlags,
        control::{ResetCode, StreamKind},
        data::MAX_RAW_BYTES,
    },
};

/// Bytes read before they are encoded.
const READ_TARGET: usize = 256 << 10;
/// How long precopy data waits for more of its kind before a small frame is made of it.
const LINGER: Duration = Duration::from_millis(2);
/// Silence after which a piece that is cut off goes out as it is, and a commit candidate that is
/// the last byte counts as the end of the stream.
const SILENCE: Duration = Duration::from_millis(20);

/// How long nothing is delivered before the VM is looked at that waits for it.
const LEAVER_POLL: Duration = Duration::from_millis(500);

/// How the local socket came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// In order: the other side closed or half-closed.
    Closed,
    /// By a reset or another failure.
    Reset,
}

pub(super) struct PumpIn<'a> {
    gateway: &'a Gateway,
    migration: &'a Arc<Migration>,
    channel: &'a Arc<Channel>,
    socket: &'a Socket,
    known: Arc<KnownPages>,
    peer_memory: Arc<Semaphore>,
    encoder: Option<ChannelEncoder>,
    adoption: Adoption,
    pace: Pace,
    buf: Vec<u8>,
    accepted_at: Instant,
    /// The socket has reported a failure, which it does once: a read would give an end in order.
    failed: bool,
    /// Of a VM that has left: how many frames were not delivered, and since when as many.
    stuck: Option<(usize, Instant)>,
    /// The next frame is the first after a refuted candidate.
    unheld: bool,
    /// Where the last commit candidate is.
    candidate: Option<Mark>,
    /// Memory reserved for what has been read and is not in a frame yet.
    permits: Vec<OwnedSemaphorePermit>,
    /// Follows the return path at the far gateway.
    return_path: Option<ReturnPath>,
}

impl<'a> PumpIn<'a> {
    /// `first` are bytes that were read already. The peer must have been met.
    pub(super) fn new(
        gateway: &'a Gateway,
        migration: &'a Arc<Migration>,
        channel: &'a Arc<Channel>,
        socket: &'a Socket,
        first: Vec<u8>,
    ) -> Option<Self> {
        let Shared {
            known,
            receive_memory: peer_memory,
            places,
        } = migration.link.remote()?;
        let near_main = migration.role() == Role::Near && channel.kind == StreamKind::QemuMain;
        let far_main = migration.role() == Role::Far && channel.kind == StreamKind::QemuMain;
        let kind = if near_main {
            ChannelKind::QemuMain
        } else {
            ChannelKind::Opaque
        };
        let mut options = EncodeOptions {
            max_raw: MAX_RAW_BYTES,
            max_places: places,
            ..EncodeOptions::default()
        };
        if let Some(level) = gateway.config.compression.level {
            options.level = level;
        }
        let mut encoder = ChannelEncoder::new(kind, &migration.domain, options);
        if migration.role() == Role::Near {
            encoder.refer_to(migration.link.announced());
        }
        if near_main {
            let domain = migration.domain.id();
            encoder.compare_with(gateway.manifests.candidates(&migration.link.peer, &domain));
        }
        Some(Self {
            gateway,
            migration,
            channel,
            socket,
            known,
            peer_memory,
            encoder: Some(encoder),
            adoption: Adoption::default(),
            pace: Pace::new(gateway, migration),
            buf: first,
            accepted_at: Instant::now(),
            failed: false,
            stuck: None,
            unheld: false,
            candidate: None,
            permits: Vec::new(),
            return_path: far_main.then(ReturnPath::new),
        })
    }

    /// Runs until the socket ends. What it brought is in frames then; the end itself is not.
    pub(super) async fn run(mut self) -> Result<Ended, Abort> {
        if !self.buf.is_empty() {
            self.encode(Flush::Soft).await?;
        }
        loop {
            self.wait_for_bytes().await?;
            let start = Instant::now();
            self.wait_for_room().await?;
            self.pace.waited(start);
            self.accepted_at = Instant::now();
            let ended = self.fill().await?;
            let flush = match ended {
                Some(_) => Flush::Hard,
                None if self.buf.len() >= READ_TARGET => Flush::No,
                None => Flush::Soft,
            };
            self.encode(flush).await?;
            if let Some(ended) = ended {
                if self.ends_at_candidate() && ended == Ended::Closed {
                    self.commit().await?;
                }
                if self.candidate.is_some() {
                    // Held at the far gateway for good: the destination must not see any of it.
                    let reason = "the source closed before its stream was complete";
                    let mut abort = Abort::new(ResetCode::Endpoint, reason);
                    abort.source_left = true;
                    self.migration.on_source_left();
                    return Err(abort);
                }
                return Ok(ended);
            }
        }
    }

    /// Waits until the socket has something. Silence lets go what would wait for more.
    async fn wait_for_bytes(&mut self) -> Result<(), Abort> {
        let waiting = !self.buf.is_empty() || self.pending() > 0 || self.candidate.is_some();
        if waiting && timeout(SILENCE, self.socket.readable()).await.is_err() {
            self.encode(Flush::Hard).await?;
            if self.ends_at_candidate() {
                self.commit().await?;
            }
        }
        match self.socket.is_drained() {
            Ok(drained) => self.channel.idle.store(drained, Ordering::Release),
            Err(e) => {
                self.channel.on_socket_error(&e);
                self.failed = true;
            }
        }
        // An error shows again on the read.
        if timeout(IDLE, self.socket.readable()).await.is_err() {
            self.rest();
            let _ = self.socket.readable().await;
        }
        self.channel.idle.store(false, Ordering::Release);
        Ok(())
    }

    /// Gives back the memory that what comes next would use.
    fn rest(&mut self) {
        self.buf.shrink_to_fit();
        if let Some(encoder) = &mut self.encoder {
            encoder.rest();
        }
    }

    /// Whether the last byte of the stream so far is a commit candidate: a source that sends no
    /// description of its devices has nothing more to say.
    fn ends_at_candidate(&self) -> bool {
        self.candidate.is_some()
            && self
                .encoder
                .as_ref()
                .is_some_and(ChannelEncoder::candidate_is_last)
    }

    fn pending(&self) -> usize {
        self.encoder.as_ref().map_or(0, ChannelEncoder::pending)
    }

    /// Waits until the budget and the memory limits leave room for one read.
    async fn wait_for_room(&mut self) -> Result<(), Abort> {
        while !self.may_accept() {
            if self.channel.guest_in_flight() == 0 && self.pending() > 0 {
                self.encode(Flush::Soft).await?;
            }
            if timeout(LEAVER_POLL, self.channel.space.notified())
                .await
                .is_err()
            {
                self.look_for_leaver()?;
            }
        }
        if !self.permits.is_empty() {
            return Ok(());
        }
        // A channel with nothing in flight always gets on, whatever the others hold: channels of
        // one migration wait for each other at the destination.
        let units = u32::try_from(READ_TARGET / MEMORY_UNIT).unwrap_or(1);
        for memory in [self.gateway.memory.clone(), self.peer_memory.clone()] {
            let permit = loop {
                if let Ok(permit) = memory.clone().try_acquire_many_owned(units) {
                    break Some(permit);
                }
                if self.channel.guest_in_flight() == 0 {
                    break None;
                }
                tokio::select! {
                    permit = memory.clone().acquire_many_owned(units) => break permit.ok(),
                    () = self.channel.space.notified() => {}
                }
            };
            self.permits.extend(permit);
        }
        Ok(())
    }

    /// Nothing was delivered for a while. A VM that has left meanwhile is noticed all the same: its migration has
    /// failed, and what is another protocol's is kept for no longer than an outage may last.
    fn look_for_leaver(&mut self) -> Result<(), Abort> {
        let of_qemu = self.channel.kind == StreamKind::QemuMain;
        let leaves = self.migration.role() == Role::Near && of_qemu;
        if leaves && self.channel.is_openable() && self.migration.awaits_verdict() {
            if self.socket.has_left() && !self.migration.past_commit() {
                self.migration.on_source_left();
                let mut abort = Abort::new(ResetCode::Endpoint, "the source closed its connection");
                abort.source_left = true;
                return Err(abort);
            }
        } else if !self.channel.receiving_done()
            && let Some(error) = self.socket.broken()
        {
            self.channel.on_socket_error(&error);
            let left = self.channel.frames_in_flight();
            let (before, since) = *self.stuck.get_or_insert_with(|| (left, Instant::now()));
            if left != before {
                self.stuck = None;
            } else if since.elapsed() > self.channel.patience {
                let reason = "the VM's side has left, and the other side takes nothing";
                return Err(Abort::new(ResetCode::Outage, reason));
            }
        }
        Ok(())
    }

    fn may_accept(&self) -> bool {
        let (rtt, window) = self.migration.link.path();
        let share = window / self.migration.link.migration_count().max(1) as u64;
        self.channel.may_accept(rtt, share)
    }

    /// Reads what is there, up to the target.
    async fn fill(&mut self) -> Result<Option<Ended>, Abort> {
        if self.failed {
            return Ok(Some(Ended::Reset));
        }
        let linger = self.migration.may_linger() && self.channel.kind == StreamKind::QemuMain;
        loop {
            let room = READ_TARGET.saturating_sub(self.buf.len());
            if room == 0 {
                return Ok(None);
            }
            self.buf.reserve(room);
            match self.socket.try_read(&mut self.buf, room) {
                Ok(0) => return Ok(Some(Ended::Closed)),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let waited = linger && timeout(LINGER, self.socket.readable()).await.is_ok();
                    if !waited {
                        return Ok(None);
                    }
                }
                Err(e) => {
                    tracing::debug!(migration = %self.migration.id, error = %e, "socket failed");
                    self.channel.on_socket_error(&e);
                    return Ok(Some(Ended::Reset));
                }
            }
        }
    }

    /// Makes frames of what has been read.
    async fn encode(&mut self, flush: Flush) -> Result<(), Abort> {
        if let Some(return_path) = &mut self.return_path {
            return_path.feed(&self.buf);
            if let Some(status) = return_path.shut_seen() {
                self.migration.on_verdict(status);
            }
        }
        let adoption = &mut self.adoption;
        let adopted = adoption.advance(self.gateway, self.migration, self.channel);
        let adopted = adopted.await;
        let Some(mut encoder) = self.encoder.take() else {
            return Err(Abort::new(ResetCode::Internal, "the encoder is gone"));
        };
        self.pace.apply(self.gateway, self.migration, &mut encoder);
        encoder.peer_has_forgotten(self.channel.forgotten());
        let mut input = std::mem::take(&mut self.buf);
        let known = self.known.clone();
        let store = self.gateway.store.clone();
        let size = input.len() + adopted.as_ref().map_or(0, |manifest| manifest.bytes());
        let work = move || {
            if let Some(manifest) = adopted {
                encoder.adopt(&manifest);
            }
            let result = encode_all(&mut encoder, &mut input, flush, &known, &*store);
            (encoder, input, result)
        };
        let stage = &self.gateway.metrics.gateway.encode_seconds;
        let start = Instant::now();
        let (mut encoder, rest, result) = super::off_the_runtime(stage, size, work).await?;
        self.pace.encoded(start);
        if let Some(matches) = encoder.take_matches() {
            self.adoption.begin(matches);
        }
        if let Some(total) = encoder.ram_total() {
            self.migration.on_ram_total(total);
        }
        if encoder.postcopy_advised() {
            self.migration.expect_silent_channel();
        }
        self.encoder = Some(encoder);
        self.buf = rest;
        let steps = result.map_err(|e| Abort::new(ResetCode::Internal, e.to_string()))?;
        for step in steps {
            if let Some(frame) = step.frame {
                self.push(frame, step.mark);
            }
            for (_, event) in step.events {
                self.on_event(event, step.mark).await?;
            }
        }
        Ok(())
    }

    fn push(&mut self, frame: Frame, mark: Mark) {
        let need = (frame.payload.len() + frame.retained.bytes()).div_ceil(MEMORY_UNIT);
        let permits = self
            .permits
            .iter_mut()
            .filter_map(|permit| permit.split(need.min(permit.num_permits())));
        let permits: Vec<_> = permits.collect();
        if self.pending() == 0 && self.buf.is_empty() {
            self.permits.clear();
        }
        let class = match self.migration.role() {
            Role::Near => self.migration.class(),
            Role::Far => Class::Urgent,
        };
        self.pace.made(self.migration, &frame.stats);
        let wire = frame.payload.len() as u64;
        if self.migration.role() == Role::Near {
            self.migration
                .count_frame(&frame.stats, u64::from(frame.raw_len), wire);
        }
        self.channel.add_mark(mark);
        let flags = DataFlags {
            end: false,
            held: frame.held_from_start,
            unheld: std::mem::take(&mut self.unheld),
        };
        self.migration
            .metrics
            .in_flight
            .add(i64::from(frame.raw_len));
        self.channel.push(OutFrame {
            payload: frame.payload,
            flags,
            raw_len: frame.raw_len,
            retained: frame.retained,
            class,
            accepted_at: self.accepted_at,
            permits,
        });
    }

    async fn on_event(&mut self, event: Event, mark: Mark) -> Result<(), Abort> {
        self.migration.on_event(event);
        match event {
            Event::ReturnPath(open) => {
                near::on_return_path(self.gateway, self.migration, self.channel, open).await
            }
            Event::Phase(Phase::Opaque) => {
                near::on_footing_lost(self.gateway, self.migration, self.channel).await
            }
            Event::Phase(_) => Ok(()),
            Event::Commit(CommitMark::Candidate) => {
                self.candidate = Some(mark);
                Ok(())
            }
            Event::Commit(CommitMark::Refuted) => {
                self.candidate = None;
                self.unheld = true;
                Ok(())
            }
            Event::Commit(CommitMark::Complete) => self.commit().await,
        }
    }

    /// The stream is complete: asks the far gateway to compare and release.
    async fn commit(&mut self) -> Result<(), Abort> {
        match self.candidate.take() {
            Some(mark) => {
                near::request_commit(self.migration, self.channel, self.socket, mark).await
            }
            None => Ok(()),
        }
    }
}

impl Drop for PumpIn<'_> {
    fn drop(&mut self) {
        if self.migration.role() == Role::Near
            && self.channel.kind == StreamKind::QemuMain
            && let Some(encoder) = &mut self.encoder
        {
            self.migration.set_table(encoder.take_table());
        }
    }
}

/// One result of the encoder with the state of the stream behind it.
struct EncodeStep {
    frame: Option<Frame>,
    events: Vec<(u64, Event)>,
    mark: Mark,
}

/// Encodes all of `input` that can be; what is left is the start of a piece.
fn encode_all(
    encoder: &mut ChannelEncoder,
    input: &mut Vec<u8>,
    flush: Flush,
    known: &KnownPages,
    store: &dyn PageStore,
) -> Result<Vec<EncodeStep>, skyferry_dedup::EncodeError> {
    let mut steps = Vec::new();
    let mut consumed = 0;
    loop {
        let Encoded {
            consumed: taken,
            frame,
            events,
        } = encoder.encode(&input[consumed..], flush, Some(known), Some(store))?;
        consumed += taken;
        let progress = taken > 0 || frame.is_some() || !events.is_empty();
        if frame.is_some() || !events.is_empty() {
            let mark = Mark {
                offset: encoder.offset(),
                digest: *encoder.digest().as_bytes(),
            };
            steps.push(EncodeStep {
                frame,
                events,
                mark,
            });
        }
        if !progress {
            break;
        }
    }
    input.drain(..consumed);
    Ok(steps)
}
