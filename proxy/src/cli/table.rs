//! The status as a table for people: pure text, no terminal needed.
//!
//! Text from the gateway (names, errors) loses its control characters here, so that a peer's error
//! message cannot steer the operator's terminal.

use std::fmt::Write;

use crate::status::{GatewayStatus, LinkStatus, MigrationStatus};

/// Most finished migrations shown.
const SHOWN_RECENT: usize = 10;

/// Longest id shown; ids differ in their first characters.
const SHOWN_ID_CHARS: usize = 12;

/// How a column's text is placed.
#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}

/// The whole status in lines, each with `\n`.
pub(super) fn render(status: &GatewayStatus) -> String {
    let mut text = String::new();
    let draining = if status.draining {
        ", DRAINING: takes no new migrations"
    } else {
        ""
    };
    let _ = writeln!(
        text,
        "gateway {}, skyferry {}{draining}",
        clean(&status.name),
        clean(&status.version)
    );
    text.push('\n');
    links(&status.links, &mut text);
    text.push('\n');
    if status.migrations.is_empty() {
        text.push_str("No migration is running.\n");
    } else {
        running(&status.migrations, &mut text);
    }
    if !status.recent.is_empty() {
        text.push('\n');
        finished(&status.recent, &mut text);
    }
    text
}

fn links(links: &[LinkStatus], text: &mut String) {
    let mut rows = vec![
        [
            "LINK", "DIR", "ADDRESS", "STATE", "RTT", "LOSS", "SENT", "RECEIVED",
        ]
        .map(String::from),
    ];
    for link in links {
        rows.push([
            clean(&link.peer),
            link.direction.as_str().into(),
            link.address.as_deref().map_or_else(dash, clean),
            if link.up { "up".into() } else { "DOWN".into() },
            link.rtt_seconds
                .map_or_else(dash, |rtt| format!("{:.1} ms", rtt * 1000.0)),
            link.loss
                .map_or_else(dash, |loss| format!("{:.2} %", loss * 100.0)),
            size(link.sent_bytes as f64),
            size(link.received_bytes as f64),
        ]);
    }
    use Align::{Left, Right};
    let align = [Left, Left, Left, Left, Right, Right, Right, Right];
    columns(&rows, &align, text);
    for link in links {
        if let Some(error) = &link.error {
            let (peer, direction) = (clean(&link.peer), link.direction.as_str());
            let _ = writeln!(text, "  {peer} {direction}: {}", clean(error));
        }
    }
}

fn running(migrations: &[MigrationStatus], text: &mut String) {
    let head = [
        "MIGRATION",
        "PEER",
        "DIR",
        "STATE",
        "ROUND",
        "CHAN",
        "GUEST",
        "WIRE",
        "RATIO",
        "RATE",
        "TIME",
        "LEFT",
    ];
    let mut rows = vec![head.map(String::from)];
    for migration in migrations {
        rows.push([
            short_id(&migration.id),
            clean(&migration.peer),
            migration.direction.as_str().into(),
            migration.state.as_str().into(),
            migration.round.to_string(),
            migration.channels.to_string(),
            size(migration.guest_bytes as f64),
            size(migration.wire_bytes as f64),
            ratio(migration.ratio),
            format!("{}/s", size(migration.guest_bytes_per_sec)),
            time(migration.elapsed_seconds),
            migration.remaining_seconds.map_or_else(dash, time),
        ]);
    }
    use Align::{Left, Right};
    let align = [
        Left, Left, Left, Left, Right, Right, Right, Right, Right, Right, Right, Right,
    ];
    columns(&rows, &align, text);
}

fn finished(recent: &[MigrationStatus], text: &mut String) {
    let head = [
        "FINISHED", "PEER", "DIR", "RESULT", "GUEST", "WIRE", "RATIO", "TIME", "BLACKOUT",
    ];
    let mut rows = vec![head.map(String::from)];
    let shown = &recent[..recent.len().min(SHOWN_RECENT)];
    for migration in shown {
        rows.push([
            short_id(&migration.id),
            clean(&migration.peer),
            migration.direction.as_str().into(),
            migration.state.as_str().into(),
            size(migration.guest_bytes as f64),
            size(migration.wire_bytes as f64),
            ratio(migration.ratio),
            time(migration.elapsed_seconds),
            migration
                .blackout_seconds
                .map_or_else(dash, |s| format!("{:.0} ms", s * 1000.0)),
        ]);
    }
    use Align::{Left, Right};
    columns(
        &rows,
        &[Left, Left, Left, Left, Right, Right, Right, Right, Right],
        text,
    );
    for migration in shown {
        if let Some(error) = &migration.error {
            let _ = writeln!(text, "  {}: {}", short_id(&migration.id), clean(error));
        }
    }
    if recent.len() > SHOWN_RECENT {
        let _ = writeln!(
            text,
            "  and {} before; --json shows them",
            recent.len() - SHOWN_RECENT
        );
    }
}

