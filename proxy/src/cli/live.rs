//! The live view of `skyferry status`: a table that is redrawn in place until it is interrupted.
//!
//! However it ends, by a signal or because nothing can be shown any more, the terminal is given back
//! as it was found; so it is while the view is suspended (ctrl-z).

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{JoinHandle, spawn_blocking};

use super::http::AdminUrl;
use super::status::{fetch, print};
use super::table;

/// Shows the alternate screen without cursor and line wrap: the table may be wider than the window.
const ENTER_SCREEN: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
/// Undoes [`ENTER_SCREEN`].
const LEAVE_SCREEN: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// Goes to the top left corner.
const HOME: &str = "\x1b[H";
/// Clears to the end of the line.
const CLEAR_LINE: &str = "\x1b[K";
/// Clears below the cursor.
const CLEAR_BELOW: &str = "\x1b[J";

/// How long a terminal may take to be given back; one that is stopped (ctrl-s) takes nothing.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Lines of a window whose height cannot be told.
const DEFAULT_ROWS: usize = 24;

/// Redraws every `interval` until a signal ends it; the last table stays on the screen.
///
/// # Errors
/// When the gateway does not answer at the start, or the terminal takes nothing.
pub(super) async fn show(endpoint: &AdminUrl, interval: Duration) -> Result<(), String> {
    let (_, first) = fetch(endpoint).await?;
    let mut view = View {
        table: table::render(&first),
        note: String::new(),
    };
    // Before the screen is changed: from then on a signal must not just end the process.
    let mut heeded = Heeded::new().map_err(|error| error.to_string())?;
    let mut terminal = Terminal { writing: None };
    loop {
        let result = tokio::select! {
            // The screen is entered before a signal is looked at, so leaving it comes second.
            biased;
            error = redraw(endpoint, interval, &mut view, &mut terminal) => Err(error),
            wish = heeded.next() => Ok(wish),
        };
        let last = format!("{LEAVE_SCREEN}{}{}", view.table, view.note);
        let left = tokio::time::timeout(LEAVE_TIMEOUT, terminal.write(last)).await;
        let left = left.unwrap_or_else(|_| Err(io::Error::other("the terminal takes no output")));
        match result.and_then(|wish| left.map(|()| wish)) {
            Ok(Wish::Suspend) => suspend(),
            Ok(Wish::End) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// What is on the screen.
struct View {
    table: String,
    /// That the table is old, and why.
    note: String,
}

/// Draws for as long as the terminal takes it.
async fn redraw(
    endpoint: &AdminUrl,
    interval: Duration,
    view: &mut View,
    terminal: &mut Terminal,
) -> io::Error {
    let mut ticks = tokio::time::interval(interval);
    ticks.tick().await;
    let mut text = ENTER_SCREEN.to_owned();
    loop {
        text.push_str(&frame(&view.table, &view.note, rows()));
        if let Err(error) = terminal.write(std::mem::take(&mut text)).await {
            return error;
        }
        ticks.tick().await;
        // A gateway that restarts comes back; keep looking.
        match fetch(endpoint).await {
            Ok((_, status)) => {
                view.table = table::render(&status);
                view.note.clear();
            }
            Err(message) => {
                view.note = format!("\nNOT ANSWERING, the above is old: {message}\n");
            }
        }
    }
}

/// One screen: what was there before is overwritten line by line, which does not flicker. What does
/// not fit into `rows` is left out, for scrolling would take the top lines away.
fn frame(table: &str, note: &str, rows: usize) -> String {
    let mut frame = String::from(HOME);
    let notes = note.lines().count();
    // The last two lines are for what ends the view.
    let room = rows.saturating_sub(2 + notes).max(1);
    let lines = table.lines().count();
    let (shown, hidden) = if lines > room {
        (room - 1, lines - (room - 1))
    } else {
        (lines, 0)
    };
    let more = format!("... {hidden} more lines: enlarge the window, or use --once");
    let more = (hidden > 0).then_some(more.as_str());
    for line in table.lines().take(shown).chain(more).chain(note.lines()) {
        frame.push_str(line);
        frame.push_str(CLEAR_LINE);
        frame.push_str("\r\n");
    }
    frame.push_str(CLEAR_LINE);
    frame.push_str("\r\nctrl-c ends this view");
    frame.push_str(CLEAR_LINE);
    frame.push_str(CLEAR_BELOW);
    frame
}

/// Lines of the window.
fn rows() -> usize {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes into the struct only, which lives until the call returns.
    #[expect(unsafe_code, reason = "the standard library has no ioctl")]
    let got = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    // Terminals that do not know their size say 0.
    if got == 0 && size.ws_row > 0 {
        usize::from(size.ws_row)
    } else {
        DEFAULT_ROWS
    }
}

/// What a signal asks for.
enum Wish {
    End,
    Suspend,
}

/// The signals that end the view (ctrl-c, `kill`, a terminal that goes away) or suspend it (ctrl-z).
struct Heeded {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    stop: Signal,
}

impl Heeded {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            stop: signal(SignalKind::from_raw(libc::SIGTSTP))?,
        })
    }

    async fn next(&mut self) -> Wish {
        tokio::select! {
            _ = self.interrupt.recv() => Wish::End,
            _ = self.terminate.recv() => Wish::End,
            _ = self.hang_up.recv() => Wish::End,
            _ = self.stop.recv() => Wish::Suspend,
        }
    }
}

/// Stops the process until it is continued (`fg`).
fn suspend() {
    // SAFETY: raise takes a number. It cannot fail for a signal that exists.
    #[expect(unsafe_code, reason = "the standard library has no raise")]
    unsafe {
        libc::raise(libc::SIGSTOP);
    }
}

/// Writes to the terminal in order, and off the thread that heeds signals: a terminal that is stopped
/// takes its time.
struct Terminal {
    writing: Option<JoinHandle<io::Result<()>>>,
}

impl Terminal {
    async fn write(&mut self, text: String) -> io::Result<()> {
        // One that was not waited for to the end.
        self.written().await?;
        self.writing = Some(spawn_blocking(move || print(&text)));
        self.written().await
    }

    async fn written(&mut self) -> io::Result<()> {
        let Some(writing) = &mut self.writing else {
            return Ok(());
        };
        let written = writing.await;
        self.writing = None;
        written.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_overwrites_and_never_scrolls_up() {
        let frame = frame("one\ntwo\n", "", 24);
        assert!(frame.starts_with("\x1b[Hone\x1b[K\r\ntwo\x1b[K\r\n"));
        assert!(frame.ends_with("\x1b[K\x1b[J"));
    }

    #[test]
    fn a_frame_fits_into_the_window() {
        let table: String = (0..40).map(|line| format!("line {line}\n")).collect();
        for (rows, note) in [(24, ""), (24, "\nold\n"), (42, ""), (41, ""), (3, "")] {
            let frame = frame(&table, note, rows);
            assert_eq!(frame.matches("\r\n").count(), rows - 1, "{rows} {note:?}");
            assert_eq!(frame.contains("more lines"), rows < 42, "{rows}");
            assert!(frame.contains(note.trim()));
        }
        // However small, and with whatever to say, it never panics.
        for rows in 0..5 {
            frame(&table, "\nold\nvery\n", rows);
        }
    }
}
