//! The process's own figures, read from `/proc` at each scrape under Prometheus's standard names.

use std::fs;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge};

/// CPU time, memory, open files and start time of this process.
///
/// A figure that `/proc` does not give (another system, a hidden `/proc`) keeps its last value.
#[derive(Debug)]
pub struct ProcessMetrics {
    cpu: Counter,
    resident: Gauge,
    virtual_memory: Gauge,
    open_files: Gauge,
    max_files: Gauge,
    start: Gauge,
    threads: Gauge,
    ticks_per_sec: f64,
    page_bytes: f64,
}

/// Fields of `/proc/self/stat` (proc(5)) counted from 0 *after* the closing bracket of the program's
/// name, which may itself hold spaces.
mod stat_field {
    pub(super) const UTIME: usize = 11;
    pub(super) const STIME: usize = 12;
    pub(super) const THREADS: usize = 17;
    pub(super) const START: usize = 19;
    pub(super) const VSIZE: usize = 20;
    pub(super) const RSS_PAGES: usize = 21;
}

impl ProcessMetrics {
    /// Makes them, unregistered.
    ///
    /// # Errors
    /// When a name is malformed: our bug.
    pub fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            cpu: Counter::new(
                "process_cpu_seconds_total",
                "Total user and system CPU time spent in seconds.",
            )?,
            resident: Gauge::new(
                "process_resident_memory_bytes",
                "Resident memory size in bytes.",
            )?,
            virtual_memory: Gauge::new(
                "process_virtual_memory_bytes",
                "Virtual memory size in bytes.",
            )?,
            open_files: Gauge::new("process_open_fds", "Number of open file descriptors.")?,
            max_files: Gauge::new(
                "process_max_fds",
                "Maximum number of open file descriptors.",
            )?,
            start: Gauge::new(
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds.",
            )?,
            threads: Gauge::new("process_threads", "Number of OS threads in the process.")?,
            ticks_per_sec: system_value(libc::_SC_CLK_TCK, 100.0),
            page_bytes: system_value(libc::_SC_PAGESIZE, 4096.0),
        })
    }

    fn all(&self) -> [&dyn Collector; 7] {
        [
            &self.cpu,
            &self.resident,
            &self.virtual_memory,
            &self.open_files,
            &self.max_files,
            &self.start,
            &self.threads,
        ]
    }

    fn refresh(&self) {
        if let Some(fields) = fs::read_to_string("/proc/self/stat")
            .ok()
            .and_then(stat_numbers)
        {
            let field = |index: usize| fields.get(index).copied().unwrap_or(0.0);
            let cpu = (field(stat_field::UTIME) + field(stat_field::STIME)) / self.ticks_per_sec;
            // Two scrapes at once may read the clock in either order: never count down.
            self.cpu.inc_by((cpu - self.cpu.get()).max(0.0));
            self.threads.set(field(stat_field::THREADS));
            self.virtual_memory.set(field(stat_field::VSIZE));
            self.resident
                .set(field(stat_field::RSS_PAGES) * self.page_bytes);
            if let Some(boot) = boot_time() {
                self.start
                    .set(boot + field(stat_field::START) / self.ticks_per_sec);
            }
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            // The listing itself holds one open.
            self.open_files.set(files.count().saturating_sub(1) as f64);
        }
        if let Some(limit) = open_file_limit() {
            self.max_files.set(limit);
        }
    }
}

impl Collector for ProcessMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.refresh();
        self.all()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}

/// The numbers after the program's name; a field that is none reads as 0.
fn stat_numbers(stat: String) -> Option<Vec<f64>> {
    let (_, fields) = stat.rsplit_once(')')?;
    Some(
        fields
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0.0))
            .collect(),
    )
}

/// When the machine was started, in seconds since 1970.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()
}

fn open_file_limit() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn system_value(name: libc::c_int, otherwise: f64) -> f64 {
    // SAFETY: sysconf takes a plain number and touches no memory of ours.
    #[expect(unsafe_code, reason = "the standard library has no sysconf")]
    let value = unsafe { libc::sysconf(name) };
    if value > 0 { value as f64 } else { otherwise }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Registry;

    #[test]
    fn figures_of_this_process_are_sane() {
        let registry = Registry::new();
        registry
            .register(Box::new(ProcessMetrics::new().unwrap()))
            .unwrap();
        let text = super::super::render(&registry).unwrap();
        let value = |name: &str| -> f64 {
            let line = text
                .lines()
                .find(|l| l.starts_with(&format!("{name} ")))
                .unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_threads") >= 1.0);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        let age = now - value("process_start_time_seconds");
        assert!((-5.0..3600.0 * 24.0).contains(&age), "started {age} s ago");
    }

    #[test]
    fn a_program_name_with_brackets_does_not_shift_fields() {
        let numbers = stat_numbers("1 (a b) c)) S 1 2 3".into()).unwrap();
        assert_eq!(numbers, [0.0, 1.0, 2.0, 3.0]);
    }
}
