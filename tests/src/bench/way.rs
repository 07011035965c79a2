//! The ways to move a guest.

use crate::bench::guests::Guest;
use crate::bench::relays::Over;
use crate::qemu::{MigrationSettings, Multifd};

/// How a guest is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// QEMU, one TCP connection with cubic.
    TcpCubic,
    /// QEMU, one TCP connection with BBR.
    TcpBbr,
    /// QEMU, one connection, changed pages as differences.
    Xbzrle,
    /// QEMU, four connections.
    Multifd,
    /// QEMU, four connections, zstd level 1.
    MultifdZstd1,
    /// QEMU, four connections, zstd level 3.
    MultifdZstd3,
    /// QEMU through a pipe to `zstd -3 --long=27 -T2`.
    ZstdPipe,
    /// Gateways that hold nothing yet.
    Cold,
    /// The sibling, after the first guest.
    Warm,
    /// The same, both gateways restarted in between.
    WarmRestart,
    /// The far site was seeded with the image.
    Seeded,
    /// Back to where it came from, after it has worked at the other site.
    Returning,
    /// The sibling through gateways that hold nothing yet: what [`Self::Warm`] is measured by.
    ColdSibling,
    /// As [`Self::Cold`], over 20 Mbit/s.
    Cold20Mbit,
    /// As [`Self::Cold`], over the loopback interface.
    Loopback,
    /// The same, as bytes of which the gateways know nothing.
    LoopbackOpaque,
    /// Copied by two relays over the loopback interface, by the gateways' own transport: what a gateway does
    /// at the least.
    LoopbackCopy,
    /// The same with TLS over TCP between them.
    LoopbackTls,
}

impl Way {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 18] = [
        Self::TcpCubic,
        Self::TcpBbr,
        Self::Xbzrle,
        Self::Multifd,
        Self::MultifdZstd1,
        Self::MultifdZstd3,
        Self::ZstdPipe,
        Self::Cold,
        Self::Warm,
        Self::WarmRestart,
        Self::Seeded,
        Self::Returning,
        Self::ColdSibling,
        Self::Cold20Mbit,
        Self::Loopback,
        Self::LoopbackOpaque,
        Self::LoopbackCopy,
        Self::LoopbackTls,
    ];

    /// On the command line and in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TcpCubic => "tcp-cubic",
            Self::TcpBbr => "tcp-bbr",
            Self::Xbzrle => "xbzrle",
            Self::Multifd => "multifd",
            Self::MultifdZstd1 => "multifd-zstd1",
            Self::MultifdZstd3 => "multifd-zstd3",
            Self::ZstdPipe => "zstd-pipe",
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::WarmRestart => "warm-restart",
            Self::Seeded => "seeded",
            Self::Returning => "returning",
            Self::ColdSibling => "cold-sibling",
            Self::Cold20Mbit => "cold-20mbit",
            Self::Loopback => "loopback",
            Self::LoopbackOpaque => "loopback-opaque",
            Self::LoopbackCopy => "loopback-copy",
            Self::LoopbackTls => "loopback-tls",
        }
    }

    /// In tables and charts.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::TcpCubic => "QEMU, TCP cubic",
            Self::TcpBbr => "QEMU, TCP BBR",
            Self::Xbzrle => "QEMU, xbzrle",
            Self::Multifd => "QEMU, multifd 4",
            Self::MultifdZstd1 => "QEMU, multifd 4 + zstd 1",
            Self::MultifdZstd3 => "QEMU, multifd 4 + zstd 3",
            Self::ZstdPipe => "QEMU, pipe through zstd -3 --long=27 -T2",
            Self::Cold => "Skyferry, cold",
            Self::Warm => "Skyferry, warm (the sibling, after the guest)",
            Self::WarmRestart => "Skyferry, warm, gateways restarted",
            Self::Seeded => "Skyferry, seeded",
            Self::Returning => "Skyferry, returning",
            Self::ColdSibling => "Skyferry, cold, the sibling",
            Self::Cold20Mbit => "Skyferry, cold, 20 Mbit/s",
            Self::Loopback => "Skyferry, cold, loopback",
            Self::LoopbackOpaque => "Skyferry, cold, loopback, as opaque bytes",
            Self::LoopbackCopy => "two relays with QUIC, loopback",
            Self::LoopbackTls => "two relays with TLS over TCP, loopback",
        }
    }

    /// The way of this name.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.name() == name)
    }

    /// Whether gateways carry it.
    #[must_use]
    pub const fn is_ours(self) -> bool {
        !matches!(self.kind(), Kind::Native(_) | Kind::Copy(_))
    }

    /// Whether a guest is moved in this way in a run (from 1) unless somebody asks: some ways answer
    /// one question only, and a guest that works before it returns takes the longest of all.
    #[must_use]
    pub fn is_usual_for(self, guest: &Guest, run: u32) -> bool {
        match self {
            Self::Returning => {
                let promised = [Guest::IDLE, Guest::CACHE, Guest::WRITER_500];
                run == 1 || promised.contains(guest)
            }
            Self::WarmRestart | Self::ColdSibling => {
                [Guest::CACHE, Guest::WRITER_500].contains(guest)
            }
            Self::Cold20Mbit
            | Self::Loopback
            | Self::LoopbackOpaque
            | Self::LoopbackCopy
            | Self::LoopbackTls => *guest == Guest::WRITER_500,
            _ => true,
        }
    }

    pub(super) const fn kind(self) -> Kind {
        match self {
            Self::TcpCubic => Kind::Native(Native::TCP.with_cubic()),
            Self::TcpBbr => Kind::Native(Native::TCP),
            Self::Xbzrle => Kind::Native(Native {
                xbzrle: true,
                ..Native::TCP
            }),
            Self::Multifd => Kind::Native(Native::multifd(None)),
            Self::MultifdZstd1 => Kind::Native(Native::multifd(Some(1))),
            Self::MultifdZstd3 => Kind::Native(Native::multifd(Some(3))),
            Self::ZstdPipe => Kind::Native(Native {
                pipe: true,
                ..Native::TCP
            }),
            Self::Cold | Self::Warm | Self::Returning => Kind::Chain,
            Self::WarmRestart => Kind::Restart,
            Self::Seeded => Kind::Seeded,
            Self::ColdSibling => Kind::Sibling,
            Self::Cold20Mbit => Kind::Slow,
            Self::Loopback => Kind::Loopback { opaque: false },
            Self::LoopbackOpaque => Kind::Loopback { opaque: true },
            Self::LoopbackCopy => Kind::Copy(Over::Quic),
            Self::LoopbackTls => Kind::Copy(Over::Tls),
        }
    }
}

