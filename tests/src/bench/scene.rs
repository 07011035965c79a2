//! Moves a guest in one or several ways and measures what they cost.
//!
//! Ways that build on each other share a scene: the sibling is moved after the first guest, and the
//! first guest returns when it has worked at the other site.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::cost::{Watched, measure};
use super::guests::{Guest, Scale, Twin};
use super::machine::Abilities;
use super::relays::{self, COPY_BYTES, Over};
use super::results::{Cost, Outcome, Role};
use super::way::{Kind, Native, Way};
use crate::gateway::{GatewayPair, PairSetup, Route, Side};
use crate::guest::{GuestImage, cache_dir, write_disk_image};
use crate::process::Process;
use crate::qemu::{Launch, MigrationSettings, Progress, Qemu, Start};
use crate::scenario::{Passage, prove_it_goes_on};
use crate::wan::netns::Netns;
use crate::wan::tun::{ADDRESS_B, TunWan};
use crate::wan::{LinkControl, Shape};

/// Time for the guest's signs of life.
const LIFE_LIMIT: Duration = Duration::from_secs(60);
/// After the source has said `completed`; a pipe may hold much then.
const RESUME_LIMIT: Duration = Duration::from_secs(60);
/// TCP ports of destinations and ingresses in namespaces, for the way there and for the way back.
const PORT_THERE: u16 = 4444;
const PORT_BACK: u16 = 4445;
/// Memory of each gateway's page store.
const STORE_MEMORY: &str = "1GiB";
/// Room for it on disk, where it can be there.
const STORE_DISK: &str = "8GiB";
/// Rate of the slow link of [`Way::Cold20Mbit`].
const SLOW_MBIT: u64 = 20;

/// Moves guests under the same circumstances.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Size of the guests.
    pub scale: Scale,
    /// Rate of the link in Mbit/s.
    pub rate_mbit: u64,
    /// Its round-trip time in ms.
    pub rtt_ms: u64,
    /// Packets that it loses, in percent.
    pub loss_percent: f64,
    /// How long a guest works before it returns.
    pub work: Duration,
    /// After which a migration has failed.
    pub limit: Duration,
    /// The gateway program.
    pub program: PathBuf,
    /// What it can do.
    pub abilities: Abilities,
}

/// Ways that are measured together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    kind: Kind,
    ways: Vec<Way>,
}

impl Scene {
    /// The scenes for some ways, in their order.
    #[must_use]
    pub fn of(ways: &[Way]) -> Vec<Self> {
        let mut scenes: Vec<Self> = Vec::new();
        for way in ways {
            let kind = way.kind();
            match scenes.iter_mut().find(|scene| scene.kind == kind) {
                Some(scene) => scene.ways.push(*way),
                None => scenes.push(Self {
                    kind,
                    ways: vec![*way],
                }),
            }
        }
        scenes
    }

    /// What is measured.
    #[must_use]
    pub fn ways(&self) -> &[Way] {
        &self.ways
    }
}

/// A link with whatever stands at its ends.
#[derive(Debug)]
struct Ground {
    /// `None` is the loopback interface.
    wan: Option<TunWan>,
    pair: Option<GatewayPair>,
    relays: Vec<Process>,
}

/// From where to where a guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trip {
    There,
    Back,
}

impl Trip {
    const fn sides(self) -> [Side; 2] {
        match self {
            Self::There => [Side::A, Side::B],
            Self::Back => [Side::B, Side::A],
        }
    }
}

impl Ground {
    fn netns(&self, side: Side) -> Option<&Netns> {
        let wan = self.wan.as_ref()?;
        Some(match side {
            Side::A => wan.a(),
            Side::B => wan.b(),
        })
    }

    fn link(&self) -> Option<&LinkControl> {
        self.wan.as_ref().map(TunWan::control)
    }

    fn wire_bytes(&self) -> u64 {
        self.link().map_or(0, LinkControl::wire_bytes)
    }

    fn gateways(&self) -> Result<&GatewayPair> {
        self.pair.as_ref().context("no gateways here")
    }
}

/// A move to be made.
struct Move<'a> {
    ground: &'a Ground,
    image: &'a GuestImage,
    trip: Trip,
    settings: MigrationSettings,
    source_uri: String,
    destination_uri: String,
    limit: Duration,
    /// What the link had carried when the cost began, if that was before the move.
    wire_before: Option<u64>,
}

