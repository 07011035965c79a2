//! What goes through a pair of gateways comes out as it was: fake VMs, real gateways.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_tests::fake_vm::{
    End, FakeEnd, FakeListener, FakeMigration, LIMIT, expect_state, expect_verdict, migrate, noise,
    pong, shut, wait_finished,
};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::random::{Random, seed};
use skyferry_tests::wan::Shape;

/// Memory of a gateway's page store in these tests, in MiB.
const STORE_MIB: u32 = 16;
/// Memory of a gateway besides its store, in bytes.
const MEMORY_LIMIT: u64 = 96 << 20;

/// How long a gateway waits for more behind a commit byte before silence counts as the end.
const SILENCE: Duration = Duration::from_millis(20);

/// A fast link: these tests are about bytes, not about time.
fn near_link() -> Shape {
    Shape::wan(1000, 4)
}

fn pair_with(routes: Vec<Route>, setup: PairSetup) -> Result<GatewayPair> {
    let store_mib = setup.store_mib.or(Some([STORE_MIB; 2]));
    GatewayPair::over_relay(
        near_link(),
        &PairSetup {
            routes,
            store_mib,
            ..setup
        },
    )
}

fn pair(routes: Vec<Route>) -> Result<GatewayPair> {
    pair_with(routes, PairSetup::default())
}

/// A stream of some megabytes that has everything.
fn guest(seed: u64) -> SyntheticStream {
    SyntheticStream::builder()
        .seed(seed)
        .blocks(&[("pc.ram", 1500), ("vga.vram", 64)])
        .rounds(3)
        .xbzrle(seed.is_multiple_of(2))
        .dirty_bitmap(seed.is_multiple_of(3))
        .multifd_flush(seed.is_multiple_of(5))
        .build()
}

/// Everything that is no QEMU stream: random, zero, and text.
fn mixture(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = noise(seed, len / 3);
    bytes.resize(len / 3 * 2, 0);
    let text = format!("line of text {seed} ");
    bytes.extend(text.as_bytes().iter().cycle().take(len - bytes.len()));
    bytes
}

/// Law 1 for bytes of no known kind: exact in both directions, over TCP and unix sockets, and a
/// half-close is passed on as one, whichever side is first.
#[test]
fn opaque_bytes_pass_both_ways_and_half_closes_too() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let unix = |name: &str| format!("unix:{}", dir.path().join(name).display());
    let routes = vec![
        Route::tcp(Side::A)?,
        Route::between(Side::B, &unix("ingress"), &unix("target")),
    ];
    let pair = pair(routes)?;
    let run = |route: usize, client_first: bool| -> Result<()> {
        let route = pair.route(route);
        let listener = FakeListener::bind(&route.target)?;
        let (there, back) = (mixture(1, 3 << 20), mixture(2, 2 << 20));
        let client = FakeEnd::connect(&route.listen)?;
        let sending = client.send_in_background(there.clone());
        let server = listener.accept(LIMIT)?;
        let answering = server.send_in_background(back.clone());
        sending.finish(LIMIT)?;
        answering.finish(LIMIT)?;
        let (first, second) = if client_first {
            (&client, &server)
        } else {
            (&server, &client)
        };
        first.end_writing();
        ensure!(second.wait_end(LIMIT)? == End::Closed);
        // The other direction still works.
        second.send(b"afterwards")?;
        second.end_writing();
        ensure!(first.wait_end(LIMIT)? == End::Closed);
        let (mut there, mut back) = (there, back);
        (if client_first { &mut back } else { &mut there }).extend_from_slice(b"afterwards");
        client.expect_received(&back).context("the client")?;
        server.expect_received(&there).context("the server")
    };
    for route in 0..2 {
        for client_first in [true, false] {
            run(route, client_first)
                .with_context(|| format!("{route} {client_first} {}", pair.explain()))?;
        }
    }
    Ok(())
}

