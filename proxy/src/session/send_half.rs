//! The sending side of one direction of a channel.

use std::{collections::VecDeque, time::Instant};

use bytes::Bytes;
use skyferry_dedup::Retained;
use tokio::sync::OwnedSemaphorePermit;

use crate::wire::DataFlags;

/// What a frame is for; later ones go before earlier ones on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Copying while the guest runs.
    Bulk,
    /// The guest has stopped: every byte is downtime.
    Switchover,
    /// Return path and answers to misses.
    Urgent,
}

/// A frame that has not been delivered yet.
#[derive(Debug)]
pub struct OutFrame {
    /// The encoded frame.
    pub payload: Bytes,
    /// Marks for the receiver.
    pub flags: DataFlags,
    /// Stream bytes the frame stands for.
    pub raw_len: u32,
    /// Contents of the pages it refers to, for misses.
    pub retained: Retained,
    /// Order on the wire.
    pub class: Class,
    /// When its bytes were accepted.
    pub accepted_at: Instant,
    /// The frame's share of the memory limits; given back on delivery.
    pub permits: Vec<OwnedSemaphorePermit>,
}

/// A frame to put on the wire.
#[derive(Debug)]
pub struct Transmit {
    /// Its position in the direction.
    pub seq: u64,
    /// Marks.
    pub flags: DataFlags,
    /// Order on the wire.
    pub class: Class,
    /// Contents; shared, not copied.
    pub payload: Bytes,
}

/// What an acknowledgement brought.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Acked {
    /// Stream bytes newly delivered.
    pub guest: u64,
    /// Wire bytes that carried them.
    pub wire: u64,
    /// When the oldest of them was accepted.
    pub oldest: Option<Instant>,
}

/// Frames of one direction, from acceptance to delivery.
///
/// Invariant: `acked ≤ next_transmit ≤ acked + frames.len()`; `frames[0]` has the number `acked`.
#[derive(Debug, Default)]
pub struct SendHalf {
    frames: VecDeque<OutFrame>,
    acked: u64,
    next_transmit: u64,
    guest_in_flight: u64,
    wire_in_flight: u64,
    ended: bool,
}

impl SendHalf {
    /// An empty direction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a frame behind the last one; returns its number.
    pub fn push(&mut self, frame: OutFrame) -> u64 {
        debug_assert!(!self.ended, "a frame behind the end");
        self.guest_in_flight += u64::from(frame.raw_len);
        self.wire_in_flight += frame.payload.len() as u64;
        self.ended |= frame.flags.end;
        self.frames.push_back(frame);
        self.next_seq() - 1
    }

