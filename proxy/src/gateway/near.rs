//! The near role: a source VM's connections become channels that are opened at the peer.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::{
    Gateway,
    channel::{Abort, Channel, Mark},
    far,
    faults::Step,
    flow::{self, Outcome},
    link::{Conn, lock},
    migration::Migration,
    panics::{self, LeaveOnPanic},
    peer_clock, rest, resumption,
    socket::Socket,
};
use crate::{
    config::{First, Ingress},
    metrics::RefusalReason,
    wire::{
        Control, MigrationId,
        control::{ChannelDigest, ResetCode, StreamKind},
    },
};

/// How long a source waits for a link to the peer: managers report a failed migration within
/// seconds, so the gateway must not be slower.
const LINK_WAIT: Duration = Duration::from_millis(2500);
/// How long a channel waits for the word that its target was reached; the far gateway gives up
/// dialling before that.
const OPEN_WAIT: Duration = Duration::from_secs(5);
/// How long the channels besides the main one wait for it to be opened first. Destinations that
/// tell channels apart by their order need that.
const MAIN_FIRST_WAIT: Duration = Duration::from_secs(5);
/// How long the far gateway may take to say whether it released a commit byte before an operator is
/// told that nobody knows.
const LAST_WORD_WAIT: Duration = Duration::from_secs(5);
/// How long a commit waits for what lies unread in the sockets of the other channels.
const QUIESCE_WAIT: Duration = Duration::from_millis(200);
/// How long a source may take to close its connection when it has been given the verdict.
const FAREWELL_WAIT: Duration = Duration::from_secs(10);
/// How often a source is looked at while the commit may be under way.
const SOURCE_POLL: Duration = Duration::from_millis(10);

/// The source's socket. A fault of ours that unwinds the task must not close it when the destination
/// may be running: it stays open then, as long as the process lives.
struct SourceSocket {
    migration: Arc<Migration>,
    socket: Arc<Socket>,
}

impl SourceSocket {
    fn new(migration: Arc<Migration>, kind: StreamKind, socket: Socket) -> Self {
        let socket = Arc::new(socket);
        if kind == StreamKind::QemuMain {
            migration.set_source(&socket);
        }
        Self { migration, socket }
    }

    fn get(&self) -> &Socket {
        &self.socket
    }

    /// Closes it so that the source sees a failure. Behind the destination's verdict it closes in order, and
    /// not before the source has: a reset, which a close is where anything is left to read, would throw away
    /// what the kernel has not delivered yet, the verdict included, and the source would let its guest run as
    /// well.
    async fn close(&self) {
        if self.migration.verdict().is_some() {
            let _ = self.socket.end_writing();
            let _ = timeout(FAREWELL_WAIT, closed_by_source(&self.socket)).await;
        } else {
            self.socket.reset_on_close();
        }
    }
}

impl Drop for SourceSocket {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        // First of all: a request to commit that comes from here on is refused, and one that went out
        // before shows in the answer to what is asked next.
        self.migration.on_broken();
        if self.migration.keeps_source_waiting() {
            // One reference that nobody holds keeps the socket open.
            std::mem::forget(self.socket.clone());
        } else if self.migration.verdict().is_none() {
            self.socket.reset_on_close();
        }
    }
}

/// Carries one connection of a source VM from its first bytes to its end.
pub(super) async fn run_channel(
    gateway: &Arc<Gateway>,
    ingress: &Ingress,
    migration: &Arc<Migration>,
    channel: &Arc<Channel>,
    socket: Socket,
    first: Vec<u8>,
) {
    // Dropped behind the socket, which looks whether it is to stay open.
    let _leave = LeaveOnPanic::new(gateway, migration, channel);
    let socket = SourceSocket::new(migration.clone(), channel.kind, socket);
    let silent = first.is_empty();
    let ready = async {
        gateway.faults.panic_at_step(Step::Open);
        wait_for_link(gateway, migration).await?;
        let message = open_message(ingress, migration, channel, silent);
        channel.set_open_message(message);
        if channel.kind == StreamKind::Opaque {
            wait_for_main(migration).await;
            open(migration, channel).await;
        }
        Ok(())
    };
    let carried = async {
        match ready.await {
            Ok(()) => flow::run(gateway, migration, channel, socket.get(), first).await,
            Err(abort) => Outcome::Aborted(abort),
        }
    };
    let work = async {
        tokio::select! {
            outcome = carried => outcome,
            abort = channel.until_aborted() => Outcome::Aborted(abort),
            abort = never_opened(gateway, migration, channel) => Outcome::Aborted(abort),
        }
    };
    let outcome = panics::caught(work).await;
    let outcome = outcome.unwrap_or_else(|_| Outcome::Aborted(panics::abort()));
    end_channel(gateway, migration, channel, socket, outcome).await;
}

