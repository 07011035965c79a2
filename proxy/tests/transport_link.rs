//! The congestion controllers on a simulated link, in virtual time.
//!
//! `cargo test -p skyferry --test transport_link -- --nocapture` prints the figures.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod sim;

use std::time::Duration;

use quinn::Connection;
use quinn::congestion::{Bbr, Cubic, NewReno};
use sim::{Pair, receive_all, send_bulk};
use skyferry::config::{Config, Congestion, MAX_UDP_PAYLOAD};
use skyferry::pki;
use skyferry::transport::congestion::{DeliveryRate, Fixed};
use skyferry::transport::simulated::{Direction, LinkCounters, LinkModel};
use skyferry::transport::{TransportSettings, estimate};
use tokio::time::{Instant, sleep};

/// Every random choice in this file follows from it.
const SEED: u64 = 7;

/// Round trips that a start-up may take before the steady state is measured.
const STARTUP_RTTS: u64 = 15;

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn settings(congestion: Congestion) -> TransportSettings {
    TransportSettings {
        congestion,
        ..TransportSettings::default()
    }
}

/// Two gateways, the far one reading all it gets.
async fn connect(model: &LinkModel, settings: &TransportSettings) -> Pair {
    let pair = Pair::connect(model, settings, SEED).await;
    receive_all(&pair.far_connection);
    pair
}

fn forward(pair: &Pair) -> LinkCounters {
    pair.net.counters(Direction::Forward)
}

/// What the forward direction delivered during `time`, in bits per second, and the mean wait in
/// the queue.
async fn measure(pair: &Pair, time: Duration) -> (f64, Duration) {
    let before = forward(pair);
    sleep(time).await;
    let after = forward(pair);
    let bits = (after.delivered_bytes - before.delivered_bytes) as f64 * 8.0;
    let passed = |counters: LinkCounters| counters.delivered_packets + counters.loss_drops;
    let waited = after.queue_delay_total - before.queue_delay_total;
    let packets = (passed(after) - passed(before)).max(1) as f64;
    (
        bits / time.as_secs_f64(),
        Duration::from_secs_f64(waited.as_secs_f64() / packets),
    )
}

/// What a bulk transfer showed.
struct Figures {
    /// Delivered share of the link's capacity over the whole time, start-up included.
    overall: f64,
    /// The same without the first [`STARTUP_RTTS`].
    steady: f64,
    /// Round trips until a whole round trip ran at 90 % of the rate.
    startup_rtts: Option<u64>,
    /// Share of all packets that the queue dropped.
    queue_drops: f64,
    /// Mean queueing delay of the packets that passed the queue, in RTTs.
    queue_delay: f64,
    /// Size of packets at the end.
    packet_bytes: u16,
}

/// Sends as fast as the controller allows for `seconds`, and prints what came of it.
async fn bulk(model: &LinkModel, congestion: Congestion, seconds: u64) -> Figures {
    bulk_with(model, &settings(congestion), seconds).await
}

async fn bulk_with(model: &LinkModel, settings: &TransportSettings, seconds: u64) -> Figures {
    let pair = connect(model, settings).await;
    let congestion = settings.congestion;
    send_bulk(&pair.near_connection, 256 << 10, 256);
    let rtt = model.delay * 2;
    let capacity = model.bits_per_sec as f64 / 8.0 * rtt.as_secs_f64();
    let rounds = (Duration::from_secs(seconds).as_millis() / rtt.as_millis()) as u64;
    let at_start = forward(&pair).delivered_bytes;
    let (mut last, mut after_startup, mut startup_rtts) = (at_start, at_start, None);
    for round in 1..=rounds {
        sleep(rtt).await;
        let now = forward(&pair).delivered_bytes;
        if startup_rtts.is_none() && (now - last) as f64 >= 0.9 * capacity {
            startup_rtts = Some(round);
        }
        if round == STARTUP_RTTS {
            after_startup = now;
        }
        last = now;
    }
    let counters = forward(&pair);
    let figures = Figures {
        overall: (last - at_start) as f64 / (capacity * rounds as f64),
        steady: (last - after_startup) as f64 / (capacity * (rounds - STARTUP_RTTS) as f64),
        startup_rtts,
        queue_drops: counters.queue_drop_share(),
        queue_delay: counters.queue_delay_mean().as_secs_f64() / rtt.as_secs_f64(),
        packet_bytes: pair.near_connection.stats().path.current_mtu,
    };
    println!(
        "{:>4} Mbit/s {:>3} ms loss {:<5} queue {:>5} kB {congestion:8?} overall {:.3} steady \
         {:.3} start {:>4} RTT, queue drops {:.4}, mean queue {:.3} RTT, packets {} (seed {SEED})",
        model.bits_per_sec / 1_000_000,
        rtt.as_millis(),
        model.loss,
        model.queue_bytes / 1000,
        figures.overall,
        figures.steady,
        startup_rtts.map_or("-".to_owned(), |rtts| rtts.to_string()),
        figures.queue_drops,
        figures.queue_delay,
        figures.packet_bytes,
    );
    figures
}

