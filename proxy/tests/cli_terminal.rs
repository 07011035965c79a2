//! `skyferry status` on a terminal: however it ends, the terminal is left as it was found.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use skyferry::status::{Direction, GatewayStatus, LinkStatus, MigrationState, MigrationStatus};

/// Time for what should happen at once.
const SOON: Duration = Duration::from_secs(10);
/// Longest that ending may take, well below the time that an answer may.
const END_LIMIT: Duration = Duration::from_secs(4);

// --- a gateway ---------------------------------------------------------------------------------

const ANSWERS: u8 = 0;
/// Takes connections and says nothing.
const HANGS: u8 = 1;
/// Closes connections.
const IS_DEAD: u8 = 2;

/// A gateway's admin endpoint as `skyferry status` sees it.
struct Gateway {
    url: String,
    mood: Arc<AtomicU8>,
}

impl Gateway {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mood = Arc::new(AtomicU8::new(ANSWERS));
        let current = mood.clone();
        // Ends with the test's process.
        thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                match current.load(Ordering::Relaxed) {
                    ANSWERS => {
                        let mut request = [0; 1024];
                        let _ = stream.read(&mut request);
                        let body = serde_json::to_string(&status()).unwrap();
                        let length = body.len();
                        let _ = write!(
                            stream,
                            "HTTP/1.0 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"
                        );
                        let _ = stream.shutdown(Shutdown::Write);
                    }
                    HANGS => kept.push(stream),
                    _ => {}
                }
            }
        });
        Self { url, mood }
    }

    fn is_now(&self, mood: u8) {
        self.mood.store(mood, Ordering::Relaxed);
    }
}

/// More lines than a small window has.
fn status() -> GatewayStatus {
    let finished = |number: usize| MigrationStatus {
        id: format!("{number:032x}"),
        peer: "edge-b".into(),
        direction: Direction::Out,
        ingress: None,
        target: "10.0.0.5:4444".into(),
        state: MigrationState::Failed,
        round: 1,
        channels: 0,
        guest_bytes: 1,
        wire_bytes: 1,
        ratio: None,
        guest_bytes_per_sec: 0.0,
        wire_bytes_per_sec: 0.0,
        ram_total_bytes: None,
        remaining_seconds: None,
        started_at: 1.0,
        elapsed_seconds: 1.0,
        blackout_seconds: None,
        error: Some("the source went away".into()),
    };
    GatewayStatus {
        name: "edge-a".into(),
        version: "0.1.0".into(),
        draining: false,
        links: vec![LinkStatus {
            peer: "edge-b".into(),
            direction: Direction::Out,
            address: None,
            up: true,
            rtt_seconds: None,
            loss: None,
            congestion_window_bytes: None,
            sent_bytes: 0,
            received_bytes: 0,
            error: None,
        }],
        migrations: Vec::new(),
        recent: (0..10).map(finished).collect(),
    }
}

// --- a terminal --------------------------------------------------------------------------------

/// A terminal's two ends. They are not inherited by what other tests start at the same time, so it
/// is closed when we close it.
fn open_terminal(rows: u16) -> (File, OwnedFd) {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let keyboard = File::options()
        .read(true)
        .write(true)
        .open("/dev/ptmx")
        .unwrap();
    let fd = keyboard.as_raw_fd();
    let locked: libc::c_int = 0;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the first two read what they are given, which lives until they return; the third takes
    // a number and makes a descriptor that nobody else has.
    #[expect(unsafe_code, reason = "the standard library has no terminals")]
    let slave = unsafe {
        assert_eq!(libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size), 0);
        assert_eq!(libc::ioctl(fd, libc::TIOCSPTLCK, &raw const locked), 0);
        let slave = libc::ioctl(fd, libc::TIOCGPTPEER, flags);
        assert!(slave >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(slave)
    };
    (keyboard, slave)
}

