//! What a gateway tells of itself: the figures of its status, and its log for programs.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use skyferry_core::qemu::synthetic::{PAGE_SIZE, SyntheticStream};
use skyferry_core::qemu::{Event, Phase};
use skyferry_tests::fake_vm::{
    FakeEnd, FakeListener, FakeMigration, LIMIT, expect_state, migrate, noise, wait_finished,
};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::process::wait_for;
use skyferry_tests::wan::{Shape, Way};

/// Guest memory in these tests, in pages: 24 MiB.
const PAGES: u64 = 6000;
/// What the source writes per second where rates are looked at, and how long; all of that is in the
/// first round.
const STEADY: usize = 4_000_000;
const STEADY_TIME: Duration = Duration::from_secs(3);
/// What it writes before: more than the destination is dialled for.
const BEGINNING: usize = 10_000;

/// Most pages are text, so that there are more guest bytes than wire bytes.
fn guest() -> SyntheticStream {
    SyntheticStream::builder()
        .blocks(&[("pc.ram", PAGES)])
        .zero_percent(0)
        .random_percent(20)
        .rounds(3)
        .build()
}

/// The only running migration, as a gateway shows it.
fn running(pair: &GatewayPair, side: Side) -> Result<Value> {
    let status = pair.gateway(side).status()?;
    let list = status["migrations"].as_array().context("no migrations")?;
    ensure!(list.len() == 1, "{status}");
    Ok(list[0].clone())
}

/// Waits until the figure `key` of the running migration is `expected`.
fn wait_figure(pair: &GatewayPair, side: Side, key: &str, expected: u64) -> Result<Value> {
    wait_for(
        &format!("{key} = {expected} at {}", side.name()),
        LIMIT,
        || {
            let migration = running(pair, side)?;
            Ok((migration[key] == expected).then_some(migration))
        },
        || format!("{:?}", running(pair, side)),
    )
}

fn figure(migration: &Value, key: &str) -> Result<f64> {
    let value = migration[key].as_f64();
    value.with_context(|| format!("no {key} in {migration}"))
}

/// Makes sure that a figure is between a share and a multiple of what it should be.
fn expect_about(migration: &Value, key: &str, expected: f64, slack: f64) -> Result<()> {
    let value = figure(migration, key)?;
    ensure!(
        value >= expected / slack && value <= expected * slack,
        "{key} is {value}, not about {expected}: {migration}"
    );
    Ok(())
}

/// Wire bytes are those that a link without other traffic has carried, apart from packets' heads and
/// what the gateways have to say to each other; and the ratio is that of the two figures beside it.
fn expect_wire_bytes(pair: &GatewayPair, migration: &Value, carried: f64) -> Result<()> {
    let wire = figure(migration, "wire_bytes")?;
    ensure!(
        wire < carried && wire > carried * 0.8 - 100_000.0,
        "{wire} wire bytes, the link has carried {carried}: {migration}"
    );
    let counted = pair.gateway(Side::A);
    let counted = counted.metric("skyferry_wire_bytes_total", "direction=\"out\"")?;
    ensure!(wire == counted, "{wire} wire bytes, counted {counted}");
    let ratio = figure(migration, "guest_bytes")? / wire;
    ensure!(ratio > 1.5, "text is not compressed: {migration}");
    expect_about(migration, "ratio", ratio, 1.0 + 1e-9)
}

