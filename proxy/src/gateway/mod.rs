//! The gateway: listeners, links to peers, and the migrations between them.
//!
//! ```text
//! source VM ─ ingress ─ near channel ─ link (near) ═ QUIC ═ link (far) ─ far channel ─ destination VM
//!                        pump_in → transmit ──────→ connection → pump_out
//!                        pump_out ← connection ←────── transmit ← pump_in
//! ```
//!
//! A [`link::Link`] outlives its connections; a [`migration::Migration`] belongs to a link and has
//! [`channel::Channel`]s; [`flow`] runs one channel on either side, and [`near`] and [`far`] hold
//! what differs between the sides. What may happen to a guest in which order is decided in three
//! places only: [`near::request_commit`], [`far::check_commit`] and the end of a near channel.

mod admission;
mod announce;
mod channel;
mod channels;
mod connection;
mod effort;
mod end;
mod far;
mod faults;
mod finished;
mod flow;
mod handshakes;
mod ingress;
mod link;
mod manifests;
mod migration;
mod near;
mod outage;
mod panics;
mod peer;
mod peer_clock;
mod pump_in;
mod pump_out;
mod releases;
mod rest;
mod resumption;
#[cfg(test)]
mod rig;
mod seeding;
mod socket;
mod status;
mod store;
mod throttle;
mod transmit;

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use skyferry_dedup::{DomainKey, PageStore, ShortId, TieredStore, disk::OpenError};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    task::JoinSet,
    time::{MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::{
    channel::Abort,
    connection::LinkError,
    handshakes::{Entry, Handshakes},
    link::{Link, MEMORY_UNIT, Role, lock},
    migration::Migration,
    peer::PeerKnowledge,
    releases::Releases,
    socket::Listener,
    throttle::Throttle,
};
use crate::{
    config::{Config, Egress, Host, HostPort},
    metrics::{Metrics, RefusalReason, Registry},
    status::{MAX_RECENT_MIGRATIONS, MigrationStatus},
    transport::{BindError, Identity, LinkEndpoint, TransportSettings, peer_of},
    wire::{InstanceId, VERSION, control::ResetCode},
};

/// Work on fewer bytes than this is done where it is; more goes to the blocking pool.
const SMALL_WORK: usize = 8 << 10;
/// First and longest pause between attempts to reach a peer.
const DIAL_PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// How long an attempt to reach a peer may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often sampled figures are brought up to date.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// How often it is looked whether a peer's clock is to be asked for.
const CLOCK_INTERVAL: Duration = Duration::from_millis(250);
/// How long peers may take at the end to hear what became of their migrations.
const FAREWELL_WAIT: Duration = Duration::from_secs(2);
/// How long closing connections may take at the end.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Why a gateway could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The UDP socket or the certificates.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The page store on disk.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A listener of an ingress or the admin endpoint.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A metric was registered twice.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// Signals can't be received.
    #[error("signals: {0}")]
    Signal(io::Error),
}

/// One running gateway.
struct Gateway {
    config: Config,
    endpoint: LinkEndpoint,
    handshakes: Handshakes,
    instance: InstanceId,
    /// Commit bytes that were handed over, by this process and those before it.
    releases: Releases,
    store: Arc<dyn PageStore>,
    /// The same, where there is a tier on disk.
    tiers: Option<Arc<TieredStore>>,
    metrics: Metrics,
    near: HashMap<String, Arc<Link>>,
    far: HashMap<String, Arc<Link>>,
    egress: HashMap<String, Arc<Egress>>,
    domains: HashMap<String, DomainKey>,
    /// Memory for frames that were accepted and are not delivered.
    memory: Arc<Semaphore>,
    /// Memory for frames that were received and are not decoded, beyond what each link has of its own.
    receive_memory: Arc<Semaphore>,
    recent: Mutex<VecDeque<MigrationStatus>>,
    /// Held while a migration is let in.
    admission: Mutex<()>,
    /// Lines about connections of nobody.
    strangers: Throttle,
    draining: CancellationToken,
    /// What still runs is not waited for any more.
    giving_up: CancellationToken,
    /// What is kept of guests for their return.
    manifests: manifests::Manifests,
    faults: faults::Faults,
}