/// A link that our controller must fill: at most 3 % dropped by the queue, at most a quarter RTT of
/// queue on average, up to speed within 11 round trips.
async fn fills(megabits: u64, delay: u64, queue: f64, loss: f64, seconds: u64) {
    let model = LinkModel::new(megabits, millis(delay), queue).with_loss(loss);
    let figures = bulk(&model, Congestion::Auto, seconds).await;
    assert!(figures.steady >= 0.95, "steady state");
    assert!(figures.overall >= 0.8, "start-up included");
    assert!(figures.queue_drops <= 0.03, "dropped by the queue");
    assert!(figures.queue_delay <= 0.25, "standing queue");
    assert!(figures.startup_rtts.is_some_and(|rtts| rtts <= 11), "start");
}

#[tokio::test(start_paused = true)]
async fn fills_20_megabits_at_150_ms() {
    fills(20, 75, 1.0, 0.0, 15).await;
}

#[tokio::test(start_paused = true)]
async fn fills_100_megabits_at_80_ms_with_loss() {
    fills(100, 40, 1.0, 0.005, 10).await;
}

#[tokio::test(start_paused = true)]
async fn fills_200_megabits_at_60_ms_half_bdp_queue() {
    fills(200, 30, 0.5, 0.0, 10).await;
}

#[tokio::test(start_paused = true)]
async fn fills_200_megabits_at_60_ms_full_bdp_queue() {
    fills(200, 30, 1.0, 0.0, 10).await;
}

#[tokio::test(start_paused = true)]
async fn fills_200_megabits_at_60_ms_shallow_queue() {
    fills(200, 30, 0.1, 0.0, 10).await;
}

#[tokio::test(start_paused = true)]
async fn fills_200_megabits_at_60_ms_with_loss() {
    fills(200, 30, 1.0, 0.005, 10).await;
}

#[tokio::test(start_paused = true)]
async fn fills_a_gigabit_at_150_ms() {
    fills(1000, 75, 0.33, 0.0, 8).await;
}

#[tokio::test(start_paused = true)]
async fn fills_a_gigabit_at_150_ms_with_little_loss() {
    fills(1000, 75, 0.33, 0.001, 8).await;
}

#[tokio::test(start_paused = true)]
async fn fills_a_gigabit_at_150_ms_with_much_loss() {
    fills(1000, 75, 0.33, 0.01, 8).await;
}

/// Where the interface takes large packets and the path behind it does not, the search for their size
/// takes longer; what is sent meanwhile goes in small ones, and hardly later for it.
#[tokio::test(start_paused = true)]
async fn starts_on_an_ethernet_path_behind_a_wider_interface() {
    let model = LinkModel::new(200, millis(30), 1.0).with_loss(0.001);
    let known = settings(Congestion::Auto);
    let wide = TransportSettings {
        max_udp_payload: MAX_UDP_PAYLOAD,
        ..known.clone()
    };
    let known = bulk_with(&model, &known, 4).await;
    let wide = bulk_with(&model, &wide, 4).await;
    assert!(wide.packet_bytes > 1400 && known.packet_bytes > 1400);
    assert!(wide.overall > 0.98 * known.overall);
    assert!(wide.startup_rtts <= known.startup_rtts.map(|rtts| rtts + 1));
}

