//! Children that die with their owner, and what they cost.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys;
use crate::wan::netns::Netns;

/// How often a wait looks again.
pub(crate) const POLL: Duration = Duration::from_millis(10);

/// Bytes of a log that an error message quotes.
const LOG_TAIL_BYTES: u64 = 3000;

/// What a process has used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time, in seconds.
    pub cpu_secs: f64,
    /// Resident memory now, in bytes.
    pub rss_bytes: u64,
    /// Largest resident memory so far, in bytes.
    pub peak_rss_bytes: u64,
}

/// A child process: output goes to a log file, SIGKILL on drop or when the thread that started it
/// ends.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

/// Where and how a child runs.
#[derive(Debug, Default)]
pub struct Surroundings<'a> {
    /// Network namespace; `None` is the caller's.
    pub netns: Option<&'a Netns>,
    /// Descriptors that the child inherits under the same number.
    pub(crate) inherit: Vec<RawFd>,
}

impl Process {
    /// Starts `command` with stdout and stderr appended to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started (the text names it).
    pub fn start(
        name: &str,
        command: &mut Command,
        log: &Path,
        surroundings: Surroundings<'_>,
    ) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let setup = sys::ChildSetup {
            network: surroundings.netns.map(Netns::fd),
            inherit: surroundings.inherit,
        };
        sys::prepare_child(command, setup);
        let child = command.spawn().with_context(|| {
            format!(
                "start {}",
                Path::new(command.get_program() as &OsStr).display()
            )
        })?;
        Ok(Self {
            child,
            name: name.to_owned(),
            log: log.to_owned(),
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Exit status if the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// When it still runs after `limit`; the text ends with the log's tail.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited() {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!(
                    "{} still runs after {limit:?}\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// Asks the process to end (SIGTERM). Nothing happens if it has ended.
    pub fn terminate(&mut self) {
        self.signal(libc::SIGTERM);
    }

    /// Ends the process at once (SIGKILL) and waits for it.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        let _ = self.child.wait();
    }

    /// Stops (SIGSTOP) or continues (SIGCONT) the process.
    pub fn freeze(&mut self, frozen: bool) {
        self.signal(if frozen { libc::SIGSTOP } else { libc::SIGCONT });
    }

    fn signal(&mut self, signal: libc::c_int) {
        // Once waited for, the pid may belong to somebody else.
        if self.exited().is_none() {
            let _ = sys::kill(self.child.id(), signal);
        }
    }

    /// What the process has used so far.
    ///
    /// # Errors
    /// When it has ended, or `/proc` is not readable.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.child.id())
    }

    /// Has [`Usage::peak_rss_bytes`] start again from what is resident now.
    ///
    /// # Errors
    /// When the process has ended, or the kernel does not offer it.
    pub fn reset_peak(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.child.id());
        fs::write(&path, "5").with_context(|| format!("write {path}"))
    }

    /// The last lines of the log, with a heading.
    #[must_use]
    pub fn log_tail(&self) -> String {
        log_tail(&self.name, &self.log)
    }

    /// Path of the log file.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a log file under a heading; says so if there are none.
#[must_use]
pub(crate) fn log_tail(name: &str, log: &Path) -> String {
    let mut text = Vec::new();
    if let Ok(mut file) = File::open(log) {
        let length = file.metadata().map(|meta| meta.len()).unwrap_or(0);
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)));
        let _ = file.read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    let text = if text.trim().is_empty() {
        "(nothing)"
    } else {
        text.trim_end()
    };
    format!("--- end of the log of {name} ({})\n{text}\n", log.display())
}

/// What any process has used.
pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in brackets, which may hold spaces and brackets.
    let fields = stat.rsplit_once(')').context("stat without a name")?.1;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |at: usize| -> Result<u64> { Ok(fields.get(at).context("short stat")?.parse()?) };
    let cpu_ticks = ticks(11)? + ticks(12)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |key: &str| -> u64 {
        status
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    Ok(Usage {
        cpu_secs: cpu_ticks as f64 / sys::clock_ticks_per_sec() as f64,
        rss_bytes: kib("VmRSS:") * 1024,
        peak_rss_bytes: kib("VmHWM:") * 1024,
    })
}

/// Output of a command that must succeed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Looks for `what` until `look` finds it.
///
/// # Errors
/// After `limit`, with `explain`'s text; errors of `look` at once.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
    explain: impl FnOnce() -> String,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > end {
            bail!("no {what} within {limit:?}\n{}", explain());
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_measured_and_killed() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo started; exec sleep 100"]);
        let process =
            Process::start("sleeper", &mut command, &log, Surroundings::default()).unwrap();
        let pid = process.pid();
        wait_for(
            "output",
            Duration::from_secs(10),
            || Ok(process.log_tail().contains("started").then_some(())),
            String::new,
        )
        .unwrap();
        assert!(process.usage().unwrap().rss_bytes > 0);
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