/// Runs a gateway until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// Only before anything is carried: an address in use, certificates or a page store that can't be used.
pub async fn run(config: Config) -> Result<(), RunError> {
    let registry = Registry::new();
    let listeners = bind_all(&config)?;
    let admin = bind_admin(&config).await?;
    let gateway = Arc::new(Gateway::new(config, &registry)?);
    for warning in &gateway.config.warnings {
        warn!("{warning}");
    }
    let stop = CancellationToken::new();
    let mut signals = Signals::new().map_err(RunError::Signal)?;
    let admin_task = admin.map(|listener| {
        let source = Arc::new(status::Source::new(gateway.clone()));
        tokio::spawn(crate::admin::serve(
            listener,
            registry,
            source,
            stop.clone().cancelled_owned(),
        ))
    });
    tokio::spawn(accept_peers(gateway.clone()));
    let mut dialers = JoinSet::new();
    for link in gateway.near.values() {
        dialers.spawn(dial_peer(gateway.clone(), link.clone()));
        tokio::spawn(outage::watch(gateway.clone(), link.clone()));
    }
    for link in gateway.far.values() {
        tokio::spawn(outage::watch(gateway.clone(), link.clone()));
    }
    tokio::spawn(sample(gateway.clone()));
    tokio::spawn(store::watch(gateway.clone()));
    let loading = gateway.clone();
    tokio::task::spawn_blocking(move || loading.manifests.load());
    if let Some(listener) = seeding::bind(&gateway) {
        tokio::spawn(seeding::run(gateway.clone(), listener));
    }
    tokio::spawn(ask_clocks(gateway.clone()));
    let mut ingresses = JoinSet::new();
    for (ingress, listener) in listeners {
        let Some(link) = gateway.near.get(&ingress.peer).cloned() else {
            continue;
        };
        ingresses.spawn(ingress::run(
            gateway.clone(),
            link,
            Arc::new(ingress),
            listener,
        ));
    }
    info!(
        name = gateway.config.gateway.name,
        version = env!("CARGO_PKG_VERSION"),
        wan = %gateway.config.wan.listen,
        "gateway ready"
    );
    signals.next().await;
    drain(&gateway, &mut signals).await;
    dialers.abort_all();
    // With them the files of their unix sockets go.
    ingresses.shutdown().await;
    stop.cancel();
    if let Some(task) = admin_task {
        let _ = timeout(CLOSE_WAIT, task).await;
    }
    gateway
        .endpoint
        .quinn()
        .close(quinn::VarInt::from_u32(0), b"the gateway stops");
    let _ = timeout(CLOSE_WAIT, gateway.endpoint.quinn().wait_idle()).await;
    seeding::unbind(&gateway);
    store::close(&gateway).await;
    Ok(())
}