/// Law 1 with many connections at once, all through one listener.
#[test]
fn many_connections_at_once_do_not_mix() -> Result<()> {
    const CONNECTIONS: u8 = 40;
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let route = pair.route(0);
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&route.target)?;
        // The first byte tells whose it is.
        let content = |index: u8| [vec![index], mixture(u64::from(index), 200_000)].concat();
        let clients: Vec<_> = (0..CONNECTIONS)
            .map(|index| {
                let client = FakeEnd::connect(&route.listen)?;
                let sending = client.send_in_background(content(index));
                Ok((client, sending))
            })
            .collect::<Result<_>>()?;
        let servers: Vec<_> = (0..CONNECTIONS)
            .map(|_| listener.accept(LIMIT))
            .collect::<Result<_>>()?;
        let mut seen = [false; CONNECTIONS as usize];
        for server in &servers {
            server.wait_received(200_001, LIMIT)?;
            let index = server.received()[0];
            server.expect_received(&content(index))?;
            server.send(&[index; 1000])?;
            seen[usize::from(index)] = true;
        }
        ensure!(seen.iter().all(|seen| *seen));
        for (index, (client, sending)) in clients.into_iter().enumerate() {
            sending.finish(LIMIT)?;
            client.wait_received(1000, LIMIT)?;
            client.expect_received(&[u8::try_from(index)?; 1000])?;
        }
        Ok(())
    };
    run().with_context(|| pair.explain())
}

/// Laws 1 to 3 when all goes well: the destination gets the commit byte only after everything
/// before it, and its verdict is the last that the source reads before the end.
#[test]
fn a_migration_passes_exactly_and_its_verdict_comes_back() -> Result<()> {
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let stream = guest(1);
    let commit = stream.commit.context("a commit byte")?;
    let route = pair.route(0);
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&route.target)?;
        let FakeMigration {
            source,
            destination,
            ..
        } = FakeMigration::begin(route, &listener, &stream.bytes[..commit])?;
        destination.wait_received(commit, LIMIT)?;
        destination.send(&pong(1))?;
        source.wait_received(8, LIMIT)?;
        // The commit byte alone is not the end of a stream that goes on.
        source.send(&stream.bytes[commit..])?;
        destination.wait_received(stream.bytes.len(), LIMIT)?;
        destination.expect_received(&stream.bytes)?;
        // The source is kept waiting until the destination has spoken.
        source.expect_silence(Duration::from_millis(300))?;
        destination.send(&shut(0))?;
        drop(destination);
        expect_verdict(&source, &[pong(1), shut(0)].concat())
    };
    run().with_context(|| pair.explain())?;
    expect_state(&pair, 1, "completed")?;
    for side in [Side::A, Side::B] {
        let held = pair.gateway(side).metric("skyferry_held_commits", "")?;
        ensure!(held == 0.0, "{held} commits held at {}", side.name());
    }
    let checked = pair
        .gateway(Side::B)
        .metric("skyferry_commit_checks_total", "agreed")?;
    ensure!(checked == 1.0, "{checked} commits checked");
    Ok(())
}

/// A destination that fails says so itself: its verdict reaches the source as it is.
#[test]
fn a_verdict_of_failure_reaches_the_source() -> Result<()> {
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let stream = guest(2).bytes;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
        moving.destination.wait_received(stream.len(), LIMIT)?;
        moving.destination.send(&shut(22))?;
        drop(moving.destination);
        expect_verdict(&moving.source, &shut(22))
    };
    run().with_context(|| pair.explain())?;
    expect_state(&pair, 1, "failed")
}

/// A stream without device description ends with its commit byte: only silence tells, and it must
/// not take long to.
#[test]
fn a_stream_without_description_completes_soon() -> Result<()> {
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let stream = SyntheticStream::builder().vmdesc(false).build().bytes;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
        moving.destination.wait_received(stream.len() - 1, LIMIT)?;
        let begun = Instant::now();
        moving.destination.wait_received(stream.len(), LIMIT)?;
        let held = begun.elapsed();
        ensure!(held < Duration::from_millis(200), "held for {held:?}");
        moving.conclude(&stream)
    };
    run().with_context(|| pair.explain())?;
    expect_state(&pair, 1, "completed")
}

