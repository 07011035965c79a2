//! Announcements on the wire: a message is items one behind the other.

use super::{MAX_RECORDS, PREFIX_SIZE, StoreId};
use crate::varint;

/// Largest announcement in bytes.
pub const MAX_ANNOUNCEMENT: usize = 256 * 1024;

const STORE: u8 = 1;
const PAGES: u8 = 2;
const DROPPED: u8 = 3;

/// Longest head of a [`Item::Pages`]: its tag and three numbers of at most 32 bits.
pub(super) const MAX_PAGES_HEAD: usize = 1 + 3 * 5;

/// Longest other item.
pub(super) const MAX_ITEM: usize = 1 + 16;

/// The peer broke the format of announcements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AnnounceError {
    /// Cut off, or an item or number that does not exist.
    #[error("a malformed announcement")]
    Malformed,
    /// More than [`MAX_ANNOUNCEMENT`] bytes.
    #[error("an announcement over its limit")]
    TooLong,
    /// Pages that do not go on where the segment ended, or belong to no store.
    #[error("an announcement that does not continue the one before")]
    OutOfOrder,
    /// More than 2^18 segments.
    #[error("more segments than allowed")]
    TooManySegments,
}

/// One item of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// Whose segments these are. What another store announced is void.
    Store(StoreId),
    /// Records of a segment from number `first` on.
    Pages {
        segment: u32,
        first: u32,
        /// Prefixes, 5 bytes each.
        prefixes: &'a [u8],
    },
    /// The segment is no more.
    Dropped { segment: u32 },
}

pub(super) fn write_store(store: StoreId, out: &mut Vec<u8>) {
    out.push(STORE);
    out.extend_from_slice(&store.0);
}

/// Writes the head of an item whose prefixes follow.
pub(super) fn write_pages_head(segment: u32, first: u32, count: usize, out: &mut Vec<u8>) {
    out.push(PAGES);
    varint::write(u64::from(segment), out);
    varint::write(u64::from(first), out);
    varint::write(count as u64, out);
}

pub(super) fn write_dropped(segment: u32, out: &mut Vec<u8>) {
    out.push(DROPPED);
    varint::write(u64::from(segment), out);
}

/// Takes the next item off a message.
pub(super) fn read<'a>(message: &mut &'a [u8]) -> Result<Item<'a>, AnnounceError> {
    let (&tag, rest) = message.split_first().ok_or(AnnounceError::Malformed)?;
    *message = rest;
    match tag {
        STORE => {
            let (id, rest) = message
                .split_first_chunk()
                .ok_or(AnnounceError::Malformed)?;
            *message = rest;
            Ok(Item::Store(StoreId(*id)))
        }
        PAGES => {
            let segment = number(message)?;
            let first = number(message)?;
            let count = number(message)?;
            let end = first.checked_add(count).ok_or(AnnounceError::Malformed)?;
            if count == 0 || end > MAX_RECORDS {
                return Err(AnnounceError::Malformed);
            }
            let (prefixes, rest) = message
                .split_at_checked(count as usize * PREFIX_SIZE)
                .ok_or(AnnounceError::Malformed)?;
            *message = rest;
            Ok(Item::Pages {
                segment,
                first,
                prefixes,
            })
        }
        DROPPED => Ok(Item::Dropped {
            segment: number(message)?,
        }),
        _ => Err(AnnounceError::Malformed),
    }
}

fn number(message: &mut &[u8]) -> Result<u32, AnnounceError> {
    let value = varint::read(message).ok_or(AnnounceError::Malformed)?;
    u32::try_from(value).map_err(|_| AnnounceError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let mut message = Vec::new();
        write_store(StoreId([0xab; 16]), &mut message);
        write_pages_head(300, 2, 2, &mut message);
        message.extend(1..=10);
        write_dropped(7, &mut message);
        let mut expected = vec![1];
        expected.extend([0xab; 16]);
        expected.extend([2, 0xac, 0x02, 2, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3, 7]);
        assert_eq!(message, expected);

        let mut rest = &message[..];
        assert_eq!(read(&mut rest), Ok(Item::Store(StoreId([0xab; 16]))));
        let pages = Item::Pages {
            segment: 300,
            first: 2,
            prefixes: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        };
        assert_eq!(read(&mut rest), Ok(pages));
        assert_eq!(read(&mut rest), Ok(Item::Dropped { segment: 7 }));
        assert!(rest.is_empty());
    }

    #[test]
    fn malformed_items_are_refused() {
        let over = {
            let mut item = Vec::new();
            write_pages_head(1, MAX_RECORDS, 1, &mut item);
            item.extend([0; PREFIX_SIZE]);
            item
        };
        let refused: [&[u8]; 8] = [
            &[],
            &[0],
            &[4],
            &[1, 2, 3],                               // store id cut off
            &[2, 1, 0, 0],                            // no pages
            &[2, 1, 0, 1, 1, 2, 3, 4],                // a prefix cut off
            &[3, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], // a number of more than 32 bits
            &over,
        ];
        for item in refused {
            assert_eq!(
                read(&mut &item[..]),
                Err(AnnounceError::Malformed),
                "{item:x?}"
            );
        }
    }
}
