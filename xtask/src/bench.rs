//! `cargo xtask bench`: both sides in one run, alternating, medians of three, against bars.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use skyferry_tests::bars::Bars;
use skyferry_tests::gateway::{Build, GatewayPair, PairSetup, Route, Side, build};
use skyferry_tests::guest::{GuestImage, GuestSpec, target_dir};
use skyferry_tests::qemu::{Launch, Qemu, Start};
use skyferry_tests::scenario::{Figures, Method, Passage, Scenario, median, prove_it_goes_on};
use skyferry_tests::wan::Shape;
use skyferry_tests::wan::tun::TunWan;

use crate::check::cargo;
use crate::{bench_wan, install};

const MIB: f64 = 1_048_576.0;
/// A migration that is not done by then has failed.
const LIMIT: Duration = Duration::from_secs(240);
/// Store of each gateway while four guests move, in MiB: smaller than what they hold.
const STORE_MIB: u32 = 64;
/// What a gateway may use beside its store, in MiB.
const RESIDENT_MIB: f64 = 96.0;

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    which: Which,
}

#[derive(Debug, Subcommand)]
enum Which {
    /// One guest of 1.5 GiB over 200 Mbit/s: bytes, time, blackout, and the gateways' own cost
    Main(MainOptions),
    /// Many guests in many ways, QEMU's own and ours, side by side; writes docs/benchmarks
    Wan(bench_wan::Options),
    /// Encoder and decoder on a real guest's stream, which is recorded if need be, against bare loops
    Pipeline(PipelineOptions),
    /// Each step that a stream's bytes go through, on a real guest's stream (divan); has no bars
    Micro(PipelineOptions),
    /// The page store on disk against bare files on the same disk; takes up to 5 GiB there
    Store(StoreOptions),
    /// A day of a site replayed against the page store: size, memory, what it keeps; takes 512 MiB
    Replay(ReplayOptions),
}

#[derive(Debug, Args)]
struct PipelineOptions {
    /// Another stream than that of the guest of the main benchmark, see `record-streams`
    #[arg(long)]
    stream: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct StoreOptions {
    /// A folder on the disk to measure [default: the target folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// MiB that are written and read, by store and bare files in turns
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=65_536))]
    mebibytes: u32,
    /// Runs of both sides; the medians count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
}

#[derive(Debug, Args)]
struct ReplayOptions {
    /// A folder on the disk that is to take the store [default: the target folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Another day than the usual one
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
struct MainOptions {
    /// Runs of each way; the medians count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// Measure only these parts
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Part>,
}

/// Parts of the main benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// 60 ms: against plain TCP and multifd with zstd, and with loss
    Near,
    /// 150 ms: blackout against plain TCP
    Far,
    /// Encoder and decoder without network
    Pipeline,
    /// Memory of the gateways with four guests at once
    Memory,
}

/// Runs a benchmark; false if a bar was missed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    match &options.which {
        Which::Wan(options) if options.only_reports() => bench_wan::run(options),
        // These are programs of their own, which cargo builds optimised.
        Which::Pipeline(options) => run_pipeline(options),
        Which::Micro(options) => run_micro(options),
        Which::Store(options) => run_store(options),
        Which::Replay(options) => run_replay(options),
        _ if cfg!(debug_assertions) => run_optimised(),
        Which::Main(options) => run_main(options),
        Which::Wan(options) => bench_wan::run(options),
    }
}

fn run_store(options: &StoreOptions) -> Result<bool> {
    let folder = folder(options.folder.as_deref())?;
    let [mebibytes, runs] = [options.mebibytes, options.runs].map(|n| n.to_string());
    run_program(
        "store",
        &[folder.as_os_str(), mebibytes.as_ref(), runs.as_ref()],
    )
}

fn run_replay(options: &ReplayOptions) -> Result<bool> {
    let mut arguments = vec![folder(options.folder.as_deref())?.into_os_string()];
    arguments.extend(options.seed.map(|seed| seed.to_string().into()));
    run_program("replay", &arguments)
}

