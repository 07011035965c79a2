//! What was named on the command line: a disk, an image of one, a file or a folder.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use skyferry_dedup::DomainId;

use super::contents::{Contents, Plain};
use super::qemu::{Format, Image, find_format};
use super::state::SourceId;
use super::walk::Walk;

/// Something to read pages from.
#[derive(Debug)]
pub(super) struct Source {
    /// As it was named.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) id: SourceId,
    /// Bytes that it takes on its disk: what reading it comes to, more or less.
    pub(super) allocated: u64,
    file: File,
}

/// How it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file or block device of so many bytes, read as it is.
    Plain(u64),
    /// An image read by `qemu-nbd`; `alone`: without other files that it may name.
    Image { format: Format, alone: bool },
    /// All regular files in it.
    Folder,
}

impl Source {
    /// Opens what is at `path`, a file in `format` if that is given.
    ///
    /// # Errors
    /// When it cannot be read, or is nothing that can be.
    pub(super) fn open(path: &Path, format: Option<Format>, domain: &DomainId) -> io::Result<Self> {
        let mut file = File::options()
            .read(true)
            // A FIFO is not waited for.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        let meta = file.metadata()?;
        let kind = if meta.is_dir() {
            Kind::Folder
        } else if meta.is_file() || meta.file_type().is_block_device() {
            let found = match format {
                Some(format) => format,
                None => find_format(&file)?,
            };
            match found {
                Format::Raw => Kind::Plain(file.seek(SeekFrom::End(0))?),
                found => Kind::Image {
                    format: found,
                    alone: format.is_none(),
                },
            }
        } else {
            return Err(io::Error::other("it is no file, no folder and no disk"));
        };
        let absolute = std::path::absolute(path)?;
        let format = match kind {
            Kind::Plain(_) => "raw",
            Kind::Image { format, .. } => format.name(),
            Kind::Folder => "folder",
        };
        Ok(Self {
            path: path.into(),
            id: SourceId::new(&absolute, format, &meta, domain),
            allocated: allocated(&meta, kind),
            kind,
            file,
        })
    }

    /// Opens the contents of what is no folder.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn contents(&self) -> io::Result<Box<dyn Contents>> {
        Ok(match self.kind {
            Kind::Image { format, alone } => Box::new(Image::open(&self.path, format, alone)?),
            Kind::Plain(size) => Box::new(Plain::new(self.file.try_clone()?, size)),
            Kind::Folder => return Err(io::ErrorKind::IsADirectory.into()),
        })
    }

    /// Begins to go through a folder.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn walk(&self) -> io::Result<Walk> {
        Walk::new(&self.file)
    }

    /// Looks how much there is in a folder, until `stop` is set; troubles are left to the reading.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn measure(&mut self, stop: &AtomicBool) -> io::Result<()> {
        if self.kind == Kind::Folder {
            self.allocated = self
                .walk()?
                .take_while(|_| !stop.load(Ordering::Relaxed))
                .flatten()
                .map(|entry| entry.allocated)
                .sum();
        }
        Ok(())
    }

    /// Whether a file has changed since it was opened.
    pub(super) fn has_changed(&self) -> bool {
        let same =
            |meta: Metadata| self.kind == Kind::Folder || !meta.is_file() || self.id.is_of(&meta);
        !self.file.metadata().is_ok_and(same)
    }
}

fn allocated(meta: &Metadata, kind: Kind) -> u64 {
    let blocks = meta.blocks().saturating_mul(512);
    match kind {
        Kind::Plain(size) if meta.is_file() => blocks.min(size),
        Kind::Plain(size) => size,
        Kind::Image { .. } => blocks,
        Kind::Folder => 0,
    }
}