/// Law 2 for a source that goes in the middle of what follows the commit byte: its stream is not
/// complete, so the destination gets all before that byte, and then a failure.
#[test]
fn a_stream_cut_behind_its_commit_byte_never_commits() -> Result<()> {
    let stream = guest(6);
    let commit = stream.commit.context("a commit byte")?;
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let middle = (stream.bytes.len() - commit) / 2;
    let mut count = 0;
    for behind in [2, 5, 6, middle, stream.bytes.len() - commit - 1] {
        for closes in [true, false] {
            let run = || -> Result<()> {
                let listener = FakeListener::bind(&pair.route(0).target)?;
                let cut = &stream.bytes[..commit + behind];
                let moving = FakeMigration::begin(pair.route(0), &listener, cut)?;
                moving.destination.wait_received(commit, LIMIT)?;
                moving.sending.finish(LIMIT)?;
                if closes {
                    moving.source.end_writing();
                } else {
                    // Silence is no end.
                    moving.destination.expect_silence(SILENCE * 5)?;
                    moving.source.reset()?;
                }
                let end = moving.destination.wait_end(LIMIT)?;
                ensure!(end == End::Reset, "the destination reads {end:?}");
                moving.destination.expect_received(&stream.bytes[..commit])
            };
            run().with_context(|| format!("{behind} {closes} {}", pair.explain()))?;
            count += 1;
            // A source that goes before its stream is complete has called the migration off.
            let finished = wait_finished(pair.gateway(Side::A), count)?;
            ensure!(finished[0]["state"] == "cancelled", "{}", finished[0]);
        }
    }
    migrate(&pair, 0, &stream.bytes)
}

/// How a stream is spoilt.
fn spoil(bytes: &mut Vec<u8>, random: &mut Random) {
    match random.below(4) {
        // Cut off anywhere.
        0 => bytes.truncate(random.below(bytes.len())),
        // Some bytes changed anywhere.
        1 => {
            for _ in 0..=random.below(20) {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
        }
        // A part taken out.
        2 => {
            let at = random.below(bytes.len());
            let len = random.below(9000).min(bytes.len() - at);
            bytes.drain(at..at + len);
        }
        // No QEMU stream at all, or one that soon stops being one.
        _ => {
            let kept = if random.below(2) == 0 {
                0
            } else {
                random.below(300)
            };
            bytes.truncate(kept);
            bytes.extend(noise(random.draw(), random.below(200_000)));
        }
    }
}

/// Law 1 and 8 with bad input: whatever a source writes, a destination reads a beginning of it and
/// nothing else; the gateways stay up, their memory bounded, and the next good migration works.
#[test]
fn spoilt_streams_arrive_as_a_beginning_of_what_was_written() -> Result<()> {
    const TRIALS: usize = 60;
    const WORKERS: usize = 4;
    /// Bytes of noise in each long stream: together more than twice the memory that a gateway may take.
    const MUCH: usize = 64 << 20;
    // A route for each: a destination dialled late is none of the next trial's business.
    let routes = (0..TRIALS + WORKERS)
        .map(|_| Route::tcp(Side::A))
        .collect::<Result<Vec<_>>>()?;
    let pair = pair(routes)?;
    let trial = |seed: usize| -> Result<()> {
        let route = pair.route(seed);
        let listener = FakeListener::bind(&route.target)?;
        let mut random = Random::new(seed as u64);
        let mut bytes = SyntheticStream::builder().seed(seed as u64).build().bytes;
        spoil(&mut bytes, &mut random);
        let source = FakeEnd::connect(&route.listen)?;
        // A refusal can come in the middle of the write.
        let whole = source.send(&bytes).is_ok();
        source.end_writing();
        let end = Instant::now() + LIMIT;
        let destination = loop {
            if let Some(destination) = listener.poll()? {
                break destination;
            }
            if source.end().is_some() || (whole && bytes.is_empty()) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "neither dialled nor refused");
            thread::sleep(Duration::from_millis(2));
        };
        destination.wait_end(LIMIT).context("the destination")?;
        destination.expect_prefix_of(&bytes)?;
        drop(destination);
        source.wait_end(LIMIT).context("the source")?;
        Ok(())
    };
    // One that stops in the middle of being a QEMU stream and goes on and on.
    let long = |seed: usize| -> Result<()> {
        let mut bytes = guest(seed as u64).bytes;
        bytes.truncate(bytes.len() / 2);
        bytes.extend(noise(seed as u64, MUCH));
        let route = pair.route(seed);
        let listener = FakeListener::bind(&route.target)?;
        let moving = FakeMigration::begin(route, &listener, &bytes)?;
        // Seconds, unless the machine has much else to do.
        moving.sending.finish(LIMIT * 5)?;
        moving.source.end_writing();
        moving.destination.wait_end(LIMIT)?;
        moving.destination.expect_prefix_of(&bytes)?;
        let arrived = moving.destination.received_len();
        ensure!(arrived >= MUCH, "only {arrived} bytes arrived");
        drop(moving.destination);
        moving.source.wait_end(LIMIT)?;
        Ok(())
    };
    let work = |worker: usize| -> Result<()> {
        let explain = |seed| format!("seed {seed}\n{}", pair.explain());
        (worker..TRIALS)
            .step_by(WORKERS)
            .try_for_each(|seed| trial(seed).with_context(|| explain(seed)))?;
        let seed = TRIALS + worker;
        long(seed).with_context(|| explain(seed))
    };
    thread::scope(|scope| -> Result<()> {
        let work = &work;
        let workers: Vec<_> = (0..WORKERS)
            .map(|index| scope.spawn(move || work(index)))
            .collect();
        for worker in workers {
            worker.join().expect("no panic")?;
        }
        Ok(())
    })?;
    for side in [Side::A, Side::B] {
        wait_finished(pair.gateway(side), 1)?;
        let peak = pair.gateway(side).usage()?.peak_rss_bytes;
        let limit = (u64::from(STORE_MIB) << 20) + MEMORY_LIMIT;
        eprintln!("{} used {} MiB", side.name(), peak >> 20);
        ensure!(peak <= limit, "{} used {peak} bytes", side.name());
    }
    migrate(&pair, 0, &guest(3).bytes)
}

