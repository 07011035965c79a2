//! The far role: channels opened by the peer become connections to a destination VM.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use skyferry_dedup::DomainKey;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{
    Gateway,
    channel::{Abort, Channel, Mark},
    faults::Step,
    flow::{self, Outcome},
    link::{Conn, Link},
    migration::{CommitRequest, Migration, direction},
    panics::{self, LeaveOnPanic},
    releases::Release,
    rest,
    socket::{DialError, Socket, dial},
};
use crate::{
    config::{Egress, Endpoint, Host, HostPort},
    metrics::{CommitCheck, RefusalReason},
    wire::{
        ChannelNo, Control, MigrationId,
        control::{ChannelPosition, ResetCode, StreamKind},
    },
};

/// A commit is asked for once more when its request may be older than this and one round trip.
const FRESH: Duration = Duration::from_millis(250);
/// How often a request is asked for again that waits for pages: when they are there it must not have grown old.
const REFRESH: Duration = Duration::from_millis(150);
/// How soon the request is asked for again where nothing is known of the round-trip time.
const UNKNOWN_RTT: Duration = Duration::from_millis(500);
/// How long a commit waits for channels that have not caught up, and for the near gateway's word.
const COMMIT_PATIENCE: Duration = Duration::from_secs(30);
/// How long the far gateway keeps a broken channel for its last frames to reach the peer.
const DRAIN_WAIT: Duration = Duration::from_secs(10);

/// What the peer asks for in an open message.
#[derive(Debug)]
pub(super) struct OpenRequest {
    pub(super) migration: MigrationId,
    pub(super) channel: ChannelNo,
    pub(super) kind: StreamKind,
    pub(super) dial_now: bool,
    pub(super) target: String,
    pub(super) domain: [u8; 32],
}

/// Takes a channel that the peer opens, or refuses it.
pub(super) async fn on_open(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    request: OpenRequest,
) {
    let id = request.migration;
    let no = request.channel;
    let OpenRequest { kind, dial_now, .. } = request;
    match admit(gateway, link, request) {
        Ok((migration, channel, target, egress)) => {
            if !channel.attach(conn.generation, 0) {
                return;
            }
            debug!(migration = %id, channel = no, %kind, ?target, "the peer opens a channel");
            conn.ask_clock(false);
            let gateway = gateway.clone();
            tokio::spawn(async move {
                run_channel(&gateway, &migration, &channel, &target, &egress, dial_now).await;
            });
        }
        Err(refusal) => {
            gateway.refused(link, refusal.metric);
            if link.lines.refused_opens.lets_pass(Instant::now()) {
                warn!(migration = %id, peer = link.peer, reason = refusal.reason, "open refused");
            }
            conn.send(Control::Reset {
                migration: id,
                channel: no,
                after_seq: 0,
                code: refusal.code,
                released: has_released(gateway, link, id),
                reason: refusal.reason,
            })
            .await;
        }
    }
}

struct Refusal {
    metric: RefusalReason,
    code: ResetCode,
    reason: String,
}

impl Refusal {
    fn new(metric: RefusalReason, code: ResetCode, reason: impl Into<String>) -> Self {
        Self {
            metric,
            code,
            reason: reason.into(),
        }
    }
}

type Admitted = (Arc<Migration>, Arc<Channel>, Endpoint, Arc<Egress>);

