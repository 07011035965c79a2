//! QMP client: one JSON object per line, answers and events mixed (QEMU's `docs/interop/qmp-spec.rst`).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Time for an answer. QEMU answers at once unless its main loop is stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// An event with QEMU's own time stamp.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, …
    pub name: String,
    /// What comes with it; null if nothing.
    pub data: Value,
    /// Host time since the epoch.
    pub at: Duration,
}

#[derive(Debug, Default)]
struct Inbox {
    answers: Vec<Value>,
    events: Vec<Event>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    news: Condvar,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection to a QEMU monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: Mutex<UnixStream>,
    shared: Arc<Shared>,
}

impl Qmp {
    /// Starts reading; [`Self::negotiate`] comes next.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let reader = BufReader::new(stream.try_clone()?);
        let inbox = Arc::clone(&shared);
        thread::Builder::new()
            .name("qmp".into())
            .spawn(move || read(reader, &inbox))?;
        Ok(Self {
            stream: Mutex::new(stream),
            shared,
        })
    }

    /// Leaves the negotiation mode that every connection starts in.
    pub(crate) fn negotiate(&self) -> Result<()> {
        self.execute("qmp_capabilities", json!({})).map(|_| ())
    }

    /// Runs a command and gives its `return` value.
    ///
    /// # Errors
    /// QEMU's refusal (with its text), a closed monitor, or no answer in time.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        // One command at a time: answers come in order.
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.inbox().answers.clear();
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        stream
            .write_all(line.as_bytes())
            .with_context(|| format!("send {command} to QEMU"))?;
        let end = Instant::now() + ANSWER_LIMIT;
        let mut inbox = self.shared.inbox();
        loop {
            if let Some(answer) = inbox.answers.pop() {
                return match answer.get("error") {
                    Some(error) => bail!("QEMU refuses {command}: {}", error["desc"]),
                    None => Ok(answer["return"].clone()),
                };
            }
            if inbox.closed {
                bail!("QEMU closed its monitor during {command}");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no answer to {command} within {ANSWER_LIMIT:?}");
            }
            let waited = self.shared.news.wait_timeout(inbox, left);
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All events so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.shared.inbox().events.clone()
    }

    /// The last event of this name.
    #[must_use]
    pub fn last_event(&self, name: &str) -> Option<Event> {
        self.shared
            .inbox()
            .events
            .iter()
            .rev()
            .find(|event| event.name == name)
            .cloned()
    }

    /// Waits for the first event of this name.
    ///
    /// # Errors
    /// When there is none within `limit`, or QEMU has gone.
    pub fn wait_event(&self, name: &str, limit: Duration) -> Result<Event> {
        let end = Instant::now() + limit;
        let mut inbox = self.shared.inbox();
        loop {
            if let Some(event) = inbox.events.iter().find(|event| event.name == name) {
                return Ok(event.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if inbox.closed || left.is_zero() {
                bail!("no event {name} within {limit:?}");
            }
            let waited = self.shared.news.wait_timeout(inbox, left);
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn read(reader: BufReader<UnixStream>, shared: &Shared) {
    for line in reader.lines() {
        let Ok(line) = line else { break };
        let Ok(message) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        let mut inbox = shared.inbox();
        if let Some(name) = message["event"].as_str() {
            let stamp = &message["timestamp"];
            let at = Duration::from_secs(stamp["seconds"].as_u64().unwrap_or(0))
                + Duration::from_micros(stamp["microseconds"].as_u64().unwrap_or(0));
            let data = message["data"].clone();
            inbox.events.push(Event {
                name: name.to_owned(),
                data,
                at,
            });
        } else if message.get("return").is_some() || message.get("error").is_some() {
            inbox.answers.push(message);
        }
        shared.news.notify_all();
    }
    shared.inbox().closed = true;
    shared.news.notify_all();
}
