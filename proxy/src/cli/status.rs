//! `skyferry status`: a live table on a terminal, a plain one or JSON elsewhere.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::http::AdminUrl;
use super::{EXIT_USAGE, StatusArgs, complain, fail, live, table};
use crate::status::GatewayStatus;

pub(super) fn run(args: &StatusArgs) -> ExitCode {
    let endpoint = match &args.config {
        Some(path) => admin_of_config(path),
        None => AdminUrl::parse(&args.admin),
    };
    let endpoint = match endpoint {
        Ok(endpoint) => endpoint,
        Err(message) => {
            complain(format_args!("skyferry: {message}"));
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
        runtime.block_on(live::show(&endpoint, interval))
    } else {
        runtime.block_on(show_plain(
            &endpoint,
            args.json,
            args.watch.then_some(interval),
        ))
    };
    // Not dropped: that would wait for a terminal that takes no output.
    runtime.shutdown_background();
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

/// The status as the gateway sent it, and what it says.
pub(super) async fn fetch(endpoint: &AdminUrl) -> Result<(String, GatewayStatus), String> {
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

/// Writes at once.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

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
