//! Moves of a guest from A to B, by QEMU's own means or through a pair of gateways, and what they
//! cost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::gateway::{Gateway, GatewayPair, PairSetup, Route, Side};
use crate::guest::GuestImage;
use crate::process::Usage;
use crate::qemu::{Launch, MigrationSettings, Multifd, Outcome, Progress, Qemu, Start, blackout};
use crate::wan::netns::Netns;
use crate::wan::tun::{ADDRESS_B, TunWan};
use crate::wan::{LinkControl, Shape};

/// Time for the guest's signs of life.
const LIFE_LIMIT: Duration = Duration::from_secs(60);
/// TCP port of destinations and ingresses in namespaces.
const PORT: u16 = 4444;
/// How often the far gateway is asked what it has delivered.
const DELIVERY_INTERVAL: Duration = Duration::from_millis(200);

/// Starts the guest from its recording, on the loopback network, and waits until it ticks.
///
/// # Errors
/// When it does not.
pub fn start_source(image: &GuestImage) -> Result<Qemu> {
    let source = Launch {
        label: "source",
        image,
        start: Start::Recording,
        netns: None,
    }
    .run()?;
    source.wait_ticks(2, LIFE_LIMIT)?;
    Ok(source)
}

/// One move of a guest between two QEMUs of this machine.
#[derive(Debug)]
pub struct Passage<'a> {
    /// The guest.
    pub image: &'a GuestImage,
    /// Where the destination's sockets are.
    pub destination_netns: Option<&'a Netns>,
    /// What the source is told.
    pub source_uri: String,
    /// Where the destination listens.
    pub destination_uri: String,
    /// For both sides.
    pub settings: MigrationSettings,
    /// After which the migration has failed.
    pub limit: Duration,
}

/// A guest that has arrived.
#[derive(Debug)]
pub struct Arrival {
    /// Where it runs now.
    pub destination: Qemu,
    /// How the source saw it.
    pub outcome: Outcome,
    /// The guest's real downtime.
    pub blackout: Duration,
}

impl<'a> Passage<'a> {
    /// Along a route of a pair of gateways on the loopback interface, with usual settings.
    #[must_use]
    pub fn along(image: &'a GuestImage, route: &Route) -> Self {
        Self {
            image,
            destination_netns: None,
            source_uri: route.source_uri(),
            destination_uri: route.destination_uri(),
            settings: MigrationSettings::default(),
            limit: Duration::from_secs(120),
        }
    }

    /// Starts the destination and has it listen.
    ///
    /// # Errors
    /// When it does not start.
    pub fn open_destination(&self) -> Result<Qemu> {
        let destination = Launch {
            label: "destination",
            image: self.image,
            start: Start::Incoming,
            netns: self.destination_netns,
        }
        .run()?;
        destination.configure_migration(&self.settings)?;
        destination.listen(&self.destination_uri)?;
        Ok(destination)
    }

    /// Starts migrating to a destination of [`Self::open_destination`]; returns at once.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn begin(&self, source: &Qemu) -> Result<()> {
        source.configure_migration(&self.settings)?;
        source.start_migration(&self.source_uri)
    }

    /// Moves the guest of `source`; `watch` sees each look at its progress.
    ///
    /// # Errors
    /// When the migration fails or the guest is not seen to run at the destination; the text has
    /// the logs of both QEMUs.
    pub fn run(&self, source: &mut Qemu, watch: impl FnMut(&Progress)) -> Result<Arrival> {
        let mut destination = self.open_destination()?;
        self.begin(source)?;
        let outcome = source
            .wait_migration(self.limit, watch)
            .and_then(|outcome| outcome.expect_completed(source))
            .map_err(|error| error.context(destination.explain()))?;
        let blackout = blackout(source, &destination)?;
        destination.wait_status("running", LIFE_LIMIT)?;
        Ok(Arrival {
            destination,
            outcome,
            blackout,
        })
    }
}

/// Proves that the guest goes on at the destination, and only there: it ticks, its counter continues,
/// and all its memory is what it wrote.
///
/// # Errors
/// Says which of it is not so.
pub fn prove_it_goes_on(source: &mut Qemu, destination: &mut Qemu) -> Result<()> {
    destination.wait_ticks(3, LIFE_LIMIT)?;
    destination.check_memory()?;
    ensure!(
        destination.is_running(),
        "the guest does not run at the destination"
    );
    ensure!(!source.is_running(), "the guest runs at the source, too");
    let left = source.console().ticks();
    let arrived = destination.console().ticks();
    let continues = match (left.last(), arrived.first()) {
        // A stop may fall into the output of a line, which then comes out at both ends (seen with
        // QEMU 7.2).
        (Some(last), Some(first)) => first >= last,
        (None, Some(_)) => true,
        (_, None) => false,
    };
    ensure!(
        continues,
        "the guest's counter went from {left:?} to {arrived:?}"
    );
    ensure!(
        arrived.is_sorted(),
        "the guest's counter went back: {arrived:?}"
    );
    Ok(())
}

