//! A simulated link between two UDP sockets, for tests in virtual time.
//!
//! Each direction is a bottleneck with a drop-tail queue, followed by a fixed delay, random loss,
//! jitter, reordering and duplication, and may be cut for a while. Everything random comes from one
//! seed. quinn takes the time from tokio, so in a runtime with a paused clock a test of minutes
//! takes only the processor time of its packets, and a run can be repeated. tokio's timers count
//! milliseconds: arrivals are rounded up to them, as a busy host would.
//!
//! ```text
//! try_send → cut? → too large? → queue full? → bottleneck (rate) → loss? → delay + jitter → poll_recv
//! ```
//!
//! Not modelled: a change of rate while packets wait (those already queued leave at the old rate),
//! ECN marking, fragmentation.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::{Instant, Sleep};

/// Datagrams that one `try_send` may carry; what quinn uses at most on Linux.
const SEGMENTS: usize = 10;

/// Bytes of IPv4 and UDP header that a datagram occupies on the link besides its payload.
pub const HEADER_BYTES: u64 = 28;

/// UDP payload that an Ethernet frame has room for behind the headers of IPv4 and UDP.
pub const ETHERNET_PAYLOAD: usize = 1500 - HEADER_BYTES as usize;

/// One direction of a link.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkModel {
    /// What the bottleneck carries, headers included, in bits per second.
    pub bits_per_sec: u64,
    /// Delay of a packet that finds no queue.
    pub delay: Duration,
    /// Bytes, headers included, that may wait at the bottleneck; what does not fit is dropped.
    pub queue_bytes: u64,
    /// Largest UDP payload that the path carries; larger ones vanish.
    pub max_payload: usize,
    /// Probability that a packet is lost behind the bottleneck.
    pub loss: f64,
    /// Additional random delay from 0 to this; packets stay in order.
    pub jitter: Duration,
    /// Probability that a packet arrives twice.
    pub duplicate: f64,
    /// Probability that a packet arrives late by `reorder_delay`.
    pub reorder: f64,
    /// How late a reordered packet is.
    pub reorder_delay: Duration,
    /// Spans of time, since the net was built, in which everything sent is lost.
    pub cuts: Vec<(Duration, Duration)>,
}

impl LinkModel {
    /// A clean link of `megabits` per second and `delay` one way, with a queue of
    /// `queue_rtts` × (rate × 2 × delay).
    #[must_use]
    pub fn new(megabits: u64, delay: Duration, queue_rtts: f64) -> Self {
        let bits_per_sec = megabits * 1_000_000;
        let bdp_bytes = bits_per_sec as f64 / 8.0 * 2.0 * delay.as_secs_f64();
        Self {
            bits_per_sec,
            delay,
            queue_bytes: (bdp_bytes * queue_rtts) as u64,
            max_payload: ETHERNET_PAYLOAD,
            loss: 0.0,
            jitter: Duration::ZERO,
            duplicate: 0.0,
            reorder: 0.0,
            reorder_delay: Duration::ZERO,
            cuts: Vec::new(),
        }
    }

    /// The same link with a loss probability.
    #[must_use]
    pub fn with_loss(mut self, loss: f64) -> Self {
        self.loss = loss;
        self
    }

    /// Time that `bytes` occupy the bottleneck.
    fn transmission(&self, bytes: u64) -> Duration {
        Duration::from_nanos(bytes * 8 * 1_000_000_000 / self.bits_per_sec.max(1))
    }
}

/// What has happened in one direction since the net was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Datagrams handed to the link.
    pub sent_packets: u64,
    /// Their bytes, headers included.
    pub sent_bytes: u64,
    /// Datagrams that arrived or are about to, without duplicates.
    pub delivered_packets: u64,
    /// Their bytes, headers included.
    pub delivered_bytes: u64,
    /// Dropped because the path does not carry packets of their size.
    pub size_drops: u64,
    /// Dropped because the queue was full.
    pub queue_drops: u64,
    /// Dropped at random.
    pub loss_drops: u64,
    /// Dropped while the link was cut.
    pub cut_drops: u64,
    /// Sum over all packets of the time each waited in the queue.
    pub queue_delay_total: Duration,
    /// The longest wait in the queue.
    pub queue_delay_max: Duration,
}

impl LinkCounters {
    /// Mean wait in the queue of the packets that passed it.
    #[must_use]
    pub fn queue_delay_mean(&self) -> Duration {
        let passed = self.delivered_packets + self.loss_drops;
        Duration::from_secs_f64(self.queue_delay_total.as_secs_f64() / passed.max(1) as f64)
    }