/// Checks an open message against configuration and limits.
fn admit(gateway: &Arc<Gateway>, link: &Arc<Link>, open: OpenRequest) -> Result<Admitted, Refusal> {
    let not_allowed =
        |reason: String| Refusal::new(RefusalReason::NotAllowed, ResetCode::NotAllowed, reason);
    let limit =
        |reason: &str| Refusal::new(RefusalReason::Limit, ResetCode::Busy, reason.to_owned());
    let target: Endpoint = open
        .target
        .parse()
        .map_err(|e| not_allowed(format!("{:?} is no target: {e}", open.target)))?;
    let egress = gateway
        .egress(&link.peer)
        .ok_or_else(|| not_allowed(format!("nothing is allowed for peer {}", link.peer)))?;
    if !may_be_allowed(&egress, &target) {
        return Err(not_allowed(DialError::NotAllowed(open.target).to_string()));
    }
    let migration = match link.migration(open.migration) {
        Some(migration) => migration,
        // Begun anew it would say that nothing was released.
        None if has_released(gateway, link, open.migration) => {
            return Err(limit("the migration is over, and was committed"));
        }
        None if gateway.draining.is_cancelled() => {
            let reason = "the gateway is draining";
            return Err(Refusal::new(
                RefusalReason::Draining,
                ResetCode::Busy,
                reason,
            ));
        }
        None => gateway
            .begin_migration(link, || {
                let hushed = !link.lines.migrations.lets_pass(Instant::now());
                let metrics = &gateway.metrics.migration;
                let migration = Migration::new(
                    open.migration,
                    link.clone(),
                    open.target.clone(),
                    None,
                    DomainKey::from_bytes(open.domain),
                    metrics.for_peer(&link.peer, direction(link.role)),
                    false,
                );
                if hushed {
                    migration.hush();
                }
                migration
            })
            .ok_or_else(|| limit("too many migrations"))?,
    };
    let channel = Arc::new(Channel::new(open.channel, open.kind, &gateway.config.wan));
    if !migration.add_channel(
        channel.clone(),
        gateway.config.limits.channels_per_migration,
    ) {
        return Err(limit("too many channels, or one number twice"));
    }
    Ok((migration, channel, target, egress))
}

/// Whether a target may turn out to be allowed: what a name stands for is seen when it is dialled.
fn may_be_allowed(egress: &Egress, target: &Endpoint) -> bool {
    let is_name = matches!(
        target,
        Endpoint::Tcp(HostPort {
            host: Host::Name(_),
            ..
        })
    );
    is_name || egress.allows(target)
}

async fn run_channel(
    gateway: &Arc<Gateway>,
    migration: &Arc<Migration>,
    channel: &Arc<Channel>,
    target: &Endpoint,
    egress: &Egress,
    dial_now: bool,
) {
    let _leave = LeaveOnPanic::new(gateway, migration, channel);
    let connect = async {
        while !dial_now && !channel.has_next() {
            channel.arrived.notified().await;
        }
        gateway.faults.panic_at_step(Step::Dial);
        dial(target, egress).await
    };
    let mut socket = None;
    let work = async {
        let connected = tokio::select! {
            connected = connect => connected.map_err(|e| dial_abort(gateway, migration, &e)),
            abort = channel.until_aborted() => Err(abort),
        };
        match connected {
            Ok(connected) => {
                let socket = socket.insert(connected);
                on_dialled(migration, channel, target).await;
                flow::run(gateway, migration, channel, socket, Vec::new()).await
            }
            Err(abort) => Outcome::Aborted(abort),
        }
    };
    let outcome = panics::caught(work).await;
    let outcome = outcome.unwrap_or_else(|_| Outcome::Aborted(panics::abort()));
    gateway.faults.panic_at_step(Step::End);
    if let Some(socket) = socket {
        finish_socket(gateway, migration, channel, socket, &outcome).await;
    }
    match outcome {
        Outcome::Closed => migration.on_ended(channel),
        Outcome::Aborted(abort) => {
            migration.on_broken();
            tell_peer(migration, channel, &abort).await;
        }
    }
    if migration.remove_channel(channel) {
        gateway.finish(migration);
    }
}

async fn on_dialled(migration: &Migration, channel: &Channel, target: &Endpoint) {
    migration.on_opened();
    channel.opened.cancel();
    if !migration.is_hushed() {
        let (id, no, kind) = (migration.id, channel.no, channel.kind);
        info!(migration = %id, channel = no, %kind, %target, "channel opened by the peer");
    }
    let opened = Control::Opened {
        migration: migration.id,
        channel: channel.no,
    };
    migration.link.send(opened).await;
}

