//! What outlives the process: which commit bytes it has handed over.
//!
//! A near gateway that asked for a commit and finds another process at the far end must know whether the one
//! before released the byte. If it did not, the source may go on at once; if nobody knows, it has to be kept
//! waiting for a human. So a far gateway notes each release in a file before it writes the byte, and its
//! successor on the same machine reads that. The file lies in memory: it outlives the process, nothing waits
//! for a disk, and it is gone as a whole with its file system, not back in a state of before.
//!
//! Layout (little is written, always in place): a mark, the processes that have kept the file without a gap,
//! then slots of one release each.

use std::{
    collections::HashMap,
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Mutex,
};

use rustix::fs::{FlockOperation, flock};
use tracing::{info, warn};

use super::link::lock;
use crate::{
    config::is_in_memory,
    wire::{
        InstanceId, MigrationId,
        control::{MAX_MIGRATIONS, MAX_PREDECESSORS},
    },
};

const MARK: [u8; 8] = *b"SKYFREL1";
const INSTANCES_AT: u64 = MARK.len() as u64;
const SLOTS_AT: u64 = 4096;
/// Bytes of a slot: a peer, its process, a migration.
const SLOT: usize = 48;
/// Releases that near gateways may still ask about, over all peers, and of one: as many as it may have
/// migrations.
const SLOTS: u32 = 8 << 10;
const SLOTS_EACH: usize = MAX_MIGRATIONS;
const FILE_BYTES: u64 = SLOTS_AT + SLOTS as u64 * SLOT as u64;

/// Why releases are not remembered.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("another gateway of this name uses it")]
    Taken,
    #[error("it belongs to another user, or is no file")]
    Foreign,
    #[error("it does not lie in memory (tmpfs)")]
    OnDisk,
}

/// A process at a near end: whose it is, by the certificate, and what it says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Near {
    peer: [u8; 16],
    instance: InstanceId,
}

impl Near {
    pub(super) fn new(peer: &str, instance: InstanceId) -> Self {
        let mut short = [0; 16];
        short.copy_from_slice(&blake3::hash(peer.as_bytes()).as_bytes()[..16]);
        Self {
            peer: short,
            instance,
        }
    }
}

/// A migration, as the process at its near end calls it: another one may use the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Release {
    pub(super) near: Near,
    pub(super) migration: MigrationId,
}

#[derive(Debug, Default)]
struct Noted {
    /// None where nothing is kept, or not any more.
    file: Option<File>,
    slots: HashMap<Release, u32>,
    free: Vec<u32>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Releases {
    noted: Mutex<Noted>,
    /// Processes before this one all of whose releases are known here.
    predecessors: Vec<InstanceId>,
}

impl Releases {
    /// Reads what the processes before have left in `dir` and goes on with it. Where that can't be, nothing is
    /// remembered, and the log says so.
    pub(super) fn open(dir: Option<&Path>, name: &str, instance: InstanceId) -> Self {
        let Some(dir) = dir else {
            info!(
                "releases are not remembered across a restart: set gateway.runtime_dir, or run as a service \
                 with a RuntimeDirectory"
            );
            return Self::default();
        };
        // Those that exist by default may not be there yet.
        let _ = DirBuilder::new().mode(0o700).create(dir);
        let path = dir.join(format!("{name}.releases"));
        // On a disk a crash, or a mount that breaks off, could bring back what the file held a while before.
        let read = if is_in_memory(dir) {
            Self::read(&path, instance)
        } else {
            Err(OpenError::OnDisk)
        };
        read.unwrap_or_else(|error| {
            let path = path.display();
            warn!(
                %path,
                %error,
                "releases are not remembered across a restart; set gateway.runtime_dir to a folder in memory \
                 (tmpfs) of this gateway's own"
            );
            Self::default()
        })
    }

