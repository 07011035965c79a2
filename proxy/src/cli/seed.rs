//! `skyferry seed`: fills the page store from disk images, files and folders.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use skyferry_dedup::DomainKey;
use tokio::signal::unix::{SignalKind, signal};

use super::store::say_json;
use super::{EXIT_USAGE, SeedArgs, complain, fail, harden, load_config, say};
use crate::config::{Config, Tenant};
use crate::seed::{self, Event, Order, Progress, Report, SeedFailure};

/// How often a terminal is shown how far it is, and how often anything else.
const LIVE_INTERVAL: Duration = Duration::from_millis(250);
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// A line that is longer than the window is cut, not wrapped: it could not be redrawn in place.
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";
const CLEAR_LINE: &str = "\x1b[K";
/// Things that cannot be read are named up to this number; all of them are counted.
const MAX_NAMED: u64 = 50;

pub(super) fn run(args: &SeedArgs) -> ExitCode {
    // Before any secret or image is read.
    if let Err(error) = harden::forbid_core_dumps() {
        return fail(format_args!("cannot turn core dumps off: {error}"));
    }
    let config = match load_config(&args.config) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let Some(store) = &config.store.disk else {
        return refuse(format_args!(
            "{}: store.path is missing: this gateway keeps pages in memory only, which cannot be seeded",
            args.config.display()
        ));
    };
    let tenant = match choose_tenant(&config, args.tenant.as_deref()) {
        Ok(tenant) => tenant,
        Err(message) => return refuse(message),
    };
    let stop = Arc::new(AtomicBool::new(false));
    if let Err(error) = heed_signals(stop.clone()) {
        return fail(format_args!("cannot wait for signals: {error}"));
    }
    let order = Order {
        store,
        tenant: &tenant.name,
        key: &tenant.key,
        paths: &args.paths,
        format: args.format,
        bytes_per_sec: args.rate,
        restart: args.restart,
    };
    let mut shown = Shown::new();
    let result = seed::run(&order, &stop, &mut |event| shown.event(&event));
    shown.end();
    match result {
        Ok(report) => conclude(&report, &shown, args.json),
        Err(SeedFailure::Paths(unreadable)) => {
            unreadable
                .iter()
                .for_each(|path| complain(format_args!("skyferry: {path}")));
            ExitCode::from(EXIT_USAGE)
        }
        Err(failure) => {
            fail(&failure);
            if shown.progress.read_bytes > 0 {
                complain("what was read before is kept; the same command goes on near there");
            }
            ExitCode::FAILURE
        }
    }
}

fn refuse(message: impl std::fmt::Display) -> ExitCode {
    complain(format_args!("skyferry: {message}"));
    ExitCode::from(EXIT_USAGE)
}

/// A tenant whose pages have the same names everywhere.
struct Chosen {
    name: String,
    key: DomainKey,
}

/// The tenant of that name, or the only one that can be meant.
fn choose_tenant(config: &Config, name: Option<&str>) -> Result<Chosen, String> {
    let chosen = |tenant: &Tenant| {
        let secret = tenant.secret.as_ref()?;
        Some(Chosen {
            name: tenant.name.clone(),
            key: DomainKey::derive(secret.as_bytes(), &tenant.name),
        })
    };
    if let Some(name) = name {
        let tenant = config.tenant(name).ok_or_else(|| {
            let known: Vec<&str> = config.tenants.iter().map(|t| t.name.as_str()).collect();
            let known = known.join(", ");
            format!("there is no tenant \"{name}\"; known: {known}")
        })?;
        return chosen(tenant).ok_or_else(|| {
            format!(
                "tenant \"{name}\" has no secret_file, so its pages have other names each time a gateway \
                 starts: nothing that is seeded would be found"
            )
        });
    }
    let mut with_secret = config.tenants.iter().filter_map(chosen);
    match (with_secret.next(), with_secret.next()) {
        (Some(only), None) => Ok(only),
        (Some(first), Some(second)) => {
            let names = [first, second].into_iter().chain(with_secret);
            let names: Vec<String> = names.map(|tenant| tenant.name).collect();
            let names = names.join(", ");
            Err(format!("say whose pages these are: --tenant NAME, one of {names}"))
        }
        (None, _) => Err(
            "no tenant has a secret_file, so pages have other names each time a gateway starts: nothing \
             that is seeded would be found; give both gateways one (`skyferry pki init` makes it)"
                .into(),
        ),
    }
}

/// Sets `stop` at the first signal that asks for an end, and ends the process at the second.
fn heed_signals(stop: Arc<AtomicBool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let entered = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    drop(entered);
    let heed = move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hang_up.recv() => {}
                }
                if stop.swap(true, Ordering::Relaxed) {
                    std::process::exit(1);
                }
            }
        });
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(heed)?;
    Ok(())
}

