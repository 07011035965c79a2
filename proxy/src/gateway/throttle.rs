//! Log lines that others can cause: the first are written, of the rest it is said how many they were.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use super::link::lock;

/// Lines that tell of a fault within [`WINDOW`].
pub(super) const FEW: u64 = 10;
/// The same, of lines that belong to the work of many migrations, too.
const MANY: u64 = 100;
/// Over how long lines are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Counts the lines of one kind.
#[derive(Debug)]
pub(super) struct Throttle {
    most: u64,
    window: Mutex<Option<Window>>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u64,
}

impl Throttle {
    /// So many lines are written within [`WINDOW`].
    pub(super) const fn new(most: u64) -> Self {
        let window = Mutex::new(None);
        Self { most, window }
    }

    /// Whether a line that is due now is to be written; else it is counted.
    pub(super) fn lets_pass(&self, now: Instant) -> bool {
        let mut window = lock(&self.window);
        let window = window.get_or_insert(Window {
            began: now,
            lines: 0,
        });
        window.lines += 1;
        window.lines <= self.most
    }

    /// How many lines were left out, once their window is over and if there were any. It begins anew
    /// with the next line.
    pub(super) fn left_out(&self, now: Instant) -> Option<u64> {
        let mut window = lock(&self.window);
        let over = window.take_if(|window| now.duration_since(window.began) >= WINDOW)?;
        over.lines.checked_sub(self.most).filter(|count| *count > 0)
    }
}

/// The lines that one peer can cause in one role.
#[derive(Debug)]
pub(super) struct PeerLines {
    /// Channels that were not let in, or whose target was not reached.
    pub(super) refused_opens: Throttle,
    /// Migrations that the peer began: all lines about one of them count as one.
    pub(super) migrations: Throttle,
    /// Connections that came or went.
    pub(super) connections: Throttle,
    /// Migrations that were resumed.
    pub(super) resumptions: Throttle,
    /// Questions for pages that were never sent.
    pub(super) misses: Throttle,
}

impl PeerLines {
    pub(super) const fn new() -> Self {
        Self {
            refused_opens: Throttle::new(FEW),
            migrations: Throttle::new(MANY),
            connections: Throttle::new(MANY),
            resumptions: Throttle::new(MANY),
            misses: Throttle::new(FEW),
        }
    }

    /// What was left out and how many lines, of the kinds whose window is over.
    pub(super) fn left_out(&self, now: Instant) -> impl Iterator<Item = (&'static str, u64)> {
        let kinds = [
            ("opens refused", &self.refused_opens),
            ("migrations", &self.migrations),
            ("connections came or went", &self.connections),
            ("migrations resumed", &self.resumptions),
            ("requests for pages that were never sent", &self.misses),
        ];
        let left_out = move |(what, kind): (_, &Throttle)| Some((what, kind.left_out(now)?));
        kinds.into_iter().filter_map(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_pass_and_the_rest_is_counted() {
        let throttle = Throttle::new(FEW);
        let start = Instant::now();
        assert_eq!(throttle.left_out(start), None);
        let passed =
            |at: Instant, lines: u32| (0..lines).filter(|_| throttle.lets_pass(at)).count();
        assert_eq!(passed(start, 1000), 10);
        let soon = start + WINDOW / 2;
        assert_eq!((passed(soon, 5), throttle.left_out(soon)), (0, None));
        assert_eq!(throttle.left_out(start + WINDOW), Some(995));
        assert_eq!(throttle.left_out(start + WINDOW), None);
        // Few lines: nothing is left out.
        assert_eq!(passed(start + WINDOW, 3), 3);
        assert_eq!(throttle.left_out(start + WINDOW * 2), None);
        assert_eq!(passed(start + WINDOW * 2, 11), 10);
    }
}
