//! Images in the formats of hypervisors, read by `qemu-nbd`.
//!
//! The format is never left to QEMU to guess: a guest may write what it likes to the begin of its raw
//! disk, also the head of a qcow2 image whose "backing file" is any file of this host.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::json;

use super::contents::{Contents, Next};
use super::nbd::Disk;

/// How long `qemu-nbd` may take to open an image.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(10);
/// How long it may take to end.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long a read may take: network disks are slow at times.
const READ_LIMIT: Duration = Duration::from_secs(120);
/// Most that is read of what it says.
const MAX_COMPLAINT: u64 = 2048;

/// How the bytes of a disk lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// As they are
    Raw,
    /// QEMU's; also what its backing file holds
    Qcow2,
    /// VMware's
    Vmdk,
    /// VirtualBox's
    Vdi,
    /// Hyper-V's
    Vhdx,
}

impl Format {
    /// The name by which it is given on the command line, and which QEMU has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
        }
    }

    /// What a file that begins with `head` (its first [`HEAD_BYTES`], or fewer) looks like.
    fn looks_like(head: &[u8]) -> Self {
        if head.starts_with(b"QFI\xfb") {
            Self::Qcow2
        } else if head.starts_with(b"KDMV") || head.starts_with(b"# Disk DescriptorFile") {
            Self::Vmdk
        } else if head.starts_with(b"vhdxfile") {
            Self::Vhdx
        } else if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) {
            Self::Vdi
        } else {
            Self::Raw
        }
    }
}

/// Bytes of a file by which its format is told.
const HEAD_BYTES: usize = 512;

/// How a file is to be read when nobody has said so.
///
/// # Errors
/// When it cannot be read; or the file looks like an image that may name other files: such are read only
/// when somebody vouches for them.
pub(super) fn find_format(file: &File) -> io::Result<Format> {
    let mut head = [0; HEAD_BYTES];
    let mut length = 0;
    while length < head.len() {
        match file.read_at(&mut head[length..], length as u64)? {
            0 => break,
            count => length += count,
        }
    }
    let format = Format::looks_like(&head[..length]);
    let refuse = |why: &str| {
        Err(io::Error::other(format!(
            "it looks like {name}{why}: say --format {name} if you trust it, or --format raw if it is the \
             disk of a guest",
            name = format.name()
        )))
    };
    match format {
        Format::Raw => Ok(format),
        Format::Qcow2 if names_other_files(&head) => {
            refuse(" and names another file, which would be read, too")
        }
        Format::Qcow2 => Ok(format),
        _ => refuse(""),
    }
}

/// Whether the head of a qcow2 image names a backing file or an external data file.
fn names_other_files(head: &[u8; HEAD_BYTES]) -> bool {
    /// Incompatible feature: the data are in a file of their own.
    const DATA_FILE: u64 = 1 << 2;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&head[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    let version = number(0) as u32;
    number(8) != 0 || (version >= 3 && number(72) & DATA_FILE != 0)
}

/// An image that `qemu-nbd` reads for us.
pub(super) struct Image {
    /// `None` once it is closed.
    disk: Option<Disk<UnixStream>>,
    server: Server,
}

impl Image {
    /// Opens the image at `path`. With `alone` no file but this is read: what a backing file would hold
    /// is taken for zeroes.
    ///
    /// # Errors
    /// When `qemu-nbd` is missing or refuses the image.
    pub(super) fn open(path: &Path, format: Format, alone: bool) -> io::Result<Self> {
        let folder = Folder::new()?;
        let mut server = Server::start(&folder, path, format, alone)?;
        let stream = server.connect(&folder)?;
        // The server has what it needs, and ends when the connection does.
        drop(folder);
        stream.set_read_timeout(Some(READ_LIMIT))?;
        stream.set_write_timeout(Some(READ_LIMIT))?;
        let disk = Disk::open(stream).map_err(|error| server.explain(error))?;
        let disk = Some(disk);
        Ok(Self { disk, server })
    }
}

impl Contents for Image {
    fn size(&self) -> u64 {
        self.disk.as_ref().map_or(0, Disk::size)
    }

    fn next(&mut self, at: u64, out: &mut Vec<u8>) -> io::Result<Next> {
        let Some(disk) = &mut self.disk else {
            return Ok(Next::End);
        };
        disk.next(at, out)
            .map_err(|error| self.server.explain(error))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.close();
        }
        // Dropping the server ends it, should it not end now.
    }
}