impl Move<'_> {
    /// Moves the guest and proves that it goes on.
    fn run(&self, source: &mut Qemu) -> Result<(Qemu, Cost)> {
        let [from, to] = self.trip.sides();
        let passage = Passage {
            image: self.image,
            destination_netns: self.ground.netns(to),
            source_uri: self.source_uri.clone(),
            destination_uri: self.destination_uri.clone(),
            settings: self.settings.clone(),
            limit: self.limit,
        };
        let mut destination = passage.open_destination()?;
        let mut watched = vec![
            qemu(Role::Source, source),
            qemu(Role::Destination, &destination),
        ];
        for (role, side) in [(Role::Source, from), (Role::Destination, to)] {
            if let Some(pair) = &self.ground.pair {
                watched.push(Watched {
                    role,
                    program: "gateway",
                    process: pair.gateway(side).process(),
                });
            }
        }
        let roles = [Role::Source, Role::Destination];
        for (role, process) in roles.into_iter().zip(&self.ground.relays) {
            watched.push(Watched {
                role,
                program: "relay",
                process,
            });
        }
        let before = self.wire_before.unwrap_or_else(|| self.ground.wire_bytes());
        let started = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let moved = measure(&watched, || {
            passage.begin(source)?;
            let outcome = source
                .wait_migration(self.limit, |_| {})?
                .expect_completed(source)?;
            let resumed = destination.qmp().wait_event("RESUME", RESUME_LIMIT)?;
            Ok((outcome, resumed))
        });
        let ((outcome, resumed), processes) = moved.map_err(|error| {
            let error = error.context(destination.explain());
            match &self.ground.pair {
                Some(pair) => error.context(pair.explain()),
                None => error,
            }
        })?;
        let stopped = source.qmp().last_event("STOP");
        let stopped = stopped.context("the source guest never stopped")?.at;
        prove_it_goes_on(source, &mut destination)?;
        let until_resumed = resumed.at.saturating_sub(started);
        let cost = Cost {
            total_secs: outcome.end.total.max(until_resumed).as_secs_f64(),
            blackout_secs: resumed.at.saturating_sub(stopped).as_secs_f64(),
            // Read late: what gateways tell each other after a move is part of what it costs.
            wire_bytes: self.ground.wire_bytes() - before,
            guest_bytes: outcome.end.transferred_bytes,
            nonzero_bytes: nonzero_bytes(&outcome.samples),
            processes,
        };
        Ok((destination, cost))
    }
}

fn qemu(role: Role, qemu: &Qemu) -> Watched<'_> {
    Watched {
        role,
        program: "qemu",
        process: qemu.process(),
    }
}

/// What QEMU has sent as pages with content until it began its second round.
fn nonzero_bytes(samples: &[Progress]) -> u64 {
    const PAGE_BYTES: u64 = 4096;
    let first = samples.iter().rev().find(|sample| sample.rounds <= 1);
    // A move may be over before anybody has looked twice.
    let looked = first
        .filter(|sample| sample.normal_pages > 0)
        .or(samples.last());
    looked.map_or(0, |sample| sample.normal_pages * PAGE_BYTES)
}

impl Stage {
    /// Plays a scene with a guest; `report` gets what came of each of its ways, as soon as it is known.
    ///
    /// # Errors
    /// Those of `report`, and of building the guest.
    pub fn play(
        &self,
        guest: &Guest,
        scene: &Scene,
        report: &mut dyn FnMut(Way, Outcome) -> Result<()>,
    ) -> Result<()> {
        if scene.kind == Kind::Chain {
            return self.chain(guest, &scene.ways, report);
        }
        let twin = match scene.kind {
            Kind::Sibling | Kind::Restart => Twin::Sibling,
            _ => Twin::First,
        };
        let image = GuestImage::prepare(&guest.spec(self.scale, twin))?;
        let outcome = match scene.kind {
            Kind::Native(native) => outcome(self.native(&image, native)),
            Kind::Restart => {
                let first = GuestImage::prepare(&guest.spec(self.scale, Twin::First))?;
                outcome(self.restarted(&first, &image))
            }
            Kind::Seeded if !self.abilities.seed => Outcome::Unavailable,
            Kind::Seeded => outcome(self.seeded(&image)),
            Kind::Slow => outcome(self.cold(&image, SLOW_MBIT)),
            Kind::Loopback { opaque } => outcome(self.loopback(&image, opaque)),
            Kind::Copy(over) => outcome(self.copied(&image, over)),
            Kind::Sibling | Kind::Chain => outcome(self.cold(&image, self.rate_mbit)),
        };
        for way in &scene.ways {
            report(*way, outcome.clone())?;
        }
        Ok(())
    }

    fn shape(&self, rate_mbit: u64) -> Shape {
        Shape::wan(rate_mbit, self.rtt_ms).with_loss(self.loss_percent / 100.0)
    }

