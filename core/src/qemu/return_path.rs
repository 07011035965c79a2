//! The return path: what the destination tells the source on the main channel.
//!
//! ```text
//! message := be16 type, be16 len, data[len]
//! RECV_BITMAP is followed by be64 size, bitmap[size], be64 0x0123456789ABCDEF, outside its len
//! ```
//!
//! The reader only looks on: it changes, holds and delays nothing. It stops understanding for good at
//! the first message that a source would reject.

/// Longest data of a message; the source rejects more (QEMU reads into a buffer of this size).
const MAX_DATA: usize = 512;
/// Bytes in front of the data.
const HEAD: usize = 4;
/// What ends the bitmap behind RECV_BITMAP.
const BITMAP_END: u64 = 0x0123_4567_89AB_CDEF;

/// A message of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReturnMessage {
    /// The destination's verdict; 0 means that the guest runs there. The last message.
    Shut {
        /// 0, or anything else for a failure.
        status: u32,
    },
    /// Answer to a PING, with its value.
    Pong(u32),
    /// Pages that the running guest waits for (postcopy).
    ReqPages {
        /// Byte offset inside the RAM block.
        start: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The pages of a block that have arrived (postcopy recovery); reported with the bitmap's end.
    RecvBitmap {
        /// Length of the bitmap in bytes.
        bytes: u64,
    },
    /// The destination is ready to go on (postcopy recovery).
    ResumeAck,
    /// The destination is ready for the switchover.
    SwitchoverAck,
    /// Nothing known, and nothing behind it is understood.
    Unknown {
        /// Number of the message.
        kind: u16,
    },
}

/// What the reader expects next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Message,
    BitmapSize,
    Bitmap {
        size: u64,
        left: u64,
    },
    BitmapEnd {
        size: u64,
    },
    Opaque,
}

/// Reads the return path as it passes. Memory is bounded by one message (516 bytes).
#[derive(Debug, Default)]
pub struct ReturnPath {
    state: State,
    /// The bytes of the field or message at hand.
    held: Vec<u8>,
    shut: Option<u32>,
    shut_is_last: bool,
}

impl ReturnPath {
    /// A reader for a return path on which nothing has come yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes; returns the messages that they complete, at most one for each four bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<ReturnMessage> {
        self.shut_is_last &= bytes.is_empty();
        let mut messages = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let want = match self.state {
                State::Opaque => break,
                State::Bitmap { size, left } => {
                    let taken = left.min(rest.len() as u64);
                    rest = &rest[usize::try_from(taken).unwrap_or(rest.len())..];
                    self.state = match left - taken {
                        0 => State::BitmapEnd { size },
                        left => State::Bitmap { size, left },
                    };
                    continue;
                }
                State::Message if self.held.len() < HEAD => HEAD,
                State::Message => HEAD + self.data_len(),
                State::BitmapSize | State::BitmapEnd { .. } => 8,
            };
            let taken = rest.len().min(want - self.held.len());
            self.held.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            if self.held.len() == want
                && let Some(message) = self.on_field(want)
            {
                self.shut_is_last =
                    matches!(message, ReturnMessage::Shut { .. }) && rest.is_empty();
                messages.push(message);
            }
        }
        messages
    }

    /// The status of the last SHUT so far.
    #[must_use]
    pub fn shut_seen(&self) -> Option<u32> {
        self.shut
    }

    /// Whether the bytes so far end with a whole SHUT, as they do when a migration ends in order.
    #[must_use]
    pub fn ends_with_shut(&self) -> bool {
        self.shut_is_last
    }

    /// Whether something unknown came, so that nothing more will be reported.
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        self.state == State::Opaque
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        self.held
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .unwrap_or([0; N])
    }

    fn data_len(&self) -> usize {
        usize::from(u16::from_be_bytes(self.field(2)))
    }

    /// The field at hand is complete.
    fn on_field(&mut self, len: usize) -> Option<ReturnMessage> {
        let value = u64::from_be_bytes(self.field(0));
        match self.state {
            State::Message => {
                let kind = u16::from_be_bytes(self.field(0));
                let data = self.data_len();
                if !accepts(kind, data) {
                    return Some(self.give_up(kind));
                }
                if len < HEAD + data {
                    return None;
                }
                let message = self.on_message(kind);
                self.held.clear();
                message
            }
            State::BitmapSize => {
                self.held.clear();
                self.state = match value {
                    0 => State::BitmapEnd { size: 0 },
                    size => State::Bitmap { size, left: size },
                };
                None
            }
            State::BitmapEnd { size } if value == BITMAP_END => {
                self.held.clear();
                self.state = State::Message;
                Some(ReturnMessage::RecvBitmap { bytes: size })
            }
            _ => Some(self.give_up(kind::RECV_BITMAP)),
        }
    }

    fn on_message(&mut self, kind: u16) -> Option<ReturnMessage> {
        let word = u32::from_be_bytes(self.field(HEAD));
        Some(match kind {
            kind::SHUT => {
                self.shut = Some(word);
                ReturnMessage::Shut { status: word }
            }
            kind::PONG => ReturnMessage::Pong(word),
            kind::REQ_PAGES_ID | kind::REQ_PAGES => ReturnMessage::ReqPages {
                start: u64::from_be_bytes(self.field(HEAD)),
                len: u32::from_be_bytes(self.field(HEAD + 8)),
            },
            kind::RECV_BITMAP => {
                self.state = State::BitmapSize;
                return None;
            }
            kind::RESUME_ACK => ReturnMessage::ResumeAck,
            _ => ReturnMessage::SwitchoverAck,
        })
    }

    fn give_up(&mut self, kind: u16) -> ReturnMessage {
        self.state = State::Opaque;
        self.held = Vec::new();
        ReturnMessage::Unknown { kind }
    }
}

