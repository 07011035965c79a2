//! Writer of `newc` cpio archives, the format of an initramfs (the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::{self, Read, Write};

/// Mode bits of the kinds of entry an initramfs of ours has.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes entries, then the trailer.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// A directory; parents come first.
    pub(crate) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.header(name, DIRECTORY | 0o755, 0, (0, 0))
    }

    /// A character device.
    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.header(name, CHARACTER_DEVICE | 0o600, 0, (major, minor))
    }

    /// A regular file of exactly `size` bytes. Fails if `content` is shorter.
    pub(crate) fn file(
        &mut self,
        name: &str,
        permissions: u32,
        size: u32,
        content: impl Read,
    ) -> io::Result<()> {
        self.header(name, REGULAR | permissions, size, (0, 0))?;
        let copied = io::copy(&mut content.take(size.into()), &mut self.out)?;
        if copied != u64::from(size) {
            return Err(io::Error::other(format!(
                "{name} became shorter while it was read"
            )));
        }
        self.pad(size as usize)
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 0, (0, 0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn header(&mut self, name: &str, mode: u32, size: u32, device: (u32, u32)) -> io::Result<()> {
        self.inode += 1;
        let (major, minor) = device;
        let name_size = name.len() + 1;
        // magic, inode, mode, uid, gid, links, mtime, size, device, rdevice, name size, checksum
        write!(
            self.out,
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}\
             {minor:08x}{name_size:08x}{:08x}{name}\0",
            self.inode, 0, 0, 1, 0, 0, 0, 0
        )?;
        self.pad(110 + name_size)
    }

    /// Header with name, and content, each end at a multiple of four.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..written.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_fields_in_order() {
        let mut archive = Archive::new(Vec::new());
        archive.file("init", 0o755, 5, &b"hello"[..]).unwrap();
        archive.device("tty", 4, 64).unwrap();
        let bytes = archive.finish().unwrap();
        let header = "07070100000001000081ed000000000000000000000001000000000000000500000000\
                      00000000000000000000000000000005\
                      00000000init\0";
        assert_eq!(&bytes[..115], header.as_bytes());
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }

    #[test]
    fn a_file_that_shrank_is_an_error() {
        let mut archive = Archive::new(Vec::new());
        assert!(archive.file("init", 0o755, 6, &b"hello"[..]).is_err());
    }
}