async fn finish_socket(
    gateway: &Gateway,
    migration: &Migration,
    channel: &Channel,
    socket: Socket,
    outcome: &Outcome,
) {
    let Outcome::Aborted(abort) = outcome else {
        return;
    };
    migration.note_error(abort);
    if rest::is_worth_taking(migration, abort) {
        rest::taken(gateway, &socket).await;
    }
    socket.reset();
    if abort.from_peer {
        return;
    }
    // One channel that fails here takes the migration with it, except where the VMM did it, or its
    // network: that is for the VMMs to judge.
    let by_vmm = abort.code == ResetCode::Endpoint || channel.socket_lost.load(Ordering::Acquire);
    if !by_vmm {
        for other in migration
            .channels()
            .iter()
            .filter(|other| other.no != channel.no)
        {
            other.abort(abort.clone());
        }
    }
}

/// Tells the peer about an early end, behind all that was said before it. An end that the peer asked
/// for is answered: only now is it certain that the commit byte was released, or never will be.
async fn tell_peer(migration: &Migration, channel: &Channel, abort: &Abort) {
    migration.note_error(abort);
    if abort.from_peer {
        let reason = format!("ended by the near gateway: {}", abort.reason);
        let answer = last_word(migration.id, channel.no, migration.released(), reason);
        // Before it is sent: whoever asks meanwhile, or on a new connection, is told again.
        channel.set_last_word(answer.clone());
        migration.link.send(answer).await;
        return;
    }
    let reset = Control::Reset {
        migration: migration.id,
        channel: channel.no,
        after_seq: channel.pushed(),
        code: abort.code,
        released: migration.released(),
        reason: abort.reason.clone(),
    };
    // Before it is sent: a connection that takes over meanwhile says it again.
    channel.set_last_word(reset.clone());
    channel.note_end(abort.clone());
    migration.link.send(reset).await;
    // The reset takes effect behind the last frames, so they must get there.
    let delivered = rest::deliver(migration, channel);
    if rest::counts(migration, abort) {
        delivered.await;
    } else {
        let _ = timeout(DRAIN_WAIT, delivered).await;
    }
}

/// What is said of a channel that has nothing here any more which could release a commit byte.
fn last_word(
    migration: MigrationId,
    channel: ChannelNo,
    released: bool,
    reason: String,
) -> Control {
    Control::Reset {
        migration,
        channel,
        after_seq: 0,
        code: ResetCode::Unknown,
        released,
        reason,
    }
}

/// Whether it is remembered that the commit byte of this migration was released, by this process or one before.
fn has_released(gateway: &Gateway, link: &Link, id: MigrationId) -> bool {
    let noted = gateway.releases.contains(Release {
        near: link.near(),
        migration: id,
    });
    noted || link.finished().has_released(id)
}

/// Whether the commit byte of a migration may have been released, whether it still runs or not.
fn may_have_released(
    gateway: &Gateway,
    link: &Link,
    id: MigrationId,
    running: Option<&Migration>,
) -> bool {
    let known = match running {
        Some(migration) => migration.released(),
        None => link.finished().may_have_released(id),
    };
    known || has_released(gateway, link, id)
}

/// The near gateway resets a channel that has ended here already, or was never opened.
pub(super) async fn on_late_reset(
    gateway: &Gateway,
    link: &Link,
    conn: &Conn,
    id: MigrationId,
    no: ChannelNo,
) {
    let released = may_have_released(gateway, link, id, link.migration(id).as_deref());
    conn.send(last_word(id, no, released, "the channel is over".into()))
        .await;
}

fn dial_abort(gateway: &Gateway, migration: &Migration, error: &DialError) -> Abort {
    let link = &migration.link;
    let (metric, code) = match error {
        DialError::NotAllowed(_) => (RefusalReason::NotAllowed, ResetCode::NotAllowed),
        DialError::Unreachable { .. } | DialError::TimedOut { .. } => {
            (RefusalReason::TargetDown, ResetCode::TargetUnreachable)
        }
    };
    gateway.refused(link, metric);
    if !migration.was_opened() && !link.lines.refused_opens.lets_pass(Instant::now()) {
        // Nothing else is to be said of it.
        migration.hush();
    }
    Abort::new(code, error.to_string())
}