async fn end_channel(
    gateway: &Arc<Gateway>,
    migration: &Arc<Migration>,
    channel: &Arc<Channel>,
    socket: SourceSocket,
    outcome: Outcome,
) {
    migration.closing.cancel();
    gateway.faults.panic_at_step(Step::End);
    if let Outcome::Closed = outcome {
        migration.on_ended(channel);
    }
    let mut is_owed = false;
    if let Outcome::Aborted(abort) = outcome {
        let abort = channel.end(abort);
        migration.on_broken();
        migration.note_error(&abort);
        let is_main = channel.kind == StreamKind::QemuMain;
        if is_main && abort.from_peer && !abort.released {
            // Only the main channel can release the commit byte, and it is gone at the peer.
            migration.on_last_word(false);
        }
        if !abort.from_peer {
            if migration.keeps_source_waiting() && !abort.source_left {
                // Whether the byte was released shows when the main channel has ended, too.
                migration.withdraw_commit();
                migration.abort(&abort);
            }
            let reset = reset_message(migration, channel, &abort);
            migration.link.send(reset).await;
        }
        if rest::is_worth_taking(migration, &abort) {
            rest::taken(gateway, socket.get()).await;
        }
        is_owed = !abort.from_peer && rest::counts(migration, &abort);
        if may_close(migration, channel, &abort)
            || hold(migration, channel, socket.get(), &abort).await
        {
            socket.close().await;
        }
        if is_main && abort.source_left && migration.link.current().is_some() {
            hear_last_word(migration).await;
        }
    }
    drop(socket);
    if is_owed {
        rest::deliver(migration, channel).await;
    }
    if migration.remove_channel(channel) {
        let conn = migration.link.current();
        if let Some(conn) = &conn {
            // A channel may have ended before it was on this connection.
            for end in migration.standing().ends {
                conn.send(far::ack(migration.id, end)).await;
            }
            conn.send(close(migration.id)).await;
        }
        gateway.finish(migration);
        if let Some(conn) = conn {
            resumption::forget_when_heard(&migration.link, &conn, &[migration.id]).await;
        }
    }
}

/// This gateway has no channel of the migration any more.
pub(super) fn close(migration: MigrationId) -> Control {
    Control::Close { migration }
}

pub(super) fn reset_message(migration: &Migration, channel: &Channel, abort: &Abort) -> Control {
    Control::Reset {
        migration: migration.id,
        channel: channel.no,
        after_seq: if rest::counts(migration, abort) {
            channel.pushed()
        } else {
            0
        },
        code: abort.code,
        released: false,
        reason: abort.reason.clone(),
    }
}

/// Whether the source's socket may be closed: a close lets the source guest run again, which must
/// not happen once the destination may have been started.
fn may_close(migration: &Migration, channel: &Channel, abort: &Abort) -> bool {
    let is_main = channel.kind == StreamKind::QemuMain;
    let destination_ended = abort.from_peer && abort.code == ResetCode::Endpoint;
    abort.source_left || (is_main && destination_ended) || is_settled(migration, channel)
}

/// Whether what becomes of the migration does not depend on the source's socket any more.
fn is_settled(migration: &Migration, channel: &Channel) -> bool {
    let main_is_over = channel.kind != StreamKind::QemuMain && !migration.has_main();
    !migration.maybe_committed() || migration.verdict().is_some() || main_is_over
}