/// How a guest is moved over the emulated WAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// QEMU alone, one TCP connection.
    Tcp,
    /// QEMU alone, several TCP connections with compression.
    Multifd(Multifd),
    /// A pair of gateways.
    Skyferry,
}

impl Method {
    /// QEMU's best: four channels, zstd level 1.
    pub const BEST_NATIVE: Self = Self::Multifd(Multifd {
        channels: 4,
        zstd_level: Some(1),
    });

    /// Name in tables.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Tcp => "tcp".to_owned(),
            Self::Multifd(Multifd {
                channels,
                zstd_level: Some(level),
            }) => {
                format!("multifd {channels} + zstd {level}")
            }
            Self::Multifd(Multifd {
                channels,
                zstd_level: None,
            }) => format!("multifd {channels}"),
            Self::Skyferry => "skyferry".to_owned(),
        }
    }
}

/// What a move cost.
#[derive(Debug, Clone)]
pub struct Figures {
    /// From `migrate` to `completed`, as the source says.
    pub total: Duration,
    /// The guest's real downtime.
    pub blackout: Duration,
    /// Bytes on the link, both directions, all overheads included.
    pub wire_bytes: u64,
    /// Bytes that the source wrote.
    pub guest_bytes: u64,
    /// All looks at the source's progress.
    pub samples: Vec<Progress>,
    /// What the far gateway had delivered to the destination, and when; empty without gateways.
    pub delivered: Vec<(Instant, u64)>,
    /// Of the source's QEMU.
    pub source: Usage,
    /// Of the destination's QEMU.
    pub destination: Usage,
    /// Of the gateways at A and B; `None` without gateways.
    pub gateways: Option<[Usage; 2]>,
    /// The guest's counter when it stopped at the source.
    pub last_tick_left: u64,
    /// Its counter when it first ticked at the destination.
    pub first_tick_arrived: u64,
}

impl Figures {
    /// How far QEMU's estimate of its bandwidth was from what was really delivered: over windows of a
    /// second in precopy, the median of |estimate / delivered - 1|. `None` without gateways, or when
    /// the migration was too short.
    #[must_use]
    pub fn estimate_error(&self) -> Option<f64> {
        const WINDOW: Duration = Duration::from_secs(1);
        let mut errors = Vec::new();
        let mut from = 0;
        for to in 1..self.delivered.len() {
            let ((start, before), (end, after)) = (self.delivered[from], self.delivered[to]);
            if end - start < WINDOW {
                continue;
            }
            from = to;
            let estimates: Vec<f64> = self
                .samples
                .iter()
                .filter(|sample| sample.at >= start && sample.at < end)
                .filter(|sample| sample.status == "active" && sample.mbps > 0.0)
                .map(|sample| sample.mbps)
                .collect();
            if estimates.is_empty() || after == before {
                continue;
            }
            let estimate = estimates.iter().sum::<f64>() / estimates.len() as f64;
            let delivered = (after - before) as f64 * 8e-6 / (end - start).as_secs_f64();
            errors.push((estimate / delivered - 1.0).abs());
        }
        errors.sort_by(f64::total_cmp);
        errors.get(errors.len() / 2).copied()
    }
}

/// A move over the emulated WAN: between network namespaces where that is possible, else (gateways
/// only) through the relay.
#[derive(Debug, Clone)]
pub struct Scenario<'a> {
    /// The guest.
    pub image: &'a GuestImage,
    /// How it is moved.
    pub method: Method,
    /// Over which link.
    pub shape: Shape,
    /// TCP's congestion control, for the native ways.
    pub tcp_congestion: &'a str,
    /// Gateways, for [`Method::Skyferry`]; the route is added.
    pub pair: PairSetup,
    /// After which the migration has failed.
    pub limit: Duration,
}

/// The link with whatever stands at its ends; several guests may move over it, one after the other.
#[derive(Debug)]
pub struct Ground {
    tun: Option<TunWan>,
    pair: Option<GatewayPair>,
    control: LinkControl,
    source_uri: String,
    destination_uri: String,
}

impl Ground {
    /// Steers the link and reads its counters.
    #[must_use]
    pub fn control(&self) -> &LinkControl {
        &self.control
    }
}

