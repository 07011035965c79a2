//! What `skyferry seed` and a running gateway say to each other over the socket in the store's folder.
//!
//! ```text
//! seed → Hello ·······→ gateway       who, in which version
//!      ← Welcome ←·····               which store
//!      → Pages ··→ ← Taken            as often as there are pages; a few Pages may wait for their answers
//!      → Flush ··→ ← Flushed          all that came before is written
//!      ← Refused ←·····               instead of any answer; nothing follows
//! ```
//!
//! A frame is its length (u32, without the length itself), its kind (u8) and its body. Integers are little
//! endian. Answers come in the order of the requests. Both ends are of one version: there is no
//! negotiation, only a refusal that says so.

use skyferry_dedup::{DomainId, PAGE_SIZE, SeedCounts, StoreId};

/// Version of this protocol.
pub const VERSION: u16 = 1;

/// Most bytes of pages in one frame.
pub const MAX_PAGES_BYTES: usize = 1 << 20;
/// Longest frame of a request, without its length.
pub const MAX_REQUEST: usize = 1 + MAX_PAGES_BYTES;
/// Longest frame of an answer, without its length.
pub const MAX_REPLY: usize = 1 + MAX_TEXT;
/// Longest name of a tenant, and longest text of a refusal, in bytes.
const MAX_TENANT: usize = 255;
const MAX_TEXT: usize = 1024;

const HELLO: u8 = 1;
const PAGES: u8 = 2;
const FLUSH: u8 = 3;
const WELCOME: u8 = 0x81;
const TAKEN: u8 = 0x82;
const FLUSHED: u8 = 0x83;
const REFUSED: u8 = 0x84;

/// What `skyferry seed` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// The first: version of the protocol, and whose pages will come.
    Hello {
        /// [`VERSION`].
        version: u16,
        /// The tenant's name.
        tenant: &'a str,
        /// The domain that its secret makes: at both ends the same one.
        domain: DomainId,
    },
    /// Pages in order, 1 byte to [`MAX_PAGES_BYTES`]; the last one may be cut.
    Pages(&'a [u8]),
    /// Asks for all that came before to be written.
    Flush,
}

/// What the gateway answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To Hello: the store that it is.
    Welcome {
        /// Identity of the store.
        store: StoreId,
        /// Bytes that its files may take.
        capacity_bytes: u64,
    },
    /// To Pages: what became of them.
    Taken(SeedCounts),
    /// To Flush.
    Flushed {
        /// Bytes that the store's files take.
        used_bytes: u64,
    },
    /// To anything: it is not done, for this reason.
    Refused(String),
}

/// Why a frame is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Its length is 0 or beyond what such a frame may have.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// No such kind.
    #[error("a frame of kind {0}")]
    Kind(u8),
    /// The body is too short or too long for its kind, or no text where text belongs.
    #[error("a damaged frame of kind {0}")]
    Body(u8),
}

/// The length of the frame that `head` announces, if it is at most `most`.
///
/// # Errors
/// When it is 0 or more than `most`.
pub fn frame_length(head: [u8; 4], most: usize) -> Result<usize, WireError> {
    let length = u32::from_le_bytes(head) as usize;
    if length == 0 || length > most {
        return Err(WireError::Length(length));
    }
    Ok(length)
}

/// Writes a frame: length and kind, then what `body` appends.
fn frame(kind: u8, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, kind]);
    body(out);
    // Bodies are bounded far below 4 GiB.
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

