//! `skyferry status`: a live table on a terminal, a plain one or JSON elsewhere.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::http::AdminUrl;
use super::{EXIT_USAGE, StatusArgs, fail, table};
use crate::status::GatewayStatus;

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

pub(super) fn run(args: &StatusArgs) -> ExitCode {
    let endpoint = match &args.config {
        Some(path) => admin_of_config(path),
        None => AdminUrl::parse(&args.admin),
    };
    let endpoint = match endpoint {
        Ok(endpoint) => endpoint,
        Err(message) => {
            eprintln!("skyferry: {message}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(error),
    };
    let interval = Duration::from_secs(args.interval);
    let live = !args.json && !args.once && io::stdout().is_terminal();
    let shown = if live {
        runtime.block_on(show_live(&endpoint, interval))
    } else {
        runtime.block_on(show_plain(
            &endpoint,
            args.json,
            args.watch.then_some(interval),
        ))
    };
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(message),
    }
}

/// The admin endpoint that a configuration file names. Only that key is read: whoever asks for the
/// status need not be able to read the gateway's private key.
fn admin_of_config(path: &Path) -> Result<AdminUrl, String> {
    let failed = |message: String| format!("{}: {message}", path.display());
    let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| failed(error.message().to_owned()))?;
    let listen = table
        .get("admin")
        .and_then(|admin| admin.get("listen")?.as_str())
        .ok_or_else(|| {
            failed("admin.listen: is missing; this gateway has no admin endpoint".into())
        })?;
    let mut address: SocketAddr = listen
        .parse()
        .map_err(|_| failed(format!("admin.listen: \"{listen}\" is no address and port")))?;
    // A listener on all addresses is reached over loopback.
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        });
    }
    AdminUrl::parse(&address.to_string())
}

async fn fetch(endpoint: &AdminUrl) -> Result<(String, GatewayStatus), String> {
    let body = endpoint.get("/api/v1/status").await?;
    let text = String::from_utf8(body).map_err(|_| "the status is not text".to_owned())?;
    let status = serde_json::from_str(&text).map_err(|error| {
        format!("the status cannot be read ({error}); is it of another version?")
    })?;
    Ok((text, status))
}

/// Prints once, or every `interval` until the reader of the output goes away.
async fn show_plain(
    endpoint: &AdminUrl,
    json: bool,
    interval: Option<Duration>,
) -> Result<(), String> {
    loop {
        let (text, status) = fetch(endpoint).await?;
        let output = if json {
            format!("{text}\n")
        } else {
            table::render(&status)
        };
        match print(&output) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(|error| error.to_string())?,
        }
        let Some(interval) = interval else {
            return Ok(());
        };
        tokio::time::sleep(interval).await;
    }
}

/// Redraws in place until interrupted; the last table stays on the screen.
async fn show_live(endpoint: &AdminUrl, interval: Duration) -> Result<(), String> {
    let (_, first) = fetch(endpoint).await?;
    let mut last = table::render(&first);
    let mut ticks = tokio::time::interval(interval);
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    print(ENTER_SCREEN).map_err(|error| error.to_string())?;
    let mut note = String::new();
    let result = loop {
        if let Err(error) = print(&frame(&last, &note)) {
            break Err(error.to_string());
        }
        tokio::select! {
            signal = &mut interrupted => break signal.map_err(|error| error.to_string()),
            _ = ticks.tick() => {}
        }
        // A gateway that restarts comes back; keep looking.
        match fetch(endpoint).await {
            Ok((_, status)) => {
                last = table::render(&status);
                note.clear();
            }
            Err(message) => note = format!("\nNOT ANSWERING, the above is old: {message}\n"),
        }
    };
    let left = print(LEAVE_SCREEN).and_then(|()| print(&last));
    result.and_then(|()| left.map_err(|error| error.to_string()))
}

/// One screen: what was there before is overwritten line by line, which does not flicker.
fn frame(table: &str, note: &str) -> String {
    let mut frame = String::from(HOME);
    for line in table.lines().chain(note.lines()) {
        frame.push_str(line);
        frame.push_str(CLEAR_LINE);
        frame.push_str("\r\n");
    }
    frame.push_str("\r\nctrl-c ends this view");
    frame.push_str(CLEAR_LINE);
    frame.push_str(CLEAR_BELOW);
    frame
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_overwrites_and_never_scrolls_up() {
        let frame = frame("one\ntwo\n", "");
        assert!(frame.starts_with("\x1b[Hone\x1b[K\r\ntwo\x1b[K\r\n"));
        assert!(frame.ends_with("\x1b[K\x1b[J"));
    }

    #[test]
    fn the_endpoint_is_found_in_a_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("g.toml");
        fs::write(&path, "[admin]\nlisten = \"0.0.0.0:9700\"\n").unwrap();
        assert_eq!(
            admin_of_config(&path).unwrap(),
            AdminUrl::parse("127.0.0.1:9700").unwrap()
        );
        fs::write(&path, "[gateway]\n").unwrap();
        assert!(
            admin_of_config(&path)
                .unwrap_err()
                .contains("admin.listen: is missing")
        );
    }
}