    fn read(path: &Path, instance: InstanceId) -> Result<Self, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() || meta.uid() != rustix::process::geteuid().as_raw() {
            return Err(OpenError::Foreign);
        }
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(OpenError::Taken);
        }
        let mut bytes = Vec::new();
        if meta.len() == FILE_BYTES {
            bytes.resize(FILE_BYTES as usize, 0);
            file.read_exact_at(&mut bytes, 0)?;
        }
        let mut predecessors = Vec::new();
        let mut noted = Noted::default();
        if bytes.starts_with(&MARK) {
            predecessors = instances(&bytes);
            noted.take_slots(&bytes);
        } else {
            // All of it is written now, so that nothing has to be found room for later.
            noted.free = (0..SLOTS).rev().collect();
            let mut empty = MARK.to_vec();
            empty.resize(FILE_BYTES as usize, 0);
            file.set_len(0)?;
            file.write_all_at(&empty, 0)?;
        }
        if predecessors.len() == MAX_PREDECESSORS {
            predecessors.remove(0);
        }
        // From here on the file says what this process has released, too.
        let mut list: Vec<u8> = predecessors.iter().flatten().copied().collect();
        list.extend_from_slice(&instance);
        list.resize(MAX_PREDECESSORS * size_of::<InstanceId>(), 0);
        file.write_all_at(&list, INSTANCES_AT)?;
        noted.file = Some(file);
        Ok(Self {
            noted: Mutex::new(noted),
            predecessors,
        })
    }

    /// Processes before this one all of whose releases are known here.
    pub(super) fn predecessors(&self) -> &[InstanceId] {
        &self.predecessors
    }

    /// A commit byte is about to be handed over.
    ///
    /// # Errors
    /// When that can't be noted, nor that it was not: a successor would say that nothing was released. And when
    /// this peer has more of them than migrations, and has closed none.
    pub(super) fn note(&self, release: Release) -> io::Result<()> {
        let mut noted = lock(&self.noted);
        let Some(file) = &noted.file else {
            return Ok(());
        };
        if noted.slots.contains_key(&release) {
            return Ok(());
        }
        let of_peer = |of: &&Release| of.near.peer == release.near.peer;
        if noted.slots.keys().filter(of_peer).count() >= SLOTS_EACH {
            return Err(io::Error::other("the peer closes none of its migrations"));
        }
        let Some(index) = noted.free.last().copied() else {
            warn!("too many releases to remember: from now on not across a restart");
            return noted.give_up();
        };
        if let Err(error) = write_slot(file, index, Some(release)) {
            warn!(%error, "a release cannot be noted: from now on not remembered across a restart");
            return noted.give_up();
        }
        noted.free.pop();
        noted.slots.insert(release, index);
        Ok(())
    }

    /// Whether this process or one before it handed the byte over, as far as that is remembered.
    pub(super) fn contains(&self, release: Release) -> bool {
        lock(&self.noted).slots.contains_key(&release)
    }

    /// The near gateway has closed this migration and will not ask. Another process than the one that asked for
    /// the commit has no say in it: should that one still live, it may ask.
    pub(super) fn forget(&self, release: Release) {
        lock(&self.noted).forget(|noted| *noted == release);
    }

    /// The near gateway has these migrations and no others.
    pub(super) fn retain(&self, near: Near, live: &[MigrationId]) {
        lock(&self.noted).forget(|noted| noted.near == near && !live.contains(&noted.migration));
    }
}

impl Noted {
    fn take_slots(&mut self, bytes: &[u8]) {
        let slots = bytes.get(SLOTS_AT as usize..).unwrap_or_default();
        for (index, slot) in (0..SLOTS).zip(slots.chunks_exact(SLOT)) {
            let (peer, rest) = slot.split_at(16);
            let (instance, id) = rest.split_at(16);
            // Each is of 16 bytes.
            let near = Near {
                peer: peer.try_into().unwrap_or_default(),
                instance: instance.try_into().unwrap_or_default(),
            };
            let migration = MigrationId(id.try_into().unwrap_or_default());
            if near == Near::default() {
                self.free.push(index);
            } else {
                self.slots.insert(Release { near, migration }, index);
            }
        }
    }

    fn forget(&mut self, gone: impl Fn(&Release) -> bool) {
        let Self { file, slots, free } = self;
        slots.retain(|release, index| {
            if !gone(release) {
                return true;
            }
            // A slot that can't be emptied makes a successor believe the worse, and is not used again.
            let emptied = |file: &File| write_slot(file, *index, None).is_ok();
            if file.as_ref().is_some_and(emptied) {
                free.push(*index);
            }
            false
        });
    }

    /// Keeps no file from now on; an empty one says nothing of anybody.
    fn give_up(&mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.set_len(0)?;
        }
        self.file = None;
        Ok(())
    }
}

fn instances(bytes: &[u8]) -> Vec<InstanceId> {
    let list = &bytes[MARK.len()..][..MAX_PREDECESSORS * size_of::<InstanceId>()];
    let each = list.as_chunks::<{ size_of::<InstanceId>() }>().0.iter();
    each.filter(|id| **id != InstanceId::default())
        .copied()
        .collect()
}