/// What the operator sees meanwhile.
struct Shown {
    /// Whether a line is redrawn in place.
    live: bool,
    started: Instant,
    drawn: Option<Instant>,
    progress: Progress,
    /// Where this run began.
    began_at: f64,
    troubles: u64,
    is_drawn: bool,
}

impl Shown {
    fn new() -> Self {
        Self {
            live: io::stderr().is_terminal(),
            started: Instant::now(),
            drawn: None,
            progress: Progress::default(),
            began_at: 0.0,
            troubles: 0,
            is_drawn: false,
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Warning(text) => self.line(format_args!("skyferry: warning: {text}")),
            Event::Trouble(text) => {
                self.troubles += 1;
                if self.troubles <= MAX_NAMED {
                    self.line(format_args!("skyferry: {text}"));
                }
            }
            Event::Resumed { share } => {
                self.began_at = *share;
                self.line(format_args!("resumed at {}", percent(*share)));
            }
            Event::Progress(progress) => {
                self.progress = **progress;
                let interval = if self.live {
                    LIVE_INTERVAL
                } else {
                    LINE_INTERVAL
                };
                let since = self.drawn.get_or_insert_with(Instant::now);
                if since.elapsed() >= interval {
                    *since = Instant::now();
                    self.draw();
                }
            }
        }
    }

    fn draw(&mut self) {
        let progress = &self.progress;
        let seconds = self.started.elapsed().as_secs_f64();
        let done = progress.share - self.began_at;
        let left = match (1.0 - progress.share) * seconds / done {
            left if left.is_finite() && done > 0.01 => format!(", {left:.0} s left"),
            _ => String::new(),
        };
        let line = format!(
            "{:>5}  {}{left}",
            percent(progress.share),
            figures(progress, seconds)
        );
        if self.live {
            // That nobody reads it must not end the work.
            let _ = write!(io::stderr().lock(), "\r{NO_WRAP}{line}{CLEAR_LINE}{WRAP}");
            self.is_drawn = true;
        } else {
            complain(line);
        }
    }

    /// A line that stays.
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.end();
        complain(line);
    }

    /// Clears the line that is redrawn.
    fn end(&mut self) {
        if std::mem::take(&mut self.is_drawn) {
            let _ = write!(io::stderr().lock(), "\r{CLEAR_LINE}");
        }
    }
}

fn percent(share: f64) -> String {
    // Never more than there is: the end is said in other words.
    format!("{:.0} %", (share * 100.0).floor())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn figures(progress: &Progress, seconds: f64) -> String {
    let counts = &progress.counts;
    format!(
        "{:.1} MiB read, {:.1} MiB/s; pages: {} new, {} already there, {} zero",
        mib(progress.read_bytes),
        mib(progress.read_bytes) / seconds.max(0.001),
        counts.new,
        counts.known,
        counts.zero
    )
}

#[derive(Serialize)]
struct SeedReport {
    complete: bool,
    read_bytes: u64,
    seconds: f64,
    new_pages: u64,
    known_pages: u64,
    zero_pages: u64,
    unreadable: u64,
    by_gateway: bool,
    store_bytes: u64,
    store_capacity_bytes: u64,
}

fn conclude(report: &Report, shown: &Shown, json: bool) -> ExitCode {
    let seconds = shown.started.elapsed().as_secs_f64();
    let progress = &report.progress;
    if json {
        say_json(&SeedReport {
            complete: !report.interrupted,
            read_bytes: progress.read_bytes,
            seconds,
            new_pages: progress.counts.new,
            known_pages: progress.counts.known,
            zero_pages: progress.counts.zero,
            unreadable: report.troubles,
            by_gateway: report.by_gateway,
            store_bytes: report.used_bytes,
            store_capacity_bytes: report.capacity_bytes,
        });
    } else {
        say(format_args!(
            "{} in {seconds:.1} s",
            figures(progress, seconds)
        ));
        let share = report.used_bytes as f64 / report.capacity_bytes.max(1) as f64;
        say(format_args!(
            "the store takes {:.1} of {:.1} MiB ({})",
            mib(report.used_bytes),
            mib(report.capacity_bytes),
            percent(share)
        ));
    }
    if report.troubles > 0 {
        fail(format_args!(
            "{} files or folders could not be read, or not to their end",
            report.troubles
        ));
    }
    if report.interrupted {
        let at = percent(progress.share);
        return fail(format_args!(
            "interrupted at {at}; the same command goes on there"
        ));
    }
    if report.troubles > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
