//! What kind of channel a connection is, from its first bytes.
//!
//! Only the client's side speaks in these; a server that speaks first (NBD) is told by the
//! configuration, and QEMU's postcopy-preempt channel has no mark at all.

use std::fmt;

/// Kind of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sniff {
    /// The bytes so far fit several kinds; at most [`SNIFF_BYTES`] are ever needed.
    NeedMore,
    /// Main channel of a new QEMU migration.
    QemuMain,
    /// One of QEMU's multifd channels.
    QemuMultifd,
    /// Main channel of a QEMU postcopy migration that resumes after an outage; it has no file header.
    QemuPostcopyResume,
    /// A TLS client greeting: any kind may be inside.
    Tls,
    /// None of these.
    Other,
}

/// The word for logs.
impl fmt::Display for Sniff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeedMore => "need-more",
            Self::QemuMain => "qemu-main",
            Self::QemuMultifd => "qemu-multifd",
            Self::QemuPostcopyResume => "qemu-postcopy-resume",
            Self::Tls => "tls",
            Self::Other => "other",
        })
    }
}

/// Number of bytes after which [`sniff`] is always sure.
pub const SNIFF_BYTES: usize = 8;

/// How channels begin. The marks differ in their first byte, so one byte leaves one kind.
const MARKS: [(&[u8], Sniff); 4] = [
    (b"QEVM\0\0\0\x03", Sniff::QemuMain),
    (b"\x11\x22\x33\x44\0\0\0\x01", Sniff::QemuMultifd),
    // COMMAND RECV_BITMAP.
    (b"\x08\x00\x0A", Sniff::QemuPostcopyResume),
    // TLS record of type handshake, version 3.1 as every client greeting has it.
    (b"\x16\x03\x01", Sniff::Tls),
];

/// Tells the kind of a channel from its first bytes, as soon as they allow only one.
///
/// ```
/// use skyferry_core::sniff::{Sniff, sniff};
/// assert_eq!(sniff(b"QEVM"), Sniff::NeedMore);
/// assert_eq!(sniff(b"QEVM\0\0\0\x03"), Sniff::QemuMain);
/// assert_eq!(sniff(b"GET"), Sniff::Other);
/// ```
#[must_use]
pub fn sniff(first: &[u8]) -> Sniff {
    for (mark, kind) in MARKS {
        let len = mark.len().min(first.len());
        if first[..len] == mark[..len] {
            return if first.len() >= mark.len() {
                kind
            } else {
                Sniff::NeedMore
            };
        }
    }
    Sniff::Other
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_is_found_and_no_byte_too_late() {
        for (mark, kind) in MARKS {
            for len in 0..mark.len() {
                assert_eq!(sniff(&mark[..len]), Sniff::NeedMore, "{kind:?} {len}");
            }
            assert_eq!(sniff(mark), kind);
            assert_eq!(sniff(&[mark, b"more"].concat()), kind);
            assert!(mark.len() <= SNIFF_BYTES);
        }
    }

    #[test]
    fn a_wrong_byte_decides_at_once() {
        assert_eq!(sniff(b"Q\0"), Sniff::Other);
        assert_eq!(sniff(b"QEVM\0\0\0\x02"), Sniff::Other);
        assert_eq!(sniff(b"\x16\x03\x03"), Sniff::Other);
        assert_eq!(sniff(b"\x08\x00\x0B"), Sniff::Other);
        assert_eq!(sniff(b"N"), Sniff::Other);
    }
}
