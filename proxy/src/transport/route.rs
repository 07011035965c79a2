//! What the route to a peer carries, asked of the kernel. Nothing is sent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use rustix::net::sockopt;

/// Headers before the UDP payload, of IPv6 in either case: what is left of Ethernet's 1500 bytes may
/// cross a gateway between the two.
const HEADER_BYTES: u32 = 40 + 8;

/// The largest UDP payload that leaves this host in one piece on the way from `source`, which may be
/// a wildcard address, to `peer`: by the MTU of the route or else of its interface, or less where the
/// kernel has learnt of a narrower place behind it.
///
/// # Errors
/// When there is no route.
pub(super) fn udp_payload(source: IpAddr, peer: SocketAddr) -> io::Result<u16> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let source = match (source.to_canonical(), peer) {
        (source @ IpAddr::V4(_), SocketAddr::V4(_))
        | (source @ IpAddr::V6(_), SocketAddr::V6(_)) => source,
        (_, SocketAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
        (_, SocketAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((source, 0))?;
    // Chooses the route, and no more than that.
    socket.connect(peer)?;
    let mtu = match peer {
        SocketAddr::V4(_) => sockopt::ip_mtu(&socket)?,
        SocketAddr::V6(_) => sockopt::ipv6_mtu(&socket)?,
    };
    Ok(u16::try_from(mtu.saturating_sub(HEADER_BYTES)).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_carries_as_much_as_ip_can() {
        let to = |address: &str| address.parse::<SocketAddr>().unwrap();
        let wildcard = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        for peer in ["127.0.0.1:7700", "[::ffff:127.0.0.1]:7700"] {
            for source in [
                Ipv4Addr::UNSPECIFIED.into(),
                Ipv4Addr::LOCALHOST.into(),
                wildcard,
            ] {
                let payload = udp_payload(source, to(peer)).unwrap();
                assert!(payload > 60_000, "{source} {peer}: {payload}");
            }
        }
        assert!(udp_payload(wildcard, to("255.255.255.255:1")).is_err());
    }
}
