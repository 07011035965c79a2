//! One QUIC connection to a peer: greeting, then control messages and data streams until it ends.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    task::JoinSet,
    time::timeout,
};
use tracing::{debug, info, warn};

use super::{
    Gateway, announce,
    channel::{Abort, Channel, ReceivedPages},
    far::{self, OpenRequest},
    handshakes::Handshake,
    link::{CONTROL_PRIORITY, Conn, Link, MEMORY_UNIT, Role, Shared, lock},
    manifests,
    migration::{CommitRequest, direction},
    near, panics, peer_clock,
    releases::Release,
    resumption::{self, Takeover},
    transmit::send_pages,
};
use crate::{
    metrics::RefusalReason,
    session::InFrame,
    wire::{
        ChannelNo, Control, DataHeader, DataKind, InstanceId, MigrationId, VERSION, VERSION_MIN,
        WireError, control::MAX_MESSAGE, data::HEADER_LEN,
    },
};

/// How long a new connection may take to say hello.
const HELLO_WAIT: Duration = Duration::from_secs(10);
/// How long a frame waits for the message that opens its channel.
const CHANNEL_WAIT: Duration = Duration::from_secs(10);
/// How often a frame that waits for memory looks whether it is the one that is needed next.
const MEMORY_POLL: Duration = Duration::from_millis(5);

/// Close codes of a connection, for the peer's log.
const CLOSE_PROTOCOL: u32 = 1;
const CLOSE_VERSION: u32 = 2;
const CLOSE_NAME: u32 = 3;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("{0}")]
    Connection(String),
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    #[error(
        "the peer speaks protocol versions {min} to {max}, this gateway {VERSION_MIN} to {VERSION}: \
         upgrade the older one"
    )]
    Version { min: u16, max: u16 },
    #[error("the peer calls itself {said:?}, but its certificate says {certified:?}")]
    Name { said: String, certified: String },
    #[error("the peer did not say hello in time")]
    Silent,
}

impl LinkError {
    /// What it counts as; `None` where the connection broke and nobody refused anything.
    fn refusal(&self) -> Option<RefusalReason> {
        match self {
            Self::Connection(_) => None,
            Self::Protocol(_) | Self::Silent => Some(RefusalReason::Protocol),
            Self::Version { .. } => Some(RefusalReason::Version),
            Self::Name { .. } => Some(RefusalReason::Certificate),
        }
    }

    fn close(&self, connection: &quinn::Connection) {
        let code = match self {
            Self::Connection(_) => 0,
            Self::Protocol(_) | Self::Silent => CLOSE_PROTOCOL,
            Self::Version { .. } => CLOSE_VERSION,
            Self::Name { .. } => CLOSE_NAME,
        };
        connection.close(VarInt::from_u32(code), self.to_string().as_bytes());
    }
}

impl From<WireError> for LinkError {
    fn from(error: WireError) -> Self {
        Self::Protocol(error.to_string())
    }
}

struct Hello {
    instance: InstanceId,
    store_pages: u64,
    receive_budget: u64,
    places: u64,
    predecessors: Vec<InstanceId>,
}

/// Runs a connection of `link` until it ends; says why it did. `greeting` is given back once the
/// peer has said hello: until then the connection counts as one that is being set up.
pub(super) async fn run(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    connection: quinn::Connection,
    greeting: Option<Handshake>,
) -> LinkError {
    // Were a panic not caught, nobody would dial the peer again.
    let error = match panics::caught(run_inner(gateway, link, &connection, greeting)).await {
        Ok(Ok(never)) => match never {},
        Ok(Err(error)) => error,
        Err(panics::Panicked) => LinkError::Connection("a fault inside the gateway".into()),
    };
    if let Some(reason) = error.refusal() {
        gateway.refused(link, reason);
    }
    error.close(&connection);
    error
}

enum Never {}