/// Keeps the source's socket open until it may be closed, or until the source itself closes it
/// (false).
async fn hold(migration: &Migration, channel: &Channel, socket: &Socket, abort: &Abort) -> bool {
    // An end of our own is answered; behind the peer's there is nothing more to come.
    let answer_due = Instant::now() + LAST_WORD_WAIT;
    // The other channels wait for what becomes of the main one, which says all there is to say.
    let mut told = channel.kind != StreamKind::QemuMain;
    loop {
        let settled = migration.settled.notified();
        tokio::pin!(settled);
        settled.as_mut().enable();
        if is_settled(migration, channel) {
            return true;
        }
        let hopeless = abort.from_peer || migration.released() || Instant::now() >= answer_due;
        if hopeless && !told {
            told = true;
            error!(
                migration = %migration.id,
                reason = abort.reason,
                "the destination may be running, and its verdict is lost: the source is kept \
                 waiting. Find out where the guest runs, then quit the other one by hand"
            );
        }
        tokio::select! {
            () = settled => {}
            () = tokio::time::sleep_until(answer_due), if !told => {}
            () = closed_by_source(socket) => return false,
        }
    }
}

/// Waits for the far gateway to say whether the commit byte was released, for a source that has left without
/// waiting for it.
async fn hear_last_word(migration: &Migration) {
    let said = async {
        loop {
            let settled = migration.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if !migration.maybe_committed() || migration.released() || migration.verdict().is_some()
            {
                return;
            }
            settled.await;
        }
    };
    let _ = timeout(LAST_WORD_WAIT, said).await;
}

