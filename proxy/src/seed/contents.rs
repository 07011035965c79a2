//! The bytes of a file or disk in order, without its holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;
use skyferry_dedup::PAGE_SIZE;

use super::wire::MAX_PAGES_BYTES;

/// Bytes read at a time: what one frame takes.
pub(super) const READ_BYTES: usize = MAX_PAGES_BYTES;

const PAGE: u64 = PAGE_SIZE as u64;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Bytes from this multiple of a page on; they are in the buffer.
    Data(u64),
    /// Nothing but zeroes up to here.
    Hole(u64),
    /// Nothing at all.
    End,
}

/// A disk, a file or an image of either.
pub(super) trait Contents {
    /// Bytes in all, as far as known when it was opened.
    fn size(&self) -> u64;

    /// Reads on at `at`, a multiple of a page: at most [`READ_BYTES`] into `out`, which is cleared first.
    ///
    /// # Errors
    /// When it cannot be read.
    fn next(&mut self, at: u64, out: &mut Vec<u8>) -> io::Result<Next>;
}

/// A plain file or a block device.
#[derive(Debug)]
pub(super) struct Plain {
    file: File,
    size: u64,
    /// The data that was found last: from where to where.
    data: std::ops::Range<u64>,
}

impl Plain {
    /// The contents of `file`, of which there are `size` bytes.
    pub(super) fn new(file: File, size: u64) -> Self {
        // Advice only: reading works without.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Self {
            file,
            size,
            data: 0..0,
        }
    }

    /// Looks for data at or behind `at`; `None` if there is none.
    fn find_data(&self, at: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        let begin = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(Errno::NXIO) => return Ok(None),
            // Block devices and some file systems know nothing of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::SPIPE) => return Ok(Some(at..u64::MAX)),
            Err(error) => return Err(error.into()),
        };
        let end = match seek(&self.file, SeekFrom::Hole(begin)) {
            Ok(end) => end,
            // Cut in this moment.
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Pages that are data in part.
        Ok(Some(begin / PAGE * PAGE..end.next_multiple_of(PAGE)))
    }
}

impl Contents for Plain {
    fn size(&self) -> u64 {
        self.size
    }

    fn next(&mut self, at: u64, out: &mut Vec<u8>) -> io::Result<Next> {
        out.clear();
        if at >= self.size {
            return Ok(Next::End);
        }
        if !self.data.contains(&at) {
            match self.find_data(at)? {
                Some(data) if data.start < self.size => self.data = data,
                _ => return Ok(Next::Hole(self.size)),
            }
            if self.data.start > at {
                return Ok(Next::Hole(self.data.start));
            }
        }
        let end = self.data.end.min(self.size);
        let length = (end - at).min(READ_BYTES as u64) as usize;
        out.resize(length, 0);
        let read = read_full(&self.file, out, at)?;
        out.truncate(read);
        // It has been cut since it was opened.
        Ok(if read == 0 { Next::End } else { Next::Data(at) })
    }
}

/// Reads until `out` is full or the file ends.
fn read_full(file: &File, out: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < out.len() {
        match file.read_at(&mut out[read..], at + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads everything; returns it with its holes as zeroes, and how many bytes were data.
    fn read_all(contents: &mut impl Contents) -> (Vec<u8>, usize) {
        let (mut all, mut data, mut out) = (Vec::new(), 0, Vec::new());
        loop {
            match contents.next(all.len() as u64, &mut out).unwrap() {
                Next::End => return (all, data),
                Next::Hole(until) => {
                    assert!(until > all.len() as u64);
                    all.resize(until as usize, 0);
                }
                Next::Data(at) => {
                    assert_eq!(at, all.len() as u64);
                    assert!(at.is_multiple_of(PAGE) && !out.is_empty());
                    data += out.len();
                    all.extend(&out);
                }
            }
        }
    }

    fn plain(path: &std::path::Path) -> Plain {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        Plain::new(file, size)
    }

    #[test]
    fn holes_are_passed_over_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len((40 << 20) + 123).unwrap();
        for at in [0, (8 << 20) + 4000, (30 << 20) + 17] {
            file.write_all_at(&[7; 10_000], at).unwrap();
        }
        let (all, data) = read_all(&mut plain(&path));
        assert_eq!(all, std::fs::read(&path).unwrap());
        // File systems keep blocks of several sizes; all that matters keep holes.
        assert!(data < 20 << 20, "{data}");
    }

    #[test]
    fn an_end_that_is_no_whole_page_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for size in [
            0,
            1,
            4095,
            4096,
            4097,
            READ_BYTES - 1,
            READ_BYTES,
            READ_BYTES + 1,
        ] {
            let path = dir.path().join("file");
            let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read_all(&mut plain(&path)), (bytes, size));
        }
    }

    #[test]
    fn a_file_that_is_cut_meanwhile_just_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1; 3 * READ_BYTES]).unwrap();
        let mut contents = plain(&path);
        let mut out = Vec::new();
        assert_eq!(contents.next(0, &mut out).unwrap(), Next::Data(0));
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(READ_BYTES as u64).unwrap();
        let next = contents.next(READ_BYTES as u64, &mut out).unwrap();
        assert_eq!(next, Next::End);
        assert!(out.is_empty());
    }
}