/// A folder of our own, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let id = std::process::id();
        // Making it fails if anybody has made it before: nobody else can be at home there.
        let attempts = (0..16).map(|attempt| {
            let name = format!("skyferry-seed-{id}-{number}-{attempt}");
            let path = std::env::temp_dir().join(name);
            DirBuilder::new().mode(0o700).create(&path).map(|()| path)
        });
        let mut failure = io::Error::from(io::ErrorKind::AlreadyExists);
        for attempt in attempts {
            match attempt {
                Ok(path) => return Ok(Self(path)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("nbd")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is a socket nobody listens on.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The running `qemu-nbd`; it ends with this value.
struct Server {
    child: Child,
    /// What it writes to stderr.
    complaints: File,
}

impl Server {
    fn start(folder: &Folder, path: &Path, format: Format, alone: bool) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let driver = if path.metadata()?.file_type().is_block_device() {
            "host_device"
        } else {
            "file"
        };
        let name = path.to_str();
        let name = name.ok_or_else(|| io::Error::other("its path is not UTF-8"))?;
        let mut image = json!({
            "driver": format.name(),
            "file": { "driver": driver, "filename": name },
        });
        if alone && format == Format::Qcow2 {
            image["backing"] = json!(null);
        }
        let complaints = folder.0.join("complaints");
        let stderr = File::options()
            .create_new(true)
            .read(true)
            .append(true)
            .open(&complaints)?;
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--read-only", "--shared=1", "--socket"])
            .arg(folder.socket())
            .arg(format!("json:{image}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.try_clone()?)
            // Ctrl-c is for us, and we end it.
            .process_group(0);
        // SAFETY: prctl with PR_SET_PDEATHSIG takes plain numbers and may be called after a fork.
        #[expect(unsafe_code, reason = "the standard library has no prctl")]
        unsafe {
            command.pre_exec(|| {
                let signal = libc::SIGTERM as libc::c_ulong;
                match libc::prctl(libc::PR_SET_PDEATHSIG, signal) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                error.kind(),
                format!(
                    "qemu-nbd is missing, which reads {} images; install qemu-utils (Debian, Ubuntu) or \
                     qemu-img (Fedora, RHEL)",
                    format.name()
                ),
            ),
            _ => error,
        })?;
        Ok(Self {
            child,
            complaints: stderr,
        })
    }

    /// Waits until it listens.
    fn connect(&mut self, folder: &Folder) -> io::Result<UnixStream> {
        let end = Instant::now() + OPEN_LIMIT;
        loop {
            match UnixStream::connect(folder.socket()) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > end => return Err(self.explain(error)),
                Err(error) => {
                    if self.child.try_wait()?.is_some() {
                        return Err(self.explain(error));
                    }
                }
            }
            std::thread::sleep(POLL);
        }
    }

    /// `error`, or what the server has said about it.
    fn explain(&mut self, error: io::Error) -> io::Error {
        let mut said = Vec::new();
        let read = self.complaints.rewind().and_then(|()| {
            let complaints = &self.complaints;
            complaints.take(MAX_COMPLAINT).read_to_end(&mut said)
        });
        let said = String::from_utf8_lossy(&said);
        let said = said.trim();
        if read.is_err() || said.is_empty() {
            return error;
        }
        let in_use = said.contains("Failed to get") && said.contains("lock");
        let hint = if in_use {
            "; a guest uses it: stop that, or seed a snapshot"
        } else {
            ""
        };
        io::Error::new(error.kind(), format!("{said}{hint}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let end = Instant::now() + END_LIMIT;
        // It ends when its only client is gone.
        while Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use skyferry_tests::skip::lacks;

    use super::*;

    fn run(command: &mut Command) {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
    }

    /// Whether `qemu-nbd` and `qemu-img` are there; says so if not.
    fn has_qemu() -> bool {
        let there = ["qemu-nbd", "qemu-img"].iter().all(|tool| {
            let version = Command::new(tool).arg("--version").output();
            version.is_ok_and(|output| output.status.success())
        });
        if !there {
            lacks("qemu-nbd and qemu-img (apt-get install qemu-utils)");
        }
        there
    }

    /// All of an image, and how much of it came as data.
    fn read_all(image: &mut Image) -> io::Result<(Vec<u8>, usize)> {
        let (mut all, mut data, mut out) = (Vec::new(), 0, Vec::new());
        loop {
            match image.next(all.len() as u64, &mut out)? {
                Next::End => return Ok((all, data)),
                Next::Hole(until) => all.resize(until as usize, 0),
                Next::Data(_) => {
                    data += out.len();
                    all.extend(&out);
                }
            }
        }
    }

    /// A raw disk of 24 MiB and a bit with some data in it.
    fn disk(path: &Path) -> Vec<u8> {
        let mut bytes = vec![0; (24 << 20) + 512];
        for (at, seed) in [(0_usize, 3_u8), (5 << 20, 7), (24 << 20, 11)] {
            let end = (at + 100_000).min(bytes.len());
            for (n, byte) in bytes[at..end].iter_mut().enumerate() {
                *byte = (n as u8).wrapping_mul(seed) ^ (n >> 8) as u8;
            }
        }
        fs::write(path, &bytes).unwrap();
        bytes
    }

    #[test]
    fn images_are_what_their_disks_are() {
        if !has_qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("disk.raw");
        let bytes = disk(&raw);
        for (format, more) in [
            (Format::Qcow2, &["-c"][..]),
            (Format::Qcow2, &[]),
            (Format::Vmdk, &[]),
            (Format::Vdi, &[]),
            (Format::Vhdx, &[]),
        ] {
            // A comma and a quote in the name are nothing special.
            let path = dir.path().join(format!("a,b\"c.{}", format.name()));
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", format.name()]);
            run(convert.args(more).arg(&raw).arg(&path));
            let file = File::open(&path).unwrap();
            if format == Format::Qcow2 {
                assert_eq!(find_format(&file).unwrap(), format);
            } else {
                let refused = find_format(&file).unwrap_err().to_string();
                assert!(refused.contains("--format"), "{refused}");
            }
            let mut image = Image::open(&path, format, true).unwrap();
            let (all, data) = read_all(&mut image).unwrap();
            assert!(all[..bytes.len()] == bytes, "{format:?} {more:?}");
            assert!(all[bytes.len()..].iter().all(|&byte| byte == 0));
            // Others have large blocks.
            assert!(format != Format::Qcow2 || data <= 6 << 20, "{data}");
        }
        // Nothing is left behind: a folder would still be there.
        let id = format!("skyferry-seed-{}-", std::process::id());
        let left = fs::read_dir(std::env::temp_dir()).unwrap();
        let left = left.filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().starts_with(&id)
        });
        // Other tests of this process may be opening an image at this moment.
        assert!(left.count() <= 2);
    }

    #[test]
    fn a_backing_file_is_read_only_for_who_asks_for_it() {
        if !has_qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("base.raw");
        let bytes = disk(&raw);
        let path = dir.path().join("top.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        run(create.arg(&raw).arg(&path));
        let refused = find_format(&File::open(&path).unwrap()).unwrap_err();
        assert!(
            refused.to_string().contains("names another file"),
            "{refused}"
        );
        let mut trusted = Image::open(&path, Format::Qcow2, false).unwrap();
        assert!(read_all(&mut trusted).unwrap().0[..bytes.len()] == bytes);
        let mut alone = Image::open(&path, Format::Qcow2, true).unwrap();
        assert_eq!(read_all(&mut alone).unwrap().1, 0);

        let path = dir.path().join("external.qcow2");
        let option = format!("data_file={}", dir.path().join("data").display());
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", &option]);
        run(create.arg(&path).arg("1M"));
        let refused = find_format(&File::open(&path).unwrap()).unwrap_err();
        assert!(
            refused.to_string().contains("names another file"),
            "{refused}"
        );
    }

    #[test]
    fn what_qemu_says_is_passed_on() {
        if !has_qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.qcow2");
        fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
        assert_eq!(
            find_format(&File::open(&path).unwrap()).unwrap(),
            Format::Qcow2
        );
        let Err(error) = Image::open(&path, Format::Qcow2, true) else {
            panic!("that is no image");
        };
        assert!(error.to_string().contains("qcow2"), "{error}");
    }

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        let looks = |head: &[u8]| Format::looks_like(head);
        assert_eq!(looks(b""), Format::Raw);
        assert_eq!(looks(b"QFI"), Format::Raw);
        assert_eq!(looks(&[0; HEAD_BYTES]), Format::Raw);
        assert_eq!(looks(b"QFI\xfb\0\0\0\x03"), Format::Qcow2);
        assert_eq!(looks(b"KDMV\x01"), Format::Vmdk);
        assert_eq!(looks(b"vhdxfile"), Format::Vhdx);
        let mut vdi = [0; HEAD_BYTES];
        vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        assert_eq!(looks(&vdi), Format::Vdi);
    }
}