/// Law 7: a receiver that holds far less than the sender believes, and forgets at random, asks;
/// every byte is right all the same.
#[test]
fn misses_are_asked_for_and_nothing_fails() -> Result<()> {
    let setup = PairSetup {
        store_mib: Some([64, 4]),
        faults: [String::new(), format!("drop-stored-pages=0.3:{}", seed()?)],
        ..PairSetup::default()
    };
    let pair = pair_with(vec![Route::tcp(Side::A)?], setup)?;
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 6000)])
        .zero_percent(20)
        .build()
        .bytes;
    for _ in 0..3 {
        migrate(&pair, 0, &stream)?;
    }
    expect_state(&pair, 3, "completed")?;
    for side in [Side::A, Side::B] {
        let misses = pair
            .gateway(side)
            .metric("skyferry_page_misses_total", "")?;
        ensure!(misses > 0.0, "no misses at {}", side.name());
    }
    Ok(())
}

/// Law 7: all pages of a stream are believed to be held and are not: asking for them costs one round trip.
#[test]
fn a_burst_of_misses_costs_one_round_trip() -> Result<()> {
    const RTT: Duration = Duration::from_millis(1000);
    /// For a busy machine; two round trips are a second more.
    const SLACK: Duration = Duration::from_millis(700);
    /// What a new connection carries in one round trip.
    const PAGES: u64 = 12;
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", PAGES)])
        .zero_percent(0)
        .random_percent(100)
        .build()
        .bytes;
    let timed = |fault: &str| -> Result<(Duration, f64)> {
        let setup = PairSetup {
            routes: vec![Route::tcp(Side::A)?],
            store_mib: Some([64; 2]),
            faults: [String::new(), fault.to_owned()],
            ..PairSetup::default()
        };
        let pair = GatewayPair::over_relay(Shape::wan(1000, 1000), &setup)?;
        migrate(&pair, 0, &stream)?;
        let start = Instant::now();
        migrate(&pair, 0, &stream)?;
        let took = start.elapsed();
        let misses = pair
            .gateway(Side::B)
            .metric("skyferry_page_misses_total", "")?;
        Ok((took, misses))
    };
    let (held, none) = timed("")?;
    let (lost, all) = timed(&format!("drop-stored-pages=1.0:{}", seed()?))?;
    eprintln!("{held:?} with all pages there, {lost:?} with none of them");
    ensure!(
        none == 0.0 && all >= PAGES as f64,
        "{none} and {all} misses"
    );
    ensure!(
        lost < held + RTT + SLACK,
        "{lost:?}, without misses {held:?}"
    );
    Ok(())
}