/// Jumbo frames are used as soon as a packet of their size has come through.
#[tokio::test(start_paused = true)]
async fn uses_jumbo_frames() {
    let mut model = LinkModel::new(1000, millis(5), 1.0);
    model.max_payload = 8972;
    let settings = TransportSettings {
        max_udp_payload: MAX_UDP_PAYLOAD,
        ..settings(Congestion::Auto)
    };
    let figures = bulk_with(&model, &settings, 2).await;
    assert_eq!(figures.packet_bytes, MAX_UDP_PAYLOAD);
    assert!(figures.steady >= 0.95, "steady state");
    assert!(figures.queue_drops <= 0.03, "dropped by the queue");
}

/// The reason for a controller of our own.
#[tokio::test(start_paused = true)]
async fn outperforms_the_stock_controllers() {
    let model = LinkModel::new(100, millis(40), 1.0).with_loss(0.005);
    let auto = bulk(&model, Congestion::Auto, 8).await;
    let cubic = bulk(&model, Congestion::Cubic, 8).await;
    let bbr = bulk(&model, Congestion::Bbr, 8).await;
    assert!(auto.overall > 5.0 * cubic.overall);
    assert!(auto.queue_drops < 0.3 * bbr.queue_drops);
    assert!(auto.overall > bbr.overall);
}

/// Packets that overtake each other, come twice or late by chance are no congestion.
#[tokio::test(start_paused = true)]
async fn takes_disorder_for_what_it_is() {
    let mut model = LinkModel::new(100, millis(40), 1.0);
    model.jitter = millis(5);
    model.duplicate = 0.01;
    model.reorder = 0.01;
    model.reorder_delay = millis(3);
    let figures = bulk(&model, Congestion::Auto, 8).await;
    assert!(figures.steady > 0.93);
}

/// Sends 40 Mbit/s in frames of 100 kB for `seconds`: what an application does that has no more.
async fn trickle(connection: &Connection, seconds: u64) {
    let frame = vec![0x11; 100_000];
    for _ in 0..seconds * 50 {
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&frame).await.unwrap();
        stream.finish().unwrap();
        sleep(millis(20)).await;
    }
}

/// A migration's data rate varies. What the path carries is not forgotten meanwhile, neither in a
/// trickle nor in silence, and is used at once afterwards.
#[tokio::test(start_paused = true)]
async fn remembers_the_rate_while_the_application_is_slow() {
    let model = LinkModel::new(200, millis(30), 1.0).with_loss(0.001);
    let pair = connect(&model, &settings(Congestion::Auto)).await;
    let (connection, counting) = (pair.near_connection.clone(), forward(&pair));
    let full = bytes::Bytes::from(vec![0; 1 << 20]);
    assert_eq!(estimate(&connection).is_known, Some(false));
    // 50 MB at full speed, then 15 s of a fifth of it, then silence.
    let mut streams = Vec::new();
    for _ in 0..50 {
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_chunk(full.clone()).await.unwrap();
        stream.finish().unwrap();
        streams.push(stream);
    }
    for stream in streams {
        stream.stopped().await.unwrap();
    }
    assert!(forward(&pair).delivered_bytes > counting.delivered_bytes + (50 << 20));
    assert_eq!(estimate(&connection).is_known, Some(true));
    let full_speed = estimate(&connection).arrived.unwrap();
    assert!(full_speed.bytes > 50 << 20);
    let share = full_speed.with_more_waiting as f64 / full_speed.bytes as f64;
    assert!(share > 0.8, "{full_speed:?}");
    trickle(&connection, 15).await;
    let known = estimate(&connection);
    assert!(known.rate_bytes_per_sec > 22_000_000, "{known:?}");
    // In a trickle the path is not what the application waits for.
    let trickled = known.arrived.unwrap();
    let bytes = trickled.bytes - full_speed.bytes;
    let waiting = trickled.with_more_waiting - full_speed.with_more_waiting;
    assert!(waiting < bytes / 4, "{waiting} of {bytes} bytes");
    sleep(Duration::from_secs(40)).await;
    let known = estimate(&connection);
    assert!(known.rate_bytes_per_sec > 22_000_000, "{known:?}");
    send_bulk(&connection, 256 << 10, 256);
    sleep(millis(62)).await;
    let (rate, _) = measure(&pair, millis(300)).await;
    assert!(rate > 0.93 * 200e6, "after the pause: {rate}");
}

