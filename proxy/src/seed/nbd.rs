//! A client for NBD, as much of it as reads a disk front to back: the fixed newstyle handshake, and reads
//! with structured replies, in which holes cost nothing.
//!
//! The format is that of the protocol's own document (NetworkBlockDevice/nbd `doc/proto.md`). Integers
//! are big endian.

use std::io::{self, Read, Write};

use super::contents::{Contents, Next, READ_BYTES};

const INIT_MAGIC: [u8; 8] = *b"NBDMAGIC";
const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Client flags: fixed newstyle, and no padding behind answers to old options.
const CLIENT_FLAGS: u32 = 1 | 2;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;

const COMMAND_READ: u16 = 0;
const COMMAND_DISCONNECT: u16 = 2;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_ERROR: u16 = 1 << 15;

/// Longest answer to an option, and longest text of an error, that is read.
const MAX_TEXT: usize = 4096;
/// Answers to one option: a server that gives more is not sane.
const MAX_ANSWERS: usize = 64;
/// Chunks of one reply: at least 512 bytes each, and some without data.
const MAX_CHUNKS: usize = READ_BYTES / 512 + 16;

/// A disk at the other end of a connection.
#[derive(Debug)]
pub(super) struct Disk<S: Read + Write> {
    stream: S,
    size: u64,
    cookie: u64,
}

impl<S: Read + Write> Disk<S> {
    /// Greets a server and asks for its export without a name.
    ///
    /// # Errors
    /// When the connection fails, or the server does not speak as it should or refuses.
    pub(super) fn open(mut stream: S) -> io::Result<Self> {
        if take(&mut stream)? != INIT_MAGIC || take(&mut stream)? != OPTION_MAGIC {
            return Err(broken("no greeting"));
        }
        let flags = u16::from_be_bytes(take(&mut stream)?);
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(broken("the server is too old"));
        }
        stream.write_all(&CLIENT_FLAGS.to_be_bytes())?;
        ask(&mut stream, OPTION_STRUCTURED_REPLY, &[])?;
        // A name of no bytes, and no wishes.
        let size = ask(&mut stream, OPTION_GO, &[0; 6])?;
        let size = size.ok_or_else(|| broken("the server does not tell the size"))?;
        Ok(Self {
            stream,
            size,
            cookie: 0,
        })
    }

    /// Ends the connection in order.
    pub(super) fn close(mut self) {
        // A server that is gone already is as good.
        let _ = self.request(COMMAND_DISCONNECT, 0, 0);
    }

    fn request(&mut self, command: u16, at: u64, length: u32) -> io::Result<()> {
        self.cookie += 1;
        let mut request = [0; 28];
        request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[6..8].copy_from_slice(&command.to_be_bytes());
        request[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        request[16..24].copy_from_slice(&at.to_be_bytes());
        request[24..].copy_from_slice(&length.to_be_bytes());
        self.stream.write_all(&request)
    }

    /// Reads from `at` on until `out`, which is all zeroes, is full. Returns whether there was any data.
    fn read(&mut self, at: u64, out: &mut [u8]) -> io::Result<bool> {
        // At most `READ_BYTES`.
        self.request(COMMAND_READ, at, out.len() as u32)?;
        let mut any = false;
        for _ in 0..MAX_CHUNKS {
            let magic = u32::from_be_bytes(take(&mut self.stream)?);
            let flags = u16::from_be_bytes(take(&mut self.stream)?);
            let kind = u16::from_be_bytes(take(&mut self.stream)?);
            let cookie = u64::from_be_bytes(take(&mut self.stream)?);
            let length = u32::from_be_bytes(take(&mut self.stream)?) as usize;
            if magic != CHUNK_MAGIC || cookie != self.cookie {
                return Err(broken("not the reply to the request"));
            }
            match kind {
                CHUNK_NONE if length == 0 => {}
                CHUNK_DATA if length > 8 => {
                    let place = self.place(at, out.len(), length - 8)?;
                    self.stream.read_exact(&mut out[place])?;
                    any = true;
                }
                CHUNK_HOLE if length == 12 => {
                    let offset = u64::from_be_bytes(take(&mut self.stream)?);
                    let size = u32::from_be_bytes(take(&mut self.stream)?) as usize;
                    check_place(offset, at, out.len(), size)?;
                }
                _ if kind & CHUNK_ERROR != 0 && length <= MAX_TEXT => {
                    return Err(self.refusal(length)?);
                }
                _ => return Err(broken("a chunk that does not belong to a read")),
            }
            if flags & CHUNK_DONE != 0 {
                return Ok(any);
            }
        }
        Err(broken("a reply without an end"))
    }

    /// Where in the buffer a chunk of data of `size` bytes goes, by the offset that comes next.
    fn place(&mut self, at: u64, room: usize, size: usize) -> io::Result<std::ops::Range<usize>> {
        let offset = u64::from_be_bytes(take(&mut self.stream)?);
        check_place(offset, at, room, size)
    }

    /// The error that a chunk of `length` bytes tells.
    fn refusal(&mut self, length: usize) -> io::Result<io::Error> {
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        let (Some(code), Some(text)) = (body.first_chunk(), body.get(6..)) else {
            return Err(broken("an error without a number"));
        };
        // The numbers are those of Linux, near enough for all that a read can meet.
        let code = io::Error::from_raw_os_error(i32::from_be_bytes(*code));
        let text = String::from_utf8_lossy(text);
        Ok(io::Error::new(code.kind(), format!("{code} {text}")))
    }
}