    /// Share of the packets that the queue dropped, 0 to 1.
    #[must_use]
    pub fn queue_drop_share(&self) -> f64 {
        self.queue_drops as f64 / self.sent_packets.max(1) as f64
    }
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From [`SimNet::near`] to [`SimNet::far`].
    Forward,
    /// From [`SimNet::far`] to [`SimNet::near`].
    Backward,
}

/// Two sockets and the link between them.
#[derive(Clone, Debug)]
pub struct SimNet {
    near: Arc<SimSocket>,
    far: Arc<SimSocket>,
}

impl SimNet {
    /// A link with the same model in both directions. Must run inside tokio.
    #[must_use]
    pub fn new(model: &LinkModel, seed: u64) -> Self {
        Self::asymmetric(model.clone(), model.clone(), seed)
    }

    /// A link with its own model for each direction. Must run inside tokio.
    #[must_use]
    pub fn asymmetric(forward: LinkModel, backward: LinkModel, seed: u64) -> Self {
        let start = Instant::now();
        let address = |host| SocketAddr::from((Ipv4Addr::new(192, 0, 2, host), 7700));
        // Each socket owns the inbox it reads from and knows the one it writes to.
        let to_far = Arc::new(Mutex::new(Pipe::new(forward, seed, start)));
        let to_near = Arc::new(Mutex::new(Pipe::new(backward, !seed, start)));
        Self {
            near: Arc::new(SimSocket::new(address(1), &to_near, &to_far)),
            far: Arc::new(SimSocket::new(address(2), &to_far, &to_near)),
        }
    }

    /// One end's socket.
    #[must_use]
    pub fn near(&self) -> Arc<dyn AsyncUdpSocket> {
        Arc::clone(&self.near) as Arc<dyn AsyncUdpSocket>
    }

    /// The other end's socket.
    #[must_use]
    pub fn far(&self) -> Arc<dyn AsyncUdpSocket> {
        Arc::clone(&self.far) as Arc<dyn AsyncUdpSocket>
    }

    /// The address of [`Self::far`].
    #[must_use]
    pub fn far_addr(&self) -> SocketAddr {
        self.far.address
    }

    /// What has happened in a direction so far.
    #[must_use]
    pub fn counters(&self, direction: Direction) -> LinkCounters {
        lock(self.pipe(direction)).counters
    }

    /// Changes the model of a direction from now on.
    pub fn change(&self, direction: Direction, change: impl FnOnce(&mut LinkModel)) {
        let mut pipe = lock(self.pipe(direction));
        change(&mut pipe.model);
    }

    fn pipe(&self, direction: Direction) -> &Mutex<Pipe> {
        match direction {
            Direction::Forward => &self.near.outgoing,
            Direction::Backward => &self.far.outgoing,
        }
    }
}

/// A panic elsewhere in a test must not hide behind a poisoned lock.
fn lock(pipe: &Mutex<Pipe>) -> MutexGuard<'_, Pipe> {
    pipe.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One direction at work.
struct Pipe {
    model: LinkModel,
    random: SplitMix,
    start: Instant,
    /// When the bottleneck has sent all that it accepted.
    busy_until: Instant,
    /// The latest arrival so far, which jitter must not undercut.
    last_arrival: Instant,
    sequence: u64,
    /// Packets under way, the earliest arrival on top.
    under_way: BinaryHeap<Packet>,
    /// The receiver, when it waits.
    receiver: Option<Waker>,
    counters: LinkCounters,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipe")
            .field("model", &self.model)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Pipe {
    fn new(model: LinkModel, seed: u64, start: Instant) -> Self {
        Self {
            model,
            random: SplitMix(seed),
            start,
            busy_until: start,
            last_arrival: start,
            sequence: 0,
            under_way: BinaryHeap::new(),
            receiver: None,
            counters: LinkCounters::default(),
        }
    }

    /// Takes one datagram from the sender.
    fn send(&mut self, now: Instant, from: SocketAddr, ecn: Option<EcnCodepoint>, payload: &[u8]) {
        let bytes = payload.len() as u64 + HEADER_BYTES;
        self.counters.sent_packets += 1;
        self.counters.sent_bytes += bytes;
        let age = now - self.start;
        if self
            .model
            .cuts
            .iter()
            .any(|(begin, end)| (*begin..*end).contains(&age))
        {
            self.counters.cut_drops += 1;
            return;
        }
        if payload.len() > self.model.max_payload {
            self.counters.size_drops += 1;
            return;
        }
        let begin = self.busy_until.max(now);
        let wait = begin - now;
        let waiting_bytes = wait.as_secs_f64() * self.model.bits_per_sec as f64 / 8.0;
        if waiting_bytes + bytes as f64 > self.model.queue_bytes.max(bytes) as f64 {
            self.counters.queue_drops += 1;
            return;
        }
        self.busy_until = begin + self.model.transmission(bytes);
        self.counters.queue_delay_total += wait;
        self.counters.queue_delay_max = self.counters.queue_delay_max.max(wait);
        if self.random.happens(self.model.loss) {
            self.counters.loss_drops += 1;
            return;
        }
        self.counters.delivered_packets += 1;
        self.counters.delivered_bytes += bytes;
        let jitter = self.model.jitter.mul_f64(self.random.unit());
        let mut arrival = (self.busy_until + self.model.delay + jitter).max(self.last_arrival);
        self.last_arrival = arrival;
        if self.random.happens(self.model.reorder) {
            arrival += self.model.reorder_delay;
        }
        let copies = if self.random.happens(self.model.duplicate) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            self.enqueue(arrival, from, ecn, payload);
        }
    }