/// The path gets slower, then faster again.
#[tokio::test(start_paused = true)]
async fn follows_a_change_of_rate() {
    let model = LinkModel::new(200, millis(30), 1.0);
    let pair = connect(&model, &settings(Congestion::Auto)).await;
    send_bulk(&pair.near_connection, 64 << 10, 512);
    sleep(Duration::from_secs(3)).await;
    pair.net
        .change(Direction::Forward, |model| model.bits_per_sec = 50_000_000);
    sleep(Duration::from_secs(3)).await;
    let (rate, queue) = measure(&pair, Duration::from_secs(5)).await;
    println!("200 to 50 Mbit/s: {rate:.0} bit/s, queue {queue:?}");
    assert!(rate > 0.93 * 50e6);
    assert!(queue < millis(20));
    pair.net
        .change(Direction::Forward, |model| model.bits_per_sec = 200_000_000);
    sleep(Duration::from_secs(4)).await;
    let (rate, queue) = measure(&pair, Duration::from_secs(3)).await;
    println!("50 to 200 Mbit/s: {rate:.0} bit/s, queue {queue:?}");
    assert!(rate > 0.93 * 200e6);
}

/// A new route has twice the delay: not a queue, although it looks like one.
#[tokio::test(start_paused = true)]
async fn follows_a_longer_path() {
    let model = LinkModel::new(100, millis(30), 1.0);
    let pair = connect(&model, &settings(Congestion::Auto)).await;
    send_bulk(&pair.near_connection, 256 << 10, 256);
    sleep(Duration::from_secs(3)).await;
    for direction in [Direction::Forward, Direction::Backward] {
        pair.net.change(direction, |model| model.delay = millis(60));
    }
    sleep(Duration::from_secs(5)).await;
    let (rate, queue) = measure(&pair, Duration::from_secs(5)).await;
    println!("60 to 120 ms: {rate:.0} bit/s, queue {queue:?}");
    assert!(rate > 0.93 * 100e6);
    assert!(queue < millis(30));
}

/// An outage shorter than the idle timeout is a pause.
#[tokio::test(start_paused = true)]
async fn goes_on_after_an_outage() {
    let mut model = LinkModel::new(100, millis(30), 1.0);
    model.cuts = vec![(Duration::from_secs(4), Duration::from_secs(14))];
    let pair = connect(&model, &settings(Congestion::Auto)).await;
    let begin = Instant::now();
    send_bulk(&pair.near_connection, 256 << 10, 256);
    // quinn looks for life at doubling intervals, so it may notice late.
    sleep(Duration::from_secs(4 + 10 + 10)).await;
    let (rate, _) = measure(&pair, Duration::from_secs(3)).await;
    println!(
        "{:?} after an outage of 10 s: {rate:.0} bit/s",
        begin.elapsed()
    );
    assert!(rate > 0.9 * 100e6);
}

/// The operator's ceiling holds on average over any second, and is used.
#[tokio::test(start_paused = true)]
async fn keeps_under_the_ceiling() {
    let model = LinkModel::new(200, millis(30), 1.0).with_loss(0.001);
    let ceiling = 5_000_000;
    for congestion in [
        Congestion::Auto,
        Congestion::Fixed {
            bits_per_sec: 100_000_000,
        },
    ] {
        let settings = TransportSettings {
            max_rate_bytes_per_sec: Some(ceiling),
            ..settings(congestion)
        };
        let pair = connect(&model, &settings).await;
        send_bulk(&pair.near_connection, 256 << 10, 256);
        sleep(Duration::from_secs(2)).await;
        for _ in 0..5 {
            let before = pair.near_connection.stats().udp_tx.bytes;
            sleep(Duration::from_secs(1)).await;
            let sent = pair.near_connection.stats().udp_tx.bytes - before;
            assert!(sent <= ceiling + ceiling / 100, "{congestion:?}: {sent}");
            assert!(sent >= ceiling * 93 / 100, "{congestion:?}: {sent}");
        }
        pair.near_connection.close(0u32.into(), b"done");
    }
}

/// What a gateway with these lines in `[wan]` tells its transport.
fn configured(wan: &str) -> TransportSettings {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    pki::issue(dir.path(), "edge-a", &[], pki::LEAF_DAYS).unwrap();
    let text = format!(
        "[gateway]\nname = \"edge-a\"\n[wan]\nlisten = \"127.0.0.1:0\"\n{wan}\n[tls]\nca = \
         \"ca.pem\"\ncert = \"edge-a.pem\"\nkey = \"edge-a.key\"\n[[peer]]\nname = \"edge-b\"\n"
    );
    let config = Config::parse(&dir.path().join("gateway.toml"), &text).unwrap();
    TransportSettings::from(&config.wan)
}

