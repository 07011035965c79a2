//! Durations, sizes and rates as operators write them.

use std::time::Duration;

/// Reads `100ms`, `5s`, `10m`, `24h`, `30d`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_number(text)?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

/// Writes a duration in the largest unit that gives a whole number, as [`parse_duration`] reads it.
pub(super) fn write_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        _ if !millis.is_multiple_of(1000) || millis == 0 => format!("{millis}ms"),
        _ if !millis.is_multiple_of(60_000) => format!("{}s", millis / 1000),
        _ if !millis.is_multiple_of(3_600_000) => format!("{}m", millis / 60_000),
        // One day is written as 24 hours.
        _ if !millis.is_multiple_of(86_400_000) || millis == 86_400_000 => {
            format!("{}h", millis / 3_600_000)
        }
        _ => format!("{}d", millis / 86_400_000),
    }
}

/// Reads `512MiB`, `2GiB`, `65536` (bytes), `100MB` into bytes.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = split_number(text)?;
    let bytes: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    number.checked_mul(bytes)
}

/// Writes a size in the largest binary unit that gives a whole number.
pub(super) fn write_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}B")
}

/// Reads `900Mbit/s` or `1Gbit/s` into bits per second.
pub(super) fn parse_rate(text: &str) -> Option<u64> {
    let (number, unit) = split_number(text)?;
    let bits: u64 = match unit {
        "kbit/s" => 1000,
        "Mbit/s" => 1_000_000,
        "Gbit/s" => 1_000_000_000,
        _ => return None,
    };
    number.checked_mul(bits)
}

/// Writes a rate in the largest unit that gives a whole number.
pub(super) fn write_rate(bits_per_sec: u64) -> String {
    for (bits, unit) in [(1_000_000_000, "Gbit/s"), (1_000_000, "Mbit/s")] {
        if bits_per_sec.is_multiple_of(bits) {
            return format!("{}{unit}", bits_per_sec / bits);
        }
    }
    format!("{}kbit/s", bits_per_sec / 1000)
}

/// A whole number without sign, then a unit, perhaps with a space between.
fn split_number(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for text in ["100ms", "5s", "90s", "10m", "24h", "30d", "0ms"] {
            assert_eq!(write_duration(parse_duration(text).unwrap()), text);
        }
        for text in ["512MiB", "2GiB", "1TiB", "1000B", "64KiB"] {
            assert_eq!(write_size(parse_size(text).unwrap()), text);
        }
        for text in ["900Mbit/s", "1Gbit/s", "512kbit/s"] {
            assert_eq!(write_rate(parse_rate(text).unwrap()), text);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "5",
            "s",
            "-5s",
            "1.5s",
            "5 days",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
        for text in ["", "MiB", "5 MB/s", "5mib", "99999999999TiB"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
        for text in ["", "100", "100Mbit", "100MB/s"] {
            assert_eq!(parse_rate(text), None, "{text}");
        }
    }
}