impl Gateway {
    fn new(config: Config, registry: &Registry) -> Result<Self, RunError> {
        let metrics = Metrics::register(registry, u32::from(VERSION))?;
        metrics
            .gateway
            .set_certificate_expiry(config.tls.expires_at);
        let endpoint = LinkEndpoint::bind(
            config.wan.listen,
            config.wan.socket_buffer_bytes,
            &identity(&config),
            &TransportSettings::from(&config.wan),
        )?;
        let units = usize::try_from(config.limits.in_flight_bytes / MEMORY_UNIT as u64)
            .unwrap_or(Semaphore::MAX_PERMITS)
            .min(Semaphore::MAX_PERMITS);
        let names = |role| -> Vec<&String> {
            let wanted = |name: &String| match role {
                Role::Near => config.ingress.iter().any(|ingress| ingress.peer == *name),
                Role::Far => true,
            };
            let peers = config.peers.iter().map(|peer| &peer.name);
            peers.filter(|name| wanted(name)).collect()
        };
        let (near, far) = (names(Role::Near), names(Role::Far));
        // Half of the memory for what is received is shared out, so that no peer can slow another.
        let count = near.len() + far.len();
        let share = units / 2 / count.max(1);
        let room = config.store.peer_index_bytes;
        let knowledge = || Arc::new(PeerKnowledge::new(room));
        let peers = config.peers.iter().map(|peer| peer.name.clone());
        let known: HashMap<String, Arc<PeerKnowledge>> =
            peers.map(|name| (name, knowledge())).collect();
        let links = |names: Vec<&String>, role| -> HashMap<_, _> {
            let link = |name: &String| {
                let known = known.get(name).cloned().unwrap_or_else(knowledge);
                Arc::new(Link::new(name.clone(), role, share, known))
            };
            names
                .into_iter()
                .map(|name| (name.clone(), link(name)))
                .collect()
        };
        let addresses = config.peers.iter().filter_map(|peer| {
            let address = peer.address.as_ref()?;
            match address.host {
                Host::Ip(ip) => Some(ip),
                Host::Name(_) => None,
            }
        });
        let handshakes = Handshakes::new(addresses);
        let faults = faults::Faults::from_env();
        let opened = store::open(&config.store)?;
        let store = faults.store(opened.pages);
        let instance = random();
        Ok(Self {
            near: links(near, Role::Near),
            far: links(far, Role::Far),
            egress: config
                .egress
                .iter()
                .map(|egress| (egress.peer.clone(), Arc::new(egress.clone())))
                .collect(),
            domains: domains(&config),
            memory: Arc::new(Semaphore::new(units)),
            receive_memory: Arc::new(Semaphore::new(units - share * count)),
            releases: Releases::open(
                config.gateway.runtime_dir.as_deref(),
                &config.gateway.name,
                instance,
            ),
            instance,
            recent: Mutex::default(),
            admission: Mutex::default(),
            strangers: Throttle::new(throttle::FEW),
            draining: CancellationToken::new(),
            giving_up: CancellationToken::new(),
            manifests: manifests::Manifests::new(
                config.limits.manifests_bytes,
                opened.tiers.clone(),
            ),
            tiers: opened.tiers,
            config,
            endpoint,
            handshakes,
            store,
            metrics,
            faults,
        })
    }

    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.near.values().chain(self.far.values())
    }

    fn migration_count(&self) -> usize {
        self.links().map(|link| link.migration_count()).sum()
    }

    /// Places that a main channel may remember here.
    fn max_places(&self) -> u64 {
        self.config.limits.places_bytes / ShortId::SIZE as u64
    }

    fn egress(&self, peer: &str) -> Option<Arc<Egress>> {
        self.egress.get(peer).cloned()
    }

    /// The page identity key of a tenant. The configuration has every tenant that an ingress names.
    fn domain(&self, tenant: &str) -> DomainKey {
        self.domains
            .get(tenant)
            .cloned()
            .unwrap_or_else(|| DomainKey::from_bytes(random32()))
    }

    /// All channels of a migration are gone.
    fn finish(self: &Arc<Self>, migration: &Arc<Migration>) {
        if !migration.finish() {
            return;
        }
        manifests::on_finished(self, migration);
        migration.link.remove_migration(migration);
        let mut recent = lock(&self.recent);
        recent.push_front(migration.status());
        recent.truncate(MAX_RECENT_MIGRATIONS);
    }
}

fn identity(config: &Config) -> Identity {
    Identity {
        authorities: config.tls.roots(),
        chain: config.tls.cert_chain.clone(),
        key: config.tls.key.clone_key(),
    }
}

/// Each tenant's key: from its secret where there is one, so that gateways which share the secret
/// share what they know; else a new one for this run.
fn domains(config: &Config) -> HashMap<String, DomainKey> {
    config
        .tenants
        .iter()
        .map(|tenant| {
            let key = match &tenant.secret {
                Some(secret) => DomainKey::derive(secret.as_bytes(), &tenant.name),
                None => DomainKey::from_bytes(random32()),
            };
            (tenant.name.clone(), key)
        })
        .collect()
}

/// Random bytes for names that need not be secret but must not be guessed by accident.
fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&random32()[..16]);
    bytes
}

fn random32() -> [u8; 32] {
    let mut bytes = [0; 32];
    // The provider's generator fails only where the operating system has no randomness at all.
    if rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .is_err()
    {
        error!("the system has no randomness");
        std::process::abort();
    }
    bytes
}

/// Runs heavy work on the blocking pool, and small work at once; its processor time goes to `stage`.
async fn off_the_runtime<T: Send + 'static>(
    stage: &prometheus::Counter,
    size: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Abort> {
    let stage = stage.clone();
    let work = move || {
        let start = thread_time();
        let result = work();
        stage.inc_by(thread_time().saturating_sub(start).as_secs_f64());
        result
    };
    if size < SMALL_WORK {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Abort::new(ResetCode::Internal, format!("a worker failed: {e}")))
}

/// Processor time of this thread so far.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

// --- listeners -------------------------------------------------------------------------------