/// Law 2: what a fault behind the decoder has changed never runs. The destination is reset before
/// the commit byte, the source is reset, and the reason is to be seen.
#[test]
fn a_corrupted_frame_never_commits() -> Result<()> {
    let stream = guest(4);
    let commit = stream.commit.context("a commit byte")?;
    for frame in [0, 5] {
        let setup = PairSetup {
            faults: [String::new(), format!("corrupt-frame={frame}")],
            ..PairSetup::default()
        };
        let pair = pair_with(vec![Route::tcp(Side::A)?], setup)?;
        let run = || -> Result<()> {
            let listener = FakeListener::bind(&pair.route(0).target)?;
            let moving = FakeMigration::begin(pair.route(0), &listener, &stream.bytes)?;
            let end = moving.destination.wait_end(LIMIT)?;
            ensure!(end == End::Reset, "the destination reads {end:?}");
            let read = moving.destination.received_len();
            ensure!(read <= commit, "{read} bytes read, commit byte at {commit}");
            let end = moving.source.wait_end(LIMIT)?;
            ensure!(end == End::Reset, "the source reads {end:?}");
            ensure!(moving.source.received_len() == 0);
            Ok(())
        };
        run().with_context(|| pair.explain())?;
        expect_state(&pair, 1, "failed")?;
        let finished = wait_finished(pair.gateway(Side::B), 1)?;
        let error = finished[0]["error"].as_str().unwrap_or_default();
        ensure!(error.contains("digest"), "{}", finished[0]);
    }
    Ok(())
}

/// Several migrations at once, each for itself.
#[test]
fn eight_migrations_at_once() -> Result<()> {
    let routes = (0..8)
        .map(|index| Route::tcp(if index % 2 == 0 { Side::A } else { Side::B }))
        .collect::<Result<Vec<_>>>()?;
    let pair = pair(routes)?;
    let streams: Vec<_> = (0..8).map(|seed| guest(seed).bytes).collect();
    thread::scope(|scope| -> Result<()> {
        let pair = &pair;
        let running: Vec<_> = streams
            .iter()
            .enumerate()
            .map(|(route, stream)| scope.spawn(move || migrate(pair, route, stream)))
            .collect();
        for migration in running {
            migration.join().expect("no panic")?;
        }
        Ok(())
    })?;
    for side in [Side::A, Side::B] {
        let finished = wait_finished(pair.gateway(side), 8)?;
        ensure!(
            finished
                .iter()
                .all(|migration| migration["state"] == "completed")
        );
        let peak = pair.gateway(side).usage()?.peak_rss_bytes;
        let limit = (u64::from(STORE_MIB) << 20) + MEMORY_LIMIT;
        ensure!(peak <= limit, "{} used {peak} bytes", side.name());
    }
    Ok(())
}

/// The bytes that a multifd channel begins with, and then some pages.
fn multifd_channel(index: u8) -> Vec<u8> {
    let mut bytes = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1];
    bytes.extend_from_slice(&[index; 16]);
    bytes.extend(mixture(u64::from(index), 300_000));
    bytes
}

/// Multifd channels that connect before the main one: the destination is dialled for the main one
/// first, and the commit byte comes only after what every channel carried.
#[test]
fn the_main_channel_is_dialled_before_the_others() -> Result<()> {
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let stream = guest(5).bytes;
    let route = pair.route(0);
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&route.target)?;
        let others: Vec<_> = (0..4)
            .map(|index| {
                let source = FakeEnd::connect(&route.listen)?;
                source.send(&multifd_channel(index)[..24])?;
                Ok(source)
            })
            .collect::<Result<_>>()?;
        listener.expect_not_dialled(Duration::from_millis(200))?;
        let FakeMigration {
            source,
            destination: main,
            sending: beginning,
        } = FakeMigration::begin(route, &listener, &stream[..stream.len() / 2])?;
        main.wait_received(8, LIMIT)?;
        ensure!(main.received().starts_with(b"QEVM"), "not the main channel");
        let sending: Vec<_> = (0..4)
            .zip(&others)
            .map(|(index, other)| other.send_in_background(multifd_channel(index)[24..].to_vec()))
            .collect();
        let destinations: Vec<_> = (0..4)
            .map(|_| listener.accept(LIMIT))
            .collect::<Result<_>>()?;
        sending
            .into_iter()
            .try_for_each(|sending| sending.finish(LIMIT))?;
        beginning.finish(LIMIT)?;
        source.send(&stream[stream.len() / 2..])?;
        main.wait_received(stream.len(), LIMIT)?;
        main.expect_received(&stream)?;
        for destination in &destinations {
            destination.wait_received(300_024, LIMIT)?;
            let index = destination.received()[8];
            destination.expect_received(&multifd_channel(index))?;
        }
        main.send(&shut(0))?;
        drop((main, destinations));
        expect_verdict(&source, &shut(0))
    };
    run().with_context(|| pair.explain())?;
    expect_state(&pair, 1, "completed")
}