async fn run_inner(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    connection: &quinn::Connection,
    greeting: Option<Handshake>,
) -> Result<Never, LinkError> {
    let greeted = timeout(HELLO_WAIT, greet(gateway, link, connection)).await;
    let (send, mut recv, hello) = greeted.map_err(|_| LinkError::Silent)??;
    if let Some(greeting) = greeting {
        greeting.said_hello(&link.peer);
    }
    // Both sides believe a page to be held as long as it may be; asking for one costs a round trip.
    let known_pages = hello
        .store_pages
        .min(gateway.store.capacity_pages().saturating_mul(4));
    // What one side does not remember is of no use to the other.
    let places = hello.places.min(gateway.max_places());
    let logged = link.lines.connections.lets_pass(Instant::now());
    let (conn, queue, takeover) = {
        let _takeover = lock(&link.takeover);
        let before = link.set_remote(hello.instance, known_pages, hello.receive_budget, places);
        if let Some(before) = before {
            if logged {
                warn!(peer = link.peer, "the peer's gateway was restarted");
            }
            match link.role {
                Role::Near => {
                    resumption::on_restart(link, hello.predecessors.contains(&before));
                }
                Role::Far => far::on_restart(link),
            }
        }
        let (conn, queue) = Conn::new(connection.clone(), link.next_generation());
        let conn = Arc::new(conn);
        let takeover = match link.role {
            Role::Near => resumption::take_over(link, &conn),
            Role::Far => Takeover::default(),
        };
        link.set_current(conn.clone());
        (conn, queue, takeover)
    };
    let _current = Current {
        link,
        generation: conn.generation,
    };
    if logged {
        info!(
            peer = link.peer,
            direction = direction(link.role).as_str(),
            address = %connection.remote_address(),
            "link up"
        );
    }
    tokio::select! {
        result = write_control(send, queue) => result,
        result = resume_and_read(gateway, link, &conn, takeover, &mut recv) => result,
        result = take_streams(gateway, link, &conn) => result,
    }
}

/// A connection for as long as it is the link's; not any more when its task has ended, however it did.
struct Current<'a> {
    link: &'a Link,
    generation: u64,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        self.link.clear_current(self.generation);
    }
}

// --- greeting --------------------------------------------------------------------------------

async fn greet(
    gateway: &Gateway,
    link: &Link,
    connection: &quinn::Connection,
) -> Result<(SendStream, RecvStream, Hello), LinkError> {
    let lost = |e: quinn::ConnectionError| LinkError::Connection(crate::transport::explain(&e));
    let (mut send, mut recv) = match link.role {
        Role::Near => connection.open_bi().await.map_err(lost)?,
        Role::Far => connection.accept_bi().await.map_err(lost)?,
    };
    // Urgency is a wish; a stream that is gone shows on the first write.
    let _ = send.set_priority(CONTROL_PRIORITY);
    let mut message = Vec::new();
    Control::Hello {
        version_min: VERSION_MIN,
        version_max: VERSION,
        instance: gateway.instance,
        name: gateway.config.gateway.name.clone(),
        store_pages: gateway.store.capacity_pages(),
        receive_budget: gateway.config.limits.in_flight_bytes,
        places: gateway.max_places(),
        predecessors: gateway.releases.predecessors().to_vec(),
    }
    .encode(&mut message);
    let broken = |e: String| match connection.close_reason() {
        Some(reason) => LinkError::Connection(crate::transport::explain(&reason)),
        None => LinkError::Connection(e),
    };
    send.write_all(&message)
        .await
        .map_err(|e| broken(e.to_string()))?;
    let hello = read_message(&mut recv).await.map_err(|e| match e {
        LinkError::Connection(text) => broken(text),
        other => other,
    })?;
    let Control::Hello {
        version_min,
        version_max,
        instance,
        name,
        store_pages,
        receive_budget,
        places,
        predecessors,
    } = hello
    else {
        return Err(LinkError::Protocol("the first message is no hello".into()));
    };
    if version_min > VERSION || version_max < VERSION_MIN {
        return Err(LinkError::Version {
            min: version_min,
            max: version_max,
        });
    }
    if name != link.peer {
        return Err(LinkError::Name {
            said: name,
            certified: link.peer.clone(),
        });
    }
    Ok((
        send,
        recv,
        Hello {
            instance,
            store_pages,
            receive_budget,
            places,
            predecessors,
        },
    ))
}

// --- control stream --------------------------------------------------------------------------

async fn write_control(
    mut stream: SendStream,
    mut queue: mpsc::Receiver<Control>,
) -> Result<Never, LinkError> {
    let mut batch = Vec::new();
    let mut out = Vec::new();
    loop {
        let count = queue.recv_many(&mut batch, 64).await;
        if count == 0 {
            return Err(LinkError::Connection("closed".into()));
        }
        out.clear();
        batch.drain(..).for_each(|message| message.encode(&mut out));
        stream
            .write_all(&out)
            .await
            .map_err(|e| LinkError::Connection(e.to_string()))?;
    }
}

async fn read_message(stream: &mut RecvStream) -> Result<Control, LinkError> {
    let lost = |e: quinn::ReadExactError| LinkError::Connection(e.to_string());
    let mut len = [0; 4];
    stream.read_exact(&mut len).await.map_err(lost)?;
    let len = u32::from_le_bytes(len);
    if len == 0 || len > MAX_MESSAGE {
        return Err(LinkError::Protocol(format!(
            "a control message of {len} bytes"
        )));
    }
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).await.map_err(lost)?;
    Ok(Control::decode(&body)?)
}

