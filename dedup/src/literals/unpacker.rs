//! The receiving side of a channel's zstd stream.

use zstd_safe::{DCtx, DParameter, FrameFormat, InBuffer, OutBuffer, SafeResult};

use super::ZstdFailed;

/// The receiving side of a channel's zstd stream.
pub(crate) struct Unpacker {
    max_window_log: u32,
    context: Option<DCtx<'static>>,
}

impl Unpacker {
    pub(crate) fn new(max_window_log: u32) -> Self {
        Self {
            max_window_log,
            context: None,
        }
    }

    /// Unpacks the literals of the next frame, exactly `length` bytes, to the start of `out`, which
    /// grows as needed. The caller has checked `length` against its limit.
    pub(crate) fn unpack<'a>(
        &mut self,
        packed: &[u8],
        length: usize,
        out: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], ZstdFailed> {
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(decompressor(self.max_window_log)?),
        };
        // One byte more than due, so that there is always room: zstd then shows what is too much,
        // and a call that neither reads nor writes has nothing left to give.
        grow(out, length + 1);
        let mut input = InBuffer::around(packed);
        let mut written = 0;
        loop {
            let before = (input.pos(), written);
            let mut buffer = OutBuffer::around_pos(&mut out[..=length], written);
            let hint = checked(context.decompress_stream(&mut buffer, &mut input))?;
            written = buffer.pos();
            // Zero: a zstd frame ends here, and the next one has to begin: the stream goes on as long
            // as the channel.
            if hint == 0 && input.pos() == packed.len() || written > length {
                return Err(ZstdFailed);
            }
            if (input.pos(), written) == before {
                break;
            }
        }
        let complete = input.pos() == packed.len() && written == length;
        complete.then_some(&out[..length]).ok_or(ZstdFailed)
    }
}

/// Makes `buffer` at least `length` long. It never shrinks, so its bytes are set once.
fn grow(buffer: &mut Vec<u8>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
}

fn decompressor(max_window_log: u32) -> Result<DCtx<'static>, ZstdFailed> {
    let mut context = DCtx::try_create().ok_or(ZstdFailed)?;
    checked(context.set_parameter(DParameter::Format(FrameFormat::Magicless)))?;
    checked(context.set_parameter(DParameter::WindowLogMax(max_window_log)))?;
    Ok(context)
}

fn checked(result: SafeResult) -> Result<usize, ZstdFailed> {
    result.map_err(|_| ZstdFailed)
}
