//! Starts a QEMU with the test guest.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;

use super::console::Console;
use super::qmp::Qmp;
use crate::guest::{GuestImage, GuestSpec};
use crate::process::{Process, Surroundings, Usage, wait_for};
use crate::wan::netns::Netns;

/// Loading a recording of half a gigabyte takes about a second.
const START_LIMIT: Duration = Duration::from_secs(60);

/// QEMU as found on this machine.
#[derive(Debug, Clone)]
pub struct QemuBinary {
    path: PathBuf,
    version: String,
}

impl QemuBinary {
    /// `SKYFERRY_QEMU`, else `qemu-system-x86_64` in the path.
    ///
    /// # Errors
    /// When there is none; the text says what to install.
    pub fn find() -> Result<Self> {
        let path = std::env::var_os("SKYFERRY_QEMU")
            .map_or_else(|| PathBuf::from("qemu-system-x86_64"), PathBuf::from);
        let output = Command::new(&path)
            .arg("--version")
            .output()
            .with_context(|| {
                format!(
                    "start {}: install QEMU 7.2 or later (Debian: apt-get install \
                 --no-install-recommends qemu-system-x86) or name it in SKYFERRY_QEMU",
                    path.display()
                )
            })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .split_whitespace()
            .skip_while(|word| *word != "version")
            .nth(1)
            .context("QEMU does not tell its version")?
            .to_owned();
        Ok(Self { path, version })
    }

    /// As QEMU tells it, for example `10.0.2`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Major version number.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .unwrap_or(0)
    }
}

/// Where the guest comes from.
#[derive(Debug)]
pub enum Start<'a> {
    /// Boot it.
    Boot {
        /// bzImage.
        kernel: &'a Path,
        /// cpio archive.
        initramfs: &'a Path,
        /// For the kernel.
        command_line: String,
    },
    /// From the image's recording: a source.
    Recording,
    /// Wait for [`Qemu::listen`]: a destination.
    Incoming,
}

/// How to start a QEMU.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Name in messages and logs.
    pub label: &'a str,
    /// The guest.
    pub image: &'a GuestImage,
    /// Where the guest comes from.
    pub start: Start<'a>,
    /// Where QEMU's sockets are; `None` is the caller's network.
    pub netns: Option<&'a Netns>,
}

/// A running QEMU; killed on drop, or when the thread that started it ends.
#[derive(Debug)]
pub struct Qemu {
    process: Process,
    qmp: Qmp,
    console: Console,
    label: String,
    _dir: TempDir,
}

impl Launch<'_> {
    /// Starts QEMU; with a recording, returns when the guest runs.
    ///
    /// # Errors
    /// When QEMU does not start or ends at once (the text has its last words).
    pub fn run(self) -> Result<Qemu> {
        let dir = tempfile::Builder::new()
            .prefix("skyferry-qemu-")
            .tempdir()?;
        let (qmp_ours, qmp_theirs) = UnixStream::pair()?;
        let (console_ours, console_theirs) = UnixStream::pair()?;
        let theirs = [OwnedFd::from(qmp_theirs), OwnedFd::from(console_theirs)];
        let inherit: Vec<_> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(&self.image.qemu().path);
        add_machine(&mut command, self.image.spec());
        command.args(["-name", self.label]);
        command
            .arg("-chardev")
            .arg(format!("socket,id=qmp,fd={}", inherit[0]));
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command
            .arg("-chardev")
            .arg(format!("socket,id=console,fd={}", inherit[1]));
        command.args(["-serial", "chardev:console"]);
        let expected = match &self.start {
            Start::Boot {
                kernel,
                initramfs,
                command_line,
            } => {
                command
                    .arg("-kernel")
                    .arg(kernel)
                    .arg("-initrd")
                    .arg(initramfs);
                command.args(["-append", command_line]);
                "running"
            }
            Start::Recording => {
                let recording = self.image.recording().display();
                command
                    .arg("-incoming")
                    .arg(format!("exec:cat '{recording}'"));
                "running"
            }
            Start::Incoming => {
                command.args(["-incoming", "defer"]);
                "inmigrate"
            }
        };
        let log = dir.path().join("log");
        let surroundings = Surroundings {
            netns: self.netns,
            inherit,
        };
        let process = Process::start(self.label, &mut command, &log, surroundings)?;
        drop(theirs);
        let mut qemu = Qemu {
            process,
            qmp: Qmp::new(qmp_ours)?,
            console: Console::new(console_ours)?,
            label: self.label.to_owned(),
            _dir: dir,
        };
        qemu.qmp
            .negotiate()
            .with_context(|| qemu.process.log_tail())?;
        qemu.wait_status(expected, START_LIMIT)?;
        Ok(qemu)
    }
}