/// What a way needs; ways of one chain share a pair of gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Native(Native),
    /// Cold, then the sibling, then the first guest back again.
    Chain,
    Restart,
    Seeded,
    Sibling,
    Slow,
    Loopback {
        /// Whether the gateways are to take the stream for something else than a migration.
        opaque: bool,
    },
    Copy(Over),
}

/// QEMU without gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Native {
    pub(super) congestion: &'static str,
    multifd: Option<Multifd>,
    xbzrle: bool,
    /// Through programs at both ends.
    pub(super) pipe: bool,
}

impl Native {
    const TCP: Self = Self {
        congestion: "bbr",
        multifd: None,
        xbzrle: false,
        pipe: false,
    };

    const fn with_cubic(self) -> Self {
        Self {
            congestion: "cubic",
            ..self
        }
    }

    const fn multifd(zstd_level: Option<u8>) -> Self {
        Self {
            multifd: Some(Multifd {
                channels: 4,
                zstd_level,
            }),
            ..Self::TCP
        }
    }

    pub(super) fn settings(self) -> MigrationSettings {
        MigrationSettings {
            // A pipe has one direction.
            return_path: !self.pipe,
            multifd: self.multifd,
            xbzrle: self.xbzrle,
            ..MigrationSettings::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_are_found_by_name() {
        for way in Way::ALL {
            assert_eq!(Way::find(way.name()), Some(way));
        }
        assert_eq!(Way::find("carrier pigeon"), None);
        assert!(Way::Returning.is_usual_for(&Guest::WHOLE_PAGES, 1));
        assert!(!Way::Returning.is_usual_for(&Guest::WHOLE_PAGES, 2));
        assert!(Way::Cold20Mbit.is_ours());
        assert!(!Way::ZstdPipe.is_ours() && !Way::LoopbackCopy.is_ours());
    }
}