/// One write: the kernel carries it out as a whole, whatever becomes of this process. Zeros say that the slot is
/// free.
fn write_slot(file: &File, index: u32, release: Option<Release>) -> io::Result<()> {
    let mut slot = [0; SLOT];
    if let Some(Release { near, migration }) = release {
        slot[..16].copy_from_slice(&near.peer);
        slot[16..32].copy_from_slice(&near.instance);
        slot[32..].copy_from_slice(&migration.0);
    }
    file.write_all_at(&slot, SLOTS_AT + u64::from(index) * SLOT as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processes of near gateways.
    fn near(peer: &str, process: u8) -> Near {
        Near::new(peer, [process; 16])
    }

    fn release(near: Near, n: u32) -> Release {
        Release {
            near,
            migration: id(n),
        }
    }

    fn a(n: u32) -> Release {
        release(near("edge-a", 10), n)
    }

    /// Another peer that says that it is the same process.
    fn c(n: u32) -> Release {
        release(near("edge-c", 10), n)
    }

    fn id(n: u32) -> MigrationId {
        let mut id = [1; 16];
        id[..4].copy_from_slice(&n.to_le_bytes());
        MigrationId(id)
    }

    /// A folder in memory.
    fn dir() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("edge-b.releases");
        (dir, path)
    }

    fn of(path: &Path, process: u8) -> Releases {
        Releases::read(path, [process; 16]).unwrap()
    }

    #[test]
    fn a_successor_knows_what_was_released_and_by_whom_that_is_all() {
        let (_dir, path) = dir();
        let first = of(&path, 1);
        assert!(first.predecessors().is_empty());
        first.note(a(1)).unwrap();
        first.note(a(2)).unwrap();
        first.note(c(3)).unwrap();
        first.forget(a(2));
        // Another's.
        first.forget(a(3));
        // A name that is in use.
        assert!(matches!(
            Releases::read(&path, [7; 16]),
            Err(OpenError::Taken)
        ));
        drop(first);
        let second = of(&path, 2);
        assert_eq!(second.predecessors(), [[1; 16]]);
        let known = [1, 2, 3].map(|n| second.contains(a(n)));
        assert_eq!(known, [true, false, false]);
        assert!(second.contains(c(3)));
        second.note(a(5)).unwrap();
        drop(second);
        let third = of(&path, 3);
        assert_eq!(third.predecessors(), [[1; 16], [2; 16]]);
        assert_eq!([1, 5].map(|n| third.contains(a(n))), [true; 2]);
        third.retain(near("edge-a", 10), &[id(5), id(6)]);
        assert_eq!([1, 5].map(|n| third.contains(a(n))), [false, true]);
        assert!(third.contains(c(3)));
    }

    #[test]
    fn a_file_that_may_have_gaps_says_nothing() {
        let (_dir, path) = dir();
        let broken = |change: &dyn Fn(&File)| {
            let _ = std::fs::remove_file(&path);
            let first = of(&path, 1);
            first.note(a(1)).unwrap();
            drop(first);
            change(&File::options().write(true).open(&path).unwrap());
            let second = of(&path, 2);
            assert!(second.predecessors().is_empty() && !second.contains(a(1)));
            // And is a good one from here on.
            drop(second);
            assert_eq!(of(&path, 3).predecessors(), [[2; 16]]);
        };
        broken(&|file| file.set_len(FILE_BYTES - 1).unwrap());
        broken(&|file| file.set_len(0).unwrap());
        broken(&|file| file.write_all_at(b"else", 0).unwrap());
    }

    #[test]
    fn who_cannot_remember_does_not_claim_to() {
        let (_dir, path) = dir();
        let first = of(&path, 1);
        let each = u32::try_from(SLOTS_EACH).unwrap();
        let some = |n: u32| release(near(&format!("edge-{}", n / each), 1), n);
        for n in 0..SLOTS {
            first.note(some(n)).unwrap();
        }
        // One more than there is room for, and none is forgotten by this process.
        first.note(a(SLOTS)).unwrap();
        assert!(first.contains(some(0)) && first.contains(some(SLOTS - 1)));
        drop(first);
        assert!(of(&path, 2).predecessors().is_empty());
        // Room that was given back is used again.
        let third = of(&path, 3);
        for n in 0..3 * SLOTS {
            third.note(a(n)).unwrap();
            third.forget(a(n));
        }
        drop(third);
        assert_eq!(of(&path, 4).predecessors(), [[2; 16], [3; 16]]);
    }

    /// One peer that closes nothing takes the room of nobody else; what is noted twice takes it once, and the
    /// same name in another's mouth is another migration.
    #[test]
    fn peers_do_not_get_in_each_others_way() {
        let (_dir, path) = dir();
        let first = of(&path, 1);
        first.note(c(0)).unwrap();
        for n in 0..u32::try_from(SLOTS_EACH).unwrap() {
            first.note(a(n)).unwrap();
            first.note(a(n)).unwrap();
        }
        assert!(first.note(a(SLOTS)).is_err());
        first.note(c(SLOTS)).unwrap();
        first.retain(near("edge-a", 10), &[]);
        first.forget(a(0));
        assert!(first.contains(c(0)) && !first.contains(a(0)));
        drop(first);
        assert!(of(&path, 2).contains(c(0)));
    }

    /// What cannot be noted is not released, unless it is certain that nobody takes it for unreleased.
    #[test]
    fn a_file_that_takes_nothing_is_given_up() {
        let (_dir, path) = dir();
        let first = of(&path, 1);
        lock(&first.noted).file = Some(File::open(&path).unwrap());
        assert!(first.note(a(1)).is_err());
        drop(first);
        assert_eq!(of(&path, 2).predecessors(), [[1; 16]]);
    }

    #[test]
    fn only_the_latest_processes_are_vouched_for() {
        let (_dir, path) = dir();
        for process in 1..=u8::try_from(MAX_PREDECESSORS + 3).unwrap() {
            drop(of(&path, process));
        }
        let last = of(&path, 200);
        assert_eq!(last.predecessors().len(), MAX_PREDECESSORS - 1);
        assert_eq!(last.predecessors()[0], [5; 16]);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let (dir, path) = dir();
        let other = dir.path().join("other");
        std::fs::write(&other, "precious").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(Releases::read(&path, [1; 16]).is_err());
        assert_eq!(std::fs::read(&other).unwrap(), b"precious");
    }
}
