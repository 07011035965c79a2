//! The guests of the benchmark.

use crate::guest::{Data, GuestSpec};

/// A guest that the benchmark moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// On the command line, in files and tables.
    pub name: &'static str,
    /// One line for readers.
    pub about: &'static str,
    /// Names of the recordings: of the guest, and of its sibling.
    recordings: [&'static str; 2],
    /// RAM, page cache and working set in MiB.
    sizes: [u32; 3],
    pages_per_sec: u32,
    incompressible: bool,
    whole_pages: bool,
}

/// How large the guests are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// As large as small servers.
    Full,
    /// So small that a move takes a second: to try the benchmark itself.
    Quick,
}

impl Scale {
    /// In files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Quick => "quick",
        }
    }
}

/// Which of the guests of one kind: both were booted from the same image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Twin {
    /// The one that moves first.
    First,
    /// One that was booted anew and has other data.
    Sibling,
}

impl Guest {
    /// Does nothing but tick.
    pub const IDLE: Self = Self {
        name: "idle",
        about: "a small server that does nothing",
        recordings: ["idle", "idle-sibling"],
        sizes: [1024, 96, 16],
        pages_per_sec: 0,
        incompressible: false,
        whole_pages: false,
    };
    /// Mostly files.
    pub const CACHE: Self = Self {
        name: "cache",
        about: "page-cache heavy, 20 pages/s change a little",
        recordings: ["cache", "cache-sibling"],
        sizes: [1280, 288, 16],
        pages_per_sec: 20,
        incompressible: false,
        whole_pages: false,
    };
    /// The usual one.
    pub const WRITER_500: Self = Self {
        name: "writer-500",
        about: "500 pages/s change a little",
        recordings: ["writer-500", "writer-500-sibling"],
        sizes: [1024, 176, 64],
        pages_per_sec: 500,
        incompressible: false,
        whole_pages: false,
    };
    /// A busy one.
    pub const WRITER_4000: Self = Self {
        name: "writer-4000",
        about: "4000 pages/s change a little",
        recordings: ["writer-4000", "writer-4000-sibling"],
        sizes: [1024, 176, 64],
        pages_per_sec: 4000,
        incompressible: false,
        whole_pages: false,
    };
    /// Deltas do not help here.
    pub const WHOLE_PAGES: Self = Self {
        name: "whole-pages",
        about: "500 pages/s change from end to end, to content that compresses by half",
        recordings: ["whole-pages", "whole-pages-sibling"],
        sizes: [1024, 176, 64],
        pages_per_sec: 500,
        incompressible: false,
        whole_pages: true,
    };
    /// Compression does not help here.
    pub const INCOMPRESSIBLE: Self = Self {
        name: "incompressible",
        about: "mostly random data, 100 pages/s change a little",
        recordings: ["incompressible", "incompressible-sibling"],
        sizes: [1024, 48, 160],
        pages_per_sec: 100,
        incompressible: true,
        whole_pages: false,
    };

    /// All of them, in the order of tables.
    pub const ALL: [Self; 6] = [
        Self::IDLE,
        Self::CACHE,
        Self::WRITER_500,
        Self::WRITER_4000,
        Self::WHOLE_PAGES,
        Self::INCOMPRESSIBLE,
    ];

    /// The guest of this name.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|guest| guest.name == name)
    }

    /// How to build it.
    #[must_use]
    pub fn spec(&self, scale: Scale, twin: Twin) -> GuestSpec {
        let [memory_mib, page_cache_mib, working_set_mib] = match scale {
            Scale::Full => self.sizes,
            Scale::Quick => self.sizes.map(|mib| mib.div_ceil(8)).map(|mib| mib.max(4)),
        };
        GuestSpec {
            name: self.recordings[twin as usize],
            // The kernel alone needs more than an eighth of a small guest.
            memory_mib: memory_mib.max(224),
            page_cache_mib,
            working_set_mib,
            pages_per_sec: self.pages_per_sec,
            data: Data {
                seed: twin as u32,
                incompressible: self.incompressible,
                whole_pages: self.whole_pages,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_found_by_name_and_differ() {
        for guest in Guest::ALL {
            assert_eq!(Guest::find(guest.name), Some(guest));
            let [first, sibling] =
                [Twin::First, Twin::Sibling].map(|twin| guest.spec(Scale::Full, twin));
            assert_ne!(first.data.seed, sibling.data.seed);
            assert_eq!(first.page_cache_mib, sibling.page_cache_mib);
        }
        assert_eq!(Guest::find("nobody"), None);
    }
}