impl Scenario<'_> {
    /// [`Self::prepare`], then [`Self::run_on`].
    ///
    /// # Errors
    /// When anything fails; the text has the logs.
    pub fn run(&self, watch: impl FnMut(&Progress, &LinkControl)) -> Result<Figures> {
        self.run_on(&self.prepare()?, watch)
    }

    /// Starts the guest at A, moves it to B, and proves that it goes on. `watch` sees each look at its
    /// progress together with the link. The gateways' usage is that since their start.
    ///
    /// # Errors
    /// When anything fails; the text has the logs.
    pub fn run_on(
        &self,
        ground: &Ground,
        mut watch: impl FnMut(&Progress, &LinkControl),
    ) -> Result<Figures> {
        let Ground {
            tun, pair, control, ..
        } = ground;
        let mut source = Launch {
            label: "source",
            image: self.image,
            start: Start::Recording,
            netns: tun.as_ref().map(TunWan::a),
        }
        .run()?;
        source.wait_ticks(3, LIFE_LIMIT)?;
        let multifd = match self.method {
            Method::Multifd(multifd) => Some(multifd),
            Method::Tcp | Method::Skyferry => None,
        };
        let passage = Passage {
            image: self.image,
            destination_netns: tun.as_ref().map(TunWan::b),
            source_uri: ground.source_uri.clone(),
            destination_uri: ground.destination_uri.clone(),
            settings: MigrationSettings {
                multifd,
                ..MigrationSettings::default()
            },
            limit: self.limit,
        };
        let before = control.wire_bytes();
        let far = pair.as_ref().map(|pair| pair.gateway(Side::B));
        let (arrival, delivered) = observe(far, || {
            passage.run(&mut source, |progress| watch(progress, control))
        });
        let mut arrival = arrival.map_err(|error| match pair {
            Some(pair) => error.context(pair.explain()),
            None => error,
        })?;
        let gateways = match pair {
            Some(pair) => Some([
                pair.gateway(Side::A).usage()?,
                pair.gateway(Side::B).usage()?,
            ]),
            None => None,
        };
        let figures = Figures {
            total: arrival.outcome.end.total,
            blackout: arrival.blackout,
            wire_bytes: control.wire_bytes() - before,
            guest_bytes: arrival.outcome.end.transferred_bytes,
            samples: arrival.outcome.samples,
            delivered,
            source: source.usage()?,
            destination: arrival.destination.usage()?,
            gateways,
            last_tick_left: source.console().ticks().last().copied().unwrap_or(0),
            first_tick_arrived: 0,
        };
        prove_it_goes_on(&mut source, &mut arrival.destination)?;
        let first = arrival.destination.console().ticks().first().copied();
        Ok(Figures {
            first_tick_arrived: first.unwrap_or(0),
            ..figures
        })
    }

    /// Sets up the link, and the gateways where the method has them.
    ///
    /// # Errors
    /// Without root (native methods), or when a gateway does not come up.
    pub fn prepare(&self) -> Result<Ground> {
        if self.method != Method::Skyferry {
            let wan = TunWan::new(self.shape)?;
            wan.set_tcp_congestion_control(self.tcp_congestion)?;
            let uri = format!("tcp:{ADDRESS_B}:{PORT}");
            let control = wan.control().clone();
            return Ok(Ground {
                tun: Some(wan),
                pair: None,
                control,
                source_uri: uri.clone(),
                destination_uri: uri,
            });
        }
        let mut setup = self.pair.clone();
        let (tun, pair) = if TunWan::is_possible() {
            let local = format!("127.0.0.1:{PORT}");
            setup
                .routes
                .insert(0, Route::between(Side::A, &local, &local));
            let wan = TunWan::new(self.shape)?;
            let pair = GatewayPair::over_tun(&wan, &setup)?;
            (Some(wan), pair)
        } else {
            setup.routes.insert(0, Route::tcp(Side::A)?);
            (None, GatewayPair::over_relay(self.shape, &setup)?)
        };
        Ok(Ground {
            tun,
            control: pair.control().clone(),
            source_uri: pair.route(0).source_uri(),
            destination_uri: pair.route(0).destination_uri(),
            pair: Some(pair),
        })
    }
}

/// Runs `action` while another thread notes what the far gateway has delivered.
fn observe<T>(far: Option<&Gateway>, action: impl FnOnce() -> T) -> (T, Vec<(Instant, u64)>) {
    let Some(far) = far else {
        return (action(), Vec::new());
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let observer = scope.spawn(|| {
            let mut delivered = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let bytes = far.latest_migration().ok().flatten();
                if let Some(bytes) = bytes.and_then(|m| m["guest_bytes"].as_u64()) {
                    delivered.push((asked, bytes));
                }
                thread::sleep(DELIVERY_INTERVAL);
            }
            delivered
        });
        let result = action();
        done.store(true, Ordering::Relaxed);
        (result, observer.join().unwrap_or_default())
    })
}

/// The median of `key` over the values; 0 if there are none.
#[must_use]
pub fn median<T>(values: &[T], key: impl Fn(&T) -> f64) -> f64 {
    let mut sorted: Vec<f64> = values.iter().map(key).collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}
