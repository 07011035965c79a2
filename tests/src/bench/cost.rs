//! What processes use while something runs, those that they start included.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::results::{ProcessCost, Role};
use crate::process::{Process, Usage, usage};

/// How often children are looked at. What they use after the last look is not seen.
const LOOK: Duration = Duration::from_millis(50);

/// Children are looked for this deep: QEMU, its shell, the programs of the pipe.
const MAX_DEPTH: usize = 4;

/// A process to be measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Watched<'a> {
    pub(super) role: Role,
    /// What it is called in tables.
    pub(super) program: &'static str,
    pub(super) process: &'a Process,
}

/// Use of the children of one role, by program and process.
type Children = BTreeMap<(Role, String, u32), Usage>;

/// Runs `action` and gives what the processes used meanwhile: CPU time from start to end, and the
/// largest resident memory.
pub(super) fn measure<T>(
    watched: &[Watched<'_>],
    action: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<ProcessCost>)> {
    let mut before = Vec::new();
    for one in watched {
        one.process.reset_peak()?;
        before.push(one.process.usage()?);
    }
    let roots: Vec<(Role, u32)> = watched.iter().map(|w| (w.role, w.process.pid())).collect();
    let done = AtomicBool::new(false);
    let (outcome, children) = thread::scope(|scope| {
        let observer = scope.spawn(|| {
            let mut seen = Children::new();
            while !done.load(Ordering::Relaxed) {
                for (role, root) in &roots {
                    look(*role, *root, 0, &mut seen);
                }
                thread::sleep(LOOK);
            }
            seen
        });
        let outcome = action();
        done.store(true, Ordering::Relaxed);
        (outcome, observer.join().unwrap_or_default())
    });
    let outcome = outcome?;
    let mut costs = Vec::new();
    for (one, before) in watched.iter().zip(before) {
        let now = one.process.usage()?;
        costs.push(ProcessCost {
            role: one.role,
            program: one.program.to_owned(),
            cpu_secs: now.cpu_secs - before.cpu_secs,
            peak_rss_bytes: now.peak_rss_bytes,
        });
    }
    costs.extend(sum(children));
    Ok((outcome, costs))
}

/// Notes what the children of `parent` have used, and theirs.
fn look(role: Role, parent: u32, depth: usize, seen: &mut Children) {
    for child in children(parent) {
        if let (Ok(name), Ok(now)) = (
            fs::read_to_string(format!("/proc/{child}/comm")),
            usage(child),
        ) {
            let known = seen
                .entry((role, name.trim_end().to_owned(), child))
                .or_default();
            // One that has ended and is not yet collected has no memory any more.
            known.cpu_secs = known.cpu_secs.max(now.cpu_secs);
            known.peak_rss_bytes = known.peak_rss_bytes.max(now.peak_rss_bytes);
        }
        if depth < MAX_DEPTH {
            look(role, child, depth + 1, seen);
        }
    }
}

/// Children of all threads of a process.
fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let lists = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<u32>>()
        })
        .collect()
}

/// One cost for all processes of the same program in the same role; the shells between them cost
/// nothing.
fn sum(children: Children) -> Vec<ProcessCost> {
    let mut sums: BTreeMap<(Role, String), Usage> = BTreeMap::new();
    for ((role, program, _), usage) in children {
        if program == "sh" {
            continue;
        }
        let sum = sums.entry((role, program)).or_default();
        sum.cpu_secs += usage.cpu_secs;
        sum.peak_rss_bytes += usage.peak_rss_bytes;
    }
    let costs = sums
        .into_iter()
        .map(|((role, program), usage)| ProcessCost {
            role,
            program,
            cpu_secs: usage.cpu_secs,
            peak_rss_bytes: usage.peak_rss_bytes,
        });
    costs.collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::process::{Surroundings, wait_for};

    #[test]
    fn children_of_children_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        // Two commands, else the shell would become the program itself.
        command.args(["-c", "sh -c 'sleep 100; true'; true"]);
        let log = dir.path().join("log");
        let process = Process::start("shell", &mut command, &log, Surroundings::default()).unwrap();
        let sleeps = || {
            let mut seen = Children::new();
            look(Role::Source, process.pid(), 0, &mut seen);
            seen.keys().any(|(_, program, _)| program == "sleep")
        };
        let found = || Ok(sleeps().then_some(()));
        wait_for("sleep", Duration::from_secs(10), found, String::new).unwrap();
        let watched = Watched {
            role: Role::Source,
            program: "shell",
            process: &process,
        };
        let pause = || {
            thread::sleep(LOOK * 3);
            Ok(())
        };
        let ((), costs) = measure(&[watched], pause).unwrap();
        let programs: Vec<&str> = costs.iter().map(|cost| cost.program.as_str()).collect();
        assert_eq!(programs, ["shell", "sleep"]);
        assert!(costs.iter().all(|cost| cost.peak_rss_bytes > 0));
        // The innermost process would outlive its parents.
        let mut seen = Children::new();
        look(Role::Source, process.pid(), 0, &mut seen);
        for (_, _, pid) in seen.keys() {
            let _ = crate::sys::kill(*pid, libc::SIGKILL);
        }
    }
}