    fn native(&self, image: &GuestImage, native: Native) -> Result<Cost> {
        let wan = TunWan::new(self.shape(self.rate_mbit))?;
        wan.set_tcp_congestion_control(native.congestion)?;
        let ground = Ground {
            wan: Some(wan),
            pair: None,
            relays: Vec::new(),
        };
        let [source_uri, destination_uri] = if native.pipe {
            [
                format!(
                    "exec:zstd -q -3 --long=27 -T2 -c | socat -u -b {COPY_BYTES} - \
                     TCP:{ADDRESS_B}:{PORT_THERE},retry=200,interval=0.05"
                ),
                format!(
                    "exec:socat -u -b {COPY_BYTES} TCP-LISTEN:{PORT_THERE},reuseaddr,accept-timeout=60 - | zstd -q -d \
                     --long=27 -c"
                ),
            ]
        } else {
            let uri = format!("tcp:{ADDRESS_B}:{PORT_THERE}");
            [uri.clone(), uri]
        };
        let mut source = self.source(&ground, image)?;
        let the_move = Move {
            ground: &ground,
            image,
            trip: Trip::There,
            settings: native.settings(),
            source_uri,
            destination_uri,
            limit: self.limit,
            wire_before: None,
        };
        Ok(the_move.run(&mut source)?.1)
    }

    /// Gateways over the emulated link.
    fn ground(&self, rate_mbit: u64) -> Result<Ground> {
        let local = |port: u16| format!("127.0.0.1:{port}");
        let route = |from, port| Route::between(from, &local(port), &local(port));
        let setup = PairSetup {
            routes: vec![route(Side::A, PORT_THERE), route(Side::B, PORT_BACK)],
            more: self.store(),
            shared_secret: true,
            ..PairSetup::default()
        };
        let wan = TunWan::new(self.shape(rate_mbit))?;
        let pair = GatewayPair::over_tun(&wan, &setup)?;
        Ok(Ground {
            wan: Some(wan),
            pair: Some(pair),
            relays: Vec::new(),
        })
    }

    /// The section of the configuration.
    fn store(&self) -> String {
        let memory = format!("[store]\nmemory = \"{STORE_MEMORY}\"\n");
        if self.abilities.disk_store {
            // Beside the configuration, so that each gateway has its own.
            format!("{memory}path = \"store\"\nsize = \"{STORE_DISK}\"\nkey_file = \"store.key\"\n")
        } else {
            memory
        }
    }

    fn source(&self, ground: &Ground, image: &GuestImage) -> Result<Qemu> {
        let source = Launch {
            label: "source",
            image,
            start: Start::Recording,
            netns: ground.netns(Side::A),
        }
        .run()?;
        source.wait_ticks(3, LIFE_LIMIT)?;
        Ok(source)
    }