/// `skyferry status` on a terminal of its own.
struct View {
    child: Child,
    keyboard: File,
    slave: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl View {
    fn start(gateway: &Gateway, rows: u16) -> Self {
        let (keyboard, slave) = open_terminal(rows);
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_skyferry"));
        command
            .args(["status", "--admin", &gateway.url])
            .stdin(end())
            .stdout(end())
            .stderr(Stdio::piped());
        // SAFETY: setsid and ioctl may be called between fork and exec; nothing is allocated.
        #[expect(unsafe_code, reason = "a session of its own on this terminal")]
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut shown, seen) = (keyboard.try_clone().unwrap(), screen.clone());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Fails once the other end is closed everywhere.
            while let Ok(count) = shown.read(&mut bytes)
                && count > 0
            {
                seen.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self {
            child,
            keyboard,
            slave,
            screen,
        }
    }

    /// All that has been written to the terminal.
    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits until this has been shown so often.
    fn wait_for(&self, text: &str, times: usize) {
        let start = Instant::now();
        while self.screen().matches(text).count() < times {
            assert!(start.elapsed() < SOON, "no {text:?}: {:?}", self.screen());
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn type_in(&self, keys: &[u8]) {
        (&self.keyboard).write_all(keys).unwrap();
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: kill takes numbers; the child has not been waited for, so the id is its own.
        #[expect(unsafe_code, reason = "kill")]
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0);
    }

    fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The state is the first field behind the name.
        let (_, state) = stat.rsplit_once(") ").unwrap();
        state.starts_with('T')
    }

    /// Stops or continues output, as ctrl-s and ctrl-q do.
    fn stop_output(&self, stopped: bool) {
        let action = if stopped { libc::TCOOFF } else { libc::TCOON };
        // SAFETY: tcflow takes numbers; the descriptor is open.
        #[expect(unsafe_code, reason = "tcflow")]
        let done = unsafe { libc::tcflow(self.slave.as_raw_fd(), action) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Waits for the end; panics have a status of their own and say so on stderr.
    fn wait_end(&mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                start.elapsed() < END_LIMIT,
                "does not end: {:?}",
                self.screen()
            );
            thread::sleep(Duration::from_millis(10));
        };
        let mut complaint = String::new();
        let stderr = self.child.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut complaint).unwrap();
        assert!(!complaint.contains("panicked"), "{complaint}");
        // What was written last may still be on its way to the reader.
        thread::sleep(Duration::from_millis(100));
        (status, complaint)
    }

