//! A link: one gateway's relation to one peer in one role, across all its QUIC connections.
//!
//! The *near* role dials and opens migrations, the *far* role accepts and carries them out; two
//! gateways with traffic in both directions have two links. Migrations belong to the link and
//! outlive its connections: when a new one stands they are resumed on it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use skyferry_dedup::{Announced, KnownPages};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    time::timeout,
};
use tracing::warn;

use super::{
    channel::Channel,
    finished::Finished,
    migration::Migration,
    peer::PeerKnowledge,
    peer_clock::{self, PeerClock},
    releases::Near,
    throttle::PeerLines,
};
use crate::{
    session::Class,
    transport::{LinkEstimate, estimate},
    wire::{ChannelNo, Control, InstanceId, MigrationId},
};

/// Control messages that may wait for the wire; whoever adds more waits.
const CONTROL_QUEUE: usize = 1024;
/// Misses of one connection that wait for their answer.
const MAX_MISSES: usize = 8192;
/// Answers to misses that are made and sent at once, each at most 2 MiB.
const MAX_ANSWERS: usize = 8;
/// One unit of the memory limits.
pub(super) const MEMORY_UNIT: usize = 1 << 10;
/// How long a peer may read none of the messages that wait for it. Whoever has one more waits with
/// it, the ends of channels included.
const CONTROL_PATIENCE: Duration = Duration::from_secs(10);
/// Most that is kept behind commit candidates, over all channels of a link: device descriptions are
/// tens of kilobytes, and whatever follows a commit byte is no more.
const MAX_HELD: usize = 64 << 20;
/// The round-trip time assumed where there is no connection.
const DEFAULT_RTT: Duration = Duration::from_millis(100);

/// Which end of a link this gateway is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// On the source's side; dials.
    Near,
    /// On the destination's side; accepts.
    Far,
}

/// One established connection to a peer.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) quinn: quinn::Connection,
    control: mpsc::Sender<Control>,
    /// Number of the connection inside its link, from 1.
    pub(super) generation: u64,
    /// Nonces of the last ping sent and of the last pong heard.
    pinged: AtomicU64,
    ponged: watch::Sender<u64>,
    clock: Mutex<PeerClock>,
    order: AtomicU32,
    /// Announcements go over this connection.
    announcing: AtomicBool,
    /// Room for misses that wait for their answer.
    pub(super) misses: Arc<Semaphore>,
    /// Room for answers that are being made and sent.
    pub(super) answers: Semaphore,
}

impl Conn {
    pub(super) fn new(
        quinn: quinn::Connection,
        generation: u64,
    ) -> (Self, mpsc::Receiver<Control>) {
        let (control, queue) = mpsc::channel(CONTROL_QUEUE);
        let conn = Self {
            quinn,
            control,
            generation,
            pinged: AtomicU64::new(0),
            ponged: watch::Sender::new(0),
            clock: Mutex::default(),
            order: AtomicU32::new(0),
            announcing: AtomicBool::new(false),
            misses: Arc::new(Semaphore::new(MAX_MISSES)),
            answers: Semaphore::new(MAX_ANSWERS),
        };
        (conn, queue)
    }

    /// Queues a message. A message for a connection that is gone is dropped: what it said is said
    /// again when the migration is resumed.
    pub(super) async fn send(&self, message: Control) {
        let queued = timeout(CONTROL_PATIENCE, self.control.send(message)).await;
        // Whoever waits beside this one finds it closed.
        if queued.is_err() && self.quinn.close_reason().is_none() {
            let address = self.quinn.remote_address();
            warn!(%address, "the peer reads no control messages; its connection is closed");
            self.quinn
                .close(quinn::VarInt::from_u32(1), b"control messages are not read");
        }
    }

    /// Waits until the peer has acted on all messages so far (true); false when the connection is
    /// gone before that, or the peer takes its time.
    pub(super) async fn settle(&self) -> bool {
        let nonce = self.pinged.fetch_add(1, Ordering::AcqRel) + 1;
        self.send(Control::Ping { nonce }).await;
        let mut answers = self.ponged.subscribe();
        let answered = answers.wait_for(|ponged| *ponged >= nonce);
        tokio::select! {
            answered = timeout(CONTROL_PATIENCE, answered) => matches!(answered, Ok(Ok(_))),
            _ = self.quinn.closed() => false,
        }
    }

