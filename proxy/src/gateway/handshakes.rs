//! Connections from outside that have not said who they are: how many there may be, and from where.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex},
};

use super::link::lock;

/// Incoming connections that may be in their handshake or have not said hello, besides those from
/// places where peers are.
const MOST: usize = 64;
/// As many from one place: an IPv4 address, or the first 64 bits of an IPv6 address.
const MOST_OF_A_PLACE: usize = 16;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// No place has none.
    of_places: HashMap<IpAddr, usize>,
    /// Places where peers are by the configuration.
    expected: HashSet<IpAddr>,
    /// Where the name of each peer that has one has last led to.
    named: HashMap<String, HashSet<IpAddr>>,
    /// Where each peer has last come from.
    seen: HashMap<String, IpAddr>,
}

impl Taken {
    fn is_of_a_peer(&self, place: IpAddr) -> bool {
        self.expected.contains(&place)
            || self.named.values().any(|places| places.contains(&place))
            || self.seen.values().any(|seen| *seen == place)
    }
}

/// What is to be done about a connection.
#[derive(Debug)]
pub(super) enum Entry {
    /// It may begin.
    Open(Handshake),
    /// Its sender has to show first that it reads what is sent to its address.
    Unproven,
    /// There are too many.
    Full,
}

/// The place of a connection, until it is known whose it is.
#[derive(Debug)]
pub(super) struct Handshake {
    taken: Arc<Mutex<Taken>>,
    place: IpAddr,
}

impl Handshakes {
    /// `peers` are the addresses of peers, as far as they are known.
    pub(super) fn new(peers: impl IntoIterator<Item = IpAddr>) -> Self {
        let taken = Taken {
            expected: peers.into_iter().map(place_of).collect(),
            ..Taken::default()
        };
        Self {
            taken: Arc::new(Mutex::new(taken)),
        }
    }

    /// The name under which `peer` is dialled leads to these addresses.
    pub(super) fn resolved(&self, peer: &str, addresses: impl IntoIterator<Item = IpAddr>) {
        let places = addresses.into_iter().map(place_of).collect();
        lock(&self.taken).named.insert(peer.to_owned(), places);
    }

    /// A connection comes in; `proven`: its sender reads what is sent to `address`.
    ///
    /// Packets with invented addresses take half of all places at most, and half of those of the
    /// address that they name. Strangers at many addresses may take all: where a peer is there is
    /// room besides.
    pub(super) fn enter(&self, address: IpAddr, proven: bool) -> Entry {
        let place = place_of(address);
        let mut taken = lock(&self.taken);
        let here = taken.of_places.get(&place).copied().unwrap_or(0);
        if !proven && (taken.all >= MOST / 2 || here >= MOST_OF_A_PLACE / 2) {
            return Entry::Unproven;
        }
        let full = taken.all >= MOST && !taken.is_of_a_peer(place);
        if full || here >= MOST_OF_A_PLACE {
            return Entry::Full;
        }
        taken.all += 1;
        taken.of_places.insert(place, here + 1);
        Entry::Open(Handshake {
            taken: self.taken.clone(),
            place,
        })
    }
}

impl Handshake {
    /// It was this peer's, and is over.
    pub(super) fn said_hello(self, peer: &str) {
        lock(&self.taken).seen.insert(peer.to_owned(), self.place);
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        taken.all -= 1;
        if let Some(here) = taken.of_places.get_mut(&self.place) {
            *here -= 1;
            if *here == 0 {
                taken.of_places.remove(&self.place);
            }
        }
    }
}

