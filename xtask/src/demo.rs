//! `cargo xtask demo`: the same guest through two gateways and natively, side by side.

use std::io::{IsTerminal, Write, stdout};
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use skyferry_tests::gateway::{Build, PairSetup, build};
use skyferry_tests::guest::{GuestImage, GuestSpec};
use skyferry_tests::qemu::Progress;
use skyferry_tests::scenario::{Figures, Ground, Method, Scenario};
use skyferry_tests::wan::tun::TunWan;
use skyferry_tests::wan::{LinkControl, Shape};

use crate::install;

/// A native migration that is not done by then never will be.
const LIMIT: Duration = Duration::from_secs(100);

/// Memory of each gateway's page store: the guest fits.
const STORE_MIB: u32 = 1024;

/// The emulated link.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rate of the link in Mbit/s
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rate: u64,
    /// Round-trip time of the link in ms
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u64).range(0..=2000))]
    rtt: u64,
    /// Packets lost at random, in percent
    #[arg(long, default_value_t = 0.5)]
    loss: f64,
}

/// Runs the demo.
pub(crate) fn run(options: &Options) -> Result<()> {
    install::ensure(&[install::GCC])?;
    println!("Building the gateway, and preparing a guest (booted and recorded once, then kept)");
    // Takes longest. What cannot be installed is said at once, and not when this is done.
    let building = thread::spawn(|| build(Build::Plain));
    install::ensure(&[install::QEMU])?;
    install::warn_of_old_qemu();
    install::ensure_package_lists();
    let image = GuestImage::prepare(&GuestSpec::LARGE)?;
    building
        .join()
        .unwrap_or_else(|panic| resume_unwind(panic))?;
    let shape = Shape::wan(options.rate, options.rtt).with_loss(options.loss / 100.0);
    let native = TunWan::is_possible();
    introduce(options, &image, native);
    let scenario = |method| Scenario {
        image: &image,
        method,
        shape,
        tcp_congestion: "bbr",
        pair: PairSetup {
            store_mib: Some([STORE_MIB; 2]),
            ..PairSetup::default()
        },
        limit: LIMIT,
    };
    let mut rows = Vec::new();
    let ours = scenario(Method::Skyferry);
    let ground = ours.prepare()?;
    rows.push(Row::measure("through Skyferry", &ours, &ground)?);
    rows.push(Row::measure("through Skyferry, once more", &ours, &ground)?);
    drop(ground);
    let name = "QEMU alone (4 channels, zstd, TCP BBR)";
    rows.push(if native {
        let theirs = scenario(Method::BEST_NATIVE);
        Row::measure(name, &theirs, &theirs.prepare()?)?
    } else {
        let reason = "left out: its TCP needs network namespaces, hence root";
        Row {
            name,
            figures: Err(reason.to_owned()),
        }
    });
    table(&rows);
    Ok(())
}

fn introduce(options: &Options, image: &GuestImage, native: bool) {
    let spec = image.spec();
    println!(
        "\nGuest: {} MiB of RAM under QEMU {}, {} MiB of files in its page cache; it rewrites {} \
         pages per second,\nchecks its memory all the time and ticks on its console.",
        spec.memory_mib,
        image.qemu().version(),
        spec.page_cache_mib,
        spec.pages_per_sec
    );
    println!(
        "Link: {} Mbit/s, {} ms round trip, {} % loss ({}).",
        options.rate,
        options.rtt,
        options.loss,
        if native {
            "two network namespaces"
        } else {
            "UDP relay"
        }
    );
}

/// One line of the table.
struct Row {
    name: &'static str,
    /// Or why there are none.
    figures: Result<Figures, String>,
}

impl Row {
    /// A native way may fail, which is a figure as well; ours may not.
    fn measure(name: &'static str, scenario: &Scenario<'_>, ground: &Ground) -> Result<Self> {
        println!("\n{name}:");
        let mut view = View::new(ground);
        let result = scenario.run_on(ground, |progress, link| view.show(progress, link));
        view.end();
        let figures = match result {
            Ok(figures) => {
                println!(
                    "  the guest goes on: its counter was {} at the source and is {} at the \
                     destination, all its memory is right",
                    figures.last_tick_left, figures.first_tick_arrived
                );
                Ok(figures)
            }
            Err(error) if scenario.method == Method::Skyferry => return Err(error),
            Err(error) => {
                let text = format!("{error:#}");
                Err(text.lines().next().unwrap_or("failed").to_owned())
            }
        };
        Ok(Self { name, figures })
    }
}

fn table(rows: &[Row]) {
    println!(
        "\n{:40} {:>9} {:>10} {:>12}",
        "", "time", "blackout", "on the link"
    );
    for Row { name, figures } in rows {
        match figures {
            Ok(figures) => println!(
                "{name:40} {:>7.1} s {:>7} ms {:>9.1} MB",
                figures.total.as_secs_f64(),
                figures.blackout.as_millis(),
                figures.wire_bytes as f64 / 1e6
            ),
            Err(reason) => println!("{name:40} {reason}"),
        }
    }
    println!("\n\"Once more\": the far gateway still holds what it has got.\n");
}

/// Progress of one migration: a line that renews itself, or a line every two seconds where the
/// output is no terminal.
struct View {
    live: bool,
    /// What the link had carried before.
    carried_bytes: u64,
    start: Instant,
    shown: Option<Instant>,
}

impl View {
    fn new(ground: &Ground) -> Self {
        Self {
            live: stdout().is_terminal(),
            carried_bytes: ground.control().wire_bytes(),
            start: Instant::now(),
            shown: None,
        }
    }

    fn show(&mut self, progress: &Progress, link: &LinkControl) {
        let pause = Duration::from_millis(if self.live { 200 } else { 2000 });
        let now = Instant::now();
        let due = self.shown.is_none_or(|shown| now - shown >= pause);
        if !due && !progress.is_final() {
            return;
        }
        if self.shown.is_none() {
            self.start = now;
        }
        self.shown = Some(now);
        let pages = progress.zero_pages + progress.normal_pages;
        let sent = pages * 4096;
        let all = sent + progress.remaining_bytes;
        let percent = (sent * 100).checked_div(all).unwrap_or(0);
        let line = format!(
            "  {:>5.1} s  {:<10} round {}  {percent:>3} % of RAM  {:>6.0} MB from the guest  {:>6.1} \
             MB on the link  {:>5.0} Mbit/s",
            (now - self.start).as_secs_f64(),
            progress.status,
            progress.rounds,
            progress.transferred_bytes as f64 / 1e6,
            (link.wire_bytes() - self.carried_bytes) as f64 / 1e6,
            progress.mbps,
        );
        if self.live {
            print!("\r{line}\x1b[K");
            let _ = stdout().flush();
        } else {
            println!("{line}");
        }
    }

    fn end(&self) {
        if self.live && self.shown.is_some() {
            println!();
        }
    }
}
