//! The two halves of a channel's direction over a link that loses, repeats and breaks.

use std::time::Instant;

use skyferry::session::{Class, InFrame, OutFrame, RecvHalf, SendHalf};
use skyferry::wire::DataFlags;

fn frame(number: u64, end: bool) -> OutFrame {
    OutFrame {
        payload: number.to_le_bytes().to_vec().into(),
        flags: DataFlags {
            end,
            ..DataFlags::default()
        },
        raw_len: 8,
        retained: skyferry_dedup::Retained::default(),
        class: Class::Bulk,
        accepted_at: Instant::now(),
        permits: Vec::new(),
    }
}

/// Each byte is an operation: two bits of what, six bits of which. Whatever happens, frames come out
/// once and in order, nothing that the receiver may ask for is gone, and in the end all have come.
pub(crate) fn operations(data: &[u8]) {
    let (mut sender, mut receiver) = (SendHalf::new(), RecvHalf::default());
    let mut on_the_way: Vec<InFrame> = Vec::new();
    let (mut pushed, mut taken) = (0, 0);
    for byte in data {
        let which = usize::from(byte >> 2);
        match byte & 3 {
            0 => {
                assert_eq!(sender.push(frame(pushed, false)), pushed);
                pushed += 1;
                transmit(&mut sender, &mut on_the_way, which);
            }
            1 => deliver(&mut receiver, &mut on_the_way, which, &mut taken),
            2 => {
                let acked = sender.on_ack(receiver.delivered()).expect("a true one");
                assert_eq!(acked.guest % 8, 0);
                // What was never made can't be acknowledged.
                assert!(sender.on_ack(pushed + 1 + which as u64).is_none());
            }
            _ => {
                // The connection breaks. Frames of the old one are gone, but for one straggler.
                let straggler = on_the_way.pop();
                on_the_way.clear();
                on_the_way.extend(straggler);
                assert!(sender.rewind(receiver.next_seq()), "a frame is gone");
                assert!(!sender.rewind(pushed + 1));
            }
        }
        assert!(receiver.delivered() <= receiver.next_seq() && receiver.next_seq() <= pushed);
    }
    sender.push(frame(pushed, true));
    assert!(sender.rewind(receiver.next_seq()));
    transmit(&mut sender, &mut on_the_way, usize::MAX);
    while !on_the_way.is_empty() {
        deliver(&mut receiver, &mut on_the_way, 0, &mut taken);
    }
    assert_eq!(taken, pushed + 1);
    assert!(receiver.done());
    assert!(sender.on_ack(receiver.delivered()).is_some() && sender.done());
    assert_eq!((sender.guest_in_flight(), sender.wire_in_flight()), (0, 0));
}

fn transmit(sender: &mut SendHalf, on_the_way: &mut Vec<InFrame>, most: usize) {
    for _ in 0..most {
        let Some(next) = sender.poll_transmit() else {
            return;
        };
        on_the_way.push(InFrame {
            seq: next.seq,
            flags: next.flags,
            payload: next.payload.to_vec(),
            permit: None,
        });
    }
}

fn deliver(receiver: &mut RecvHalf, on_the_way: &mut Vec<InFrame>, which: usize, taken: &mut u64) {
    if on_the_way.is_empty() {
        return;
    }
    let frame = on_the_way.swap_remove(which % on_the_way.len());
    receiver.on_frame(frame).expect("a frame in its place");
    while let Some(frame) = receiver.poll_frame() {
        assert_eq!(frame.seq, *taken);
        assert_eq!(frame.payload, taken.to_le_bytes());
        *taken += 1;
        receiver.on_delivered(*taken);
    }
}