impl<'a> Request<'a> {
    /// Appends the frame. Pages beyond [`MAX_PAGES_BYTES`], or a tenant's name that is too long, are the
    /// caller's error: the other end refuses them.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello {
                version,
                tenant,
                domain,
            } => frame(HELLO, out, |out| {
                out.extend_from_slice(&version.to_le_bytes());
                out.extend_from_slice(domain.as_bytes());
                out.extend_from_slice(tenant.as_bytes());
            }),
            Self::Pages(pages) => frame(PAGES, out, |out| out.extend_from_slice(pages)),
            Self::Flush => frame(FLUSH, out, |_| {}),
        }
    }

    /// Reads a frame without its length.
    ///
    /// # Errors
    /// When it is not a request.
    pub fn decode(frame: &'a [u8]) -> Result<Self, WireError> {
        let (&kind, body) = frame.split_first().ok_or(WireError::Length(0))?;
        let bad = WireError::Body(kind);
        match kind {
            HELLO => {
                let (version, rest) = body.split_first_chunk().ok_or(bad)?;
                let (domain, tenant) = rest.split_first_chunk().ok_or(bad)?;
                if tenant.len() > MAX_TENANT {
                    return Err(bad);
                }
                Ok(Self::Hello {
                    version: u16::from_le_bytes(*version),
                    tenant: str::from_utf8(tenant).map_err(|_| bad)?,
                    domain: DomainId::from_bytes(*domain),
                })
            }
            PAGES if (1..=MAX_PAGES_BYTES).contains(&body.len()) => Ok(Self::Pages(body)),
            FLUSH if body.is_empty() => Ok(Self::Flush),
            PAGES | FLUSH => Err(bad),
            _ => Err(WireError::Kind(kind)),
        }
    }
}

impl Reply {
    /// Appends the frame; a text that is too long is cut.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let numbers = |out: &mut Vec<u8>, numbers: &[u64]| {
            numbers
                .iter()
                .for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        };
        match self {
            Self::Welcome {
                store,
                capacity_bytes,
            } => frame(WELCOME, out, |out| {
                out.extend_from_slice(&store.0);
                numbers(out, &[*capacity_bytes]);
            }),
            Self::Taken(counts) => frame(TAKEN, out, |out| {
                numbers(out, &[counts.known, counts.new, counts.zero]);
            }),
            Self::Flushed { used_bytes } => frame(FLUSHED, out, |out| {
                numbers(out, &[*used_bytes]);
            }),
            Self::Refused(text) => frame(REFUSED, out, |out| {
                let end = text.floor_char_boundary(MAX_TEXT);
                out.extend_from_slice(&text.as_bytes()[..end]);
            }),
        }
    }

    /// Reads a frame without its length.
    ///
    /// # Errors
    /// When it is not an answer.
    pub fn decode(frame: &[u8]) -> Result<Self, WireError> {
        let (&kind, body) = frame.split_first().ok_or(WireError::Length(0))?;
        let bad = WireError::Body(kind);
        match kind {
            WELCOME => {
                let (store, rest) = body.split_first_chunk().ok_or(bad)?;
                let [capacity_bytes] = numbers(rest).ok_or(bad)?;
                Ok(Self::Welcome {
                    store: StoreId(*store),
                    capacity_bytes,
                })
            }
            TAKEN => {
                let [known, new, zero] = numbers(body).ok_or(bad)?;
                // No frame has more pages; sums of what is taken cannot overflow.
                let most = (MAX_PAGES_BYTES / PAGE_SIZE) as u64;
                if [known, new, zero].iter().any(|&count| count > most) {
                    return Err(bad);
                }
                Ok(Self::Taken(SeedCounts { known, new, zero }))
            }
            FLUSHED => {
                let [used_bytes] = numbers(body).ok_or(bad)?;
                Ok(Self::Flushed { used_bytes })
            }
            REFUSED if body.len() <= MAX_TEXT => {
                let text = str::from_utf8(body).map_err(|_| bad)?;
                Ok(Self::Refused(text.into()))
            }
            REFUSED => Err(bad),
            _ => Err(WireError::Kind(kind)),
        }
    }
}