/// The same for every QEMU that shares a guest: migration needs equal machines.
fn add_machine(command: &mut Command, spec: &GuestSpec) {
    command.args([
        "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1",
    ]);
    command.arg("-m").arg(format!("{}M", spec.memory_mib));
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
}

impl Qemu {
    /// Name in messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Its monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Its guest's console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The run state: `running`, `inmigrate`, `postmigrate`, `paused`, …
    ///
    /// # Errors
    /// When QEMU has gone.
    pub fn status(&self) -> Result<String> {
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits for a run state.
    ///
    /// # Errors
    /// When QEMU ends or `limit` passes; the text has the log's tail.
    pub fn wait_status(&mut self, wanted: &str, limit: Duration) -> Result<()> {
        let Self {
            process,
            qmp,
            label,
            ..
        } = self;
        let log = process.log_path().to_owned();
        wait_for(
            &format!("run state {wanted} of {label}"),
            limit,
            || {
                if let Some(status) = process.exited() {
                    bail!("{label} has ended: {status}\n{}", process.log_tail());
                }
                let status = qmp.execute("query-status", json!({}))?;
                Ok((status["status"] == wanted).then_some(()))
            },
            || crate::process::log_tail(label, &log),
        )
    }

    /// Whether the guest runs here. A QEMU that has ended runs nothing.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        self.process.exited().is_none() && self.status().is_ok_and(|status| status == "running")
    }

    /// Has the guest go on here, where it does not already, and waits until it ticks: after a
    /// migration that failed, QEMU mostly does so itself.
    ///
    /// # Errors
    /// When it does not go on.
    pub fn resume(&mut self) -> Result<()> {
        if !self.is_running() {
            self.qmp.execute("cont", json!({}))?;
        }
        self.wait_status("running", START_LIMIT)?;
        self.wait_ticks(2, START_LIMIT)
    }

    /// Waits until the guest has ticked `count` times from now.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub fn wait_ticks(&self, count: usize, limit: Duration) -> Result<()> {
        let before = self.console.ticks().len();
        wait_for(
            &format!("{count} ticks of the guest in {}", self.label),
            limit,
            || Ok((self.console.ticks().len() >= before + count).then_some(())),
            || self.explain(),
        )
    }

    /// Has the guest compare all its memory with its checksums.
    ///
    /// # Errors
    /// When something differs, now or earlier, or the guest does not answer.
    pub fn check_memory(&self) -> Result<()> {
        let seen = self.console.len();
        self.console.send("check")?;
        let line = self
            .console
            .wait_for_after(seen, "CHECKED", Duration::from_secs(120))?;
        let damaged = self
            .console
            .lines()
            .iter()
            .any(|line| line.text.contains("SELFCHECK ERROR"));
        if damaged || !line.text.ends_with("errors=0") {
            bail!(
                "the guest in {} finds its memory damaged\n{}",
                self.label,
                self.explain()
            );
        }
        Ok(())
    }

    /// Exit status if QEMU has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.process.exited()
    }

    /// Waits for QEMU's end.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.wait_exit(limit)
    }

    /// Ends QEMU at once.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Its process, in which the clock of [`Self::usage`] runs.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// CPU time and memory so far.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn usage(&self) -> Result<Usage> {
        self.process.usage()
    }

    /// Log and console tails, for error messages.
    #[must_use]
    pub fn explain(&self) -> String {
        format!("{}{}", self.process.log_tail(), self.console.tail())
    }
}