/// What a comparison came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommitVerdict {
    /// Something is still on its way.
    Wait,
    /// All agree, and the source was just still there.
    Release,
}

/// What a commit has waited for so far.
#[derive(Debug, Default)]
pub(super) struct CommitWait {
    /// When all before the byte had been delivered, and there was a request.
    since: Option<Instant>,
    /// The request was asked for once more: the connection, and when.
    asked: Option<(u64, Instant)>,
    /// When it was last asked for while pages were missing, or the first of them were.
    refreshed: Option<Instant>,
}

/// Compares the digests of a commit request with what arrived; `held` is the stream of `channel`
/// up to the byte that is held.
pub(super) async fn check_commit(
    migration: &Migration,
    channel: ChannelNo,
    held: Mark,
    request: &CommitRequest,
    waited: &mut CommitWait,
) -> Result<CommitVerdict, Abort> {
    let since = *waited.since.get_or_insert_with(Instant::now);
    let wait = || {
        if since.elapsed() <= COMMIT_PATIENCE {
            return Ok(CommitVerdict::Wait);
        }
        migration.metrics.commit_check(CommitCheck::Stale);
        Err(Abort::new(
            ResetCode::Outage,
            "the near gateway was not heard in time before the commit byte",
        ))
    };
    let mismatch = |no: ChannelNo| {
        migration.metrics.commit_check(CommitCheck::Mismatch);
        let reason = format!("digests of channel {no} disagree before the commit byte");
        Err(Abort::new(ResetCode::DigestMismatch, reason))
    };
    if !request.digests.iter().any(|item| item.channel == channel) {
        return mismatch(channel);
    }
    for item in &request.digests {
        let wanted = Mark {
            offset: item.offset,
            digest: item.digest,
        };
        let agrees = if item.channel == channel {
            // The request may be faster than the frames: what is held now may be an earlier
            // candidate, about to be refuted.
            (held.offset == wanted.offset).then_some(held == wanted)
        } else {
            migration.agrees(item.channel, wanted)
        };
        match agrees {
            None => return wait(),
            Some(false) => return mismatch(item.channel),
            Some(true) => {}
        }
    }
    // A request from a connection that is gone may have been withdrawn since; the near gateway
    // repeats the one that stands.
    let current = migration.link.current();
    let Some(conn) = current.filter(|conn| conn.generation == request.generation) else {
        return wait();
    };
    // The source may have left since it was seen. If so, word of that is as long under way as a request
    // that was just made; one that was lost and sent again, or waited anywhere, may be older.
    let age = conn.age(request.clock);
    if age.is_some_and(|(age, round_trip)| age <= FRESH + round_trip) {
        waited.since = None;
        return Ok(CommitVerdict::Release);
    }
    let patience = FRESH + age.map_or(UNKNOWN_RTT, |(_, round_trip)| round_trip);
    let is_asked = waited
        .asked
        .is_some_and(|(generation, at)| generation == conn.generation && at.elapsed() <= patience);
    if !is_asked {
        waited.asked = Some((conn.generation, Instant::now()));
        migration.metrics.commit_check(CommitCheck::Asked);
        conn.ask_clock(true);
        let migration = migration.id;
        conn.send(Control::AskCommit { migration }).await;
    }
    wait()
}

/// Asks for the commit now and then while pages that were missing are on their way: asked for behind them it
/// would cost one more round trip. Ends only by being dropped.
pub(super) async fn keep_fresh(migration: &Migration, waited: &mut CommitWait) -> ! {
    let mut request = migration.commit_request.subscribe();
    loop {
        // The sender lives as long as the migration.
        let _ = request.wait_for(Option::is_some).await;
        let last = waited.refreshed.get_or_insert_with(Instant::now);
        tokio::time::sleep_until((*last + REFRESH).into()).await;
        *last = Instant::now();
        if let Some(conn) = migration.link.current() {
            conn.ask_clock(false);
            let migration = migration.id;
            conn.send(Control::AskCommit { migration }).await;
        }
    }
}

