//! A raw disk image with the files of a guest, to seed a store with.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};

use super::{GuestSpec, corpus};

/// File systems begin files at a multiple of this, and page caches hold them so.
const BLOCK: u64 = 4096;

/// Writes the guest's files one behind the other, each from the begin of a block on.
///
/// # Errors
/// When a file cannot be read or the image cannot be written.
pub fn write_disk_image(spec: &GuestSpec, path: &Path) -> Result<()> {
    let mut image = BufWriter::new(File::create(path)?);
    let mut at = 0;
    for chosen in corpus::choose(u64::from(spec.page_cache_mib) << 20) {
        image.seek(SeekFrom::Start(at))?;
        let file =
            File::open(&chosen.path).with_context(|| format!("open {}", chosen.path.display()))?;
        let copied = io::copy(&mut file.take(chosen.bytes), &mut image)?;
        at += copied.next_multiple_of(BLOCK);
    }
    let file = image.into_inner().context("write the disk image")?;
    file.set_len(at)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_whole_blocks_of_files() {
        let spec = GuestSpec {
            page_cache_mib: 1,
            ..GuestSpec::TINY
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        write_disk_image(&spec, file.path()).unwrap();
        let bytes = file.path().metadata().unwrap().len();
        assert!(
            bytes >= 1 << 20 && bytes.is_multiple_of(BLOCK),
            "{bytes} bytes"
        );
    }
}