impl<S: Read + Write> Contents for Disk<S> {
    fn size(&self) -> u64 {
        self.size
    }

    fn next(&mut self, at: u64, out: &mut Vec<u8>) -> io::Result<Next> {
        out.clear();
        if at >= self.size {
            return Ok(Next::End);
        }
        let length = (self.size - at).min(READ_BYTES as u64);
        // The server gives data over what is there already, or says that there is none.
        out.resize(length as usize, 0);
        Ok(if self.read(at, out)? {
            Next::Data(at)
        } else {
            out.clear();
            Next::Hole(at + length)
        })
    }
}

/// Asks for an option and returns the size of the export, if that was told.
fn ask(stream: &mut (impl Read + Write), option: u32, body: &[u8]) -> io::Result<Option<u64>> {
    let mut request = OPTION_MAGIC.to_vec();
    request.extend_from_slice(&option.to_be_bytes());
    request.extend_from_slice(&(body.len() as u32).to_be_bytes());
    request.extend_from_slice(body);
    stream.write_all(&request)?;
    let mut size = None;
    for _ in 0..MAX_ANSWERS {
        let magic = u64::from_be_bytes(take(stream)?);
        let echoed = u32::from_be_bytes(take(stream)?);
        let kind = u32::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?) as usize;
        if magic != OPTION_REPLY_MAGIC || echoed != option || length > MAX_TEXT {
            return Err(broken("not the answer to an option"));
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer)?;
        match kind {
            REPLY_ACK => return Ok(size),
            REPLY_INFO => {
                if let Some((kind, rest)) = answer.split_first_chunk()
                    && u16::from_be_bytes(*kind) == INFO_EXPORT
                    && let Some(told) = rest.first_chunk()
                {
                    size = Some(u64::from_be_bytes(*told));
                }
            }
            _ if kind & REPLY_ERROR != 0 => {
                let text = String::from_utf8_lossy(&answer);
                return Err(broken(&format!("option {option} was refused: {text}")));
            }
            _ => {}
        }
    }
    Err(broken("too many answers to one option"))
}

