//! The receiving side of one direction of a channel: frames back in order, each once.

use std::collections::BTreeMap;

use tokio::sync::OwnedSemaphorePermit;

use crate::wire::DataFlags;

/// How far ahead of the next frame others are accepted. At the smallest useful frame of 4 KiB of
/// wire bytes this covers 64 MiB in flight.
const MAX_REORDER: u64 = 16 << 10;

/// A received frame.
#[derive(Debug)]
pub struct InFrame {
    /// Its position in the direction.
    pub seq: u64,
    /// Marks.
    pub flags: DataFlags,
    /// The encoded frame.
    pub payload: Vec<u8>,
    /// Its share of the memory limit; given back when it has been decoded.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// How a peer broke the rules of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// The frame is too far ahead.
    #[error("frame {seq} is more than {MAX_REORDER} ahead of {next}")]
    TooFarAhead {
        /// The frame.
        seq: u64,
        /// The one that is waited for.
        next: u64,
    },
    /// The frame lies behind the end of the direction.
    #[error("frame {0} lies behind the end")]
    BehindEnd(u64),
}

/// Frames of one direction, from arrival to delivery.
#[derive(Debug, Default)]
pub struct RecvHalf {
    waiting: BTreeMap<u64, InFrame>,
    next: u64,
    delivered: u64,
    end: Option<u64>,
}

impl RecvHalf {
    /// Whether the frame is wanted: neither taken nor waiting already.
    #[must_use]
    pub fn wants(&self, seq: u64) -> bool {
        seq >= self.next && !self.waiting.contains_key(&seq)
    }

    /// Takes a frame in any order; duplicates are dropped.
    ///
    /// # Errors
    /// The peer broke the rules.
    pub fn on_frame(&mut self, frame: InFrame) -> Result<(), RecvError> {
        if frame.seq > self.next + MAX_REORDER {
            return Err(RecvError::TooFarAhead {
                seq: frame.seq,
                next: self.next,
            });
        }
        if self.end.is_some_and(|end| frame.seq > end) {
            return Err(RecvError::BehindEnd(frame.seq));
        }
        if self.wants(frame.seq) {
            if frame.flags.end {
                if let Some((&last, _)) = self.waiting.last_key_value()
                    && last > frame.seq
                {
                    return Err(RecvError::BehindEnd(last));
                }
                self.end = Some(frame.seq);
            }
            self.waiting.insert(frame.seq, frame);
        }
        Ok(())
    }

    /// Whether the next frame has arrived.
    #[must_use]
    pub fn has_next(&self) -> bool {
        self.waiting.contains_key(&self.next)
    }

    /// The next frame in order, if it has arrived.
    pub fn poll_frame(&mut self) -> Option<InFrame> {
        let frame = self.waiting.remove(&self.next)?;
        self.next += 1;
        Some(frame)
    }

    /// The frame that [`poll_frame`](Self::poll_frame) waits for: all before it need not be sent
    /// again.
    #[must_use]
    pub const fn next_seq(&self) -> u64 {
        self.next
    }

    /// All frames before `seq` have been handed over.
    pub fn on_delivered(&mut self, seq: u64) {
        self.delivered = self.delivered.max(seq);
    }

    /// Frames handed over.
    #[must_use]
    pub const fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Whether the end has been handed over.
    #[must_use]
    pub fn done(&self) -> bool {
        self.end.is_some_and(|end| self.delivered > end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(seq: u64, end: bool) -> InFrame {
        let flags = DataFlags {
            end,
            ..DataFlags::default()
        };
        InFrame {
            seq,
            flags,
            payload: vec![],
            permit: None,
        }
    }

    #[test]
    fn refusals() {
        let mut half = RecvHalf::default();
        assert!(half.on_frame(frame(MAX_REORDER + 1, false)).is_err());
        half.on_frame(frame(2, true)).unwrap();
        assert_eq!(half.on_frame(frame(3, false)), Err(RecvError::BehindEnd(3)));
        let mut half = RecvHalf::default();
        half.on_frame(frame(3, false)).unwrap();
        assert_eq!(half.on_frame(frame(2, true)), Err(RecvError::BehindEnd(3)));
    }

    proptest! {
        /// Any order of arrival, with duplicates, comes out in order and once.
        #[test]
        fn in_order_and_once(mut order in Just((0..40_u64).collect::<Vec<_>>()).prop_shuffle(),
                             again in proptest::collection::vec(0..40_u64, 0..40)) {
            order.extend(again);
            let mut half = RecvHalf::default();
            let mut out = Vec::new();
            for seq in order {
                half.on_frame(frame(seq, seq == 39)).unwrap();
                while let Some(frame) = half.poll_frame() {
                    out.push(frame.seq);
                    half.on_delivered(frame.seq + 1);
                }
            }
            prop_assert_eq!(out, (0..40).collect::<Vec<_>>());
            prop_assert!(half.done());
        }
    }
}
