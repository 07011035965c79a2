//! Sudden deaths in every phase of a migration: the guest never runs twice, survives wherever its
//! machine survives, and moves at the next attempt.
//!
//! The times are random; `SKYFERRY_SEED` repeats a run.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::process::wait_for;
use skyferry_tests::qemu::{MigrationSettings, Qemu};
use skyferry_tests::random::{Random, seed};
use skyferry_tests::scenario::{Passage, prove_it_goes_on, start_source};
use skyferry_tests::wan::Shape;

const LIMIT: Duration = Duration::from_secs(60);
const LINK: Shape = Shape {
    delay: Duration::from_millis(10),
    bits_per_sec: 100_000_000,
    queue_bytes: 256 << 10,
    loss: 0.0,
    seed: 1,
};
/// The guest's 30 MB and more take some seconds at this rate.
const BYTES_PER_SEC: u64 = 8 << 20;
/// Within this a source learns by itself that its destination is dead.
const NOTICED: Duration = Duration::from_secs(10);
/// How long the guest must then stay in one place.
const QUIET: Duration = Duration::from_millis(1000);

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
    Gateway(Side),
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// While the way to the destination is set up: the far gateway does not know of it yet, or has just
    /// dialled.
    Setup,
    /// While RAM is copied.
    Precopy,
    /// When the source guest has stopped and the last of its RAM waits.
    Switchover,
}

impl Phase {
    /// How long after the phase began the death comes, in milliseconds: from, and below. The phase lasts longer.
    fn delays_ms(self, turn: usize) -> (usize, usize) {
        match self {
            // Before the far gateway knows of it, and when it has dialled.
            Self::Setup if turn.is_multiple_of(2) => (0, 1400),
            Self::Setup => (1600, 2600),
            Self::Precopy => (0, 1500),
            Self::Switchover => (0, 20),
        }
    }

    /// The link in this phase: the way to the destination is known to stand after one round trip.
    fn link(self) -> Shape {
        match self {
            Self::Setup => Shape::wan(100, 3000),
            _ => LINK,
        }
    }

    /// Whether a migration is in it, by its states at the source and at the near gateway.
    fn is_now(self, source: &str, near: &str) -> bool {
        match self {
            Self::Setup => ["connecting", "setup"].contains(&near),
            Self::Precopy => source == "active" && near == "precopy",
            Self::Switchover => source == "pre-switchover" && near == "precopy",
        }
    }
}

const VICTIMS: [Victim; 4] = [
    Victim::Source,
    Victim::Destination,
    Victim::Gateway(Side::A),
    Victim::Gateway(Side::B),
];
/// How often each victim dies in each phase: 24 trials.
const PHASES: [Phase; 6] = [
    Phase::Setup,
    Phase::Setup,
    Phase::Precopy,
    Phase::Precopy,
    Phase::Precopy,
    Phase::Switchover,
];

/// One trial, as told in messages.
#[derive(Debug, Clone, Copy)]
struct Trial {
    victim: Victim,
    phase: Phase,
    delay: Duration,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} killed in {:?} after {:?}",
            self.victim, self.phase, self.delay
        )
    }
}