/// The near side first resumes what it has; the queue of messages is being written meanwhile.
async fn resume_and_read(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    takeover: Takeover,
    stream: &mut RecvStream,
) -> Result<Never, LinkError> {
    link.begin_turns(conn.generation).await;
    for message in takeover.messages {
        conn.send(message).await;
    }
    if link.role == Role::Near {
        conn.send(announce::interest(gateway, link)).await;
        // Answers are read below.
        let (link, conn) = (link.clone(), conn.clone());
        tokio::spawn(async move {
            resumption::forget_when_heard(&link, &conn, &takeover.over).await;
        });
    }
    read_control(gateway, link, conn, stream).await
}

async fn read_control(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    stream: &mut RecvStream,
) -> Result<Never, LinkError> {
    loop {
        let message = read_message(stream).await.map_err(|error| {
            match (error, conn.quinn.close_reason()) {
                (LinkError::Connection(_), Some(reason)) => {
                    LinkError::Connection(crate::transport::explain(&reason))
                }
                (error, _) => error,
            }
        })?;
        let Some(_turn) = link.turn(conn.generation).await else {
            return Err(LinkError::Connection(
                "replaced by a newer connection".into(),
            ));
        };
        match link.role {
            Role::Near => on_near_message(gateway, link, conn, message).await?,
            Role::Far => on_far_message(gateway, link, conn, message).await?,
        }
    }
}

async fn on_near_message(
    gateway: &Gateway,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    message: Control,
) -> Result<(), LinkError> {
    match message {
        Control::Opened { migration, channel } => {
            if let Some((migration, channel)) = link.channel(migration, channel) {
                near::on_opened(&migration, &channel);
            }
        }
        Control::Committed { migration } => {
            if let Some(migration) = link.migration(migration) {
                migration.set_released();
            }
        }
        Control::AskCommit { migration } => {
            if let Some(migration) = link.migration(migration)
                && migration.may_repeat_commit()
                && let Some(message) = near::commit_message(&migration)
            {
                conn.send(message).await;
            }
        }
        Control::Adopted {
            migration,
            channel,
            manifest,
            agreed,
        } => manifests::on_adopted(link, migration, channel, manifest, agreed),
        Control::Resumed {
            migration,
            known,
            released,
            channels,
        } => {
            resumption::on_resumed(link, conn, migration, known, released, &channels).await;
        }
        other => on_common_message(gateway, link, conn, other).await?,
    }
    Ok(())
}

async fn on_far_message(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    message: Control,
) -> Result<(), LinkError> {
    match message {
        Control::Open {
            migration,
            channel,
            kind,
            dial_now,
            target,
            domain,
        } => {
            let request = OpenRequest {
                migration,
                channel,
                kind,
                dial_now,
                target,
                domain,
            };
            far::on_open(gateway, link, conn, request).await;
        }
        Control::Commit {
            migration,
            channel,
            digests,
            clock,
        } => {
            if let Some(migration) = link.migration(migration) {
                let request = CommitRequest {
                    channel,
                    digests,
                    clock: Duration::from_micros(clock),
                    generation: conn.generation,
                    near: link.near(),
                };
                far::on_commit(&migration, request);
            }
        }
        Control::Adopt {
            migration,
            channel,
            manifest,
        } => manifests::on_adopt(gateway, link, conn, migration, channel, manifest).await,
        Control::Interest(interest) => announce::on_interest(gateway, conn, interest)?,
        Control::Live { migrations } => far::on_live(gateway, link, conn, &migrations),
        Control::Resume {
            migration,
            channels,
        } => {
            far::on_resume(gateway, link, conn, migration, &channels).await;
        }
        Control::Close { migration } => {
            if let Some(migration) = link.migration(migration) {
                let code = crate::wire::control::ResetCode::Endpoint;
                let mut abort = Abort::new(code, "the near gateway closed the migration");
                abort.from_peer = true;
                // One that has ended in order is only about to notice.
                let mut channels = migration.channels();
                channels.retain(|channel| !channel.is_done());
                for channel in channels {
                    channel.abort(abort.clone());
                }
                migration.on_ends_known();
            }
            let near = link.near();
            gateway.releases.forget(Release { near, migration });
            link.finished().forget_ends(migration);
        }
        other => on_common_message(gateway, link, conn, other).await?,
    }
    Ok(())
}

