//! Reading what a segment's file holds, whether it was sealed or cut short.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use super::crypt::{SegmentCipher, StoreKey};
use super::segment::{
    CHUNK_HEAD_SIZE, ChunkAt, ChunkHead, Contents, HEADER_SIZE, Header, MAX_SEGMENT, TRAILER_SIZE,
    Trailer, read_footer,
};

/// A segment found in the folder of a store.
pub(super) struct FoundSegment {
    pub(super) header: Header,
    pub(super) sealed_header: [u8; HEADER_SIZE],
    pub(super) cipher: SegmentCipher,
    pub(super) sealed: bool,
    pub(super) contents: Contents,
    /// Bytes of the file.
    pub(super) size: u64,
    /// Seconds since 1970.
    pub(super) last_used: u64,
}

/// What segments are read from.
pub(super) trait ReadAt {
    /// Fills `out` from `at` on.
    fn fill(&self, out: &mut [u8], at: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn fill(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(out, at)
    }
}

/// What a sealed file of `size` bytes holds; `None` if it is not sealed, or its footer is damaged.
pub(super) fn read_sealed(
    file: &impl ReadAt,
    cipher: &SegmentCipher,
    size: u64,
) -> io::Result<Option<Contents>> {
    let Some(at) = size.checked_sub(TRAILER_SIZE as u64) else {
        return Ok(None);
    };
    let mut trailer = [0; TRAILER_SIZE];
    file.fill(&mut trailer, at)?;
    let Ok(trailer) = Trailer::read(&trailer) else {
        return Ok(None);
    };
    let Some(at) = at.checked_sub(trailer.footer_size() as u64) else {
        return Ok(None);
    };
    let mut footer = vec![0; trailer.footer_size()];
    file.fill(&mut footer, at)?;
    Ok(read_footer(cipher, trailer, &mut footer, at).ok())
}

/// The whole chunks of a file of `size` bytes, and where they end.
pub(super) fn read_chunks(
    file: &impl ReadAt,
    cipher: &SegmentCipher,
    size: u64,
) -> io::Result<(Contents, u64)> {
    let mut contents = Contents::default();
    let mut at = HEADER_SIZE as u64;
    loop {
        let table = at + CHUNK_HEAD_SIZE as u64;
        if table > size {
            break;
        }
        let mut head = [0; CHUNK_HEAD_SIZE];
        file.fill(&mut head, at)?;
        let Ok(head) = ChunkHead::read(&head) else {
            break;
        };
        if at + head.size() > size || head.first as usize != contents.entries.len() {
            break;
        }
        let mut sealed = vec![0; head.table_size()];
        file.fill(&mut sealed, table)?;
        let first = contents.entries.len();
        let opened = head.open_table(cipher, &mut sealed, &mut contents.entries);
        let offset = table + head.table_size() as u64;
        let chunk =
            opened.and_then(|()| ChunkAt::new(head.first, offset, &contents.entries[first..]));
        let Ok(chunk) = chunk else {
            break;
        };
        contents.chunks.push(chunk);
        at += head.size();
    }
    Ok((contents, at))
}

/// What a segment's file holds; `None` if that is nothing: its process died right after it was made.
///
/// # Errors
/// When the file cannot be read, or is none of this store's ([`io::ErrorKind::InvalidData`]).
pub(super) fn read_segment(
    path: &Path,
    number: u32,
    key: &StoreKey,
    store: &[u8; 16],
) -> io::Result<Option<FoundSegment>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let size = metadata.len();
    if size < HEADER_SIZE as u64 {
        return Ok(None);
    }
    let foreign = || io::Error::from(io::ErrorKind::InvalidData);
    if size > MAX_SEGMENT {
        return Err(foreign());
    }
    let mut sealed_header = [0; HEADER_SIZE];
    file.read_exact_at(&mut sealed_header, 0)?;
    let (header, cipher) = Header::read(&sealed_header, key).map_err(|_| foreign())?;
    if header.number != number || header.store != *store {
        return Err(foreign());
    }
    let modified = metadata.modified()?;
    let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (sealed, contents, size) = match read_sealed(&file, &cipher, size)? {
        Some(contents) => (true, contents, size),
        None => {
            let (contents, end) = read_chunks(&file, &cipher, size)?;
            (false, contents, end)
        }
    };
    Ok((!contents.entries.is_empty()).then_some(FoundSegment {
        header,
        sealed_header,
        cipher,
        sealed,
        contents,
        size,
        last_used: modified.as_secs(),
    }))
}