/// A record as TLS begins with, a handshake message of kind `hello` and `len` bytes, and behind it what
/// cannot be told from noise.
fn tls(version: u8, hello: u8, len: u8, seed: u64, sealed: usize) -> Vec<u8> {
    let mut bytes = vec![0x16, 3, version, 0, len + 4, hello, 0, 0, len];
    bytes.extend(noise(seed + 100, usize::from(len)));
    for (index, part) in (seed..).zip(noise(seed, sealed).chunks(16_000)) {
        // Application data.
        bytes.extend_from_slice(&[0x17, 3, 3]);
        bytes.extend_from_slice(&(part.len() as u16).to_be_bytes());
        bytes.extend_from_slice(part);
        // Records come in all lengths.
        bytes.truncate(bytes.len() - index as usize % 7);
    }
    bytes
}

/// Law 1 for a migration that the hypervisors have encrypted: nothing of it is understood, and every
/// byte passes, both ways at once, while the return path of another migration is in use.
#[test]
fn tls_inside_passes_as_it_is() -> Result<()> {
    let pair = pair(vec![Route::tcp(Side::A)?, Route::tcp(Side::A)?])?;
    let (there, back) = (tls(1, 1, 200, 7, 4 << 20), tls(3, 2, 90, 8, 2 << 20));
    let stream = guest(9).bytes;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(1).target)?;
        let other = FakeMigration::begin(pair.route(1), &listener, &stream[..stream.len() / 2])?;
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let client = FakeEnd::connect(&pair.route(0).listen)?;
        // The hellos of TLS wait for each other.
        client.send(&there[..209])?;
        let server = listener.accept(LIMIT)?;
        server.wait_received(209, LIMIT)?;
        server.send(&back[..99])?;
        client.wait_received(99, LIMIT)?;
        let sending = client.send_in_background(there[209..].to_vec());
        let answering = server.send_in_background(back[99..].to_vec());
        let mut answers = Vec::new();
        for value in 0..50 {
            other.destination.send(&pong(value))?;
            answers.extend(pong(value));
            other.source.wait_received(answers.len(), LIMIT)?;
        }
        other.source.expect_received(&answers)?;
        sending.finish(LIMIT)?;
        answering.finish(LIMIT)?;
        server.wait_received(there.len(), LIMIT)?;
        client.wait_received(back.len(), LIMIT)?;
        let status = pair.gateway(Side::A).status()?;
        let mut states: Vec<_> = (0..2)
            .filter_map(|index| status["migrations"][index]["state"].as_str())
            .collect();
        states.sort_unstable();
        ensure!(states == ["opaque", "precopy"], "{status}");
        server.expect_received(&there).context("the server")?;
        client.expect_received(&back).context("the client")?;
        client.end_writing();
        ensure!(server.wait_end(LIMIT)? == End::Closed);
        server.end_writing();
        ensure!(client.wait_end(LIMIT)? == End::Closed);
        other.sending.finish(LIMIT)?;
        other.source.reset()?;
        let finished = wait_finished(pair.gateway(Side::A), 2)?;
        ensure!(finished[1]["state"] == "completed", "{}", finished[1]);
        Ok(())
    };
    run().with_context(|| pair.explain())
}

/// A cap on the rate, as configured, where nothing else would hold a migration up.
#[test]
fn a_configured_rate_is_kept() -> Result<()> {
    const MEGABITS: usize = 40;
    let setup = PairSetup {
        wan: format!("max_rate = \"{MEGABITS}Mbit/s\"\n"),
        routes: vec![Route::tcp(Side::A)?],
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(1000, 20), &setup)?;
    let bytes = noise(5, 10_000_000);
    let run = || -> Result<()> {
        let begun = Instant::now();
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &bytes)?;
        moving.destination.wait_received(bytes.len(), LIMIT)?;
        let seconds = begun.elapsed().as_secs_f64();
        let least = bytes.len() as f64 * 8e-6 / MEGABITS as f64;
        eprintln!("{seconds} s, at {MEGABITS} Mbit/s it takes {least} s");
        ensure!(seconds > least * 0.9, "{seconds} s, not {least} s");
        Ok(())
    };
    run().with_context(|| pair.explain())
}

