//! Messages of the control stream.
//!
//! Each message is `u32 length, u8 type, fields`; the length counts type and fields and is at most
//! [`MAX_MESSAGE`]. Strings are `u16 length` and UTF-8, lists `u32 count` and their items.

use std::fmt;

use super::{
    ChannelNo, InstanceId, MigrationId, WireError,
    reader::{Reader, put_string},
};

/// Largest message, its length field not counted.
pub const MAX_MESSAGE: u32 = 64 << 10;
/// Largest string of a message in bytes.
const MAX_STRING: usize = 1024;
/// Most channels of one migration that a message can list.
pub const MAX_CHANNELS: usize = 1024;
/// Most pages one [`Control::Miss`] asks for.
pub const MAX_MISSED: usize = 512;
/// Most migrations between two gateways.
pub const MAX_MIGRATIONS: usize = 1024;
/// Most segments of the peer's store that an [`Interest`] can say are known.
pub const MAX_KNOWN_SEGMENTS: usize = 3072;
/// Most processes that a hello says are known.
pub const MAX_PREDECESSORS: usize = 64;
/// Most domains of an [`Interest`].
pub const MAX_DOMAINS: usize = 1024;
/// First bytes of a hello.
const MAGIC: [u8; 4] = *b"SKYF";

/// How the stream of a channel is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// QEMU's main migration channel.
    QemuMain,
    /// Anything else: bytes.
    Opaque,
}

/// The word for logs.
impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QemuMain => "qemu-main",
            Self::Opaque => "opaque",
        })
    }
}

/// Why a channel or migration ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetCode {
    /// The VMM's socket was reset.
    Endpoint,
    /// The target could not be reached.
    TargetUnreachable,
    /// The target is not on the allow list.
    NotAllowed,
    /// A limit of the gateway was reached, or it is draining.
    Busy,
    /// The digests of a migration disagree.
    DigestMismatch,
    /// The link was away for longer than the outage budget.
    Outage,
    /// The peer broke the protocol, or a fault inside the gateway.
    Internal,
    /// The migration is not known (any more).
    Unknown,
}

/// The word for logs.
impl fmt::Display for ResetCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Endpoint => "endpoint",
            Self::TargetUnreachable => "target-unreachable",
            Self::NotAllowed => "not-allowed",
            Self::Busy => "busy",
            Self::DigestMismatch => "digest-mismatch",
            Self::Outage => "outage",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        })
    }
}

impl ResetCode {
    const ALL: [(Self, u8); 8] = [
        (Self::Endpoint, 1),
        (Self::TargetUnreachable, 2),
        (Self::NotAllowed, 3),
        (Self::Busy, 4),
        (Self::DigestMismatch, 5),
        (Self::Outage, 6),
        (Self::Internal, 7),
        (Self::Unknown, 8),
    ];

    fn to_wire(self) -> u8 {
        Self::ALL
            .iter()
            .find(|(code, _)| *code == self)
            .map_or(7, |(_, byte)| *byte)
    }

    fn from_wire(byte: u8) -> Result<Self, WireError> {
        let found = Self::ALL.iter().find(|(_, wire)| *wire == byte);
        found
            .map(|(code, _)| *code)
            .ok_or(WireError::BadValue("code"))
    }
}

/// The state of one channel's stream at some point: all bytes before `offset` have this digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelDigest {
    /// The channel.
    pub channel: ChannelNo,
    /// Stream bytes covered.
    pub offset: u64,
    /// Running digest of these bytes (`docs/protocol.md`, page frames).
    pub digest: [u8; 16],
}

/// The next frame that one side of a channel waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelPosition {
    /// The channel.
    pub channel: ChannelNo,
    /// Frames before this one have been received and need not be sent again.
    pub next_seq: u64,
}

/// What the near gateway wants to hear of the far one's store, and what it has heard.
#[derive(Clone, PartialEq, Eq)]
pub struct Interest {
    /// The store of which it has heard; zeroes for none.
    pub store: [u8; 16],
    /// Pages of which it can take note.
    pub capacity_pages: u64,
    /// Segments that it knows: number, and records it has been told of.
    pub segments: Vec<(u32, u32)>,
    /// Keys of the dedup domains in which it sends to this peer. Secret.
    pub domains: Vec<[u8; 32]>,
}