/// The near gateway asks for the commit.
pub(super) fn on_commit(migration: &Migration, request: CommitRequest) {
    let channel = migration.channel(request.channel);
    migration.commit_request.send_replace(Some(request));
    if let Some(channel) = channel {
        channel.arrived.notify_one();
    }
}

/// The near gateway has a new connection and says which migrations it still has of those before.
pub(super) fn on_live(gateway: &Gateway, link: &Link, conn: &Conn, live: &[MigrationId]) {
    gateway.releases.retain(link.near(), live);
    let is_new = |migration: &Migration| {
        let mut channels = migration.channels().into_iter();
        channels.any(|channel| channel.attached_generation() == conn.generation)
    };
    let migrations = link.migrations();
    let gone = |m: &&Arc<Migration>| !live.contains(&m.id) && !is_new(m);
    for migration in migrations.iter().filter(gone) {
        let mut abort = Abort::new(ResetCode::Unknown, "the near gateway gave the migration up");
        abort.from_peer = true;
        migration.abort(&abort);
    }
}

/// The near gateway resumes a migration on a new connection.
pub(super) async fn on_resume(
    gateway: &Gateway,
    link: &Link,
    conn: &Conn,
    id: MigrationId,
    positions: &[ChannelPosition],
) {
    let migration = link.migration(id);
    let (channels, mut ends) = match &migration {
        Some(migration) => {
            let standing = migration.standing();
            (standing.open, standing.ends)
        }
        None => (Vec::new(), link.finished().ends(id).to_vec()),
    };
    // Of an end in order the last acknowledgement may have been lost with the connection.
    ends.retain(|end| positions.iter().any(|p| p.channel == end.channel));
    // Asked behind the channels: of one that is missing there, this is the last word.
    let released = may_have_released(gateway, link, id, migration.as_deref());
    let known = migration.is_some() || !ends.is_empty();
    let position = |channel: &Arc<Channel>| ChannelPosition {
        channel: channel.no,
        next_seq: channel.recv_position(),
    };
    let answer = Control::Resumed {
        migration: id,
        known,
        released,
        channels: channels.iter().map(position).chain(ends.clone()).collect(),
    };
    conn.send(answer).await;
    for end in ends {
        conn.send(ack(id, end)).await;
    }
    for channel in channels {
        let Some(position) = positions.iter().find(|p| p.channel == channel.no) else {
            if channel.attached_generation() == conn.generation {
                // Opened on this connection since the near gateway wrote its message.
                continue;
            }
            let mut abort = Abort::new(ResetCode::Unknown, "the channel ended at the near gateway");
            abort.from_peer = true;
            channel.abort(abort);
            continue;
        };
        if let Some(reset) = channel.last_word() {
            // It may have been lost with the connection.
            conn.send(reset).await;
        }
        if !channel.attach(conn.generation, position.next_seq) {
            channel.abort(Abort::new(
                ResetCode::Internal,
                "the peer waits for a frame that is gone",
            ));
            continue;
        }
        let delivered = ChannelPosition {
            channel: channel.no,
            next_seq: channel.delivered(),
        };
        conn.send(ack(id, delivered)).await;
        if channel.opened.is_cancelled() {
            // The first time it may have been lost with the connection.
            conn.send(Control::Opened {
                migration: id,
                channel: channel.no,
            })
            .await;
        }
    }
    if link.lines.resumptions.lets_pass(Instant::now()) {
        info!(migration = %id, known, "resumed by the near gateway");
    }
}

/// All frames before this position have been delivered.
pub(super) fn ack(migration: MigrationId, position: ChannelPosition) -> Control {
    Control::Ack {
        migration,
        channel: position.channel,
        next_seq: position.next_seq,
    }
}

/// Another process is at the other end: what the one before had begun is over.
pub(super) fn on_restart(link: &Link) {
    for migration in link.migrations() {
        let mut abort = Abort::new(ResetCode::Unknown, "the near gateway was restarted");
        abort.from_peer = true;
        migration.abort(&abort);
    }
}