async fn on_common_message(
    gateway: &Gateway,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    message: Control,
) -> Result<(), LinkError> {
    match message {
        Control::Ack {
            migration,
            channel,
            next_seq,
        } => {
            let Some((migration, channel)) = link.channel(migration, channel) else {
                return Ok(());
            };
            let acked = channel.on_ack(next_seq, conn.quinn.rtt()).ok_or_else(|| {
                LinkError::Protocol(format!(
                    "frame {next_seq} is acknowledged and was never made"
                ))
            })?;
            migration
                .metrics
                .in_flight
                .sub(i64::try_from(acked.guest).unwrap_or(0));
            if let Some(oldest) = acked.oldest {
                migration
                    .metrics
                    .queue
                    .observe(oldest.elapsed().as_secs_f64());
            }
        }
        Control::Miss {
            migration,
            channel,
            seq,
            indexes,
        } => {
            on_miss(link, conn, migration, channel, seq, indexes)?;
        }
        Control::Reset {
            migration,
            channel,
            after_seq,
            code,
            released,
            reason,
        } => {
            let mut abort = Abort::new(code, reason);
            abort.from_peer = true;
            abort.released = released;
            on_reset(gateway, link, conn, (migration, channel), after_seq, abort).await;
        }
        Control::Ping { nonce } => {
            let clock = peer_clock::stamp();
            conn.send(Control::Pong { nonce, clock }).await;
        }
        Control::Pong { nonce, clock } => conn.on_pong(nonce, Duration::from_micros(clock)),
        other => {
            return Err(LinkError::Protocol(format!(
                "{other:?} is not for this side"
            )));
        }
    }
    Ok(())
}

async fn on_reset(
    gateway: &Gateway,
    link: &Link,
    conn: &Conn,
    (id, no): (MigrationId, ChannelNo),
    after_seq: u64,
    abort: Abort,
) {
    match (link.channel(id, no), link.role) {
        (Some((migration, channel)), role) => {
            if let Some(last_word) = channel.last_word() {
                channel.given_up.cancel();
                conn.send(last_word).await;
                return;
            }
            let (code, released) = (abort.code, abort.released);
            let ended_before = !channel.abort_after(after_seq, abort);
            if ended_before && role == Role::Near {
                near::on_answer(&migration, &channel, code, released);
            }
        }
        (None, Role::Far) => far::on_late_reset(gateway, link, conn, id, no).await,
        (None, Role::Near) => {}
    }
}

fn on_miss(
    link: &Arc<Link>,
    conn: &Arc<Conn>,
    id: MigrationId,
    no: u32,
    seq: u64,
    indexes: Vec<u32>,
) -> Result<(), LinkError> {
    let Some((migration, channel)) = link.channel(id, no) else {
        return Ok(());
    };
    let Some(Shared { known, .. }) = link.remote() else {
        return Ok(());
    };
    let Ok(waiting) = conn.misses.clone().try_acquire_owned() else {
        return Err(LinkError::Protocol(
            "too many requests for pages at once".into(),
        ));
    };
    migration.metrics.page_misses.inc_by(indexes.len() as u64);
    let (link, conn, announced) = (link.clone(), conn.clone(), link.announced());
    tokio::spawn(async move {
        let _waiting = waiting;
        // The semaphore is never closed.
        let _turn = conn.answers.acquire().await;
        let Some(payload) = channel.answer_miss(seq, &indexes, &known, &announced) else {
            if link.lines.misses.lets_pass(Instant::now()) {
                warn!(migration = %id, channel = no, seq, "the peer asks for pages that were never sent");
            }
            return;
        };
        // On a lost connection the peer asks again on the next.
        if let Err(e) = send_pages(&conn, id, no, seq, payload).await {
            debug!(migration = %id, error = %e, "pages not sent");
        }
    });
    Ok(())
}

// --- data streams ----------------------------------------------------------------------------

async fn take_streams(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    conn: &Arc<Conn>,
) -> Result<Never, LinkError> {
    let mut readers = JoinSet::new();
    loop {
        tokio::select! {
            stream = conn.quinn.accept_uni() => {
                let stream = stream
                    .map_err(|e| LinkError::Connection(crate::transport::explain(&e)))?;
                let (gateway, link, conn) = (gateway.clone(), link.clone(), conn.clone());
                readers.spawn(async move { take_stream(&gateway, &link, &conn, stream).await });
            }
            Some(done) = readers.join_next() => {
                if let Ok(Err(error @ LinkError::Protocol(_))) = done {
                    return Err(error);
                }
            }
        }
    }
}