/// `body` as just so many numbers.
fn numbers<const N: usize>(body: &[u8]) -> Option<[u64; N]> {
    let (words, rest) = body.as_chunks::<8>();
    let words: &[[u8; 8]; N] = words.try_into().ok()?;
    rest.is_empty().then(|| words.map(u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn requests() -> Vec<Request<'static>> {
        let domain = DomainId::from_bytes([0xd0; 16]);
        vec![
            Request::Hello {
                version: VERSION,
                tenant: "blue",
                domain,
            },
            Request::Pages(&[7; 5000]),
            Request::Flush,
        ]
    }

    fn replies() -> Vec<Reply> {
        vec![
            Reply::Welcome {
                store: StoreId([9; 16]),
                capacity_bytes: 1 << 30,
            },
            Reply::Taken(SeedCounts {
                known: 1,
                new: 2,
                zero: 3,
            }),
            Reply::Flushed { used_bytes: 77 },
            Reply::Refused("the disk is full".into()),
        ]
    }

    /// The frame without its length, which is checked.
    fn body(encode: impl FnOnce(&mut Vec<u8>), most: usize) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out);
        let head = *out.first_chunk().unwrap();
        assert_eq!(frame_length(head, most).unwrap(), out.len() - 4);
        out.split_off(4)
    }

    #[test]
    fn frames_are_what_they_were() {
        for request in requests() {
            let frame = body(|out| request.encode(out), MAX_REQUEST);
            assert_eq!(Request::decode(&frame), Ok(request));
        }
        for reply in replies() {
            let frame = body(|out| reply.encode(out), MAX_REPLY);
            assert_eq!(Reply::decode(&frame), Ok(reply));
        }
    }

    #[test]
    fn bytes_are_fixed() {
        let mut out = Vec::new();
        requests()[0].encode(&mut out);
        let mut expected = vec![23, 0, 0, 0, 1, 1, 0];
        expected.extend([0xd0; 16]);
        expected.extend(b"blue");
        assert_eq!(out, expected);
        out.clear();
        Reply::Flushed { used_bytes: 0x0102 }.encode(&mut out);
        assert_eq!(out, [9, 0, 0, 0, 0x83, 2, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_cut_or_too_long_is_refused() {
        for request in requests() {
            let mut frame = body(|out| request.encode(out), MAX_REQUEST);
            frame.resize(frame.len() + MAX_REQUEST, 0xff);
            assert!(Request::decode(&frame).is_err(), "{request:?}");
        }
        for reply in replies() {
            let mut frame = body(|out| reply.encode(out), MAX_REPLY);
            if !matches!(reply, Reply::Refused(_)) {
                for end in 0..frame.len() {
                    assert!(Reply::decode(&frame[..end]).is_err(), "{reply:?} {end}");
                }
            }
            frame.extend([b'x'; MAX_TEXT]);
            assert!(Reply::decode(&frame).is_err(), "{reply:?}");
        }
        assert_eq!(Request::decode(&[PAGES]), Err(WireError::Body(PAGES)));
        assert_eq!(Request::decode(&[0]), Err(WireError::Kind(0)));
        assert_eq!(Reply::decode(&[HELLO]), Err(WireError::Kind(HELLO)));
        let many = Reply::Taken(SeedCounts {
            known: 257,
            ..SeedCounts::default()
        });
        let many = body(|out| many.encode(out), MAX_REPLY);
        assert_eq!(Reply::decode(&many), Err(WireError::Body(TAKEN)));
        assert_eq!(frame_length([0; 4], 10), Err(WireError::Length(0)));
        assert_eq!(frame_length([11, 0, 0, 0], 10), Err(WireError::Length(11)));
        assert!(frame_length([0xff; 4], MAX_REQUEST).is_err());
    }

    #[test]
    fn a_long_refusal_is_cut_between_letters() {
        let long = Reply::Refused("é".repeat(MAX_TEXT));
        let frame = body(|out| long.encode(out), MAX_REPLY);
        let Ok(Reply::Refused(text)) = Reply::decode(&frame) else {
            panic!("not a refusal");
        };
        assert_eq!(text, "é".repeat(MAX_TEXT / 2));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(request) = Request::decode(&bytes) {
                let mut out = Vec::new();
                request.encode(&mut out);
                prop_assert_eq!(&out[4..], &bytes[..]);
            }
            if let Ok(reply) = Reply::decode(&bytes) {
                let mut out = Vec::new();
                reply.encode(&mut out);
                prop_assert_eq!(&out[4..], &bytes[..]);
            }
        }
    }
}