#[test]
fn deaths_leave_the_guest_in_one_place() -> Result<()> {
    let seed = seed()?;
    let mut random = Random::new(seed);
    let image = GuestImage::prepare(&GuestSpec::TINY)?;
    let setup = PairSetup {
        routes: vec![Route::tcp(Side::A)?],
        // Little is remembered from trial to trial.
        store_mib: Some([1, 1]),
        ..PairSetup::default()
    };
    let mut pair = GatewayPair::over_relay(LINK, &setup)?;
    for (turn, phase) in PHASES.into_iter().enumerate() {
        for victim in VICTIMS {
            let (from, below) = phase.delays_ms(turn);
            let delay = Duration::from_millis((from + random.below(below - from)) as u64);
            let trial = Trial {
                victim,
                phase,
                delay,
            };
            let start = Instant::now();
            try_once(&image, &mut pair, trial)
                .with_context(|| format!("{trial} (SKYFERRY_SEED={seed})\n{}", pair.explain()))?;
            eprintln!("{trial}: {:.1} s", start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

fn try_once(image: &GuestImage, pair: &mut GatewayPair, trial: Trial) -> Result<()> {
    let mut source = start_source(image)?;
    let mut passage = Passage::along(image, pair.route(0));
    passage.settings = MigrationSettings {
        pause_before_switchover: trial.phase == Phase::Switchover,
        max_bytes_per_sec: BYTES_PER_SEC,
        ..MigrationSettings::default()
    };
    let mut destination = passage.open_destination()?;
    pair.control().set_shape(trial.phase.link());
    passage.begin(&source)?;
    reach(pair, &source, trial)?;
    match trial.victim {
        Victim::Source => source.kill(),
        Victim::Destination => destination.kill(),
        Victim::Gateway(side) => pair.gateway_mut(side).kill(),
    }
    pair.control().set_shape(LINK);
    if trial.phase == Phase::Switchover && trial.victim != Victim::Source {
        // Fails where the migration is over already.
        let _ = source.continue_migration();
    }
    if let Victim::Gateway(side) = trial.victim {
        let end = Instant::now() + QUIET;
        while Instant::now() < end {
            places(&mut source, &mut destination)?;
        }
        pair.gateway_mut(side).restart()?;
        pair.wait_link()?;
    }
    settle(&mut source, &mut destination, trial)?;
    let completed = trial.victim != Victim::Source && source.migration()?.status == "completed";
    let (_, arrived) = places(&mut source, &mut destination)?;
    if trial.victim == Victim::Source || completed {
        // Lost with its machine, or arrived: then as a whole. `settle` has seen that it does not run twice.
        ensure!(
            arrived || !matches!(trial.victim, Victim::Gateway(_)),
            "the source says that it is done, and the guest runs nowhere"
        );
        if arrived {
            destination.wait_ticks(3, LIMIT)?;
            destination.check_memory()?;
        }
        return Ok(());
    }
    if (source.is_running(), arrived) == (false, true) {
        // The verdict was lost with the gateway: the guest arrived all the same, and to resume it at
        // the source would be to run it twice.
        eprintln!("{trial}: runs at the destination only");
        destination.wait_ticks(3, LIMIT)?;
        return destination.check_memory();
    }
    if trial.victim == Victim::Destination {
        // Nobody has to tell it.
        source
            .wait_migration(NOTICED, |_| {})
            .context("the source does not learn that its destination is dead")?;
    }
    if !source.migration()?.is_final() {
        source.cancel_migration()?;
        source.wait_migration(LIMIT, |_| {})?;
    }
    source.resume()?;
    destination.kill();
    let again = Passage::along(image, pair.route(0));
    let mut arrival = again
        .run(&mut source, |_| {})
        .context("the second attempt")?;
    prove_it_goes_on(&mut source, &mut arrival.destination)
}

/// Waits for the moment of death.
fn reach(pair: &GatewayPair, source: &Qemu, trial: Trial) -> Result<()> {
    let states = || -> Result<(String, String)> {
        let near = pair.gateway(Side::A).status()?;
        let near = near["migrations"][0]["state"].as_str().unwrap_or_default();
        Ok((source.migration()?.status, near.to_owned()))
    };
    let is_now = || {
        let (source, near) = states()?;
        Ok(trial.phase.is_now(&source, &near).then_some(()))
    };
    let what = format!("{:?}", trial.phase);
    wait_for(&what, LIMIT, is_now, || source.explain())?;
    thread::sleep(trial.delay);
    is_now()?.with_context(|| format!("not in {what} any more, but {:?}", states()))
}

/// Whether the guest runs at the source, and at the destination; both is an error.
fn places(source: &mut Qemu, destination: &mut Qemu) -> Result<(bool, bool)> {
    let places = (source.is_running(), destination.is_running());
    ensure!(places != (true, true), "the guest runs twice");
    thread::sleep(Duration::from_millis(20));
    Ok(places)
}

/// Watches both sides until the guest has been in one place for a while.
fn settle(source: &mut Qemu, destination: &mut Qemu, trial: Trial) -> Result<()> {
    let end = Instant::now() + LIMIT;
    let mut quiet_since = Instant::now();
    let mut before = (false, false);
    loop {
        let now = places(source, destination)?;
        if now != before {
            before = now;
            quiet_since = Instant::now();
        }
        // A machine takes the guest along when it dies, if the guest is there.
        let settled = match trial.victim {
            Victim::Source => true,
            Victim::Destination => now.0 || source.migration()?.status == "completed",
            Victim::Gateway(_) => now.0 || now.1,
        };
        if settled && quiet_since.elapsed() > QUIET {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "the guest runs nowhere; the migration is {:?}\n{}",
            source.migration()?,
            source.explain()
        );
    }
}