    fn enqueue(
        &mut self,
        arrival: Instant,
        from: SocketAddr,
        ecn: Option<EcnCodepoint>,
        payload: &[u8],
    ) {
        let is_earliest = self
            .under_way
            .peek()
            .is_none_or(|head| arrival < head.arrival);
        self.sequence += 1;
        self.under_way.push(Packet {
            arrival,
            sequence: self.sequence,
            from,
            ecn,
            payload: payload.into(),
        });
        // A receiver that sleeps until a later arrival, or for ever, must set its timer anew.
        if is_earliest && let Some(receiver) = self.receiver.take() {
            receiver.wake();
        }
    }
}

/// A datagram under way; ordered so that the earliest arrival is the greatest.
struct Packet {
    arrival: Instant,
    sequence: u64,
    from: SocketAddr,
    ecn: Option<EcnCodepoint>,
    payload: Box<[u8]>,
}

impl Packet {
    fn order(&self) -> (Instant, u64) {
        (self.arrival, self.sequence)
    }
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl Eq for Packet {}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> Ordering {
        other.order().cmp(&self.order())
    }
}

/// One end of a [`SimNet`].
struct SimSocket {
    address: SocketAddr,
    incoming: Arc<Mutex<Pipe>>,
    outgoing: Arc<Mutex<Pipe>>,
    /// Wakes the receiver when the next packet arrives. Only the endpoint's task polls it.
    timer: Mutex<Pin<Box<Sleep>>>,
}

impl SimSocket {
    fn new(address: SocketAddr, incoming: &Arc<Mutex<Pipe>>, outgoing: &Arc<Mutex<Pipe>>) -> Self {
        Self {
            address,
            incoming: Arc::clone(incoming),
            outgoing: Arc::clone(outgoing),
            timer: Mutex::new(Box::pin(tokio::time::sleep(Duration::ZERO))),
        }
    }
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimSocket")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let now = Instant::now();
        let segment = transmit
            .segment_size
            .unwrap_or(transmit.contents.len())
            .max(1);
        let mut pipe = lock(&self.outgoing);
        for datagram in transmit.contents.chunks(segment) {
            pipe.send(now, self.address, transmit.ecn, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = Instant::now();
            let mut pipe = lock(&self.incoming);
            let mut received = 0;
            for (buf, meta) in bufs.iter_mut().zip(meta.iter_mut()) {
                if pipe.under_way.peek().is_none_or(|head| head.arrival > now) {
                    break;
                }
                let Some(packet) = pipe.under_way.pop() else {
                    break;
                };
                let len = packet.payload.len().min(buf.len());
                buf[..len].copy_from_slice(&packet.payload[..len]);
                *meta = RecvMeta {
                    addr: packet.from,
                    len,
                    stride: len,
                    ecn: packet.ecn,
                    dst_ip: None,
                };
                received += 1;
            }
            if received > 0 {
                return Poll::Ready(Ok(received));
            }
            pipe.receiver = Some(cx.waker().clone());
            let Some(head) = pipe.under_way.peek() else {
                return Poll::Pending;
            };
            timer.as_mut().reset(head.arrival);
            drop(pipe);
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn max_transmit_segments(&self) -> usize {
        SEGMENTS
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

/// A simulated socket never makes the sender wait: its kernel buffer is the link's queue.
#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The generator SplitMix64 (Steele, Lea, Flood 2014): small, seedable, good enough for loss.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform from 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn happens(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.unit() < probability
    }
}
