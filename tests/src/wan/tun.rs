//! The emulated WAN between two network namespaces: a TUN device in each, and a thread per direction
//! that takes packets from one, keeps them as long as the link would, and writes them to the other.
//!
//! TCP and UDP cross it alike, so QEMU's own migration and a pair of gateways meet the same link.
//! Needs root. Holds more than 500 Mbit/s on one core.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::model::{Direction, Shape};
use super::netns::Netns;
use super::{LinkControl, Way};
use crate::sys::{self, InterfaceSetup};

/// Address of side A on the link.
pub const ADDRESS_A: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Address of side B on the link.
pub const ADDRESS_B: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// Largest packet, that of Ethernet.
const MTU: i32 = 1500;
/// Packets that wait in a device while its thread is off the CPU: 10 ms at 10 Gbit/s.
const DEVICE_QUEUE_PACKETS: i32 = 10_000;
/// While packets flow the threads look this often: short against any delay worth emulating, long
/// enough for a few thousand wake-ups per second instead of one per packet.
const STEP: Duration = Duration::from_micros(250);
/// How long an idle thread sleeps before it looks at the settings again.
const IDLE: Duration = Duration::from_millis(50);

/// Two namespaces, A and B, with a link between them. Everything goes on drop.
#[derive(Debug)]
pub struct TunWan {
    a: Netns,
    b: Netns,
    control: LinkControl,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl TunWan {
    /// What it takes to make one.
    pub const NEEDS: &'static str =
        "root and /dev/net/tun (modprobe tun; in a container --device /dev/net/tun)";

    /// Makes namespaces, devices and the link; [`ADDRESS_A`] and [`ADDRESS_B`] reach each other.
    ///
    /// # Errors
    /// Without root, or without `/dev/net/tun`.
    pub fn new(shape: Shape) -> Result<Self> {
        let a = Netns::new()?;
        let b = Netns::new()?;
        let tun_a = attach(&a, ADDRESS_A)?;
        let tun_b = attach(&b, ADDRESS_B)?;
        let control = LinkControl::new(shape);
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (way, from, to) in [(Way::AToB, &tun_a, &tun_b), (Way::BToA, &tun_b, &tun_a)] {
            let carrier = Carrier {
                way,
                from: from.try_clone().context("share a TUN device")?,
                to: to.try_clone().context("share a TUN device")?,
                control: control.clone(),
                stop: Arc::clone(&stop),
            };
            let thread = thread::Builder::new()
                .name(format!("wan-{way:?}"))
                .spawn(move || carrier.run(shape))?;
            threads.push(thread);
        }
        Ok(Self {
            a,
            b,
            control,
            stop,
            threads,
        })
    }

    /// Whether this process may make one.
    #[must_use]
    pub fn is_possible() -> bool {
        sys::is_root() && std::path::Path::new("/dev/net/tun").exists()
    }

    /// Side A.
    #[must_use]
    pub fn a(&self) -> &Netns {
        &self.a
    }

    /// Side B.
    #[must_use]
    pub fn b(&self) -> &Netns {
        &self.b
    }

    /// Steers the link and reads its counters.
    #[must_use]
    pub fn control(&self) -> &LinkControl {
        &self.control
    }

    /// Sets TCP's congestion control on both sides.
    ///
    /// # Errors
    /// When the kernel does not have `name`.
    pub fn set_tcp_congestion_control(&self, name: &str) -> Result<()> {
        self.a.set_tcp_congestion_control(name)?;
        self.b.set_tcp_congestion_control(name)
    }
}

impl Drop for TunWan {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn attach(netns: &Netns, address: Ipv4Addr) -> Result<File> {
    netns.run(|| {
        let tun = sys::open_tun(c"wan0").context("make a TUN device")?;
        let setup = InterfaceSetup {
            address: Some((address.octets(), 24)),
            mtu: Some(MTU),
            queue_packets: Some(DEVICE_QUEUE_PACKETS),
        };
        sys::configure_interface(c"wan0", setup).context("configure a TUN device")?;
        Ok(tun)
    })
}

/// One direction.
struct Carrier {
    way: Way,
    from: File,
    to: File,
    control: LinkControl,
    stop: Arc<AtomicBool>,
}

impl Carrier {
    fn run(mut self, shape: Shape) {
        sys::become_timekeeper();
        let mut direction = Direction::<Vec<u8>>::new(shape);
        let mut buffer = vec![0; 65536];
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.control.synchronise(self.way, &mut direction, now);
            if self.take(&mut direction, &mut buffer, now).is_err() {
                return;
            }
            let now = Instant::now();
            while let Some(packet) = direction.poll(now) {
                // A device that is gone or full loses packets, as the real ones do.
                let _ = self.to.write(&packet);
            }
            match direction.next_arrival() {
                Some(_) => thread::sleep(STEP),
                None => {
                    let _ = sys::wait_readable(&[self.from.as_fd()], Some(IDLE));
                }
            }
        }
    }

    /// Takes all packets that wait in the device.
    fn take(
        &mut self,
        direction: &mut Direction<Vec<u8>>,
        buffer: &mut [u8],
        now: Instant,
    ) -> io::Result<()> {
        loop {
            match self.from.read(buffer) {
                Ok(length) => direction.offer(now, length, || buffer[..length].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::skip::lacks;

    fn possible() -> bool {
        let possible = TunWan::is_possible();
        if !possible {
            lacks(TunWan::NEEDS);
        }
        possible
    }

    #[test]
    fn a_round_trip_takes_the_delay() {
        if !possible() {
            return;
        }
        let wan = TunWan::new(Shape::wan(100, 60)).unwrap();
        let bind = |address| Ok(UdpSocket::bind((address, 7000))?);
        let a = wan.a().run(|| bind(ADDRESS_A)).unwrap();
        let b = wan.b().run(|| bind(ADDRESS_B)).unwrap();
        for socket in [&a, &b] {
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
        }
        let mut buffer = [0; 100];
        let start = Instant::now();
        a.send_to(b"ping", (ADDRESS_B, 7000)).unwrap();
        b.recv_from(&mut buffer).unwrap();
        b.send_to(b"pong", (ADDRESS_A, 7000)).unwrap();
        a.recv_from(&mut buffer).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(60));
        wan.control().cut();
        a.set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        b.send_to(b"lost", (ADDRESS_A, 7000)).unwrap();
        assert!(a.recv_from(&mut buffer).is_err());
    }

    #[test]
    fn tcp_gets_what_the_link_has() {
        if !possible() {
            return;
        }
        let wan = TunWan::new(Shape::wan(400, 4)).unwrap();
        let listener = wan
            .b()
            .run(|| Ok(TcpListener::bind((ADDRESS_B, 7000))?))
            .unwrap();
        let reader = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            io::copy(&mut stream, &mut io::sink()).unwrap()
        });
        let mut stream = wan
            .a()
            .run(|| Ok(TcpStream::connect((ADDRESS_B, 7000))?))
            .unwrap();
        let bytes = 50_000_000;
        let start = Instant::now();
        stream.write_all(&vec![0; bytes]).unwrap();
        drop(stream);
        assert_eq!(reader.join().unwrap(), bytes as u64);
        let seconds = start.elapsed().as_secs_f64();
        // The link cannot be faster than set; how much slower depends on the machine's load.
        assert!(seconds >= 1.0, "50 MB crossed 400 Mbit/s in {seconds} s");
        let counters = wan.control().counters(Way::AToB);
        assert!(counters.delivered_bytes >= bytes as u64);
        eprintln!("{:.0} Mbit/s of 400", bytes as f64 * 8e-6 / seconds);
    }
}