async fn take_stream(
    gateway: &Gateway,
    link: &Link,
    conn: &Conn,
    mut stream: RecvStream,
) -> Result<(), LinkError> {
    let lost = |e: quinn::ReadExactError| LinkError::Connection(e.to_string());
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.map_err(lost)?;
    let header = DataHeader::decode(&header)?;
    if header.kind == DataKind::Announcements {
        return match link.role {
            Role::Near => announce::receive(link, conn, stream).await,
            Role::Far => Err(LinkError::Protocol("announcements to the far side".into())),
        };
    }
    let Some(channel) = find_channel(link, &header).await else {
        // A frame of a channel that is over; the sender learns of that otherwise.
        let _ = stream.stop(VarInt::from_u32(0));
        return Ok(());
    };
    let wanted = match header.kind {
        DataKind::Frame => channel.wants_frame(header.seq),
        DataKind::Pages => channel.take_answer_due(),
        DataKind::Announcements => false,
    };
    let permit = if wanted {
        reserve(gateway, link, &channel, &header).await
    } else {
        None
    };
    let Some(permit) = permit else {
        let _ = stream.stop(VarInt::from_u32(0));
        return Ok(());
    };
    let mut payload = vec![0; header.len as usize];
    stream.read_exact(&mut payload).await.map_err(lost)?;
    match header.kind {
        DataKind::Frame => channel
            .on_frame(InFrame {
                seq: header.seq,
                flags: header.flags,
                payload,
                permit: Some(permit),
            })
            .map_err(|e| LinkError::Protocol(e.to_string())),
        DataKind::Pages => {
            let pages = split_pages(&Bytes::from(payload))
                .ok_or_else(|| LinkError::Protocol("malformed pages".into()))?;
            channel.on_pages(ReceivedPages {
                seq: header.seq,
                pages,
                permit,
            });
            Ok(())
        }
        DataKind::Announcements => Ok(()),
    }
}

/// The channel of a data stream. The stream may be faster than the message that opens the channel.
async fn find_channel(link: &Link, header: &DataHeader) -> Option<Arc<Channel>> {
    let find = || {
        let (_, channel) = link.channel(header.migration, header.channel)?;
        Some(channel)
    };
    let wait = async {
        loop {
            let registered = link.registered.notified();
            if let Some(channel) = find() {
                return channel;
            }
            registered.await;
        }
    };
    if let Some(channel) = find() {
        return Some(channel);
    }
    if link.role == Role::Near || link.finished().contains(header.migration) {
        return None;
    }
    timeout(CHANNEL_WAIT, wait).await.ok()
}

/// Reserves memory for a payload: of the link's own share, else of what all links have in common, so
/// that no peer can take it all. Where there is none left, each channel may still receive one frame,
/// the one that is needed next, and one answer to a miss, so it always gets on. `None`: the
/// frame came on another stream meanwhile.
async fn reserve(
    gateway: &Gateway,
    link: &Link,
    channel: &Channel,
    header: &DataHeader,
) -> Option<OwnedSemaphorePermit> {
    // Empty ones are not free either.
    let units = u32::try_from((header.len as usize).div_ceil(MEMORY_UNIT).max(1)).ok()?;
    loop {
        for memory in [&link.receive_memory, &gateway.receive_memory] {
            if let Ok(permit) = memory.clone().try_acquire_many_owned(units) {
                return Some(permit);
            }
        }
        let spare = match header.kind {
            DataKind::Frame if !channel.wants_frame(header.seq) => return None,
            DataKind::Frame if channel.is_next(header.seq) => Some(&channel.spare_frame),
            DataKind::Frame => None,
            DataKind::Pages => Some(&channel.spare_answer),
            DataKind::Announcements => return None,
        };
        if let Some(Ok(permit)) = spare.map(|spare| spare.clone().try_acquire_owned()) {
            return Some(permit);
        }
        tokio::time::sleep(MEMORY_POLL).await;
    }
}

/// Reads the payload of a pages stream: `u32 count`, then `u32 index, u16 length, contents` each.
fn split_pages(payload: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
    let (count, mut rest) = payload.split_first_chunk::<4>()?;
    let mut pages = Vec::new();
    for _ in 0..u32::from_le_bytes(*count) {
        let (index, behind) = rest.split_first_chunk::<4>()?;
        let (len, behind) = behind.split_first_chunk::<2>()?;
        let (page, behind) = behind.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
        pages.push((u32::from_le_bytes(*index), page.to_vec()));
        rest = behind;
    }
    rest.is_empty().then_some(pages)
}