/// A message of the control stream.
#[derive(Clone, PartialEq, Eq)]
pub enum Control {
    /// First message in each direction.
    Hello {
        /// Oldest version the sender speaks.
        version_min: u16,
        /// Newest version the sender speaks.
        version_max: u16,
        /// The sender's process.
        instance: InstanceId,
        /// The sender's configured name.
        name: String,
        /// Pages the sender's store can hold.
        store_pages: u64,
        /// Bytes of frames the sender is ready to hold undelivered, all migrations together.
        receive_budget: u64,
        /// Places of a main channel that the sender remembers at most.
        places: u64,
        /// Processes before the sender's of which it knows which commit bytes they released.
        predecessors: Vec<InstanceId>,
    },
    /// Opens a channel (near to far).
    Open {
        /// The migration; its first channel creates it.
        migration: MigrationId,
        /// The new channel.
        channel: ChannelNo,
        /// How its forward direction is encoded.
        kind: StreamKind,
        /// Dial at once instead of with the first bytes (the server speaks first).
        dial_now: bool,
        /// Where the far gateway connects to.
        target: String,
        /// Key of the dedup domain. Secret.
        domain: [u8; 32],
    },
    /// The channel's target has accepted the connection (far to near).
    Opened {
        /// The migration.
        migration: MigrationId,
        /// The channel.
        channel: ChannelNo,
    },
    /// All frames before `next_seq` were handed to the VMM.
    Ack {
        /// The migration.
        migration: MigrationId,
        /// The channel; the direction is the one towards the sender of this message.
        channel: ChannelNo,
        /// Frames delivered so far.
        next_seq: u64,
    },
    /// References of a frame that the receiver can't resolve.
    Miss {
        /// The migration.
        migration: MigrationId,
        /// The channel.
        channel: ChannelNo,
        /// The frame.
        seq: u64,
        /// Which of its references, ascending.
        indexes: Vec<u32>,
    },
    /// The channel ends early, both directions.
    Reset {
        /// The migration.
        migration: MigrationId,
        /// The channel.
        channel: ChannelNo,
        /// Frames (towards the receiver of this message) that come first; the reset takes effect
        /// behind them.
        after_seq: u64,
        /// Why.
        code: ResetCode,
        /// The commit byte has been handed to the destination.
        released: bool,
        /// Why, for people.
        reason: String,
    },
    /// The source's stream is complete up to the commit byte; compare and release (near to far).
    Commit {
        /// The migration.
        migration: MigrationId,
        /// The channel that holds the commit byte.
        channel: ChannelNo,
        /// Digest of every channel; that of `channel` ends right before the commit byte.
        digests: Vec<ChannelDigest>,
        /// The near gateway's clock when the source was still there, as in [`Pong`](Self::Pong).
        clock: u64,
    },
    /// Is the commit still asked for? The answer is the request once more (far to near).
    AskCommit {
        /// The migration.
        migration: MigrationId,
    },
    /// Digests agreed and the commit byte was released (far to near).
    Committed {
        /// The migration.
        migration: MigrationId,
    },
    /// After a reconnect: what the near gateway waits for (near to far).
    Resume {
        /// The migration.
        migration: MigrationId,
        /// Position of each channel's reverse direction.
        channels: Vec<ChannelPosition>,
    },
    /// Answer to resume (far to near).
    Resumed {
        /// The migration.
        migration: MigrationId,
        /// The far gateway still has the migration.
        known: bool,
        /// The commit byte has been released.
        released: bool,
        /// Position of each channel's forward direction.
        channels: Vec<ChannelPosition>,
    },
    /// First message of the near gateway on a new connection: the migrations that it still has.
    /// The far gateway gives up all others of this peer.
    Live {
        /// Their ids.
        migrations: Vec<MigrationId>,
    },
    /// Asks for announcements, once on a connection (near to far).
    Interest(Interest),
    /// Asks to build a main channel on a manifest (near to far).
    Adopt {
        /// The migration.
        migration: MigrationId,
        /// The channel.
        channel: ChannelNo,
        /// Which.
        manifest: [u8; 16],
    },
    /// Answer to adopt (far to near).
    Adopted {
        /// The migration.
        migration: MigrationId,
        /// The channel.
        channel: ChannelNo,
        /// Which was asked for.
        manifest: [u8; 16],
        /// It is here and may be adopted.
        agreed: bool,
    },
    /// The migration is over for the near gateway; the far one may forget it.
    Close {
        /// The migration.
        migration: MigrationId,
    },
    /// Are you there?
    Ping {
        /// Returned in the answer.
        nonce: u64,
    },
    /// I am.
    Pong {
        /// From the ping.
        nonce: u64,
        /// The sender's clock in microseconds. It goes on while its machine is suspended; from where it
        /// counts is the sender's own affair.
        clock: u64,
    },
}

impl std::fmt::Debug for Control {
    /// Never prints the domain key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "control message {}", self.wire_type())
    }
}