/// Where a store is put: not among temporary files, which may be in memory.
fn folder(wanted: Option<&Path>) -> Result<PathBuf> {
    let folder = wanted.map_or_else(|| target_dir().join("bench-store"), Path::to_owned);
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// Level 1, at which the bare loop compresses, in the smallest window.
const BARE_WAY: &str = "1:19:0:256";
/// As a channel between sites begins.
const START_WAY: &str = "start";

/// The stream that was asked for, or that of the main benchmark's guest, recorded if need be.
fn stream(options: &PipelineOptions) -> Result<PathBuf> {
    let stream = if let Some(stream) = &options.stream {
        stream.clone()
    } else {
        install::ensure(&[install::QEMU, install::GCC])?;
        install::ensure_package_lists();
        let image = GuestImage::prepare(&GuestSpec::LARGE)?;
        image.recording().to_owned()
    };
    println!("{}", stream.display());
    std::path::absolute(&stream).with_context(|| format!("the path {}", stream.display()))
}

fn run_pipeline(options: &PipelineOptions) -> Result<bool> {
    let stream = stream(options)?;
    run_program("pipeline", &[stream.as_os_str(), BARE_WAY.as_ref()])
}

fn run_micro(options: &PipelineOptions) -> Result<bool> {
    let package = ["--package", "skyferry-benches", "--bench", "stream"];
    let mut command = cargo(&[&["bench", "--quiet"][..], &package].concat());
    command.env("SKYFERRY_STREAM", stream(options)?);
    let status = command.status().context("start cargo")?;
    Ok(status.success())
}

/// Runs a program of `benches/`, which has a process and an allocator of its own.
fn run_program(name: &str, arguments: &[impl AsRef<OsStr>]) -> Result<bool> {
    let mut command = cargo_run(&["skyferry-benches", "--bin", name]);
    let status = command.args(arguments).status().context("start cargo")?;
    Ok(status.success())
}

/// Cargo, to run an optimised program of this package.
fn cargo_run(package: &[&str]) -> Command {
    let run = ["run", "--quiet", "--release", "--package"];
    cargo(&[&run[..], package, &["--"]].concat())
}

fn run_main(options: &MainOptions) -> Result<bool> {
    install::ensure(&[install::QEMU, install::GCC])?;
    install::ensure_package_lists();
    if !TunWan::is_possible() {
        bail!("the benchmark needs root: QEMU's TCP and ours meet in network namespaces");
    }
    build(Build::Release)?;
    let image = GuestImage::prepare(&GuestSpec::LARGE)?;
    println!(
        "QEMU {}, medians of {} runs",
        image.qemu().version(),
        options.runs
    );
    let mut bars = Bars::default();
    let mut pipeline_kept = true;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    if wanted(Part::Pipeline) {
        let stream = image.recording().as_os_str();
        pipeline_kept = run_program("pipeline", &[stream, START_WAY.as_ref()])?;
    }
    if wanted(Part::Memory) {
        measure_memory(options.runs, &mut bars)?;
    }
    if wanted(Part::Near) {
        measure_near(&image, options.runs, &mut bars)?;
    }
    if wanted(Part::Far) {
        measure_far(&image, options.runs, &mut bars)?;
    }
    Ok(bars.print() && pipeline_kept)
}

/// The benchmark measures optimised code only, the emulated link included.
fn run_optimised() -> Result<bool> {
    let status = cargo_run(&["xtask"])
        .args(env::args_os().skip(1))
        .status()
        .context("start cargo")?;
    Ok(status.success())
}

fn scenario(image: &GuestImage, method: Method, shape: Shape) -> Scenario<'_> {
    let pair = PairSetup::default();
    Scenario {
        image,
        method,
        shape,
        tcp_congestion: "bbr",
        pair,
        limit: LIMIT,
    }
}

fn measure(scenario: &Scenario<'_>) -> Result<Figures> {
    let figures = scenario.run(|_, _| {})?;
    let shape = scenario.shape;
    print!(
        "{:20} {:3} ms {:.1} %: {:6.2} s, blackout {:4} ms, {:6.1} MB on the link for {:6.1} MB",
        scenario.method.name(),
        shape.delay.as_millis() * 2,
        shape.loss * 100.0,
        figures.total.as_secs_f64(),
        figures.blackout.as_millis(),
        figures.wire_bytes as f64 / 1e6,
        figures.guest_bytes as f64 / 1e6,
    );
    if let (Some([a, b]), Some(error)) = (figures.gateways, figures.estimate_error()) {
        print!(
            ", estimate off by {:.0} %, gateways {:.1} + {:.1} s CPU, {:.0} + {:.0} MiB",
            error * 100.0,
            a.cpu_secs,
            b.cpu_secs,
            a.peak_rss_bytes as f64 / MIB,
            b.peak_rss_bytes as f64 / MIB,
        );
    }
    println!();
    Ok(figures)
}

fn seconds(figures: &[Figures]) -> f64 {
    median(figures, |figures| figures.total.as_secs_f64())
}

fn wire_bytes(figures: &[Figures]) -> f64 {
    median(figures, |figures| figures.wire_bytes as f64)
}

fn blackout_ms(figures: &[Figures]) -> f64 {
    median(figures, |figures| figures.blackout.as_secs_f64() * 1000.0)
}