    /// A move through the gateways of a ground.
    fn through<'a>(
        &self,
        ground: &'a Ground,
        image: &'a GuestImage,
        trip: Trip,
    ) -> Result<Move<'a>> {
        let route = ground.gateways()?.route(trip as usize);
        Ok(Move {
            ground,
            image,
            trip,
            settings: MigrationSettings::default(),
            source_uri: route.source_uri(),
            destination_uri: route.destination_uri(),
            limit: self.limit,
            wire_before: None,
        })
    }

    /// Starts the guest at A and moves it to B.
    fn send(&self, ground: &Ground, image: &GuestImage) -> Result<(Qemu, Cost)> {
        let mut source = self.source(ground, image)?;
        self.through(ground, image, Trip::There)?.run(&mut source)
    }

    fn cold(&self, image: &GuestImage, rate_mbit: u64) -> Result<Cost> {
        Ok(self.send(&self.ground(rate_mbit)?, image)?.1)
    }

    fn restarted(&self, first: &GuestImage, sibling: &GuestImage) -> Result<Cost> {
        let mut ground = self.ground(self.rate_mbit)?;
        drop(self.send(&ground, first).context("the first guest")?);
        // What the gateways tell each other when they meet again is part of the cost.
        let before = ground.wire_bytes();
        let pair = ground.pair.as_mut().context("no gateways here")?;
        for side in [Side::A, Side::B] {
            pair.gateway_mut(side).restart()?;
        }
        pair.wait_link()?;
        let mut source = self.source(&ground, sibling)?;
        let the_move = Move {
            wire_before: Some(before),
            ..self.through(&ground, sibling, Trip::There)?
        };
        Ok(the_move.run(&mut source)?.1)
    }

    fn seeded(&self, image: &GuestImage) -> Result<Cost> {
        let ground = self.ground(self.rate_mbit)?;
        let disk = tempfile::NamedTempFile::new_in(cache_dir())?;
        write_disk_image(image.spec(), disk.path())?;
        let far = ground.gateways()?.gateway(Side::B);
        far.seed(disk.path()).context("seed the far site")?;
        Ok(self.send(&ground, image)?.1)
    }

    fn loopback(&self, image: &GuestImage, opaque: bool) -> Result<Cost> {
        let mut route = Route::tcp(Side::A)?;
        if opaque {
            // Nothing is looked for in the stream of a listener whose server speaks first.
            route.more = "first = \"server\"".to_owned();
        }
        let setup = PairSetup {
            routes: vec![route],
            more: self.store(),
            shared_secret: true,
            ..PairSetup::default()
        };
        let ground = Ground {
            wan: None,
            pair: Some(GatewayPair::over_loopback(&setup)?),
            relays: Vec::new(),
        };
        Ok(self.send(&ground, image)?.1)
    }

    fn copied(&self, image: &GuestImage, over: Over) -> Result<Cost> {
        let mut pair = relays::start(over)?;
        let relays = std::mem::take(&mut pair.processes);
        let ground = Ground {
            wan: None,
            pair: None,
            relays,
        };
        let mut source = self.source(&ground, image)?;
        let the_move = Move {
            ground: &ground,
            image,
            trip: Trip::There,
            settings: MigrationSettings::default(),
            source_uri: format!("tcp:{}", pair.near),
            destination_uri: format!("tcp:{}", pair.target),
            limit: self.limit,
            wire_before: None,
        };
        Ok(the_move.run(&mut source)?.1)
    }

    /// The first guest, its sibling, and the first guest back again, through the same gateways.
    fn chain(
        &self,
        guest: &Guest,
        ways: &[Way],
        report: &mut dyn FnMut(Way, Outcome) -> Result<()>,
    ) -> Result<()> {
        let mut note = |way, outcome| {
            if ways.contains(&way) {
                report(way, outcome)
            } else {
                Ok(())
            }
        };
        let image = GuestImage::prepare(&guest.spec(self.scale, Twin::First))?;
        let sibling = if ways.contains(&Way::Warm) {
            Some(GuestImage::prepare(&guest.spec(self.scale, Twin::Sibling))?)
        } else {
            None
        };
        let first = self
            .ground(self.rate_mbit)
            .and_then(|ground| Ok((self.send(&ground, &image)?, ground)));
        let ((mut arrived, cost), ground) = match first {
            Ok(first) => first,
            Err(error) => {
                let failed = Outcome::Failed(first_line(&error));
                for way in [Way::Cold, Way::Warm, Way::Returning] {
                    note(way, failed.clone())?;
                }
                return Ok(());
            }
        };
        let arrival = Instant::now();
        note(Way::Cold, Outcome::Done(cost))?;
        if let Some(sibling) = &sibling {
            let moved = self.send(&ground, sibling).map(|(_, cost)| cost);
            note(Way::Warm, outcome(moved))?;
        }
        if ways.contains(&Way::Returning) {
            thread::sleep(self.work.saturating_sub(arrival.elapsed()));
            let back = self
                .through(&ground, &image, Trip::Back)
                .and_then(|back| back.run(&mut arrived));
            note(Way::Returning, outcome(back.map(|(_, cost)| cost)))?;
        }
        Ok(())
    }
}

fn outcome(result: Result<Cost>) -> Outcome {
    match result {
        Ok(cost) => Outcome::Done(cost),
        Err(error) => {
            eprintln!("{error:#}");
            Outcome::Failed(first_line(&error))
        }
    }
}

/// Of the innermost reason; the text around it is logs, which went to standard error.
fn first_line(error: &anyhow::Error) -> String {
    let text = error.root_cause().to_string();
    text.lines().next().unwrap_or("failed").to_owned()
}

/// Whether the machine can run the benchmark.
///
/// # Errors
/// Says what is missing.
pub fn check() -> Result<()> {
    if !TunWan::is_possible() {
        bail!("the benchmark needs root: QEMU's TCP and ours meet in network namespaces");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_that_build_on_each_other_share_a_scene() {
        let scenes = Scene::of(&[
            Way::TcpBbr,
            Way::Cold,
            Way::TcpCubic,
            Way::Warm,
            Way::Returning,
        ]);
        let ways: Vec<&[Way]> = scenes.iter().map(Scene::ways).collect();
        assert_eq!(
            ways,
            [
                &[Way::TcpBbr][..],
                &[Way::Cold, Way::Warm, Way::Returning],
                &[Way::TcpCubic]
            ]
        );
    }

    #[test]
    fn pages_with_content_are_those_of_the_first_round() {
        let sample = |rounds, normal_pages| Progress {
            at: Instant::now(),
            status: "active".into(),
            total: Duration::ZERO,
            transferred_bytes: 0,
            remaining_bytes: 0,
            zero_pages: 0,
            normal_pages,
            mbps: 0.0,
            rounds,
            downtime: None,
            error: None,
        };
        assert_eq!(nonzero_bytes(&[]), 0);
        let samples = [sample(1, 10), sample(1, 20), sample(2, 30)];
        assert_eq!(nonzero_bytes(&samples), 20 * 4096);
        assert_eq!(nonzero_bytes(&[sample(0, 0), sample(3, 7)]), 7 * 4096);
    }
}
