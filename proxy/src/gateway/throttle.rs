//! Log lines that others can cause: the first are written, of the rest it is said how many they were.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use super::link::lock;

/// Lines of a kind that are written within [`WINDOW`].
const LINES: u64 = 10;
/// Over how long lines are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Counts the lines of one kind.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    window: Mutex<Option<Window>>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u64,
}

impl Throttle {
    /// Whether a line that is due now is to be written; else it is counted.
    pub(super) fn lets_pass(&self, now: Instant) -> bool {
        let mut window = lock(&self.window);
        let window = window.get_or_insert(Window {
            began: now,
            lines: 0,
        });
        window.lines += 1;
        window.lines <= LINES
    }

    /// How many lines were left out, once their window is over and if there were any. It begins anew
    /// with the next line.
    pub(super) fn left_out(&self, now: Instant) -> Option<u64> {
        let mut window = lock(&self.window);
        let over = window.take_if(|window| now.duration_since(window.began) >= WINDOW)?;
        over.lines.checked_sub(LINES).filter(|count| *count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_pass_and_the_rest_is_counted() {
        let throttle = Throttle::default();
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
