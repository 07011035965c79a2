//! How streams share a connection: the order in which quinn sends them, on which the scheduler of
//! frames relies.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod sim;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quinn::Connection;
use sim::{Pair, send_bulk};
use skyferry::transport::TransportSettings;
use skyferry::transport::simulated::LinkModel;
use tokio::time::{Instant, sleep};

const SEED: u64 = 11;

/// Streams in the order of their completion at the receiver, with the time of each.
type Completed = Arc<Mutex<Vec<(u64, Instant)>>>;

/// Reads all streams and notes when each was complete.
fn collect(connection: &Connection) -> Completed {
    let completed = Completed::default();
    let (connection, list) = (connection.clone(), Arc::clone(&completed));
    tokio::spawn(async move {
        while let Ok(mut stream) = connection.accept_uni().await {
            let list = Arc::clone(&list);
            tokio::spawn(async move {
                // Streams end unread when the sender closes the connection.
                if stream.read_to_end(2 << 20).await.is_err() {
                    return;
                }
                let entry = (stream.id().index(), Instant::now());
                list.lock().unwrap().push(entry);
            });
        }
    });
    completed
}

/// Opens `count` streams of 100 KiB, all queued at once, stream `n` with `priority(n)`.
async fn queue(connection: &Connection, count: u64, priority: impl Fn(u64) -> i32) {
    let data = Bytes::from(vec![0x33; 100 << 10]);
    for index in 0..count {
        let mut stream = connection.open_uni().await.unwrap();
        stream.set_priority(priority(index)).unwrap();
        stream.write_chunk(data.clone()).await.unwrap();
        stream.finish().unwrap();
    }
}

/// How far a stream's completion is from its place in the order of opening, at most.
fn worst_displacement(completed: &Completed) -> u64 {
    let completed = completed.lock().unwrap();
    completed
        .iter()
        .enumerate()
        .map(|(place, &(index, _))| index.abs_diff(place as u64))
        .max()
        .unwrap()
}

async fn wait_for(completed: &Completed, count: usize) {
    while completed.lock().unwrap().len() < count {
        sleep(Duration::from_millis(10)).await;
    }
}

/// With falling priorities, frames arrive in the order in which they were queued.
#[tokio::test(start_paused = true)]
async fn older_streams_complete_first() {
    let model = LinkModel::new(100, Duration::from_millis(40), 2.0);
    let pair = Pair::connect(&model, &TransportSettings::default(), SEED).await;
    let completed = collect(&pair.far_connection);
    queue(&pair.near_connection, 200, |index| -(index as i32)).await;
    wait_for(&completed, 200).await;
    assert_eq!(worst_displacement(&completed), 0);
}

/// With loss too: what is sent again of an older stream goes before everything newer, so a loss
/// delays its stream by a round trip and others not at all. One round trip of this link holds ten
/// frames.
#[tokio::test(start_paused = true)]
async fn retransmissions_of_older_streams_go_first() {
    let model = LinkModel::new(100, Duration::from_millis(40), 1.0).with_loss(0.005);
    let frames_per_rtt = 10;
    let run = async |priority: fn(u64) -> i32| {
        let pair = Pair::connect(&model, &TransportSettings::default(), SEED).await;
        let completed = collect(&pair.far_connection);
        queue(&pair.near_connection, 400, priority).await;
        wait_for(&completed, 400).await;
        pair.near_connection.close(0u32.into(), b"done");
        worst_displacement(&completed)
    };
    let falling = run(|index| -(index as i32)).await;
    let equal = run(|_| 0).await;
    println!("frames late at 0.5 % loss: {falling} with falling, {equal} with equal priorities");
    assert!(falling <= 3 * frames_per_rtt);
    assert!(equal > 100);
}

/// A small urgent stream overtakes what is queued: it arrives one way plus about a third of a round
/// trip after it was written, at any time during a bulk transfer.
#[tokio::test(start_paused = true)]
async fn an_urgent_stream_does_not_wait_for_bulk() {
    for (megabits, delay, frame_bytes) in [
        (200, Duration::from_millis(30), 256 << 10),
        (200, Duration::from_millis(30), 1 << 20),
        (20, Duration::from_millis(75), 256 << 10),
        (20, Duration::from_millis(75), 1 << 20),
    ] {
        let model = LinkModel::new(megabits, delay, 1.0);
        let pair = Pair::connect(&model, &TransportSettings::default(), SEED).await;
        let completed = collect(&pair.far_connection);
        send_bulk(&pair.near_connection, frame_bytes, (8 << 20) / frame_bytes);
        sleep(Duration::from_secs(4)).await;
        let mut worst = Duration::ZERO;
        for _ in 0..60 {
            sleep(Duration::from_millis(87)).await;
            let mut stream = pair.near_connection.open_uni().await.unwrap();
            stream.set_priority(i32::MAX).unwrap();
            let begin = Instant::now();
            stream.write_all(&[0x77; 10_000]).await.unwrap();
            stream.finish().unwrap();
            stream.stopped().await.unwrap();
            let index = stream.id().index();
            let completed = completed.lock().unwrap();
            let &(_, end) = completed.iter().find(|entry| entry.0 == index).unwrap();
            worst = worst.max(end - begin);
        }
        println!(
            "{megabits} Mbit/s, RTT {:?}, frames of {} KiB: urgent 10 kB in at most {worst:?}",
            delay * 2,
            frame_bytes >> 10
        );
        assert!(worst <= delay + (delay * 2).mul_f64(0.35), "{worst:?}");

        pair.near_connection.close(0u32.into(), b"done");
    }
}