    /// Queues the first message of a new connection, for which there is always room.
    pub(super) fn send_first(&self, message: Control) {
        let _ = self.control.try_send(message);
    }

    /// Asks the peer for its clock where that is due, or `at_once`. Where there is no room for a message, it
    /// is asked another time.
    pub(super) fn ask_clock(&self, at_once: bool) {
        let mut clock = lock(&self.clock);
        let now = peer_clock::now();
        let may = if at_once {
            clock.is_answered()
        } else {
            clock.is_due(now)
        };
        if !may {
            return;
        }
        let nonce = self.pinged.fetch_add(1, Ordering::AcqRel) + 1;
        if self.control.try_send(Control::Ping { nonce }).is_ok() {
            clock.on_asked(nonce, now);
        }
    }

    /// How old at most something is that the peer stamped with its clock, and how long its answers take.
    /// `None`: that can't be told.
    pub(super) fn age(&self, stamp: Duration) -> Option<(Duration, Duration)> {
        let clock = lock(&self.clock);
        let now = peer_clock::now();
        Some((clock.age(stamp, now)?, clock.round_trip(now)?))
    }

    /// An answer has come. One to a question that was never asked counts for nothing.
    pub(super) fn on_pong(&self, nonce: u64, clock: Duration) {
        lock(&self.clock).on_answer(nonce, clock, peer_clock::now());
        if nonce <= self.pinged.load(Ordering::Acquire) {
            self.ponged.send_if_modified(|last| {
                let later = nonce > *last;
                *last = nonce.max(*last);
                later
            });
        }
    }

    /// Announcements begin on this connection; false when they have before.
    pub(super) fn begin_announcements(&self) -> bool {
        !self.announcing.swap(true, Ordering::AcqRel)
    }

    /// The priority of the next stream of a class. Within a class older streams go first, so that
    /// frames arrive in order and repeated packets of old ones go before new data.
    pub(super) fn next_priority(&self, class: Class) -> i32 {
        /// Distance between classes: streams of one class before the order wraps around.
        const SPAN: i32 = 1 << 29;
        let order = self.order.fetch_add(1, Ordering::Relaxed) % SPAN.unsigned_abs();
        let base = match class {
            Class::Bulk => -SPAN,
            Class::Switchover => 0,
            Class::Urgent => SPAN,
        };
        base - i32::try_from(order).unwrap_or(0)
    }
}

/// The priority of the control stream: before everything else.
pub(super) const CONTROL_PRIORITY: i32 = i32::MAX;

/// What is known of the process at the other end.
#[derive(Debug)]
struct Remote {
    instance: InstanceId,
    shared: Shared,
}

/// What goes for all channels to the process at the other end.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    /// The pages that it is believed to hold.
    pub(super) known: Arc<KnownPages>,
    /// The memory that it has for undelivered frames.
    pub(super) receive_memory: Arc<Semaphore>,
    /// Places that both gateways remember of a main channel.
    pub(super) places: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: String,
    pub(super) role: Role,
    conn: watch::Sender<Option<Arc<Conn>>>,
    generations: AtomicU64,
    /// Held while a connection takes over, and by the near role while it opens a channel: a channel
    /// is either resumed on a new connection or opened on it, and never both.
    pub(super) takeover: Mutex<()>,
    /// Generation of the connection whose messages count; held while one of them is acted on.
    turn: tokio::sync::Mutex<u64>,
    /// The link's own memory for frames that were received and are not decoded.
    pub(super) receive_memory: Arc<Semaphore>,
    /// Memory for what is kept back behind commit candidates.
    pub(super) held_memory: Arc<Semaphore>,
    migrations: Mutex<HashMap<MigrationId, Arc<Migration>>>,
    /// A migration or channel was added.
    pub(super) registered: Notify,
    remote: Mutex<Option<Remote>>,
    knowledge: Arc<PeerKnowledge>,
    last_error: Mutex<Option<String>>,
    finished: Mutex<Finished>,
    /// What the peer may have written into the log.
    pub(super) lines: PeerLines,
}

