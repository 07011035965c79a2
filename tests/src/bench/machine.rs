//! Where figures are from.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::Result;

use super::results::Machine;
use crate::process::run;
use crate::qemu::QemuBinary;

/// This machine.
///
/// # Errors
/// When it has no QEMU.
pub fn describe() -> Result<Machine> {
    let field = |path: &str, key: &str, separator: char| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let value = text.lines().find_map(|line| {
            let (name, value) = line.split_once(separator)?;
            (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
        });
        value.unwrap_or_else(|| "unknown".to_owned())
    };
    let memory_kib = field("/proc/meminfo", "MemTotal", ':');
    let memory_kib: u64 = memory_kib
        .split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Machine {
        cpu: field("/proc/cpuinfo", "model name", ':'),
        cores: thread::available_parallelism().map_or(1, usize::from),
        memory_gib: (memory_kib + (1 << 19)) >> 20,
        system: field("/etc/os-release", "PRETTY_NAME", '='),
        kernel: kernel.trim().to_owned(),
        qemu: QemuBinary::find()?.version().to_owned(),
        tools: format!(
            "zstd {}, socat {}",
            tool_version("zstd", "--version"),
            tool_version("socat", "-V")
        ),
    })
}

/// The first number with points in what a program says of its version.
fn tool_version(program: &str, flag: &str) -> String {
    let said = run(Command::new(program).arg(flag)).unwrap_or_default();
    let mut words = said.split(|c: char| c.is_whitespace() || c == ',');
    let is_version = |word: &&str| {
        let word = word.strip_prefix('v').unwrap_or(word);
        word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok())
    };
    let version = words.find(is_version).unwrap_or("unknown");
    version.trim_start_matches('v').to_owned()
}

/// Processes that were ready to run in the last minute, on average: a machine that has other work
/// measures that as well.
#[must_use]
pub fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// The revision of the sources, with a mark if they were changed since.
#[must_use]
pub fn revision() -> String {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let git = |arguments: &[&str]| run(Command::new("git").args(["-C", root]).args(arguments));
    let Ok(short) = git(&["rev-parse", "--short", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let mark = if changed.is_ok_and(|list| list.is_empty()) {
        ""
    } else {
        "-changed"
    };
    format!("{}{mark}", short.trim())
}

/// What the gateway program can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// It has `skyferry seed`.
    pub seed: bool,
    /// Its store can be on disk.
    pub disk_store: bool,
}

impl Abilities {
    /// Asks the program.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn of(program: &Path) -> Result<Self> {
        let seed = Command::new(program).args(["seed", "--help"]).output()?;
        let dir = tempfile::tempdir()?;
        let configuration = dir.path().join("gateway.toml");
        fs::write(&configuration, "[store]\npath = \"store\"\n")?;
        let check = Command::new(program)
            .arg("check-config")
            .arg(&configuration)
            .output()?;
        // The rest of the configuration is missing, which it says as well.
        let complaint = String::from_utf8_lossy(&check.stderr);
        Ok(Self {
            seed: seed.status.success(),
            disk_store: !complaint.contains("store.path: is not a known key"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("tool");
        let script =
            "#!/bin/sh\necho 'tool by X - see www.x.org'\necho '*** Tool (64-bit) v1.5.4, by Y'\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(tool_version(program.to_str().unwrap(), "-V"), "1.5.4");
        assert_eq!(tool_version("no-such-program", "-V"), "unknown");
    }

    #[test]
    fn abilities_are_what_the_program_says() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, script: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let old = program("old", "echo 'store.path: is not a known key' >&2; exit 2");
        let new = program("new", "test \"$1\" = seed");
        let none = Abilities {
            seed: false,
            disk_store: false,
        };
        assert_eq!(Abilities::of(&old).unwrap(), none);
        let all = Abilities {
            seed: true,
            disk_store: true,
        };
        assert_eq!(Abilities::of(&new).unwrap(), all);
        assert!(Abilities::of(&dir.path().join("none")).is_err());
    }
}