/// Packets are as large as the configuration says where the path carries more.
#[test]
fn configured_packets_are_kept() -> Result<()> {
    for payload in [1300, 6000] {
        let setup = PairSetup {
            wan: format!("max_udp_payload = {payload}\n"),
            routes: vec![Route::tcp(Side::A)?],
            ..PairSetup::default()
        };
        let pair = GatewayPair::over_loopback(&setup)?;
        let stream = SyntheticStream::builder()
            .blocks(&[("pc.ram", 5000)])
            .zero_percent(0)
            .random_percent(100)
            .build();
        migrate(&pair, 0, &stream.bytes)?;
        let metric = |name| pair.gateway(Side::A).metric(name, "direction=\"out\"");
        let packets = metric("skyferry_link_packets_sent_total")?;
        let mean = metric("skyferry_link_sent_bytes_total")? / packets;
        eprintln!("{mean} bytes in each of {packets} packets, {payload} at most");
        let largest = f64::from(payload);
        ensure!(
            mean <= largest && mean > largest * 0.6,
            "{mean}, not {payload}"
        );
    }
    Ok(())
}

/// Bytes per second that a slow destination reads.
const SLOW: u64 = 2_000_000;
/// Buffers of the four sockets between a source and its destination, as the kernel doubles them.
const SOCKETS: u64 = 2 * (256 << 10) + 2 * (128 << 10);

/// Law 5: what the near gateway has accepted and a slow destination has not read stays within the
/// delay budget at the rate really achieved, beside the sockets' buffers.
#[test]
fn a_slow_destination_slows_its_source() -> Result<()> {
    let pair = pair(vec![Route::tcp(Side::A)?])?;
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 4000)])
        .zero_percent(0)
        .build()
        .bytes;
    let run = || -> Result<()> {
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
        moving.destination.read_at(SLOW);
        let limit = SOCKETS + (1 << 20) + SLOW / 10;
        moving.expect_between(limit, Duration::from_secs(4))?;
        // One that stops altogether costs no more memory.
        moving.destination.read_at(0);
        thread::sleep(Duration::from_millis(500));
        let (near, far) = (pair.gateway(Side::A), pair.gateway(Side::B));
        let before = [near.usage()?.rss_bytes, far.usage()?.rss_bytes];
        thread::sleep(Duration::from_secs(1));
        let after = [near.usage()?.rss_bytes, far.usage()?.rss_bytes];
        for (before, after) in before.iter().zip(after) {
            ensure!(after < before + (4 << 20), "{before} bytes, then {after}");
        }
        let accepted = moving.between();
        ensure!(accepted < limit, "{accepted} bytes accepted");
        moving.destination.read_at(u64::MAX);
        moving.conclude(&stream)
    };
    run().with_context(|| pair.explain())
}

/// The same behind a link that is wide, long and warmed up: its window has room for what takes the
/// destination seconds.
#[test]
fn a_wide_link_does_not_hide_a_slow_destination() -> Result<()> {
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        store_mib: Some([64; 2]),
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(300, 100), &setup)?;
    let stream = |seed| {
        let builder = SyntheticStream::builder().blocks(&[("pc.ram", 12_000)]);
        let builder = builder.random_percent(90).zero_percent(0).seed(seed);
        builder.build().bytes
    };
    let run = || -> Result<()> {
        migrate(&pair, 0, &stream(1))?;
        let stream = stream(2);
        let listener = FakeListener::bind(&pair.route(0).target)?;
        let moving = FakeMigration::begin(pair.route(0), &listener, &stream)?;
        moving.destination.read_at(SLOW);
        // Two floors of the budget, and what arrives in a round trip and the budget.
        let limit = SOCKETS + (3 << 20) / 2 + SLOW / 5;
        moving.expect_between(limit, Duration::from_secs(5))?;
        moving.destination.read_at(u64::MAX);
        moving.conclude(&stream)
    };
    run().with_context(|| pair.explain())
}