impl Control {
    fn wire_type(&self) -> u8 {
        match self {
            Self::Hello { .. } => 1,
            Self::Open { .. } => 2,
            Self::Opened { .. } => 3,
            Self::Ack { .. } => 4,
            Self::Miss { .. } => 5,
            Self::Reset { .. } => 6,
            Self::Commit { .. } => 7,
            Self::Committed { .. } => 8,
            Self::Resume { .. } => 9,
            Self::Resumed { .. } => 10,
            Self::Close { .. } => 11,
            Self::Ping { .. } => 12,
            Self::Pong { .. } => 13,
            Self::Live { .. } => 14,
            Self::Interest(_) => 15,
            Self::Adopt { .. } => 16,
            Self::Adopted { .. } => 17,
            Self::AskCommit { .. } => 18,
        }
    }

    /// Appends the message with its length field.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.push(self.wire_type());
        self.put_fields(out);
        // Every field is limited, so a message is always far below 4 GiB.
        let len = u32::try_from(out.len() - start - 4).unwrap_or(u32::MAX);
        out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    }

    fn put_fields(&self, out: &mut Vec<u8>) {
        let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
        match self {
            Self::Hello {
                version_min,
                version_max,
                instance,
                name,
                store_pages,
                receive_budget,
                places,
                predecessors,
            } => {
                put(&MAGIC);
                put(&version_min.to_le_bytes());
                put(&version_max.to_le_bytes());
                put(instance);
                put(&store_pages.to_le_bytes());
                put(&receive_budget.to_le_bytes());
                put(&places.to_le_bytes());
                put_string(out, name, MAX_STRING);
                put_list(out, predecessors, |out, item| out.extend_from_slice(item));
            }
            Self::Open {
                migration,
                channel,
                kind,
                dial_now,
                target,
                domain,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put(&[
                    if *kind == StreamKind::QemuMain { 1 } else { 2 },
                    u8::from(*dial_now),
                ]);
                put(domain);
                put_string(out, target, MAX_STRING);
            }
            Self::Committed { migration }
            | Self::AskCommit { migration }
            | Self::Close { migration } => put(&migration.0),
            Self::Resume {
                migration,
                channels,
            } => {
                put(&migration.0);
                put_positions(out, channels);
            }
            Self::Resumed {
                migration,
                known,
                released,
                channels,
            } => {
                put(&migration.0);
                put(&[u8::from(*known), u8::from(*released)]);
                put_positions(out, channels);
            }
            Self::Live { migrations } => {
                put_list(out, migrations, |out, id| out.extend_from_slice(&id.0));
            }
            Self::Interest(interest) => {
                put(&interest.store);
                put(&interest.capacity_pages.to_le_bytes());
                put_list(out, &interest.segments, |out, (segment, records)| {
                    out.extend_from_slice(&segment.to_le_bytes());
                    out.extend_from_slice(&records.to_le_bytes());
                });
                put_list(out, &interest.domains, |out, key| {
                    out.extend_from_slice(key)
                });
            }
            Self::Ping { nonce } => put(&nonce.to_le_bytes()),
            Self::Pong { nonce, clock } => {
                put(&nonce.to_le_bytes());
                put(&clock.to_le_bytes());
            }
            Self::Opened { .. }
            | Self::Ack { .. }
            | Self::Miss { .. }
            | Self::Reset { .. }
            | Self::Commit { .. }
            | Self::Adopt { .. }
            | Self::Adopted { .. } => self.put_channel_fields(out),
        }
    }

    /// The fields of messages about one open channel; nothing for all others.
    fn put_channel_fields(&self, out: &mut Vec<u8>) {
        let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
        match self {
            Self::Opened { migration, channel } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
            }
            Self::Ack {
                migration,
                channel,
                next_seq,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put(&next_seq.to_le_bytes());
            }
            Self::Miss {
                migration,
                channel,
                seq,
                indexes,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put(&seq.to_le_bytes());
                put_list(out, indexes, |out, index| {
                    out.extend_from_slice(&index.to_le_bytes())
                });
            }
            Self::Reset {
                migration,
                channel,
                after_seq,
                code,
                released,
                reason,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put(&after_seq.to_le_bytes());
                put(&[code.to_wire(), u8::from(*released)]);
                put_string(out, reason, MAX_STRING);
            }
            Self::Commit {
                migration,
                channel,
                digests,
                clock,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put_list(out, digests, |out, item| {
                    out.extend_from_slice(&item.channel.to_le_bytes());
                    out.extend_from_slice(&item.offset.to_le_bytes());
                    out.extend_from_slice(&item.digest);
                });
                out.extend_from_slice(&clock.to_le_bytes());
            }
            Self::Adopt {
                migration,
                channel,
                manifest,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put(manifest);
            }
            Self::Adopted {
                migration,
                channel,
                manifest,
                agreed,
            } => {
                put(&migration.0);
                put(&channel.to_le_bytes());
                put(manifest);
                put(&[u8::from(*agreed)]);
            }
            _ => {}
        }
    }

    /// Reads a message: `bytes` is type and fields, without the length field.
    ///
    /// # Errors
    /// Anything that is not exactly one message of this protocol version.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let kind = r.u8()?;
        let message = match kind {
            1 => hello(&mut r)?,
            2 => Self::Open {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                kind: match r.u8()? {
                    1 => StreamKind::QemuMain,
                    2 => StreamKind::Opaque,
                    _ => return Err(WireError::BadValue("kind")),
                },
                dial_now: r.bool("dial_now")?,
                domain: r.array()?,
                target: r.string("target", MAX_STRING)?,
            },
            3 => Self::Opened {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
            },
            4 => Self::Ack {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                next_seq: r.u64()?,
            },
            5 => Self::Miss {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                seq: r.u64()?,
                indexes: r.list("indexes", MAX_MISSED, Reader::u32)?,
            },
            6 => Self::Reset {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                after_seq: r.u64()?,
                code: ResetCode::from_wire(r.u8()?)?,
                released: r.bool("released")?,
                reason: r.string("reason", MAX_STRING)?,
            },
            7 => Self::Commit {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                digests: digests(&mut r)?,
                clock: r.u64()?,
            },
            8 => Self::Committed {
                migration: MigrationId(r.array()?),
            },
            9 => Self::Resume {
                migration: MigrationId(r.array()?),
                channels: positions(&mut r)?,
            },
            10 => Self::Resumed {
                migration: MigrationId(r.array()?),
                known: r.bool("known")?,
                released: r.bool("released")?,
                channels: positions(&mut r)?,
            },
            11 => Self::Close {
                migration: MigrationId(r.array()?),
            },
            12 => Self::Ping { nonce: r.u64()? },
            13 => Self::Pong {
                nonce: r.u64()?,
                clock: r.u64()?,
            },
            15 => Self::Interest(Interest {
                store: r.array()?,
                capacity_pages: r.u64()?,
                segments: r.list("segments", MAX_KNOWN_SEGMENTS, |r| Ok((r.u32()?, r.u32()?)))?,
                domains: r.list("domains", MAX_DOMAINS, Reader::array)?,
            }),
            14 => Self::Live {
                migrations: r.list("migrations", MAX_MIGRATIONS, |r| {
                    Ok(MigrationId(r.array()?))
                })?,
            },
            16 => Self::Adopt {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                manifest: r.array()?,
            },
            17 => Self::Adopted {
                migration: MigrationId(r.array()?),
                channel: r.u32()?,
                manifest: r.array()?,
                agreed: r.bool("agreed")?,
            },
            18 => Self::AskCommit {
                migration: MigrationId(r.array()?),
            },
            other => return Err(WireError::UnknownType(other)),
        };
        r.end()?;
        Ok(message)
    }
}