fn measure_near(image: &GuestImage, runs: u32, bars: &mut Bars) -> Result<()> {
    let link = Shape::wan(200, 60);
    let lossy = link.with_loss(0.005);
    let (mut tcp, mut multifd, mut ours, mut ours_lossy) = (vec![], vec![], vec![], vec![]);
    for _ in 0..runs {
        tcp.push(measure(&scenario(image, Method::Tcp, link))?);
        ours.push(measure(&scenario(image, Method::Skyferry, link))?);
        multifd.push(measure(&scenario(image, Method::BEST_NATIVE, link))?);
        ours_lossy.push(measure(&scenario(image, Method::Skyferry, lossy))?);
    }
    let bytes = wire_bytes(&ours);
    bars.at_most(
        "wire bytes / multifd 4 + zstd 1",
        bytes / wire_bytes(&multifd),
        1.0,
        "x",
    );
    bars.at_most("wire bytes / plain tcp", bytes / wire_bytes(&tcp), 0.3, "x");
    bars.at_most(
        "total time / plain tcp with bbr",
        seconds(&ours) / seconds(&tcp),
        0.35,
        "x",
    );
    let ratio = seconds(&ours_lossy) / seconds(&ours);
    bars.at_most("total time at 0.5 % loss / lossless", ratio, 1.2, "x");
    let bound = blackout_ms(&tcp) + 100.0;
    bars.at_most(
        "blackout at 60 ms, against plain tcp + 100",
        blackout_ms(&ours),
        bound,
        "ms",
    );
    let error = median(&ours, |figures| {
        figures.estimate_error().unwrap_or(f64::NAN)
    });
    bars.at_most(
        "QEMU's bandwidth estimate off from delivery by",
        error * 100.0,
        20.0,
        "%",
    );
    Ok(())
}

fn measure_far(image: &GuestImage, runs: u32, bars: &mut Bars) -> Result<()> {
    let link = Shape::wan(200, 150);
    let (mut tcp, mut ours) = (vec![], vec![]);
    for _ in 0..runs {
        tcp.push(measure(&scenario(image, Method::Tcp, link))?);
        ours.push(measure(&scenario(image, Method::Skyferry, link))?);
    }
    let bound = blackout_ms(&tcp) + 100.0;
    bars.at_most(
        "blackout at 150 ms, against plain tcp + 100",
        blackout_ms(&ours),
        bound,
        "ms",
    );
    Ok(())
}

fn measure_memory(runs: u32, bars: &mut Bars) -> Result<()> {
    let peaks = (0..runs).map(|_| four_at_once());
    let peaks = peaks.collect::<Result<Vec<_>>>()?;
    for (side, name) in ["near", "far"].into_iter().enumerate() {
        let name = format!("peak memory of the {name} gateway, 4 guests at once");
        let peak = median(&peaks, |peak| peak[side]);
        bars.at_most(&name, peak, f64::from(STORE_MIB) + RESIDENT_MIB, "MiB");
    }
    Ok(())
}

/// Peak memory of the near and the far gateway, in MiB, while four guests move.
fn four_at_once() -> Result<[f64; 2]> {
    const GUESTS: usize = 4;
    let image = GuestImage::prepare(&GuestSpec::SMALL)?;
    let mut setup = PairSetup {
        store_mib: Some([STORE_MIB; 2]),
        ..PairSetup::default()
    };
    for guest in 0..GUESTS {
        let port = 4444 + guest;
        let address = format!("127.0.0.1:{port}");
        setup
            .routes
            .push(Route::between(Side::A, &address, &address));
    }
    let wan = TunWan::new(Shape::wan(200, 60))?;
    let pair = GatewayPair::over_tun(&wan, &setup)?;
    let mut passages = Vec::new();
    for guest in 0..GUESTS {
        let source = Launch {
            label: "source",
            image: &image,
            start: Start::Recording,
            netns: Some(wan.a()),
        };
        let route = pair.route(guest);
        let passage = Passage {
            destination_netns: Some(wan.b()),
            ..Passage::along(&image, route)
        };
        let destination = passage.open_destination()?;
        passages.push((source.run()?, destination, passage));
    }
    for (source, _, passage) in &passages {
        source.configure_migration(&passage.settings)?;
        source.start_migration(&passage.source_uri)?;
    }
    for (source, destination, passage) in &mut passages {
        wait(source, destination, passage.limit).with_context(|| pair.explain())?;
    }
    let peak = |side| anyhow::Ok(pair.gateway(side).usage()?.peak_rss_bytes as f64 / MIB);
    let peaks = [peak(Side::A)?, peak(Side::B)?];
    let [near, far] = peaks;
    println!("4 guests at once: peak memory {near:.1} + {far:.1} MiB");
    Ok(peaks)
}

fn wait(source: &mut Qemu, destination: &mut Qemu, limit: Duration) -> Result<()> {
    source
        .wait_migration(limit, |_| {})?
        .expect_completed(source)?;
    prove_it_goes_on(source, destination)
}
