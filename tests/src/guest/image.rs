//! Builds, boots and records a guest.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::kernel::kernel;
use super::{cache_dir, corpus};
use crate::process::run;
use crate::qemu::{Launch, MigrationSettings, QemuBinary, Start};

const AGENT_SOURCE: &str = include_str!("../../guest/agent.c");

/// Time for boot and filling memory on a slow machine; mostly 5 to 15 s.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// What a guest is like. Sizes in MiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// Name of its files in the cache.
    pub name: &'static str,
    /// RAM.
    pub memory_mib: u32,
    /// Files in its page cache.
    pub page_cache_mib: u32,
    /// Memory that its writer rewrites.
    pub working_set_mib: u32,
    /// Pages per second that its writer changes.
    pub pages_per_sec: u32,
    /// What it works on.
    pub data: Data,
}

/// The working set of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Data {
    /// Guests that differ in nothing else have the same files, and other data.
    pub seed: u32,
    /// Whether it is random, which no compression makes smaller; else it comes from files.
    pub incompressible: bool,
    /// Whether the writer changes whole pages, else a few words of each.
    pub whole_pages: bool,
}

impl Data {
    /// From files, changed a few words at a time.
    pub const FILES: Self = Self {
        seed: 0,
        incompressible: false,
        whole_pages: false,
    };
}

impl GuestSpec {
    /// For tests: moves within a second or two.
    pub const SMALL: Self = Self {
        name: "small",
        memory_mib: 256,
        page_cache_mib: 48,
        working_set_mib: 16,
        pages_per_sec: 200,
        data: Data::FILES,
    };

    /// For tests that move it many times.
    pub const TINY: Self = Self {
        name: "tiny",
        memory_mib: 128,
        page_cache_mib: 12,
        working_set_mib: 8,
        pages_per_sec: 200,
        data: Data::FILES,
    };

    /// For demo and benchmark: about 570 MB of RAM that is not zero.
    pub const LARGE: Self = Self {
        name: "large",
        memory_mib: 1536,
        page_cache_mib: 400,
        working_set_mib: 96,
        pages_per_sec: 500,
        data: Data::FILES,
    };
}

/// A recorded guest.
#[derive(Debug, Clone)]
pub struct GuestImage {
    spec: GuestSpec,
    qemu: QemuBinary,
    recording: PathBuf,
}

impl GuestImage {
    /// The guest of this kind for the QEMU of this machine; builds and records it if the cache has
    /// none. Safe to call from several processes at once.
    ///
    /// # Errors
    /// When QEMU, gcc or a kernel are missing (the text says what to install) or the guest does not
    /// come up.
    pub fn prepare(spec: &GuestSpec) -> Result<Self> {
        let qemu = QemuBinary::find()?;
        let cache = cache_dir();
        fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
        let lock = File::create(cache.join("lock"))?;
        lock.lock()?;
        let key = fnv1a(format!("{spec:?} {AGENT_SOURCE} {}", qemu.version()).as_bytes());
        let recording = cache.join(format!("{}-{key:016x}.migration", spec.name));
        let image = Self {
            spec: spec.clone(),
            qemu,
            recording,
        };
        if !image.recording.exists() {
            image
                .build(&cache)
                .with_context(|| format!("build the guest \"{}\"", spec.name))?;
        }
        Ok(image)
    }

    /// What the guest is like.
    #[must_use]
    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    /// The QEMU that it was recorded with.
    #[must_use]
    pub fn qemu(&self) -> &QemuBinary {
        &self.qemu
    }

    /// The recorded migration stream, as QEMU wrote it.
    #[must_use]
    pub fn recording(&self) -> &Path {
        &self.recording
    }

    fn build(&self, cache: &Path) -> Result<()> {
        let kernel = kernel(cache)?;
        let dir = tempfile::tempdir_in(cache)?;
        let agent = dir.path().join("agent");
        let source = dir.path().join("agent.c");
        fs::write(&source, AGENT_SOURCE)?;
        run(Command::new("gcc")
            .args(["-O2", "-static", "-Wall", "-Wextra", "-o"])
            .args([&agent, &source]))
        .context("compile the guest's agent (needs gcc and libc6-dev)")?;
        let initramfs = dir.path().join("initramfs");
        write_initramfs(
            &initramfs,
            &agent,
            u64::from(self.spec.page_cache_mib) << 20,
        )
        .context("write the initramfs")?;
        let data = self.spec.data;
        let command_line = format!(
            "console=ttyS0 quiet panic=-1 mitigations=off init_on_free=1 skyferry.rate={} \
             skyferry.set_mib={} skyferry.seed={} skyferry.random={} skyferry.whole={}",
            self.spec.pages_per_sec,
            self.spec.working_set_mib,
            data.seed,
            u8::from(data.incompressible),
            u8::from(data.whole_pages),
        );
        let guest = Launch {
            label: "recorder",
            image: self,
            start: Start::Boot {
                kernel: &kernel,
                initramfs: &initramfs,
                command_line,
            },
            netns: None,
        }
        .run()?;
        guest.console().wait_for("AGENT READY", BOOT_LIMIT)?;
        guest.wait_ticks(5, Duration::from_secs(30))?;
        guest.check_memory()?;
        let file = dir.path().join("recording");
        let settings = MigrationSettings {
            return_path: false,
            ..MigrationSettings::default()
        };
        guest.configure_migration(&settings)?;
        guest.start_migration(&format!("exec:cat > '{}'", file.display()))?;
        guest
            .wait_migration(Duration::from_secs(120), |_| {})?
            .expect_completed(&guest)?;
        fs::rename(file, &self.recording)?;
        Ok(())
    }
}

/// `init_on_free` on the kernel's command line clears the memory of the initramfs after it has been
/// unpacked; else every page of it would be in RAM twice, which no real guest has.
fn write_initramfs(path: &Path, agent: &Path, cache_bytes: u64) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(path)?));
    for dir in ["dev", "proc", "data"] {
        archive.directory(dir)?;
    }
    archive.device("dev/console", 5, 1)?;
    archive.device("dev/ttyS0", 4, 64)?;
    let size = u32::try_from(fs::metadata(agent)?.len())?;
    archive.file("init", 0o755, size, File::open(agent)?)?;
    for (index, chosen) in corpus::choose(cache_bytes).iter().enumerate() {
        let content = File::open(&chosen.path)?;
        let bytes = u32::try_from(chosen.bytes)?;
        archive
            .file(&format!("data/{index}"), 0o644, bytes, content)
            .with_context(|| format!("copy {}", chosen.path.display()))?;
    }
    archive.finish()?;
    Ok(())
}

/// FNV-1a: names files and orders choices; the same in every release of Rust.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