/// The fields of a hello.
fn hello(r: &mut Reader<'_>) -> Result<Control, WireError> {
    if r.array::<4>()? != MAGIC {
        return Err(WireError::BadValue("magic"));
    }
    Ok(Control::Hello {
        version_min: r.u16()?,
        version_max: r.u16()?,
        instance: r.array()?,
        store_pages: r.u64()?,
        receive_budget: r.u64()?,
        places: r.u64()?,
        name: r.string("name", MAX_STRING)?,
        predecessors: r.list("predecessors", MAX_PREDECESSORS, Reader::array)?,
    })
}

fn digests(r: &mut Reader<'_>) -> Result<Vec<ChannelDigest>, WireError> {
    r.list("digests", MAX_CHANNELS, |r| {
        Ok(ChannelDigest {
            channel: r.u32()?,
            offset: r.u64()?,
            digest: r.array()?,
        })
    })
}

fn positions(r: &mut Reader<'_>) -> Result<Vec<ChannelPosition>, WireError> {
    r.list("channels", MAX_CHANNELS, |r| {
        Ok(ChannelPosition {
            channel: r.u32()?,
            next_seq: r.u64()?,
        })
    })
}

fn put_positions(out: &mut Vec<u8>, channels: &[ChannelPosition]) {
    put_list(out, channels, |out, item| {
        out.extend_from_slice(&item.channel.to_le_bytes());
        out.extend_from_slice(&item.next_seq.to_le_bytes());
    });
}

fn put_list<T>(out: &mut Vec<u8>, items: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
    out.extend_from_slice(&u32::try_from(items.len()).unwrap_or(u32::MAX).to_le_bytes());
    items.iter().for_each(|item| put(out, item));
}

#[cfg(test)]
mod tests;
