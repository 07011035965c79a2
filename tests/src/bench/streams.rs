//! Streams of real guests for micro-benchmarks: recorded on demand, kept in the cache, never
//! published, as they hold files of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::guests::{Guest, Scale, Twin};
use crate::guest::{GuestImage, cache_dir};
use crate::qemu::{Launch, MigrationSettings, Qemu, Start};

/// As a link of 200 Mbit/s lets a migration through: slow enough that the guest goes on changing pages
/// and several rounds are needed.
const BYTES_PER_SEC: u64 = 25_000_000;
/// Time for the guest's signs of life.
const LIFE_LIMIT: Duration = Duration::from_secs(60);
/// After which a recording has failed.
const LIMIT: Duration = Duration::from_secs(240);

/// Which stream of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The guest moves for the first time.
    First,
    /// It moves once more, having worked for a while since.
    Later,
    /// Its sibling moves.
    Sibling,
}

impl Stream {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::First, Self::Later, Self::Sibling];

    const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Later => "later",
            Self::Sibling => "sibling",
        }
    }
}

/// Records the streams of a guest that are not there yet; gives the paths in the order of
/// [`Stream::ALL`]. `work` is the time between the first and the later one.
///
/// # Errors
/// When the guest cannot be built, or a recording fails.
pub fn record(guest: &Guest, scale: Scale, work: Duration) -> Result<Vec<PathBuf>> {
    let folder = cache_dir().join("streams");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let images =
        [Twin::First, Twin::Sibling].map(|twin| GuestImage::prepare(&guest.spec(scale, twin)));
    let [first, sibling] = images;
    let (first, sibling) = (first?, sibling?);
    let path = |stream: Stream, image: &GuestImage| {
        // By the guest's own recording, so that another guest of this name gets another file.
        let stem = image.recording().file_stem().unwrap_or_default();
        let (stem, secs) = (stem.to_string_lossy(), work.as_secs());
        folder.join(match stream {
            Stream::Later => format!("{stem}-{}-{secs}s.stream", stream.name()),
            _ => format!("{stem}-{}.stream", stream.name()),
        })
    };
    let paths = Stream::ALL.map(|stream| match stream {
        Stream::Sibling => path(stream, &sibling),
        _ => path(stream, &first),
    });
    for (stream, to) in Stream::ALL.into_iter().zip(&paths) {
        if to.exists() {
            continue;
        }
        let image = if stream == Stream::Sibling {
            &sibling
        } else {
            &first
        };
        let source = start(image)?;
        if stream == Stream::Later {
            thread::sleep(work);
        }
        write(&source, to)?;
    }
    Ok(paths.to_vec())
}

fn start(image: &GuestImage) -> Result<Qemu> {
    let source = Launch {
        label: "source",
        image,
        start: Start::Recording,
        netns: None,
    }
    .run()?;
    source.wait_ticks(3, LIFE_LIMIT)?;
    Ok(source)
}

/// Migrates into a file; it has its name only when it is complete.
fn write(source: &Qemu, to: &Path) -> Result<()> {
    let settings = MigrationSettings {
        return_path: false,
        max_bytes_per_sec: BYTES_PER_SEC,
        ..MigrationSettings::default()
    };
    let unfinished = to.with_extension("unfinished");
    source.configure_migration(&settings)?;
    source.start_migration(&format!("exec:cat > '{}'", unfinished.display()))?;
    source
        .wait_migration(LIMIT, |_| {})?
        .expect_completed(source)?;
    fs::rename(&unfinished, to).with_context(|| format!("write {}", to.display()))
}