fn bind_all(config: &Config) -> Result<Vec<(crate::config::Ingress, Listener)>, RunError> {
    let bind = |ingress: &crate::config::Ingress| {
        let listener = Listener::bind(&ingress.listen).map_err(|source| RunError::Listen {
            address: ingress.listen.to_string(),
            source,
        })?;
        Ok((ingress.clone(), listener))
    };
    config.ingress.iter().map(bind).collect()
}

async fn bind_admin(config: &Config) -> Result<Option<TcpListener>, RunError> {
    let Some(admin) = &config.admin else {
        return Ok(None);
    };
    let listener = TcpListener::bind(admin.listen)
        .await
        .map_err(|source| RunError::Listen {
            address: admin.listen.to_string(),
            source,
        })?;
    Ok(Some(listener))
}

// --- links -----------------------------------------------------------------------------------

/// Keeps a connection to a peer, from now until the gateway drains and nothing needs it any more.
async fn dial_peer(gateway: Arc<Gateway>, link: Arc<Link>) {
    let mut pause = DIAL_PAUSE.0;
    loop {
        let error = match dial_once(&gateway, &link).await {
            Ok(connection) => {
                let started = Instant::now();
                let error = connection::run(&gateway, &link, connection, None).await;
                if started.elapsed() > DIAL_PAUSE.1 {
                    pause = DIAL_PAUSE.0;
                }
                error
            }
            Err(error) => error,
        };
        if gateway.draining.is_cancelled() && link.migration_count() == 0 {
            return;
        }
        let text = error.to_string();
        let is_new = link.last_error().as_ref() != Some(&text);
        if is_new && link.lines.connections.lets_pass(Instant::now()) {
            warn!(peer = link.peer, reason = text, "no link; trying again");
        }
        link.set_error(Some(text));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(DIAL_PAUSE.1);
    }
}

async fn dial_once(gateway: &Gateway, link: &Link) -> Result<quinn::Connection, LinkError> {
    let peer = link.peer.as_str();
    let unreachable = |text: String| LinkError::Connection(text);
    let address = gateway
        .config
        .peer(peer)
        .and_then(|peer| peer.address.clone());
    let HostPort { host, port } =
        address.ok_or_else(|| unreachable("the peer has no address".into()))?;
    let host = match host {
        Host::Ip(ip) => ip.to_string(),
        Host::Name(name) => name,
    };
    // Resolved anew for each attempt: the peer may have moved.
    let addresses: Vec<_> = tokio::net::lookup_host((host.as_str(), port))
        .await
        .map_err(|e| unreachable(format!("cannot resolve {host}: {e}")))?
        .collect();
    let places = addresses.iter().map(std::net::SocketAddr::ip);
    gateway.handshakes.resolved(peer, places);
    let address = *addresses
        .first()
        .ok_or_else(|| unreachable(format!("{host} has no address")))?;
    let connecting = gateway
        .endpoint
        .connect(address, peer)
        .map_err(|e| unreachable(crate::transport::explain_connect(&e)))?;
    match timeout(DIAL_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|e| {
            if let Some(reason) = handshake_refusal(&e) {
                gateway.refused(link, reason);
            }
            unreachable(crate::transport::explain(&e))
        }),
        Err(_) => Err(unreachable(format!("{address} does not answer"))),
    }
}

/// What a failed handshake counts as where this gateway refused the peer; `None` where the peer refused
/// this gateway, or the connection broke and nobody refused anything.
fn handshake_refusal(error: &quinn::ConnectionError) -> Option<RefusalReason> {
    match error {
        e if crate::transport::refused_certificate(e) => Some(RefusalReason::Certificate),
        quinn::ConnectionError::TransportError(_) => Some(RefusalReason::Protocol),
        _ => None,
    }
}

