//! Bounded reading of little-endian fields.

/// Why bytes are not a valid message. Always the peer's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends inside a field.
    #[error("the message ends inside a field")]
    Truncated,
    /// Bytes are left over behind the last field.
    #[error("{0} bytes are left over behind the last field")]
    Trailing(usize),
    /// The type is not one of this protocol version.
    #[error("unknown message type {0}")]
    UnknownType(u8),
    /// A field holds a value that is not allowed.
    #[error("field `{0}` holds a value that is not allowed")]
    BadValue(&'static str),
    /// A length is over its limit.
    #[error("field `{0}` is over its limit")]
    TooLong(&'static str),
}

/// Reads fields from the front of a message.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::BadValue(field)),
        }
    }

    /// A string: u16 length, then UTF-8.
    pub(super) fn string(
        &mut self,
        field: &'static str,
        limit: usize,
    ) -> Result<String, WireError> {
        let len = usize::from(self.u16()?);
        if len > limit {
            return Err(WireError::TooLong(field));
        }
        let bytes = self.bytes(len)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| WireError::BadValue(field))
    }

    /// A list: u32 count, then the items, each at least `item_len` bytes long.
    pub(super) fn list<T>(
        &mut self,
        field: &'static str,
        limit: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u32()? as usize;
        if count > limit {
            return Err(WireError::TooLong(field));
        }
        // Grows with what is really there, not with what the count promises.
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }

    pub(super) fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(WireError::Trailing(self.0.len()))
        }
    }
}

/// Appends a string; longer ones are cut at a character boundary.
pub(super) fn put_string(out: &mut Vec<u8>, text: &str, limit: usize) {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // `limit` is at most u16::MAX for every caller.
    out.extend_from_slice(&u16::try_from(end).unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&text.as_bytes()[..end]);
}
