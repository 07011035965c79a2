//! Figures of single moves, kept in a file as they come: a line of JSON each, so that a benchmark that
//! was interrupted goes on where it stood.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::way::Way;

/// Under what circumstances a guest was moved; only figures of one setting are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Size of the guests (`full`, `quick`).
    pub scale: String,
    /// Rate of the link in Mbit/s.
    pub rate_mbit: u64,
    /// Round-trip time of the link in ms.
    pub rtt_ms: u64,
    /// Packets lost at random, in percent.
    pub loss_percent: f64,
    /// How long a guest works before it returns, in seconds.
    pub work_secs: u64,
    /// Where.
    pub machine: Machine,
}

/// A machine and what runs on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of its processor.
    pub cpu: String,
    /// Processors.
    pub cores: usize,
    /// RAM in GiB, rounded.
    pub memory_gib: u64,
    /// Distribution.
    pub system: String,
    /// Version of the Linux kernel.
    pub kernel: String,
    /// Version of QEMU.
    pub qemu: String,
    /// The zstd and the socat that rivals are made of, with their versions.
    #[serde(default)]
    pub tools: String,
}

/// A side of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Where the guest came from.
    Source,
    /// Where it went.
    Destination,
}

/// What a process used during a move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessCost {
    /// On which side.
    pub role: Role,
    /// `qemu`, `gateway`, or what it is called.
    pub program: String,
    /// User and system time, in seconds.
    pub cpu_secs: f64,
    /// Largest resident memory, in bytes.
    pub peak_rss_bytes: u64,
}

/// What a move cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// From the command to migrate until the guest runs at the destination and the source says
    /// `completed`, in seconds.
    pub total_secs: f64,
    /// From the guest's stop at the source until it runs at the destination, in seconds.
    pub blackout_secs: f64,
    /// Bytes on the link, both directions, all overheads included; 0 where there is no link.
    pub wire_bytes: u64,
    /// Bytes that the source wrote.
    pub guest_bytes: u64,
    /// Bytes of RAM that were not zero, as of the first round.
    pub nonzero_bytes: u64,
    /// Of every process.
    pub processes: Vec<ProcessCost>,
}

/// How a move ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The guest runs at the destination, and its memory is right.
    Done(Cost),
    /// It does not; the first line of the reason.
    Failed(String),
    /// This build cannot do it.
    Unavailable,
}

/// One move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Circumstances.
    pub setting: Setting,
    /// Name of the guest.
    pub guest: String,
    /// Name of the way.
    pub way: String,
    /// Which run, from 1.
    pub run: u32,
    /// Revision of the gateways.
    pub revision: String,
    /// When the benchmark was started, in seconds since the epoch: what has the same number was
    /// measured in turn.
    pub session: u64,
    /// Processes that were ready to run in the minute before that, on average.
    #[serde(default)]
    pub load: Option<f64>,
    /// How it ended.
    pub outcome: Outcome,
}

/// All moves in a file.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    records: Vec<Record>,
}