/// Every figure of a migration's status, in the first round, in the second, and when it is over.
#[test]
fn the_status_has_true_figures() -> Result<()> {
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        store_mib: Some([16; 2]),
        ..PairSetup::default()
    };
    let pair = GatewayPair::over_relay(Shape::wan(200, 4), &setup)?;
    let stream = guest();
    let all = stream.bytes.len();
    let begins = |phase| {
        let mut events = stream.events.iter();
        let found = events.find(|(_, event)| *event == Event::Phase(phase));
        found.map(|(at, _)| *at).context("no such phase")
    };
    let second = begins(Phase::Precopy { round: 2 })?;
    let halfway = usize::midpoint(second, begins(Phase::Switchover)?);
    let carried = || pair.control().counters(Way::AToB).carried_bytes as f64;
    let run = || -> Result<()> {
        let before = carried();
        let route = pair.route(0);
        let listener = FakeListener::bind(&route.target)?;
        let FakeMigration {
            source,
            destination,
            sending,
        } = FakeMigration::begin(route, &listener, &stream.bytes[..BEGINNING])?;
        sending.finish(LIMIT)?;
        let (sent, rate) = send_steadily(&source, &stream.bytes[..second])?;
        let first = running(&pair, Side::A)?;
        let total = PAGES * PAGE_SIZE as u64;
        ensure!(
            first["state"] == "precopy" && first["round"] == 1 && first["direction"] == "out",
            "{first}"
        );
        ensure!(first["ram_total_bytes"] == total, "{first}");
        // Whoever else needs the processor makes this uneven.
        expect_about(&first, "guest_bytes_per_sec", rate, 1.5)?;
        let ratio = figure(&first, "ratio")?;
        expect_about(&first, "wire_bytes_per_sec", rate / ratio, 2.0)?;
        let left = (total - sent as u64) as f64 / rate;
        expect_about(&first, "remaining_seconds", left, 2.0)?;

        let sending = source.send_in_background(stream.bytes[sent..halfway].to_vec());
        destination.wait_received(halfway, LIMIT)?;
        let near = wait_figure(&pair, Side::A, "guest_bytes", halfway as u64)?;
        ensure!(
            near["state"] == "precopy" && near["round"] == 2 && near["channels"] == 1,
            "{near}"
        );
        ensure!(
            near["ingress"] == *route.listen && near["target"] == *route.target,
            "{near}"
        );
        ensure!(
            near["remaining_seconds"].is_null() && near["blackout_seconds"].is_null(),
            "{near}"
        );
        expect_wire_bytes(&pair, &near, carried() - before)?;
        let far = wait_figure(&pair, Side::B, "guest_bytes", halfway as u64)?;
        ensure!(
            far["state"] == "receiving" && far["round"] == 0 && far["direction"] == "in",
            "{far}"
        );
        ensure!(
            far["id"] == near["id"] && far["ram_total_bytes"].is_null(),
            "{far}"
        );

        sending.finish(LIMIT)?;
        let sending = source.send_in_background(stream.bytes[halfway..].to_vec());
        let moving = FakeMigration {
            source,
            destination,
            sending,
        };
        moving.conclude(&stream.bytes)?;
        expect_state(&pair, 1, "completed")?;
        for side in [Side::A, Side::B] {
            let over = &wait_finished(pair.gateway(side), 1)?[0];
            ensure!(
                over["guest_bytes"] == all && over["channels"] == 0,
                "{over}"
            );
            ensure!(figure(over, "elapsed_seconds")? >= STEADY_TIME.as_secs_f64());
        }
        let over = &wait_finished(pair.gateway(Side::A), 1)?[0];
        expect_wire_bytes(&pair, over, carried() - before)?;
        let blackout = figure(over, "blackout_seconds")?;
        let rest = figure(over, "elapsed_seconds")? - STEADY_TIME.as_secs_f64();
        ensure!(blackout > 0.0 && blackout < rest, "{over}");
        Ok(())
    };
    run().with_context(|| pair.explain())
}