/// Writes rows with columns as wide as their widest cell, two spaces apart.
fn columns<const N: usize>(rows: &[[String; N]], align: &[Align; N], text: &mut String) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let mut line = String::new();
        for ((cell, width), align) in row.iter().zip(widths).zip(align) {
            let _ = match align {
                Align::Left => write!(line, "{cell:<width$}  "),
                Align::Right => write!(line, "{cell:>width$}  "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn dash() -> String {
    "-".into()
}

fn short_id(id: &str) -> String {
    clean(id).chars().take(SHOWN_ID_CHARS).collect()
}

fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(dash, |ratio| format!("{ratio:.1}"))
}

/// Bytes in binary units with three digits or so.
fn size(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 999.5 {
            let digits = if unit == "B" || value >= 99.95 { 0 } else { 1 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Seconds as `4.2 s`, `1:05` or `2:01:05`.
fn time(seconds: f64) -> String {
    if seconds < 59.95 {
        return format!("{:.1} s", seconds.max(0.0));
    }
    let whole = seconds.round() as u64;
    let (hours, minutes, seconds) = (whole / 3600, whole / 60 % 60, whole % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Direction, MigrationState};

    fn migration(id: &str, state: MigrationState) -> MigrationStatus {
        MigrationStatus {
            id: id.into(),
            peer: "edge-b".into(),
            direction: Direction::Out,
            ingress: Some("127.0.0.1:4444".into()),
            target: "10.0.0.5:4444".into(),
            state,
            round: 3,
            channels: 1,
            guest_bytes: 5 << 29,
            wire_bytes: 150 << 20,
            ratio: Some(17.066),
            guest_bytes_per_sec: 64.0 * 1024.0 * 1024.0,
            wire_bytes_per_sec: 4e6,
            ram_total_bytes: Some(2 << 30),
            remaining_seconds: Some(75.0),
            started_at: 1.7e9,
            elapsed_seconds: 41.04,
            blackout_seconds: None,
            error: None,
        }
    }

    #[test]
    fn a_status_is_shown_line_by_line() {
        let mut failed = migration("0a1b2c3d4e5f6789", MigrationState::Failed);
        failed.error = Some("target 10.0.0.5:4444:\x1b[2J connection refused".into());
        failed.blackout_seconds = Some(0.3456);
        let status = GatewayStatus {
            name: "edge-a".into(),
            version: "0.1.0".into(),
            draining: true,
            links: vec![
                LinkStatus {
                    peer: "edge-b".into(),
                    direction: Direction::Out,
                    address: Some("198.51.100.7:7700".into()),
                    up: true,
                    rtt_seconds: Some(0.0604),
                    loss: Some(0.005),
                    congestion_window_bytes: Some(1),
                    sent_bytes: 160 << 20,
                    received_bytes: 900,
                    error: None,
                },
                LinkStatus {
                    peer: "edge-b".into(),
                    direction: Direction::In,
                    address: None,
                    up: false,
                    rtt_seconds: None,
                    loss: None,
                    congestion_window_bytes: None,
                    sent_bytes: 0,
                    received_bytes: 0,
                    error: Some("not yet".into()),
                },
            ],
            migrations: vec![migration("ffee", MigrationState::Precopy)],
            recent: vec![failed],
        };
        let expected = "\
gateway edge-a, skyferry 0.1.0, DRAINING: takes no new migrations

LINK    DIR  ADDRESS            STATE      RTT    LOSS     SENT  RECEIVED
edge-b  out  198.51.100.7:7700  up     60.4 ms  0.50 %  160 MiB     900 B
edge-b  in   -                  DOWN         -       -      0 B       0 B
  edge-b in: not yet

MIGRATION  PEER    DIR  STATE    ROUND  CHAN    GUEST     WIRE  RATIO        RATE    TIME  LEFT
ffee       edge-b  out  precopy      3     1  2.5 GiB  150 MiB   17.1  64.0 MiB/s  41.0 s  1:15

FINISHED      PEER    DIR  RESULT    GUEST     WIRE  RATIO    TIME  BLACKOUT
0a1b2c3d4e5f  edge-b  out  failed  2.5 GiB  150 MiB   17.1  41.0 s    346 ms
  0a1b2c3d4e5f: target 10.0.0.5:4444: [2J connection refused
";
        assert_eq!(render(&status), expected);
    }

    #[test]
    fn sizes_and_times_stay_short() {
        assert_eq!(size(0.0), "0 B");
        assert_eq!(size(1000.0), "1.0 KiB");
        assert_eq!(size(1024.0 * 1024.0 * 999.0), "999 MiB");
        assert_eq!(size(3.0 * 1024f64.powi(4)), "3.0 TiB");
        assert_eq!(time(59.96), "1:00");
        assert_eq!(time(7265.0), "2:01:05");
        assert_eq!(time(-1.0), "0.0 s");
    }
}