/// Reads what the source still writes, until it closes its socket.
async fn closed_by_source(socket: &Socket) {
    let mut rest = Vec::new();
    loop {
        let _ = socket.readable().await;
        rest.clear();
        match socket.try_read(&mut rest, 4096) {
            Ok(0) => return,
            Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}

async fn wait_for_link(gateway: &Gateway, migration: &Migration) -> Result<(), Abort> {
    let mut conns = migration.link.watch();
    let up = timeout(LINK_WAIT, conns.wait_for(Option::is_some)).await;
    if up.is_err() {
        gateway.refused(&migration.link, RefusalReason::PeerDown);
        let why = migration
            .link
            .last_error()
            .unwrap_or_else(|| "no answer yet".into());
        let peer = &migration.link.peer;
        return Err(Abort::new(
            ResetCode::TargetUnreachable,
            format!("no link to peer {peer}: {why}"),
        ));
    }
    Ok(())
}

/// Waits until a channel has been on its way to the peer for too long without an answer: the link
/// seems to stand, and nobody is at its other end. A link that does not stand is an outage, and a
/// new connection begins anew.
async fn never_opened(gateway: &Gateway, migration: &Migration, channel: &Channel) -> Abort {
    let mut since: Option<(u64, Instant)> = None;
    while !channel.opened.is_cancelled() {
        sleep(OPEN_WAIT / 20).await;
        let asked = channel.is_openable() && !migration.maybe_committed();
        let conn = migration.link.current().filter(|_| asked);
        since = conn.map(|conn| match since {
            Some((generation, at)) if generation == conn.generation => (generation, at),
            _ => (conn.generation, Instant::now()),
        });
        let overdue = since.is_some_and(|(_, at)| at.elapsed() > OPEN_WAIT);
        if overdue && !channel.opened.is_cancelled() {
            gateway.refused(&migration.link, RefusalReason::PeerDown);
            let reason = format!("peer {} does not answer", migration.link.peer);
            return Abort::new(ResetCode::TargetUnreachable, reason);
        }
    }
    std::future::pending().await
}

async fn wait_for_main(migration: &Migration) {
    let deadline = Instant::now() + MAIN_FIRST_WAIT;
    if !migration.expects_main() {
        return;
    }
    loop {
        if let Some(main) = migration.main() {
            let _ = tokio::time::timeout_at(deadline, main.opened.cancelled()).await;
            return;
        }
        let joined = migration.link.registered.notified();
        if migration.main().is_none() && tokio::time::timeout_at(deadline, joined).await.is_err() {
            debug!(migration = %migration.id, "no main channel; the others go ahead");
            return;
        }
    }
}

fn open_message(
    ingress: &Ingress,
    migration: &Migration,
    channel: &Channel,
    silent: bool,
) -> Control {
    Control::Open {
        migration: migration.id,
        channel: channel.no,
        kind: channel.kind,
        dial_now: silent || ingress.first == First::Server,
        target: ingress.target.to_string(),
        domain: *migration.domain.as_bytes(),
    }
}

/// Opens the channel at the peer, on the connection that stands. If there is none just now, the
/// next one's resumption opens it.
async fn open(migration: &Migration, channel: &Channel) {
    let Some(message) = channel.open_message() else {
        return;
    };
    let conn = {
        let _takeover = lock(&migration.link.takeover);
        channel.mark_openable();
        migration.link.current()
    };
    if let Some(conn) = conn {
        conn.send(message).await;
        attach(migration, channel, &conn, 0).await;
    }
}

pub(super) async fn attach(migration: &Migration, channel: &Channel, conn: &Conn, next_seq: u64) {
    if channel.attach(conn.generation, next_seq) {
        conn.send(Control::Ack {
            migration: migration.id,
            channel: channel.no,
            next_seq: channel.delivered(),
        })
        .await;
    } else {
        channel.abort(Abort::new(
            ResetCode::Internal,
            "the peer waits for a frame that is gone",
        ));
    }
}

/// The stream has said whether the source opened a return path.
pub(super) async fn on_return_path(
    gateway: &Gateway,
    migration: &Migration,
    channel: &Channel,
    has_return_path: bool,
) -> Result<(), Abort> {
    if !has_return_path && !migration.allow_no_return_path {
        gateway.refused(&migration.link, RefusalReason::NoReturnPath);
        return Err(Abort::new(
            ResetCode::NotAllowed,
            "the source opens no return path and would report success before anything has \
             arrived: turn on its migration capability return-path, or set \
             allow_no_return_path = true for this ingress",
        ));
    }
    if !has_return_path {
        migration.set_without_return_path();
    }
    open(migration, channel).await;
    Ok(())
}

/// The parser does not understand the stream any more.
pub(super) async fn on_footing_lost(
    gateway: &Gateway,
    migration: &Migration,
    channel: &Channel,
) -> Result<(), Abort> {
    if channel.is_openable() {
        warn!(migration = %migration.id, "the stream's structure is not understood; it passes as it is");
        return Ok(());
    }
    // Whether there is a return path can't be told, so there is none.
    on_return_path(gateway, migration, channel, false).await
}

/// The source's stream is complete up to the commit byte, which is at `mark`.
///
/// # Errors
/// When the source has left meanwhile, or a channel of the migration was lost: what the destination
/// has is not the whole.
pub(super) async fn request_commit(
    migration: &Migration,
    main: &Channel,
    socket: &Socket,
    mark: Mark,
) -> Result<(), Abort> {
    // What the source wrote before the commit byte may still lie in the other sockets.
    let deadline = Instant::now() + QUIESCE_WAIT;
    let busy = |channel: &Arc<Channel>| channel.no != main.no && !channel.is_idle();
    while Instant::now() < deadline && migration.channels().iter().any(busy) {
        sleep(Duration::from_millis(1)).await;
    }
    let lost = || Abort::new(ResetCode::Endpoint, "a channel was lost before the commit");
    let others = migration.other_marks(main.no).ok_or_else(lost)?;
    let clock = peer_clock::stamp();
    if migration.awaits_verdict() && socket.has_left() {
        // Cancelled, or dead: its guest runs again, or never will.
        migration.on_source_left();
        let mut abort = Abort::new(ResetCode::Endpoint, "the source left before the commit");
        abort.source_left = true;
        return Err(abort);
    }
    let digests = others
        .into_iter()
        .chain([(main.no, mark)])
        .map(|(channel, mark)| ChannelDigest {
            channel,
            offset: mark.offset,
            digest: mark.digest,
        })
        .collect();
    let message = Control::Commit {
        migration: migration.id,
        channel: main.no,
        digests,
        clock,
    };
    if !migration.set_maybe_committed(message.clone()) {
        return Err(lost());
    }
    migration.link.send(message).await;
    // Not before: whoever reads the log may take their time, and the source may leave meanwhile.
    info!(migration = %migration.id, offset = mark.offset, "the stream is complete; commit requested");
    Ok(())
}

/// The request to commit as it is to be made now; none where it does not stand, or the source has left.
pub(super) fn commit_message(migration: &Migration) -> Option<Control> {
    let mut message = migration.commit_message()?;
    // Read before the source is looked at.
    let now = peer_clock::stamp();
    if migration.awaits_verdict() && !migration.source_is_there() {
        return None;
    }
    if let Control::Commit { clock, .. } = &mut message {
        *clock = now;
    }
    Some(message)
}

/// Notices when the source leaves between its commit and the verdict, though nothing may be read from its
/// socket at the time: its guest runs again.
pub(super) async fn left_behind_the_commit(migration: &Migration, socket: &Socket) -> Abort {
    migration.requested.cancelled().await;
    loop {
        sleep(SOURCE_POLL).await;
        let awaited = migration.keeps_source_waiting() && migration.awaits_verdict();
        if awaited && socket.has_left() {
            migration.on_source_left();
            migration.withdraw_commit();
            let mut abort = Abort::new(ResetCode::Endpoint, "the source left before the verdict");
            abort.source_left = true;
            return abort;
        }
    }
}

/// The far gateway has reset a channel that had ended here already: it has nothing any more that
/// could release the commit byte.
pub(super) fn on_answer(migration: &Migration, channel: &Channel, code: ResetCode, released: bool) {
    if channel.kind != StreamKind::QemuMain {
        return;
    }
    if code == ResetCode::Endpoint {
        migration.on_destination_ended();
    } else {
        migration.on_last_word(released);
    }
}

/// The channel's target has accepted.
pub(super) fn on_opened(migration: &Migration, channel: &Channel) {
    migration.on_opened();
    channel.opened.cancel();
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::gateway::rig::{near_link, near_migration};

    fn migration() -> Arc<Migration> {
        near_migration(&near_link())
    }

    /// Whether the source's connection still stands after the task that carries it has ended: by a
    /// fault in the middle of its work, or as it should.
    async fn stands_after(migration: &Arc<Migration>, fault: bool) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut source = TcpStream::connect(address).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let guard = SourceSocket::new(migration.clone(), StreamKind::QemuMain, Socket::Tcp(socket));
        let task = tokio::spawn(async move {
            // As in a channel: the fault happens in a future inside of the one that has the guard.
            let work = async {
                tokio::task::yield_now().await;
                assert!(!fault, "a fault on purpose");
            };
            work.await;
            guard.close().await;
        });
        assert_eq!(task.await.is_err(), fault);
        let mut byte = [0];
        let heard = timeout(Duration::from_millis(100), source.read(&mut byte));
        heard.await.is_err()
    }

    /// A source that is slow to read gets the verdict, whatever becomes of the channel meanwhile.
    #[tokio::test]
    async fn a_verdict_that_is_under_way_is_not_thrown_away() {
        for verdict in [None, Some(0)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let mut source = TcpStream::connect(address).await.unwrap();
            let (socket, _) = listener.accept().await.unwrap();
            let migration = migration();
            let guard =
                SourceSocket::new(migration.clone(), StreamKind::QemuMain, Socket::Tcp(socket));
            guard.get().write_all(&[7; 50_000]).await.unwrap();
            if let Some(status) = verdict {
                migration.on_verdict(status);
            }
            // Nobody reads it any more.
            source.write_all(b"unread").await.unwrap();
            let closing = tokio::spawn(async move { guard.close().await });
            tokio::time::sleep(Duration::from_millis(100)).await;
            let mut heard = Vec::new();
            let end = source.read_to_end(&mut heard).await;
            drop(source);
            closing.await.unwrap();
            assert_eq!(end.is_ok() && heard.len() == 50_000, verdict.is_some());
        }
    }

    /// A source that has seen one of its connections end may let its guest run.
    #[test]
    fn nothing_is_committed_once_a_channel_has_ended_early() {
        let migration = migration();
        migration.on_broken();
        assert!(!migration.set_maybe_committed(Control::Ping { nonce: 0 }));
        assert!(!migration.maybe_committed() && migration.commit_message().is_none());
    }

    /// A close would let the source guest run, and the destination's may do so already.
    #[tokio::test]
    async fn a_fault_behind_the_commit_request_leaves_the_source_waiting() {
        let early = migration();
        assert!(!stands_after(&early, true).await, "before the request");
        // The source has seen its connection fail, and may let its guest run.
        assert!(!early.set_maybe_committed(Control::Ping { nonce: 0 }));

        let migration = migration();
        assert!(migration.set_maybe_committed(Control::Ping { nonce: 0 }));
        assert!(stands_after(&migration, true).await, "behind the request");
        assert!(!stands_after(&migration, false).await, "without a fault");
        migration.on_verdict(0);
        assert!(!stands_after(&migration, true).await, "behind the verdict");
    }
}
