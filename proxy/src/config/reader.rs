//! Takes a TOML table apart key by key and notes everything that is wrong with it.
//!
//! serde would stop at the first error and cannot name `ingress[1].listen`; an operator wants the whole
//! list at once. Each accessor removes its key, so what is left at the end is unknown.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use toml::{Table, Value};

use super::error::ConfigError;
use super::units;

/// What has been found so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) errors: Vec<ConfigError>,
    pub(super) warnings: Vec<String>,
}

impl Findings {
    pub(super) fn error(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.errors.push(ConfigError {
            key: key.into(),
            message: message.into(),
        });
    }

    pub(super) fn warn(&mut self, key: &str, message: impl fmt::Display) {
        self.warnings.push(format!("{key}: {message}"));
    }
}

/// One table of the file.
#[derive(Debug)]
pub(super) struct Section {
    /// `ingress[1]`; empty for the file's own table.
    name: String,
    table: Table,
    known: Vec<&'static str>,
}

impl Section {
    pub(super) fn new(name: impl Into<String>, table: Table) -> Self {
        Self {
            name: name.into(),
            table,
            known: Vec::new(),
        }
    }

    /// The full name of a key in this table.
    pub(super) fn key(&self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.table.remove(key)
    }

    /// A table inside this one; an empty one where it is missing.
    pub(super) fn section(&mut self, key: &'static str, findings: &mut Findings) -> Self {
        self.optional_section(key, findings)
            .unwrap_or_else(|| Self::new(self.key(key), Table::new()))
    }

    /// A table inside this one, if it is there.
    pub(super) fn optional_section(
        &mut self,
        key: &'static str,
        findings: &mut Findings,
    ) -> Option<Self> {
        let name = self.key(key);
        match self.take(key)? {
            Value::Table(table) => Some(Self::new(name, table)),
            other => {
                let hint = format!("must be a table, written [{name}], not {}", kind(&other));
                findings.error(name, hint);
                None
            }
        }
    }

    /// The tables of `[[key]]`, at most `limit`.
    pub(super) fn sections(
        &mut self,
        key: &'static str,
        limit: usize,
        findings: &mut Findings,
    ) -> Vec<Self> {
        let name = self.key(key);
        let list = match self.take(key) {
            None => return Vec::new(),
            Some(Value::Array(list)) => list,
            Some(other) => {
                let hint = format!(
                    "must be a list of tables, each written [[{name}]], not {}",
                    kind(&other)
                );
                findings.error(name, hint);
                return Vec::new();
            }
        };
        if list.len() > limit {
            findings.error(
                name,
                format!("has {} entries; at most {limit} are allowed", list.len()),
            );
            return Vec::new();
        }
        let mut sections = Vec::with_capacity(list.len());
        for (index, value) in list.into_iter().enumerate() {
            let name = format!("{name}[{index}]");
            match value {
                Value::Table(table) => sections.push(Self::new(name, table)),
                other => findings.error(name, format!("must be a table, not {}", kind(&other))),
            }
        }
        sections
    }

    /// A value that may be missing; also `None` when it is bad, which is then on the list.
    pub(super) fn optional<T>(
        &mut self,
        key: &'static str,
        findings: &mut Findings,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.take(key)?;
        match read(&value) {
            Ok(value) => Some(value),
            Err(message) => {
                findings.error(self.key(key), message);
                None
            }
        }
    }

    /// A value that must be there; `example` is shown when it is not.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        example: &str,
        findings: &mut Findings,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<T> {
        if !self.table.contains_key(key) {
            self.known.push(key);
            findings.error(
                self.key(key),
                format!("is missing; write {key} = {example}"),
            );
            return None;
        }
        self.optional(key, findings, read)
    }

    /// Reports every key that nobody asked for.
    pub(super) fn finish(self, findings: &mut Findings) {
        for key in self.table.keys() {
            findings.error(
                self.key(key),
                format!("is not a known key; known here: {}", self.known.join(", ")),
            );
        }
    }
}

/// A type's name with its article, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a fraction",
        Value::Boolean(_) => "a boolean",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

/// Any string.
pub(super) fn string(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        Value::String(_) => Err("must not be empty".into()),
        other => Err(format!("must be a string in quotes, not {}", kind(other))),
    }
}

/// A string that `T` reads.
pub(super) fn parsed<T: FromStr<Err: fmt::Display>>(value: &Value) -> Result<T, String> {
    string(value)?
        .parse()
        .map_err(|error: T::Err| error.to_string())
}

/// `true` or `false`.
pub(super) fn boolean(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| format!("must be true or false, not {}", kind(value)))
}

/// A whole number within a range.
pub(super) fn integer(range: RangeInclusive<i64>) -> impl FnOnce(&Value) -> Result<i64, String> {
    move |value| match value {
        Value::Integer(number) if range.contains(number) => Ok(*number),
        Value::Integer(number) => Err(format!(
            "must be {} to {}, not {number}",
            range.start(),
            range.end()
        )),
        other => Err(format!(
            "must be a whole number, {} to {}, not {}",
            range.start(),
            range.end(),
            kind(other)
        )),
    }
}

/// A duration such as `"10m"` within a range.
pub(super) fn duration(
    range: RangeInclusive<Duration>,
) -> impl FnOnce(&Value) -> Result<Duration, String> {
    in_unit(
        "a duration such as \"100ms\", \"30s\", \"10m\" or \"2h\"",
        range,
        units::parse_duration,
        |d| units::write_duration(*d),
    )
}

/// A rate such as `"900Mbit/s"` within a range, in bits per second.
pub(super) fn rate(range: RangeInclusive<u64>) -> impl FnOnce(&Value) -> Result<u64, String> {
    in_unit(
        "a rate such as \"900Mbit/s\" or \"1Gbit/s\"",
        range,
        units::parse_rate,
        |bits| units::write_rate(*bits),
    )
}

/// A size in bytes, as a number or as a string such as `"512MiB"`, within a range.
pub(super) fn size(range: RangeInclusive<u64>) -> impl FnOnce(&Value) -> Result<u64, String> {
    move |value| {
        let text;
        let value = match value {
            Value::Integer(number) => {
                text = Value::String(number.to_string());
                &text
            }
            other => other,
        };
        in_unit(
            "a size such as \"512MiB\" or a number of bytes",
            range,
            units::parse_size,
            |bytes| units::write_size(*bytes),
        )(value)
    }
}

/// A string with a unit, read by `parse`, within `range`, whose ends `write` shows.
fn in_unit<T: PartialOrd>(
    what: &'static str,
    range: RangeInclusive<T>,
    parse: fn(&str) -> Option<T>,
    write: fn(&T) -> String,
) -> impl FnOnce(&Value) -> Result<T, String> {
    move |value| {
        let Value::String(text) = value else {
            return Err(format!("must be {what}, not {}", kind(value)));
        };
        let read = parse(text).ok_or_else(|| format!("must be {what}, not \"{text}\""))?;
        if range.contains(&read) {
            Ok(read)
        } else {
            let (low, high) = (write(range.start()), write(range.end()));
            Err(format!("must be {low} to {high}, not {text}"))
        }
    }
}