    /// Checks that the last word on the alternate screen, the cursor and line wrap gives them back.
    fn assert_restored(&self) {
        let screen = self.screen();
        for (changed, restored) in [
            ("\x1b[?1049h", "\x1b[?1049l"),
            ("\x1b[?25l", "\x1b[?25h"),
            ("\x1b[?7l", "\x1b[?7h"),
        ] {
            let (last_changed, last_restored) = (screen.rfind(changed), screen.rfind(restored));
            assert!(last_changed.is_some(), "no {changed:?}: {screen:?}");
            assert!(last_restored > last_changed, "no {restored:?}: {screen:?}");
        }
        // The last table stays, on the normal screen.
        let (_, after) = screen.rsplit_once("\x1b[?1049l").unwrap();
        assert!(after.contains("gateway edge-a"), "{after:?}");
        assert!(!after.contains('\x1b'), "{after:?}");
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// --- tests -------------------------------------------------------------------------------------

#[test]
fn ctrl_c_and_signals_give_the_terminal_back() {
    let gateway = Gateway::start();
    type End = (&'static str, fn(&View));
    let ends: [End; 4] = [
        ("ctrl-c", |view| view.type_in(b"\x03")),
        ("SIGINT", |view| view.signal(libc::SIGINT)),
        ("SIGTERM", |view| view.signal(libc::SIGTERM)),
        ("SIGHUP", |view| view.signal(libc::SIGHUP)),
    ];
    for (name, end) in ends {
        let mut view = View::start(&gateway, 50);
        view.wait_for("ctrl-c ends this view", 1);
        end(&view);
        let (status, complaint) = view.wait_end();
        assert_eq!(status.code(), Some(0), "{name}: {complaint}");
        view.assert_restored();
    }
}

#[test]
fn a_suspended_view_gives_the_terminal_back_and_goes_on() {
    let gateway = Gateway::start();
    let mut view = View::start(&gateway, 50);
    view.wait_for("ctrl-c ends this view", 1);
    view.type_in(b"\x1a");
    view.wait_for("\x1b[?1049l", 1);
    let start = Instant::now();
    while !view.is_stopped() {
        assert!(start.elapsed() < SOON, "does not stop");
        thread::sleep(Duration::from_millis(10));
    }
    view.assert_restored();
    view.signal(libc::SIGCONT);
    view.wait_for("\x1b[?1049h", 2);
    let frames = view.screen().matches("ctrl-c ends this view").count();
    view.wait_for("ctrl-c ends this view", frames + 2);
    view.type_in(b"\x03");
    let (status, complaint) = view.wait_end();
    assert_eq!(status.code(), Some(0), "{complaint}");
    view.assert_restored();
}

#[test]
fn a_gateway_that_hangs_does_not_delay_the_end() {
    let gateway = Gateway::start();
    let mut view = View::start(&gateway, 50);
    view.wait_for("ctrl-c ends this view", 1);
    gateway.is_now(HANGS);
    // The next question is out.
    thread::sleep(Duration::from_millis(1500));
    view.signal(libc::SIGTERM);
    let (status, complaint) = view.wait_end();
    assert_eq!(status.code(), Some(0), "{complaint}");
    view.assert_restored();
}

#[test]
fn a_dead_gateway_is_looked_for_and_the_terminal_given_back() {
    let gateway = Gateway::start();
    let mut view = View::start(&gateway, 50);
    view.wait_for("ctrl-c ends this view", 1);
    gateway.is_now(IS_DEAD);
    view.wait_for("NOT ANSWERING, the above is old", 1);
    gateway.is_now(ANSWERS);
    let frames = view.screen().matches("ctrl-c ends this view").count();
    view.wait_for("ctrl-c ends this view", frames + 2);
    let screen = view.screen();
    let (_, last) = screen.rsplit_once("\x1b[H").unwrap();
    assert!(!last.contains("NOT ANSWERING"), "{last:?}");
    gateway.is_now(IS_DEAD);
    view.wait_for("NOT ANSWERING", screen.matches("NOT ANSWERING").count() + 1);
    view.type_in(b"\x03");
    let (status, complaint) = view.wait_end();
    assert_eq!(status.code(), Some(0), "{complaint}");
    view.assert_restored();
    // What is left on the screen says that it is old.
    assert!(
        view.screen()
            .rsplit_once("\x1b[?1049l")
            .unwrap()
            .1
            .contains("NOT ANSWERING")
    );
}

#[test]
fn nobody_there_at_the_start_leaves_the_terminal_alone() {
    let gateway = Gateway::start();
    gateway.is_now(IS_DEAD);
    let mut view = View::start(&gateway, 50);
    let (status, complaint) = view.wait_end();
    assert_eq!(status.code(), Some(1));
    assert!(complaint.contains("cannot be reached"), "{complaint}");
    assert_eq!(view.screen(), "");
}

#[test]
fn a_window_that_is_closed_ends_the_view() {
    let gateway = Gateway::start();
    let (mut window, slave) = open_terminal(50);
    // Not its controlling terminal: no signal says so, only the failed write does.
    let mut child = Command::new(env!("CARGO_BIN_EXE_skyferry"))
        .args(["status", "--admin", &gateway.url])
        .stdout(slave)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut bytes = [0; 4096];
    assert!(window.read(&mut bytes).unwrap() > 0);
    drop(window);
    let output = {
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < END_LIMIT, "does not end");
            thread::sleep(Duration::from_millis(10));
        }
        child.wait_with_output().unwrap()
    };
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
}

#[test]
fn output_that_is_stopped_does_not_keep_the_view_alive() {
    let gateway = Gateway::start();
    let mut view = View::start(&gateway, 50);
    view.wait_for("ctrl-c ends this view", 1);
    view.stop_output(true);
    // The next frame is stuck.
    thread::sleep(Duration::from_millis(1500));
    view.signal(libc::SIGTERM);
    let (status, complaint) = view.wait_end();
    assert_eq!(status.code(), Some(1));
    assert!(complaint.contains("takes no output"), "{complaint}");

    // Where it goes on in time, all is in order.
    let mut view = View::start(&gateway, 50);
    view.wait_for("ctrl-c ends this view", 1);
    view.stop_output(true);
    thread::sleep(Duration::from_millis(1500));
    view.signal(libc::SIGTERM);
    thread::sleep(Duration::from_millis(200));
    view.stop_output(false);
    let (status, complaint) = view.wait_end();
    assert_eq!(status.code(), Some(0), "{complaint}");
    view.assert_restored();
}

#[test]
fn a_small_window_shows_the_top_and_never_scrolls() {
    let gateway = Gateway::start();
    let mut view = View::start(&gateway, 12);
    view.wait_for("ctrl-c ends this view", 3);
    view.type_in(b"\x03");
    view.wait_end();
    view.assert_restored();
    let screen = view.screen();
    let frames: Vec<&str> = screen.split("\x1b[H").skip(1).collect();
    for frame in &frames[..2] {
        assert_eq!(frame.matches('\n').count(), 11, "{frame:?}");
        assert!(frame.starts_with("gateway edge-a"), "{frame:?}");
        assert!(frame.contains("more lines"), "{frame:?}");
    }
}