/// Takes connections from peers.
async fn accept_peers(gateway: Arc<Gateway>) {
    while let Some(incoming) = gateway.endpoint.accept().await {
        let address = incoming.remote_address().ip();
        let handshake = match gateway.handshakes.enter(address, !incoming.may_retry()) {
            Entry::Open(handshake) => handshake,
            Entry::Unproven => {
                // It can't fail where it may be asked for.
                let _ = incoming.retry();
                continue;
            }
            Entry::Full => {
                gateway.refused_stranger(RefusalReason::Limit);
                incoming.refuse();
                continue;
            }
        };
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let address = incoming.remote_address();
            let connected = match incoming.accept() {
                Ok(connecting) => timeout(DIAL_TIMEOUT, connecting).await,
                Err(e) => Ok(Err(e)),
            };
            let connection = match connected {
                Ok(Ok(connection)) => connection,
                Ok(Err(e)) => {
                    let refusal = handshake_refusal(&e);
                    if let Some(reason) = refusal {
                        gateway.refused_stranger(reason);
                    }
                    if gateway.strangers.lets_pass(Instant::now()) {
                        let reason = crate::transport::explain(&e);
                        match refusal {
                            Some(_) => warn!(%address, reason, "peer refused"),
                            None => warn!(%address, reason, "a peer's handshake failed"),
                        }
                    }
                    return;
                }
                Err(_) => return,
            };
            let names: Vec<&String> = gateway.far.keys().collect();
            let Some(link) = peer_of(&connection, &names)
                .and_then(|name| gateway.far.get(name))
                .cloned()
            else {
                gateway.refused_stranger(RefusalReason::Certificate);
                if gateway.strangers.lets_pass(Instant::now()) {
                    warn!(%address, "a valid certificate, but for none of the configured peers");
                }
                connection.close(quinn::VarInt::from_u32(3), b"not a peer of this gateway");
                return;
            };
            let error = connection::run(&gateway, &link, connection, Some(handshake)).await;
            if link.lines.connections.lets_pass(Instant::now()) {
                // As a string, which is quoted: part of it may be the peer's words.
                info!(
                    peer = link.peer,
                    reason = error.to_string(),
                    "link from peer ended"
                );
            }
            link.set_error(Some(error.to_string()));
        });
    }
}

// --- time ------------------------------------------------------------------------------------

/// Keeps asking the peers that send guests for their clocks, so that the age of a commit is known.
async fn ask_clocks(gateway: Arc<Gateway>) {
    let mut ticks = tokio::time::interval(CLOCK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for link in gateway.far.values().filter(|link| link.has_migrations()) {
            if let Some(conn) = link.current() {
                conn.ask_clock(false);
            }
        }
    }
}

async fn sample(gateway: Arc<Gateway>) {
    let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        gateway
            .metrics
            .gateway
            .set_dropped_log_lines(crate::logging::dropped_lines());
        if let Some(count) = gateway.strangers.left_out(now) {
            warn!(count, "more peers refused");
        }
        for link in gateway.links() {
            for (what, count) in link.lines.left_out(now) {
                warn!(peer = link.peer, count, "more {what}");
            }
            link.migrations()
                .iter()
                .for_each(|migration| migration.sample());
        }
    }
}

/// SIGTERM and SIGINT end the gateway. SIGHUP does not: a terminal that goes away is no reason to drop
/// sources that must be kept waiting.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                Some(()) = self.hang_up.recv() => {
                    warn!("SIGHUP is ignored; SIGTERM ends the gateway");
                }
            }
        }
    }
}

/// Takes no new migrations and lets the running ones finish. Past the deadline those are given up,
/// except where the destination may be running already: leaving them would start the guest twice,
/// so they are waited for, or for a second signal.
async fn drain(gateway: &Arc<Gateway>, signals: &mut Signals) {
    gateway.draining.cancel();
    gateway.metrics.gateway.set_draining(true);
    let limit = gateway.config.gateway.drain_timeout;
    info!(
        running = gateway.migration_count(),
        limit_seconds = limit.as_secs_f64(),
        "draining"
    );
    let deadline = tokio::time::sleep(limit);
    tokio::pin!(deadline);
    let mut given_up = false;
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    while gateway.migration_count() > 0 {
        tokio::select! {
            _ = ticks.tick() => {}
            () = &mut deadline, if !given_up => {
                given_up = true;
                give_up_running(gateway, "the gateway stops");
            }
            () = signals.next() => {
                warn!(running = gateway.migration_count(), "second signal: stopping at once");
                return;
            }
        }
    }
    // A connection that is closed drops what is still on its way, the ends of channels included.
    let mut farewells = JoinSet::new();
    for conn in gateway.links().filter_map(|link| link.current()) {
        farewells.spawn(async move { conn.settle().await });
    }
    let _ = timeout(FAREWELL_WAIT, farewells.join_all()).await;
    info!("drained");
}

fn give_up_running(gateway: &Gateway, reason: &str) {
    gateway.giving_up.cancel();
    for link in gateway.links() {
        for migration in link.migrations() {
            if migration.past_commit() {
                warn!(migration = %migration.id, "still waiting for the destination's verdict");
            } else {
                migration.abort(&Abort::new(ResetCode::Busy, reason));
            }
        }
    }
}
