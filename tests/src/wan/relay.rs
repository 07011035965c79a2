//! The emulated WAN between UDP sockets of one host: for QUIC alone, and without root.
//!
//! Each gateway dials a socket of the relay instead of its peer. The relay keeps every datagram as
//! long as the link would and passes it on; one thread does it all.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::model::{Direction, Shape};
use super::{LinkControl, Way};
use crate::sys;

/// IP and UDP headers, which the link carries as well.
const HEADER_BYTES: usize = 28;
/// Largest UDP payload of an Ethernet packet; larger ones are dropped, as with "don't fragment".
const MAX_PAYLOAD_BYTES: usize = 1472;
/// Sockets of one side that the relay keeps apart; a gateway has a handful.
const MAX_CLIENTS: usize = 64;
/// Asked for each socket: bursts come by segmentation offload.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// See [`super::tun`].
const STEP: Duration = Duration::from_micros(250);
/// How long an idle relay sleeps before it looks at the settings again.
const IDLE: Duration = Duration::from_millis(50);

/// A relay between two gateways on the loopback interface. Ends on drop.
#[derive(Debug)]
pub struct UdpRelay {
    for_a: SocketAddr,
    for_b: SocketAddr,
    control: LinkControl,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpRelay {
    /// Joins gateway A, listening on `a`, with gateway B, listening on `b`.
    ///
    /// # Errors
    /// When sockets or threads are not to be had.
    pub fn new(shape: Shape, a: SocketAddr, b: SocketAddr) -> Result<Self> {
        let towards_b = Route::new(Way::AToB, b)?;
        let towards_a = Route::new(Way::BToA, a)?;
        let for_a = towards_b.front.local_addr()?;
        let for_b = towards_a.front.local_addr()?;
        let control = LinkControl::new(shape);
        let stop = Arc::new(AtomicBool::new(false));
        let relay = Relay {
            routes: [towards_b, towards_a],
            links: [Direction::new(shape), Direction::new(shape)],
            control: control.clone(),
            stop: Arc::clone(&stop),
        };
        let thread = thread::Builder::new()
            .name("wan-relay".into())
            .spawn(move || relay.run())?;
        Ok(Self {
            for_a,
            for_b,
            control,
            stop,
            thread: Some(thread),
        })
    }

    /// The address that gateway A dials to reach B.
    #[must_use]
    pub fn address_for_a(&self) -> SocketAddr {
        self.for_a
    }

    /// The address that gateway B dials to reach A.
    #[must_use]
    pub fn address_for_b(&self) -> SocketAddr {
        self.for_b
    }

    /// Steers the link and reads its counters.
    #[must_use]
    pub fn control(&self) -> &LinkControl {
        &self.control
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One dialled address with all that came to it: from a client to the gateway behind it, and back.
struct Route {
    /// The way from the client to the gateway.
    way: Way,
    front: UdpSocket,
    gateway: SocketAddr,
    clients: Vec<Client>,
}

/// A socket that has dialled the relay, and the relay's socket that stands for it at the gateway.
struct Client {
    address: SocketAddr,
    back: UdpSocket,
}

/// A datagram under way.
struct Datagram {
    route: usize,
    client: usize,
    /// Whether it goes to the gateway; else back to the client.
    to_gateway: bool,
    payload: Vec<u8>,
}

impl Route {
    fn new(way: Way, gateway: SocketAddr) -> Result<Self> {
        let front = loopback_socket().context("open the relay's socket")?;
        Ok(Self {
            way,
            front,
            gateway,
            clients: Vec::new(),
        })
    }

    fn client(&mut self, address: SocketAddr) -> Option<usize> {
        if let Some(known) = self.clients.iter().position(|c| c.address == address) {
            return Some(known);
        }
        if self.clients.len() == MAX_CLIENTS {
            return None;
        }
        let back = loopback_socket().ok()?;
        back.connect(self.gateway).ok()?;
        self.clients.push(Client { address, back });
        Some(self.clients.len() - 1)
    }
}

fn loopback_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    let options = socket2::SockRef::from(&socket);
    // The system may grant less; then a burst may be lost, as on a real router.
    let _ = options.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = options.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    Ok(socket)
}

struct Relay {
    routes: [Route; 2],
    /// By [`Way::index`].
    links: [Direction<Datagram>; 2],
    control: LinkControl,
    stop: Arc<AtomicBool>,
}

impl Relay {
    fn run(mut self) {
        sys::become_timekeeper();
        let mut buffer = vec![0; 65536];
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            for way in [Way::AToB, Way::BToA] {
                self.control
                    .synchronise(way, &mut self.links[way.index()], now);
            }
            for route in 0..self.routes.len() {
                self.take(route, &mut buffer, now);
            }
            self.deliver();
            if self.links.iter().any(|link| link.next_arrival().is_some()) {
                thread::sleep(STEP);
            } else {
                self.sleep();
            }
        }
    }

    /// Takes all that waits in the sockets of one route.
    fn take(&mut self, index: usize, buffer: &mut [u8], now: Instant) {
        let Self { routes, links, .. } = self;
        let route = &mut routes[index];
        let (there, back) = match route.way {
            Way::AToB => (Way::AToB.index(), Way::BToA.index()),
            Way::BToA => (Way::BToA.index(), Way::AToB.index()),
        };
        // An error is "nothing more", or a gateway that is not there: its datagrams are lost.
        while let Ok((length, from)) = route.front.recv_from(buffer) {
            if length > MAX_PAYLOAD_BYTES {
                continue;
            }
            let Some(client) = route.client(from) else {
                continue;
            };
            links[there].offer(now, length + HEADER_BYTES, || Datagram {
                route: index,
                client,
                to_gateway: true,
                payload: buffer[..length].to_vec(),
            });
        }
        for (client, Client { back: socket, .. }) in route.clients.iter().enumerate() {
            while let Ok(length) = socket.recv(buffer) {
                if length > MAX_PAYLOAD_BYTES {
                    continue;
                }
                links[back].offer(now, length + HEADER_BYTES, || Datagram {
                    route: index,
                    client,
                    to_gateway: false,
                    payload: buffer[..length].to_vec(),
                });
            }
        }
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        for link in &mut self.links {
            while let Some(datagram) = link.poll(now) {
                let route = &self.routes[datagram.route];
                let client = &route.clients[datagram.client];
                let _ = if datagram.to_gateway {
                    client.back.send(&datagram.payload)
                } else {
                    route.front.send_to(&datagram.payload, client.address)
                };
            }
        }
    }

    fn sleep(&self) {
        let mut sockets = Vec::new();
        for route in &self.routes {
            sockets.push(route.front.as_fd());
            sockets.extend(route.clients.iter().map(|client| client.back.as_fd()));
        }
        let _ = sys::wait_readable(&sockets, Some(IDLE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_go_there_and_back_in_time() {
        let a = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let b = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for socket in [&a, &b] {
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
        }
        let shape = Shape::wan(100, 40);
        let relay = UdpRelay::new(shape, a.local_addr().unwrap(), b.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 2000];
        let start = Instant::now();
        a.send_to(b"ping", relay.address_for_a()).unwrap();
        let (length, from) = b.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"ping");
        b.send_to(b"pong", from).unwrap();
        let (length, from) = a.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"pong");
        assert_eq!(from, relay.address_for_a());
        assert!(start.elapsed() >= Duration::from_millis(40));
        b.send_to(b"other way", relay.address_for_b()).unwrap();
        assert_eq!(a.recv_from(&mut buffer).unwrap().0, 9);

        a.send_to(&[0; 1473], relay.address_for_a()).unwrap();
        a.send_to(b"small", relay.address_for_a()).unwrap();
        assert_eq!(b.recv_from(&mut buffer).unwrap().0, 5);
    }
}