impl Results {
    /// Reads a file, or starts a new one. A line that is not a record (the last one, after a kill) is
    /// left out.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("read {}", path.display()));
            }
        };
        let records = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        Ok(Self {
            path: path.to_owned(),
            records: records.collect(),
        })
    }

    /// All records, oldest first.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Adds a record, in the file as well.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let cannot = || format!("write {}", self.path.display());
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).with_context(cannot)?;
        }
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&self.path)
            .with_context(cannot)?;
        // A line break first ends what a kill has left of a line.
        let line = format!("\n{}\n", serde_json::to_string(&record)?);
        file.write_all(line.as_bytes()).with_context(cannot)?;
        self.records.push(record);
        Ok(())
    }

    /// Whether a move has been made already. Our ways have to be measured again when the revision
    /// changes, QEMU's have not.
    #[must_use]
    pub fn has(&self, wanted: &Record) -> bool {
        let ours = Way::find(&wanted.way).is_some_and(Way::is_ours);
        self.records.iter().any(|known| {
            known.outcome != Outcome::Unavailable
                && (&known.guest, &known.way, known.run) == (&wanted.guest, &wanted.way, wanted.run)
                && known.setting == wanted.setting
                && (!ours || known.revision == wanted.revision)
        })
    }

    /// What counts for a guest and a way in a setting: of each run the latest record, of our ways only
    /// those of the latest revision.
    #[must_use]
    pub fn latest(&self, setting: &Setting, guest: &str, way: Way) -> Vec<&Record> {
        let mut chosen: Vec<&Record> = Vec::new();
        let fitting = self.records.iter().rev().filter(|record| {
            record.guest == guest && record.way == way.name() && record.setting == *setting
        });
        for record in fitting {
            let other_revision = chosen
                .first()
                .is_some_and(|first| way.is_ours() && first.revision != record.revision);
            if !other_revision && chosen.iter().all(|known| known.run != record.run) {
                chosen.push(record);
            }
        }
        chosen.reverse();
        chosen
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::bench) fn setting() -> Setting {
        Setting {
            scale: "full".into(),
            rate_mbit: 200,
            rtt_ms: 60,
            loss_percent: 0.0,
            work_secs: 60,
            machine: Machine {
                cpu: "A <fast> & small processor".into(),
                cores: 2,
                memory_gib: 24,
                system: "Debian".into(),
                kernel: "6.1".into(),
                qemu: "10.0.2".into(),
                tools: "zstd 1.5.4, socat 1.7.4".into(),
            },
        }
    }

    pub(in crate::bench) fn cost(total_secs: f64, wire_bytes: u64) -> Cost {
        let process = |role, program: &str| ProcessCost {
            role,
            program: program.into(),
            cpu_secs: 1.5,
            peak_rss_bytes: 64 << 20,
        };
        Cost {
            total_secs,
            blackout_secs: total_secs / 10.0,
            wire_bytes,
            guest_bytes: wire_bytes * 3,
            nonzero_bytes: 300_000_000,
            processes: vec![
                process(Role::Source, "qemu"),
                process(Role::Source, "gateway"),
                process(Role::Destination, "qemu"),
            ],
        }
    }

    pub(in crate::bench) fn record(guest: &str, way: Way, run: u32, outcome: Outcome) -> Record {
        Record {
            setting: setting(),
            guest: guest.into(),
            way: way.name().into(),
            run,
            revision: "abc".into(),
            session: 1,
            load: Some(0.25),
            outcome,
        }
    }

    #[test]
    fn a_file_that_was_cut_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder/results.jsonl");
        let done = |run| record("idle", Way::Cold, run, Outcome::Done(cost(2.0, 100)));
        let mut results = Results::open(&path).unwrap();
        results.add(done(1)).unwrap();
        results.add(done(2)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 10]).unwrap();
        let mut results = Results::open(&path).unwrap();
        assert!(results.has(&done(1)) && !results.has(&done(2)));
        results.add(done(2)).unwrap();
        assert_eq!(Results::open(&path).unwrap().records(), [done(1), done(2)]);
    }

    #[test]
    fn our_ways_are_measured_again_when_the_revision_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::open(&dir.path().join("results")).unwrap();
        let fresh = |way, run, secs| Record {
            revision: "def".into(),
            ..record("idle", way, run, Outcome::Done(cost(secs, 1)))
        };
        for way in [Way::TcpBbr, Way::Cold] {
            for run in [1, 2] {
                let outcome = Outcome::Done(cost(9.0, 1));
                results.add(record("idle", way, run, outcome)).unwrap();
            }
        }
        assert!(results.has(&fresh(Way::TcpBbr, 1, 1.0)));
        assert!(!results.has(&fresh(Way::Cold, 1, 1.0)));
        results.add(fresh(Way::TcpBbr, 2, 1.0)).unwrap();
        results.add(fresh(Way::Cold, 1, 1.0)).unwrap();
        // A run that is repeated takes the place of the older one.
        let latest = results.latest(&setting(), "idle", Way::TcpBbr);
        let revisions: Vec<&str> = latest.iter().map(|r| r.revision.as_str()).collect();
        assert_eq!(revisions, ["abc", "def"]);
        assert_eq!(results.latest(&setting(), "idle", Way::Cold).len(), 1);
        let other = Setting {
            rtt_ms: 150,
            ..setting()
        };
        assert!(results.latest(&other, "idle", Way::Cold).is_empty());
    }

    #[test]
    fn what_was_not_available_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::open(&dir.path().join("results")).unwrap();
        let record = record("idle", Way::Seeded, 1, Outcome::Unavailable);
        results.add(record.clone()).unwrap();
        assert!(!results.has(&record));
        assert_eq!(results.latest(&setting(), "idle", Way::Seeded).len(), 1);
    }
}