/// Numbers of messages.
mod kind {
    pub(super) const SHUT: u16 = 1;
    pub(super) const PONG: u16 = 2;
    pub(super) const REQ_PAGES_ID: u16 = 3;
    pub(super) const REQ_PAGES: u16 = 4;
    pub(super) const RECV_BITMAP: u16 = 5;
    pub(super) const RESUME_ACK: u16 = 6;
    pub(super) const SWITCHOVER_ACK: u16 = 7;
}

/// Whether a message of this number may have `len` bytes of data.
fn accepts(kind: u16, len: usize) -> bool {
    match kind {
        kind::SHUT | kind::PONG | kind::RESUME_ACK => len == 4,
        kind::REQ_PAGES => len == 12,
        kind::REQ_PAGES_ID => (14..=MAX_DATA).contains(&len),
        kind::RECV_BITMAP => (2..=256).contains(&len),
        kind::SWITCHOVER_ACK => len == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kind of message, in hexadecimal, and what is reported.
    fn all_kinds() -> (Vec<u8>, Vec<ReturnMessage>) {
        let bytes = crate::qemu::hex(
            "0007 0000
             0002 0004 00000001
             0003 0013 0000000000003000 00001000 06 70632e72616d
             0004 000C 0000000000004000 00001000
             0005 0007 06 70632e72616d 0000000000000010 00112233445566778899aabbccddeeff
                       0123456789abcdef
             0006 0004 00000001
             0001 0004 00000000",
        );
        let messages = vec![
            ReturnMessage::SwitchoverAck,
            ReturnMessage::Pong(1),
            ReturnMessage::ReqPages {
                start: 0x3000,
                len: 0x1000,
            },
            ReturnMessage::ReqPages {
                start: 0x4000,
                len: 0x1000,
            },
            ReturnMessage::RecvBitmap { bytes: 16 },
            ReturnMessage::ResumeAck,
            ReturnMessage::Shut { status: 0 },
        ];
        (bytes, messages)
    }

    #[test]
    fn every_message_is_read_whatever_the_cut() {
        let (bytes, messages) = all_kinds();
        for cut in 0..=bytes.len() {
            let mut path = ReturnPath::new();
            let mut seen = path.feed(&bytes[..cut]);
            assert_eq!(path.ends_with_shut(), cut == bytes.len());
            seen.extend(path.feed(&bytes[cut..]));
            assert_eq!(seen, messages, "cut at {cut}");
            assert_eq!(path.shut_seen(), Some(0));
            assert!(path.ends_with_shut());
        }
        let mut path = ReturnPath::new();
        let seen: Vec<_> = bytes.iter().flat_map(|byte| path.feed(&[*byte])).collect();
        assert_eq!(seen, messages);
    }

    #[test]
    fn shut_counts_as_last_only_when_nothing_follows() {
        let mut path = ReturnPath::new();
        path.feed(&crate::qemu::hex("0001 0004 00000001 00"));
        assert_eq!(path.shut_seen(), Some(1));
        assert!(!path.ends_with_shut());
    }

    #[test]
    fn what_a_source_rejects_ends_the_reading() {
        let refused = [
            ("0000 0000", 0),
            ("0008 0000", 8),
            ("0001 0005", 1),
            ("0003 000D", 3),
            ("0003 0201", 3),
            ("0005 0101", 5),
            ("0005 0002 0161 0000000000000000 0123456789abcdee", 5),
        ];
        for (hex, kind) in refused {
            let mut path = ReturnPath::new();
            let seen = path.feed(&crate::qemu::hex(hex));
            assert_eq!(seen, [ReturnMessage::Unknown { kind }], "{hex}");
            assert!(path.is_opaque());
            assert_eq!(path.feed(&crate::qemu::hex("0001 0004 00000000")), []);
            assert_eq!(path.shut_seen(), None);
        }
    }

    #[test]
    fn a_hostile_bitmap_size_costs_no_memory() {
        let mut path = ReturnPath::new();
        path.feed(&crate::qemu::hex("0005 0002 0161 ffffffffffffffff"));
        path.feed(&vec![0; 1 << 20]);
        assert!(path.held.capacity() <= 1024);
    }
}