/// Writes what follows [`BEGINNING`] at [`STEADY`] for [`STEADY_TIME`]; says how far that came, and how
/// many bytes per second it was.
fn send_steadily(source: &FakeEnd, bytes: &[u8]) -> Result<(usize, f64)> {
    const STEPS: u32 = 60;
    let step = STEADY * STEADY_TIME.as_secs() as usize / STEPS as usize;
    let end = BEGINNING + step * STEPS as usize;
    ensure!(bytes.len() > end, "the round is too short");
    let begun = Instant::now();
    for (index, part) in (1..=STEPS).zip(bytes[BEGINNING..].chunks(step)) {
        source.send(part)?;
        let due = begun + STEADY_TIME * index / STEPS;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let rate = (end - BEGINNING) as f64 / begun.elapsed().as_secs_f64();
    Ok((end, rate))
}

/// The lines of a log for programs, each of which has a time, a level and a message.
fn lines_of(log: &str) -> Result<Vec<Value>> {
    let line = |text: &str| -> Result<Value> {
        let line: Value = serde_json::from_str(text)?;
        ensure!(line.is_object(), "no object");
        let levels = ["ERROR", "WARN", "INFO", "DEBUG"];
        ensure!(levels.iter().any(|level| line["level"] == *level), "level");
        // As in 2026-11-23T14:05:09.123456Z.
        let time = line["timestamp"].as_str().unwrap_or_default();
        ensure!(
            time.len() > 20 && time.as_bytes()[10] == b'T' && time.ends_with('Z'),
            "time"
        );
        ensure!(line["message"].is_string(), "message");
        Ok(line)
    };
    log.lines()
        .map(|text| line(text).with_context(|| format!("the line {text:?}")))
        .collect()
}

/// A log for programs is one for programs from its first line to its last: start, a migration, one
/// that is refused, a stream of no kind, a panic, the link's loss and return, a drain, the end.
#[test]
fn every_line_of_a_json_log_is_an_object() -> Result<()> {
    // The loss is noticed after two seconds.
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?, Route::tcp(Side::A)?],
        store_mib: Some([16; 2]),
        wan: "idle_timeout = \"2s\"\nkeep_alive = \"200ms\"\n".to_owned(),
        faults: [String::new(), "panic-at-step=end".to_owned()],
        log_level: "debug".to_owned(),
        log_json: true,
        ..PairSetup::default()
    };
    let mut pair = GatewayPair::over_relay(Shape::wan(200, 4), &setup)?;
    let stream = SyntheticStream::builder().build().bytes;
    let run = |pair: &mut GatewayPair| -> Result<()> {
        // The far side's channel panics when all is done.
        let _ = migrate(pair, 0, &stream);
        let refused = FakeEnd::connect(&pair.route(1).listen)?;
        refused.send(&noise(1, 5000))?;
        refused.wait_end(LIMIT)?;
        pair.control().cut();
        wait_for(
            "loss of the link",
            LIMIT,
            || {
                let status = pair.gateway(Side::A).status()?;
                Ok((status["links"][0]["up"] == false).then_some(()))
            },
            String::new,
        )?;
        pair.control().mend();
        pair.wait_link()?;
        for side in [Side::A, Side::B] {
            pair.gateway_mut(side).terminate();
            let status = pair.gateway_mut(side).wait_exit(LIMIT)?;
            ensure!(status.success(), "{status}");
        }
        Ok(())
    };
    run(&mut pair).map_err(|error| error.context(pair.explain()))?;
    let mut ids = Vec::new();
    for side in [Side::A, Side::B] {
        let log = pair.gateway(side).log();
        let lines = lines_of(&log).context(side.name())?;
        let of_message = |words: &str| {
            let with = |line: &&Value| line["message"].as_str().is_some_and(|m| m.contains(words));
            lines.iter().filter(with).collect::<Vec<_>>()
        };
        let mut seen = BTreeSet::new();
        let begins = ["migration begins", "channel opened by the peer"][side as usize];
        for words in [begins, "migration finished"] {
            let lines = of_message(words);
            ensure!(!lines.is_empty(), "{}: no {words:?}\n{log}", side.name());
            for line in lines {
                let id = line["migration"].as_str();
                seen.insert(
                    id.with_context(|| format!("no migration in {line}"))?
                        .to_owned(),
                );
            }
        }
        ids.push(seen);
        let panics = of_message("panic");
        ensure!(panics.is_empty() == (side == Side::A), "panics: {panics:?}");
    }
    let common = ids[0].intersection(&ids[1]).count();
    ensure!(common >= 1, "no id is in both logs: {ids:?}");
    Ok(())
}