/// A poisoned lock only means that another task panicked; the state behind it is plain data.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// `receive_units` is the memory for received frames that no other link can take; `knowledge` is
    /// what the other link to the same peer has, too.
    pub(super) fn new(
        peer: String,
        role: Role,
        receive_units: usize,
        knowledge: Arc<PeerKnowledge>,
    ) -> Self {
        Self {
            peer,
            role,
            conn: watch::Sender::new(None),
            generations: AtomicU64::new(0),
            takeover: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            receive_memory: Arc::new(Semaphore::new(receive_units)),
            held_memory: Arc::new(Semaphore::new(MAX_HELD / MEMORY_UNIT)),
            migrations: Mutex::default(),
            registered: Notify::new(),
            remote: Mutex::default(),
            knowledge,
            last_error: Mutex::default(),
            finished: Mutex::default(),
            lines: PeerLines::new(),
        }
    }

    pub(super) fn next_generation(&self) -> u64 {
        self.generations.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The connection that stands now.
    pub(super) fn current(&self) -> Option<Arc<Conn>> {
        self.conn.borrow().clone()
    }

    /// Follows the connection.
    pub(super) fn watch(&self) -> watch::Receiver<Option<Arc<Conn>>> {
        self.conn.subscribe()
    }

    /// Makes `conn` the current connection; the one before is closed.
    pub(super) fn set_current(&self, conn: Arc<Conn>) {
        *lock(&self.last_error) = None;
        if let Some(old) = self.conn.send_replace(Some(conn)) {
            old.quinn
                .close(quinn::VarInt::from_u32(0), b"replaced by a new connection");
        }
    }

    /// From now on only messages of this connection count. Returns when the last one of another has
    /// been acted on, or dropped with its connection.
    pub(super) async fn begin_turns(&self, generation: u64) {
        let mut newest = self.turn.lock().await;
        *newest = generation.max(*newest);
    }

    /// Permission to act on a message of this connection; `None` when a newer one has taken over.
    /// What the old one said is said again on the new one, and would undo it now.
    pub(super) async fn turn(&self, generation: u64) -> Option<tokio::sync::MutexGuard<'_, u64>> {
        let newest = self.turn.lock().await;
        (*newest == generation).then_some(newest)
    }

    /// The connection of this generation is gone.
    pub(super) fn clear_current(&self, generation: u64) {
        self.conn.send_if_modified(|current| {
            let gone = current
                .as_ref()
                .is_some_and(|conn| conn.generation == generation);
            if gone {
                *current = None;
            }
            gone
        });
    }

    /// Why there is no connection, for status.
    pub(super) fn set_error(&self, error: Option<String>) {
        *lock(&self.last_error) = error;
    }

    pub(super) fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }

    /// Queues a message on the current connection, if there is one.
    pub(super) async fn send(&self, message: Control) {
        if let Some(conn) = self.current() {
            conn.send(message).await;
        }
    }

    /// Round-trip time and congestion window of the connection.
    pub(super) fn path(&self) -> (Duration, u64) {
        self.conn
            .borrow()
            .as_ref()
            .map_or((DEFAULT_RTT, 0), |conn| {
                let path = conn.quinn.stats().path;
                (path.rtt, path.cwnd)
            })
    }

    /// What the connection has learnt about its path. Costs a copy of the congestion controller's state.
    pub(super) fn estimate(&self) -> Option<LinkEstimate> {
        let conn = self.current()?;
        Some(estimate(&conn.quinn))
    }

    /// Takes note of who is at the other end. Gives the process that was there before, if that was another.
    pub(super) fn set_remote(
        &self,
        instance: InstanceId,
        known_pages: u64,
        receive_budget: u64,
        places: u64,
    ) -> Option<InstanceId> {
        let mut remote = lock(&self.remote);
        let before = remote.as_ref().map(|remote| remote.instance);
        if before != Some(instance) {
            let units = usize::try_from(receive_budget / MEMORY_UNIT as u64)
                .unwrap_or(Semaphore::MAX_PERMITS)
                .clamp(1024, Semaphore::MAX_PERMITS);
            *remote = Some(Remote {
                instance,
                shared: Shared {
                    known: self.knowledge.known(instance, known_pages),
                    receive_memory: Arc::new(Semaphore::new(units)),
                    places,
                },
            });
        }
        before.filter(|before| *before != instance)
    }

    /// Far: the process at the near end, or the last one; before the first hello nobody's.
    pub(super) fn near(&self) -> Near {
        let remote = lock(&self.remote);
        let instance = remote.as_ref().map(|remote| remote.instance);
        Near::new(&self.peer, instance.unwrap_or_default())
    }

    /// What is known of the process at the other end; `None` before the first hello.
    pub(super) fn remote(&self) -> Option<Shared> {
        let remote = lock(&self.remote);
        remote.as_ref().map(|remote| remote.shared.clone())
    }

    /// What the peer has announced of its store.
    pub(super) fn announced(&self) -> Arc<Announced> {
        self.knowledge.announced.clone()
    }

    pub(super) fn add_migration(&self, migration: Arc<Migration>) {
        lock(&self.migrations).insert(migration.id, migration);
        self.registered.notify_waiters();
    }

    pub(super) fn remove_migration(&self, migration: &Migration) {
        // In this order: what is not found among those that run is found among those that are over.
        let mut finished = lock(&self.finished);
        // Asked under this lock: who hears meanwhile that the ends are known forgets them behind it.
        let ends = migration.unheard_ends();
        finished.remember(migration.id, migration.released(), ends);
        drop(finished);
        lock(&self.migrations).remove(&migration.id);
    }

    /// What is remembered of the migrations that are over.
    pub(super) fn finished(&self) -> MutexGuard<'_, Finished> {
        lock(&self.finished)
    }

    pub(super) fn migration(&self, id: MigrationId) -> Option<Arc<Migration>> {
        lock(&self.migrations).get(&id).cloned()
    }

    /// A channel that has not ended, and its migration.
    pub(super) fn channel(
        &self,
        id: MigrationId,
        no: ChannelNo,
    ) -> Option<(Arc<Migration>, Arc<Channel>)> {
        let migration = self.migration(id)?;
        let channel = migration.channel(no)?;
        Some((migration, channel))
    }

    pub(super) fn migration_count(&self) -> usize {
        lock(&self.migrations).len()
    }

    pub(super) fn has_migrations(&self) -> bool {
        !lock(&self.migrations).is_empty()
    }

    pub(super) fn migrations(&self) -> Vec<Arc<Migration>> {
        lock(&self.migrations).values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::rig::Pair;

    /// A message that an old connection brought is acted on before the new one begins, or never.
    #[tokio::test]
    async fn an_old_connection_has_no_turn_after_a_new_one() {
        let link = Link::new(
            "edge-b".into(),
            Role::Far,
            0,
            Arc::new(PeerKnowledge::new(0)),
        );
        link.begin_turns(1).await;
        let acting = link.turn(1).await;
        assert!(acting.is_some());
        let takes_over = link.begin_turns(2);
        tokio::pin!(takes_over);
        let early = tokio::time::timeout(Duration::from_millis(20), &mut takes_over).await;
        assert!(early.is_err(), "the old message was still acted on");
        drop(acting);
        takes_over.await;
        assert!(link.turn(1).await.is_none());
        assert!(link.turn(2).await.is_some());
        // Connections that take over in another order than they were made.
        link.begin_turns(1).await;
        assert!(link.turn(1).await.is_none());
    }

    /// A migration that has ended waits until its peer has heard so, a gateway that stops likewise:
    /// not for ever, though the connection stands and its packets are acknowledged.
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_answers_no_question_is_not_waited_for() {
        let pair = Pair::new().await;
        let (conn, mut queue) = Conn::new(pair.near.clone(), 1);
        let settled = timeout(Duration::from_secs(600), conn.settle()).await;
        assert_eq!(
            settled,
            Ok(false),
            "no answer came, and none was waited for"
        );
        assert!(matches!(queue.try_recv(), Ok(Control::Ping { nonce: 1 })));
        assert!(conn.quinn.close_reason().is_none());
        // One that reads nothing at all is not worth its connection.
        for _ in 0..CONTROL_QUEUE {
            conn.send(Control::Pong { nonce: 0, clock: 0 }).await;
        }
        let settled = timeout(Duration::from_secs(600), conn.settle()).await;
        assert_eq!(settled, Ok(false));
        assert!(conn.quinn.close_reason().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_one() {
        let pair = Pair::new().await;
        let (conn, _queue) = Conn::new(pair.near.clone(), 1);
        let late = async {
            tokio::time::sleep(CONTROL_PATIENCE / 2).await;
            conn.on_pong(1, Duration::ZERO);
        };
        let (settled, ()) = tokio::join!(conn.settle(), late);
        assert!(settled);
    }
}
