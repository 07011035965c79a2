//! The guest's serial console: captured line by line, with the time; commands go the other way.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::process::wait_for;

/// Lines that an error message quotes.
const TAIL_LINES: usize = 12;

/// One line of output.
#[derive(Debug, Clone)]
pub struct Line {
    /// When its end was read.
    pub at: Instant,
    /// Its text.
    pub text: String,
}

impl Line {
    /// The counter of a `TICK` line.
    #[must_use]
    pub fn tick(&self) -> Option<u64> {
        let (count, rest) = self.text.strip_prefix("TICK ")?.split_once(' ')?;
        // A line that the migration cut in two is no tick.
        rest.contains("errors=").then(|| count.parse().ok())?
    }
}

/// A guest's console.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    lines: Arc<Mutex<Vec<Line>>>,
}

impl Console {
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let reader = BufReader::new(stream.try_clone()?);
        let captured = Arc::clone(&lines);
        thread::Builder::new()
            .name("console".into())
            .spawn(move || capture(reader, &captured))?;
        Ok(Self { stream, lines })
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        self.locked().clone()
    }

    /// How many lines there are so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.locked().len()
    }

    /// Whether nothing has been said yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counters of all `TICK` lines so far.
    #[must_use]
    pub fn ticks(&self) -> Vec<u64> {
        self.locked().iter().filter_map(Line::tick).collect()
    }

    /// Sends a line to the guest.
    ///
    /// # Errors
    /// When QEMU has gone.
    pub fn send(&self, line: &str) -> Result<()> {
        (&self.stream).write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// Waits for a line that starts so.
    ///
    /// # Errors
    /// When there is none within `limit`; the text ends with the last lines.
    pub fn wait_for(&self, start: &str, limit: Duration) -> Result<Line> {
        self.wait_for_after(0, start, limit)
    }

    /// Waits for a line that starts so, behind the first `skip` lines.
    ///
    /// # Errors
    /// When there is none within `limit`; the text ends with the last lines.
    pub fn wait_for_after(&self, skip: usize, start: &str, limit: Duration) -> Result<Line> {
        wait_for(
            &format!("console line \"{start}…\""),
            limit,
            || {
                Ok(self
                    .locked()
                    .iter()
                    .skip(skip)
                    .find(|l| l.text.starts_with(start))
                    .cloned())
            },
            || self.tail(),
        )
    }

    /// The last lines, with a heading.
    #[must_use]
    pub fn tail(&self) -> String {
        let lines = self.locked();
        let mut text = format!("--- end of the guest's console ({} lines)\n", lines.len());
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            let _ = writeln!(text, "{}", line.text);
        }
        text
    }
}

fn capture(mut reader: BufReader<UnixStream>, lines: &Mutex<Vec<Line>>) {
    let mut bytes = Vec::new();
    while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        bytes.clear();
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(Line {
            at: Instant::now(),
            text,
        });
    }
}