/// Who has one IPv6 address has 2^64 of them.
fn place_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(network))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 100 connections from `address` may begin.
    fn fill(handshakes: &Handshakes, address: &str, proven: bool) -> Vec<Handshake> {
        let address: IpAddr = address.parse().unwrap();
        let entries = (0..100).map(|_| handshakes.enter(address, proven));
        entries
            .filter_map(|entry| match entry {
                Entry::Open(handshake) => Some(handshake),
                Entry::Unproven => {
                    assert!(!proven, "{address} has been asked already");
                    None
                }
                Entry::Full => {
                    assert!(proven, "{address} is to be asked first");
                    None
                }
            })
            .collect()
    }

    #[test]
    fn nobody_takes_all_places() {
        let handshakes = Handshakes::default();
        // Somebody names the address of a peer, and reads nothing of what is sent there.
        let invented = fill(&handshakes, "198.51.100.7", false);
        assert_eq!(invented.len(), 8);
        assert_eq!(fill(&handshakes, "198.51.100.7", true).len(), 8);
        let stranger = fill(&handshakes, "203.0.113.9", true);
        assert_eq!(stranger.len(), 16);
        let more = fill(&handshakes, "::ffff:203.0.113.9", true);
        assert_eq!(more.len(), 0, "the same address in other words");
        drop(stranger);
        assert_eq!(fill(&handshakes, "203.0.113.9", true).len(), 16);
    }

    #[test]
    fn addresses_of_one_network_are_one_place() {
        let handshakes = Handshakes::default();
        let first = fill(&handshakes, "2001:db8:1:2::1", true);
        assert_eq!(first.len(), 16);
        assert_eq!(fill(&handshakes, "2001:db8:1:2:ffff::2", true).len(), 0);
        assert_eq!(fill(&handshakes, "2001:db8:1:3::1", true).len(), 16);
    }

    /// Whoever has many addresses keeps out all but those who are expected.
    #[test]
    fn strangers_at_many_addresses_keep_no_peer_out() {
        let configured = "198.51.100.7".parse().unwrap();
        let handshakes = Handshakes::new([configured]);
        let seen = fill(&handshakes, "2001:db8:1:2::1", true);
        seen.into_iter().for_each(|h| h.said_hello("edge-b"));
        handshakes.resolved("edge-c", ["192.0.2.77".parse().unwrap()]);
        handshakes.resolved("edge-c", ["192.0.2.78".parse().unwrap()]);
        let strangers: Vec<_> = (0..100)
            .flat_map(|n| fill(&handshakes, &format!("203.0.113.{n}"), true))
            .collect();
        assert_eq!(strangers.len(), MOST);
        assert_eq!(fill(&handshakes, "192.0.2.1", true).len(), 0);
        assert_eq!(
            fill(&handshakes, "192.0.2.77", true).len(),
            0,
            "not its address any more"
        );
        let peers = ["198.51.100.7", "2001:db8:1:2::3", "192.0.2.78"].map(|peer| {
            assert_eq!(fill(&handshakes, peer, false).len(), 0, "anyone may say so");
            fill(&handshakes, peer, true)
        });
        assert!(peers.iter().all(|peer| peer.len() == MOST_OF_A_PLACE));
        // A peer that has moved leaves no room behind.
        drop((strangers, peers));
        let moved = fill(&handshakes, "192.0.2.9", true);
        moved.into_iter().for_each(|h| h.said_hello("edge-b"));
        let taken = lock(&handshakes.taken);
        assert_eq!(
            (taken.all, taken.of_places.len(), taken.seen.len()),
            (0, 0, 1)
        );
    }

    #[test]
    fn all_together_are_bounded() {
        let handshakes = Handshakes::default();
        let invented: Vec<_> = (0..100)
            .flat_map(|n| fill(&handshakes, &format!("192.0.2.{n}"), false))
            .collect();
        assert_eq!(invented.len(), 32);
        let proven: Vec<_> = (0..100)
            .flat_map(|n| fill(&handshakes, &format!("198.51.100.{n}"), true))
            .collect();
        assert_eq!(proven.len(), 32);
        drop((invented, proven));
        let taken = lock(&handshakes.taken);
        assert_eq!((taken.all, taken.of_places.len()), (0, 0));
    }
}