    /// The number of the next frame to be pushed.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.acked + self.frames.len() as u64
    }

    /// Whether the last frame of the direction has been pushed.
    #[must_use]
    pub const fn ended(&self) -> bool {
        self.ended
    }

    /// Whether everything, the end included, was delivered.
    #[must_use]
    pub fn done(&self) -> bool {
        self.ended && self.frames.is_empty()
    }

    /// Stream bytes accepted and not delivered.
    #[must_use]
    pub const fn guest_in_flight(&self) -> u64 {
        self.guest_in_flight
    }

    /// Frames not delivered.
    #[must_use]
    pub fn frames_in_flight(&self) -> usize {
        self.frames.len()
    }

    /// Bytes of frames not delivered.
    #[must_use]
    pub const fn wire_in_flight(&self) -> u64 {
        self.wire_in_flight
    }

    /// The next frame to put on the wire, if any.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        let index = usize::try_from(self.next_transmit - self.acked).ok()?;
        let frame = self.frames.get(index)?;
        let transmit = Transmit {
            seq: self.next_transmit,
            flags: frame.flags,
            class: frame.class,
            payload: frame.payload.clone(),
        };
        self.next_transmit += 1;
        Some(transmit)
    }

    /// The connection is a new one, and the peer waits for frame `next_seq`: frames from there on
    /// go out again. False when the peer names a frame that it can't be waiting for.
    #[must_use]
    pub fn rewind(&mut self, next_seq: u64) -> bool {
        if next_seq < self.acked || next_seq > self.next_seq() {
            return false;
        }
        self.next_transmit = next_seq;
        true
    }

    /// The peer delivered all frames before `next_seq`. `None` when that can't be.
    pub fn on_ack(&mut self, next_seq: u64) -> Option<Acked> {
        // Frames from a connection that is gone may be acknowledged after a rewind, so the limit
        // is what was pushed, not what was put on the wire since.
        if next_seq > self.next_seq() {
            return None;
        }
        let mut acked = Acked::default();
        while self.acked < next_seq {
            let frame = self.frames.pop_front()?;
            self.acked += 1;
            acked.guest += u64::from(frame.raw_len);
            acked.wire += frame.payload.len() as u64;
            acked.oldest.get_or_insert(frame.accepted_at);
        }
        self.guest_in_flight -= acked.guest;
        self.wire_in_flight -= acked.wire;
        self.next_transmit = self.next_transmit.max(self.acked);
        Some(acked)
    }

    /// Nothing will be delivered any more: drops what waits and returns how many stream bytes that
    /// was. Acknowledgements that come later find nothing left to count.
    pub fn give_up(&mut self) -> u64 {
        self.acked = self.next_seq();
        self.next_transmit = self.acked;
        self.frames.clear();
        self.wire_in_flight = 0;
        std::mem::take(&mut self.guest_in_flight)
    }

    /// An undelivered frame, for answering a miss.
    #[must_use]
    pub fn frame(&self, seq: u64) -> Option<&OutFrame> {
        self.frames
            .get(usize::try_from(seq.checked_sub(self.acked)?).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(raw_len: u32, end: bool) -> OutFrame {
        OutFrame {
            payload: Bytes::from(vec![1; raw_len as usize / 2]),
            flags: DataFlags {
                end,
                ..DataFlags::default()
            },
            raw_len,
            retained: Retained::default(),
            class: Class::Bulk,
            accepted_at: Instant::now(),
            permits: Vec::new(),
        }
    }

    #[test]
    fn a_frame_lives_until_it_is_delivered() {
        let mut half = SendHalf::new();
        assert_eq!(half.push(frame(100, false)), 0);
        assert_eq!(half.push(frame(60, true)), 1);
        assert_eq!(half.poll_transmit().map(|t| t.seq), Some(0));
        assert_eq!(half.poll_transmit().map(|t| t.seq), Some(1));
        assert!(half.poll_transmit().is_none());
        assert!(half.rewind(0));
        assert_eq!(half.poll_transmit().map(|t| t.seq), Some(0));
        let acked = half.on_ack(1).unwrap();
        assert_eq!((acked.guest, acked.wire), (100, 50));
        assert!(half.frame(0).is_none() && half.frame(1).is_some());
        assert!(!half.rewind(0), "frame 0 is gone");
        assert!(!half.rewind(3), "there is no frame 2");
        assert!(half.on_ack(3).is_none());
        assert!(!half.done());
        assert_eq!(half.on_ack(2).unwrap().guest, 60);
        assert!(half.done());
        assert_eq!((half.guest_in_flight(), half.wire_in_flight()), (0, 0));
    }

    #[test]
    fn bytes_are_counted_as_delivered_or_given_up_and_never_as_both() {
        let mut half = SendHalf::new();
        half.push(frame(100, false));
        half.push(frame(60, false));
        assert_eq!(half.on_ack(1).unwrap().guest, 100);
        assert_eq!(half.give_up(), 60);
        // One that was on its way.
        assert_eq!(half.on_ack(2).unwrap(), Acked::default());
        assert_eq!((half.give_up(), half.guest_in_flight()), (0, 0));
        assert!(half.on_ack(3).is_none());
        assert!(half.poll_transmit().is_none());
    }

    proptest! {
        /// Whatever the order of pushes, transmissions, acknowledgements and reconnects: what is
        /// put on the wire between two rewinds is gapless, and nothing undelivered is lost.
        #[test]
        fn gapless(ops in proptest::collection::vec((0..4_u8, 0..8_u64), 1..200)) {
            let mut half = SendHalf::new();
            let (mut pushed, mut delivered, mut expected) = (0_u64, 0_u64, 0_u64);
            for (op, value) in ops {
                match op {
                    0 => { prop_assert_eq!(half.push(frame(10, false)), pushed); pushed += 1; }
                    1 => if let Some(t) = half.poll_transmit() {
                        prop_assert_eq!(t.seq, expected);
                        expected += 1;
                    } else {
                        prop_assert_eq!(expected, pushed);
                    },
                    2 => {
                        let to = delivered + value;
                        prop_assert_eq!(half.on_ack(to).is_some(), to <= pushed);
                        if to <= pushed { delivered = to; expected = expected.max(to); }
                    }
                    _ => {
                        let to = delivered + value;
                        prop_assert_eq!(half.rewind(to), to <= pushed);
                        if to <= pushed { expected = to; }
                    }
                }
                prop_assert_eq!(half.guest_in_flight(), (pushed - delivered) * 10);
            }
        }
    }
}