/// The place of `size` bytes at `offset` in a read of `room` bytes at `at`.
fn check_place(
    offset: u64,
    at: u64,
    room: usize,
    size: usize,
) -> io::Result<std::ops::Range<usize>> {
    let begin = offset
        .checked_sub(at)
        .and_then(|begin| usize::try_from(begin).ok());
    begin
        .and_then(|begin| Some(begin..begin.checked_add(size)?))
        .filter(|place| place.end <= room)
        .ok_or_else(|| broken("a chunk from elsewhere"))
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A server whose words are written down; what the client says is kept.
    #[derive(Debug, Default)]
    struct Script {
        answers: std::collections::VecDeque<u8>,
        said: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.answers.read(out)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.said.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn option_reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
        let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for number in [option, kind, body.len() as u32] {
            reply.extend(number.to_be_bytes());
        }
        reply.extend(body);
        reply
    }

    fn greeting(size: u64) -> Vec<u8> {
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend(size.to_be_bytes());
        info.extend([0, 3]);
        let mut bytes = b"NBDMAGICIHAVEOPT".to_vec();
        bytes.extend([0, 3]);
        bytes.extend(option_reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]));
        bytes.extend(option_reply(OPTION_GO, REPLY_INFO, &[0, 3, 1, 2]));
        bytes.extend(option_reply(OPTION_GO, REPLY_INFO, &info));
        bytes.extend(option_reply(OPTION_GO, REPLY_ACK, &[]));
        bytes
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = CHUNK_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend((body.len() as u32).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn data(at: u64, bytes: &[u8]) -> Vec<u8> {
        [&at.to_be_bytes()[..], bytes].concat()
    }

    fn hole(at: u64, size: u32) -> Vec<u8> {
        [&at.to_be_bytes()[..], &size.to_be_bytes()[..]].concat()
    }

    fn disk(size: u64, replies: &[Vec<u8>]) -> io::Result<Disk<Script>> {
        let mut answers = greeting(size);
        answers.extend(replies.concat());
        Disk::open(Script {
            answers: answers.into(),
            said: Vec::new(),
        })
    }

    #[test]
    fn data_and_holes_come_in_any_order() {
        let replies = [
            chunk(0, CHUNK_HOLE, 1, &hole(0, 4096)),
            chunk(0, CHUNK_DATA, 1, &data(8192, &[2; 1808])),
            chunk(0, CHUNK_DATA, 1, &data(4096, &[1; 4096])),
            chunk(CHUNK_DONE, CHUNK_NONE, 1, &[]),
            chunk(CHUNK_DONE, CHUNK_HOLE, 2, &hole(0, 10_000)),
        ];
        let mut disk = disk(10_000, &replies).unwrap();
        assert_eq!(disk.size(), 10_000);
        let mut out = vec![9; 7];
        assert_eq!(disk.next(0, &mut out).unwrap(), Next::Data(0));
        assert_eq!(out, [vec![0; 4096], vec![1; 4096], vec![2; 1808]].concat());
        assert_eq!(disk.next(0, &mut out).unwrap(), Next::Hole(10_000));
        assert_eq!(disk.next(10_000, &mut out).unwrap(), Next::End);
        // The greeting: flags, and two options.
        let said = &disk.stream.said;
        assert_eq!(said[..4], [0, 0, 0, 3]);
        assert_eq!(said[4..20], *b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        assert_eq!(said[20..42], *b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        let read = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x27\x10";
        assert_eq!(said[42..70], *read);
    }

    #[test]
    fn what_does_not_belong_to_the_read_is_refused() {
        let bad = [
            chunk(CHUNK_DONE, CHUNK_DATA, 2, &data(0, &[1; 10])),
            chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(0, &[1; 10_001])),
            chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(9_999, &[1; 2])),
            chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(u64::MAX, &[1; 2])),
            chunk(CHUNK_DONE, CHUNK_DATA, 1, &[0; 8]),
            chunk(CHUNK_DONE, CHUNK_HOLE, 1, &hole(1, 10_000)),
            chunk(CHUNK_DONE, CHUNK_HOLE, 1, &[0; 8]),
            chunk(CHUNK_DONE, CHUNK_NONE, 1, &[0]),
            chunk(CHUNK_DONE, 5, 1, &[0; 12]),
            chunk(CHUNK_DONE, CHUNK_ERROR, 1, &[0; 5]),
            chunk(CHUNK_DONE, CHUNK_ERROR, 1, &[0; MAX_TEXT + 1]),
            chunk(0, CHUNK_NONE, 1, &[]).repeat(MAX_CHUNKS + 1),
            vec![0; 100],
            Vec::new(),
        ];
        for (case, reply) in bad.into_iter().enumerate() {
            let mut disk = disk(10_000, &[reply]).unwrap();
            assert!(disk.next(0, &mut Vec::new()).is_err(), "case {case}");
        }
    }

    #[test]
    fn an_error_is_told() {
        let body = [&[0, 0, 0, 5, 0, 4][..], b"oops"].concat();
        let reply = chunk(CHUNK_DONE, CHUNK_ERROR | 1, 1, &body);
        let error = disk(4096, &[reply]).unwrap().next(0, &mut Vec::new());
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("oops") && error.contains("error 5"),
            "{error}"
        );
    }

    #[test]
    fn greetings_that_are_cut_or_refuse_are_errors() {
        let whole = greeting(4096);
        for end in 0..whole.len() {
            let answers = whole[..end].to_vec().into();
            let said = Vec::new();
            assert!(Disk::open(Script { answers, said }).is_err(), "{end}");
        }
        let refusal = option_reply(OPTION_STRUCTURED_REPLY, REPLY_ERROR | 1, b"no");
        let answers = [&whole[..18], &refusal].concat().into();
        let said = Vec::new();
        let error = Disk::open(Script { answers, said }).unwrap_err();
        assert!(error.to_string().contains("refused: no"), "{error}");
        // One that never gets to the point.
        let chatter = option_reply(OPTION_STRUCTURED_REPLY, REPLY_INFO, &[]).repeat(100);
        let answers = [&whole[..18], &chatter].concat().into();
        let said = Vec::new();
        assert!(Disk::open(Script { answers, said }).is_err());
    }

    proptest! {
        /// Chunks of any kind, with any place and length: nothing but an error can come of them.
        #[test]
        fn any_reply_is_taken_or_refused(
            chunks in prop::collection::vec(
                (0..4_u16, 0..6_u16, 0..3_u64, 0..12_000_u64, 0..6000_usize),
                0..8,
            ),
            noise in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut replies: Vec<_> = chunks
                .into_iter()
                .map(|(flags, kind, cookie, at, length)| {
                    chunk(flags, kind, cookie, &data(at, &vec![1; length]))
                })
                .collect();
            replies.push(noise.clone());
            let mut disk = disk(10_000, &replies).unwrap();
            let mut out = Vec::new();
            while let Ok(Next::Data(_) | Next::Hole(_)) = disk.next(0, &mut out) {
                prop_assert!(out.len() <= 10_000);
            }
            let said = Vec::new();
            let mut answers = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
            answers.extend(noise);
            let answers = answers.into();
            let opened = Disk::open(Script { answers, said });
            prop_assert!(opened.is_err());
        }
    }
}
