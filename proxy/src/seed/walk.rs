//! The regular files below a folder, one at a time.
//!
//! Every name is opened relative to the folder it is in and never through a symbolic link, so whoever may
//! write to the tree cannot lead the walk out of it. Other file systems that are mounted in it are left
//! out, and so is all that is not a regular file. Memory is bounded by the depth, not by the number of
//! files; the order is that of the file system, the same each time while nothing changes.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, openat, statat};

/// Folders in folders, at most: each takes a file descriptor.
const MAX_DEPTH: usize = 128;

/// A regular file.
#[derive(Debug)]
pub(super) struct Entry {
    /// Its path from the top folder on.
    pub(super) path: PathBuf,
    name: std::ffi::CString,
    /// Its bytes.
    pub(super) size: u64,
    /// Bytes that it takes on the disk, at most its size.
    pub(super) allocated: u64,
}

/// Something that cannot be read, and why.
#[derive(Debug)]
pub(super) struct Trouble {
    /// Its path from the top folder on.
    pub(super) path: PathBuf,
    /// What the system said.
    pub(super) error: io::Error,
}

struct Level {
    dir: Dir,
    /// Path from the top folder on.
    path: PathBuf,
}

/// Goes through a tree. [`open`](Self::open) opens the entry that came last.
pub(super) struct Walk {
    levels: Vec<Level>,
    device: u64,
}

impl Walk {
    /// Begins at the folder `top`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn new(top: &File) -> io::Result<Self> {
        let device = fstat(top)?.st_dev;
        let level = Level {
            dir: Dir::read_from(top)?,
            path: PathBuf::new(),
        };
        Ok(Self {
            levels: vec![level],
            device,
        })
    }

    /// Opens `entry`, which must be the one that came last.
    ///
    /// # Errors
    /// When it cannot be opened, or is no regular file any more.
    pub(super) fn open(&self, entry: &Entry) -> io::Result<File> {
        let level = self.levels.last();
        let level = level.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        // Something else of that name must neither be waited for nor become a terminal of ours.
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(openat(level.dir.fd()?, &entry.name, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::other("it is no regular file any more"))
        }
    }

    /// Looks at one name: a file to be given out, a folder to go into, or nothing.
    fn look(&mut self, name: &CStr) -> Result<Option<Entry>, Trouble> {
        let Some(level) = self.levels.last() else {
            return Ok(None);
        };
        let path = level.path.join(OsStr::from_bytes(name.to_bytes()));
        let found = (|| {
            let folder = level.dir.fd()?;
            let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if stat.st_dev != self.device {
                return Ok(None);
            }
            Ok(match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => {
                    let size = u64::try_from(stat.st_size).unwrap_or(0);
                    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
                    Some(Found::File {
                        size,
                        allocated: blocks.saturating_mul(512).min(size),
                    })
                }
                FileType::Directory if self.levels.len() >= MAX_DEPTH => {
                    let message = format!("more than {MAX_DEPTH} folders in each other");
                    return Err(io::Error::other(message));
                }
                FileType::Directory => {
                    let flags =
                        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    Some(Found::Folder(Dir::new(openat(
                        folder,
                        name,
                        flags,
                        Mode::empty(),
                    )?)?))
                }
                _ => None,
            })
        })();
        match found {
            Ok(None) => Ok(None),
            Ok(Some(Found::File { size, allocated })) => Ok(Some(Entry {
                path,
                name: name.into(),
                size,
                allocated,
            })),
            Ok(Some(Found::Folder(dir))) => {
                self.levels.push(Level { dir, path });
                Ok(None)
            }
            Err(error) => Err(Trouble { path, error }),
        }
    }
}

enum Found {
    File { size: u64, allocated: u64 },
    Folder(Dir),
}

impl Iterator for Walk {
    type Item = Result<Entry, Trouble>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let level = self.levels.last_mut()?;
            match level.dir.read() {
                None => {
                    self.levels.pop();
                }
                Some(Err(error)) => {
                    let path = std::mem::take(&mut level.path);
                    self.levels.pop();
                    let error = error.into();
                    return Some(Err(Trouble { path, error }));
                }
                Some(Ok(entry)) => {
                    let name = entry.file_name();
                    if matches!(name.to_bytes(), b"." | b"..") {
                        continue;
                    }
                    if let Some(found) = self.look(name).transpose() {
                        return Some(found);
                    }
                }
            }
        }
    }
}

/// A file's path for people.
pub(super) fn shown(top: &Path, path: &Path) -> String {
    top.join(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Paths and contents of all files, and the paths of what made trouble.
    fn walk(top: &Path) -> (BTreeMap<String, String>, Vec<String>) {
        let mut walk = Walk::new(&File::open(top).unwrap()).unwrap();
        let (mut files, mut troubles) = (BTreeMap::new(), Vec::new());
        while let Some(found) = walk.next() {
            match found {
                Ok(entry) => {
                    let mut text = String::new();
                    let mut file = walk.open(&entry).unwrap();
                    file.read_to_string(&mut text).unwrap();
                    assert_eq!(entry.size, text.len() as u64);
                    assert!(entry.allocated <= entry.size);
                    files.insert(entry.path.display().to_string(), text);
                }
                Err(trouble) => troubles.push(trouble.path.display().to_string()),
            }
        }
        (files, troubles)
    }

    #[test]
    fn regular_files_are_found_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::write(top.join("one"), "1").unwrap();
        fs::write(top.join("a/two"), "22").unwrap();
        fs::write(top.join("a/b/three"), "").unwrap();
        symlink("/etc", top.join("etc")).unwrap();
        symlink("..", top.join("a/loop")).unwrap();
        symlink("one", top.join("alias")).unwrap();
        let _socket = UnixListener::bind(top.join("socket")).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(top.join("a/fifo"))
            .status();
        assert!(made.unwrap().success());
        let (files, troubles) = walk(top);
        let expected = [("a/b/three", ""), ("a/two", "22"), ("one", "1")];
        assert_eq!(
            files,
            expected
                .map(|(path, text)| (path.into(), text.into()))
                .into()
        );
        assert!(troubles.is_empty(), "{troubles:?}");
    }

    #[test]
    fn a_tree_that_is_too_deep_is_named_and_the_rest_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d/".repeat(MAX_DEPTH + 3));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("lost"), "x").unwrap();
        fs::write(dir.path().join("kept"), "y").unwrap();
        let (files, troubles) = walk(dir.path());
        assert_eq!(files.keys().collect::<Vec<_>>(), ["kept"]);
        assert_eq!(troubles.len(), 1);
    }

    #[test]
    fn a_file_that_becomes_a_link_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "x").unwrap();
        let mut walk = Walk::new(&File::open(dir.path()).unwrap()).unwrap();
        let entry = walk.next().unwrap().unwrap();
        fs::remove_file(&path).unwrap();
        symlink("/etc/passwd", &path).unwrap();
        assert!(walk.open(&entry).is_err());
    }
}