/// The controller that the configuration names is the one that a connection has, at both ends.
#[tokio::test(start_paused = true)]
async fn the_configured_controller_is_at_work() {
    let model = LinkModel::new(100, millis(30), 1.0);
    for (lines, controller) in [
        ("", "auto"),
        ("congestion = \"auto\"", "auto"),
        ("congestion = \"bbr\"", "bbr"),
        ("congestion = \"cubic\"", "cubic"),
        ("congestion = \"new-reno\"", "new-reno"),
        ("congestion = \"fixed\"\nfixed_rate = \"50Mbit/s\"", "fixed"),
    ] {
        let pair = connect(&model, &configured(lines)).await;
        for connection in [&pair.near_connection, &pair.far_connection] {
            let state = connection.congestion_state().into_any();
            let is = match controller {
                "auto" => state.is::<DeliveryRate>(),
                "bbr" => state.is::<Bbr>(),
                "cubic" => state.is::<Cubic>(),
                "new-reno" => state.is::<NewReno>(),
                _ => state.is::<Fixed>(),
            };
            assert!(is, "{lines:?} is not {controller}");
        }
    }
}

/// Rates and packets are no larger than the configuration says, and as large.
#[tokio::test(start_paused = true)]
async fn the_configured_rate_and_packets_are_kept() {
    let model = LinkModel::new(200, millis(30), 1.0);
    for (payload, megabits) in [(1250, 20), (1400, 80)] {
        let lines = format!("max_udp_payload = {payload}\nmax_rate = \"{megabits}Mbit/s\"");
        let pair = connect(&model, &configured(&lines)).await;
        send_bulk(&pair.near_connection, 256 << 10, 256);
        sleep(Duration::from_secs(4)).await;
        let before = pair.near_connection.stats().udp_tx.bytes;
        sleep(Duration::from_secs(2)).await;
        let stats = pair.near_connection.stats();
        let rate = (stats.udp_tx.bytes - before) * 8 / 2 / 1_000_000;
        assert!(
            (megabits * 9 / 10..=megabits).contains(&rate),
            "{lines}: {rate} Mbit/s"
        );
        let mtu = stats.path.current_mtu;
        // The search ends within a few bytes of the largest.
        assert!(
            (payload - 50..=payload).contains(&mtu),
            "{lines}: {mtu} bytes"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn sends_at_a_fixed_rate_through_loss() {
    let model = LinkModel::new(200, millis(30), 1.0).with_loss(0.03);
    let fixed = Congestion::Fixed {
        bits_per_sec: 150_000_000,
    };
    let figures = bulk(&model, fixed, 5).await;
    // Delivered: 97 % of 150 of 200 Mbit/s, and headers.
    assert!((0.70..0.77).contains(&figures.steady));
}

/// Two connections of ours on one link, the second a late joiner.
#[tokio::test(start_paused = true)]
async fn shares_with_its_own_kind() {
    let model = LinkModel::new(100, millis(30), 1.0);
    let pair = connect(&model, &settings(Congestion::Auto)).await;
    let (second, second_far) = pair.another().await;
    receive_all(&second_far);
    send_bulk(&pair.near_connection, 256 << 10, 256);
    sleep(Duration::from_secs(3)).await;
    send_bulk(&second, 256 << 10, 256);
    sleep(Duration::from_secs(15)).await;
    let sent = |connection: &Connection| connection.stats().udp_tx.bytes as f64;
    let (first_before, second_before) = (sent(&pair.near_connection), sent(&second));
    let (rate, queue) = measure(&pair, Duration::from_secs(15)).await;
    let first = sent(&pair.near_connection) - first_before;
    let second = sent(&second) - second_before;
    let jain = (first + second).powi(2) / (2.0 * (first.powi(2) + second.powi(2)));
    println!(
        "two connections: {rate:.0} bit/s, {first} and {second} bytes, Jain {jain:.3}, queue {queue:?}"
    );
    assert!(rate > 0.95 * 100e6);
    assert!(jain > 0.9, "{first} and {second}");
}
