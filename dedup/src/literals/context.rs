//! zstd's compressor, with input that it reads where it lies.
//!
//! zstd calls that a stable input buffer (`ZSTD_c_stableInBuffer`). zstd-safe has no safe interface for
//! it, and cannot have one: the compressor keeps a pointer into memory that Rust believes to be free to
//! move. So this talks to the C library itself.
#![expect(unsafe_code, reason = "calls of the C library")]

use std::ffi::c_int;
use std::ptr::NonNull;

use zstd_safe::zstd_sys::{self, ZSTD_CCtx, ZSTD_EndDirective, ZSTD_cParameter};

use super::{Matching, PackOptions, ZstdFailed};

/// [`Matching::Short`], for levels of the strategy `lazy2`. At level 9 this saves 2.2 % of a guest's bytes, in the
/// same memory.
const SHORT: [(ZSTD_cParameter, c_int); 3] = [
    (ZSTD_cParameter::ZSTD_c_searchLog, 5),
    (ZSTD_cParameter::ZSTD_c_minMatch, 4),
    // `ZSTD_c_splitAfterSequences`: blocks end where the statistics of the matches found change.
    (ZSTD_cParameter::ZSTD_c_experimentalParam13, 1),
];

/// Owns a compressor of the C library.
pub(super) struct Context(NonNull<ZSTD_CCtx>);

// SAFETY: a compressor is not bound to the thread that made it.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by `ZSTD_createCCtx`, freed once. It does not look at its input any more.
        unsafe { zstd_sys::ZSTD_freeCCtx(self.0.as_ptr()) };
    }
}

impl Context {
    /// A compressor whose zstd frames are magicless, without content size and checksum.
    pub(super) fn new(options: PackOptions, in_place: bool) -> Result<Self, ZstdFailed> {
        use ZSTD_cParameter as P;
        // SAFETY: takes nothing.
        let context = unsafe { zstd_sys::ZSTD_createCCtx() };
        let context = Self(NonNull::new(context).ok_or(ZstdFailed)?);
        let window_log = c_int::try_from(options.window_log).map_err(|_| ZstdFailed)?;
        let magicless = zstd_sys::ZSTD_format_e::ZSTD_f_zstd1_magicless as c_int;
        let more: &[_] = match options.matching {
            Matching::Short => &SHORT,
            Matching::OfLevel | Matching::LongDistance => &[],
        };
        let parameters = [
            // The names of the next two are those of `ZSTD_c_format` and `ZSTD_c_stableInBuffer`.
            (P::ZSTD_c_experimentalParam2, magicless),
            (P::ZSTD_c_experimentalParam9, c_int::from(in_place)),
            (P::ZSTD_c_compressionLevel, options.level),
            (P::ZSTD_c_windowLog, window_log),
            (
                P::ZSTD_c_enableLongDistanceMatching,
                c_int::from(options.matching == Matching::LongDistance),
            ),
            (P::ZSTD_c_contentSizeFlag, 0),
            (P::ZSTD_c_checksumFlag, 0),
            (P::ZSTD_c_dictIDFlag, 0),
        ];
        for &(parameter, value) in parameters.iter().chain(more) {
            // SAFETY: the compressor is ours.
            let code =
                unsafe { zstd_sys::ZSTD_CCtx_setParameter(context.0.as_ptr(), parameter, value) };
            checked(code)?;
        }
        Ok(context)
    }

    /// Forgets the zstd frame that was begun, and all memory that it was read from.
    pub(super) fn reset(&mut self) {
        let session = zstd_sys::ZSTD_ResetDirective::ZSTD_reset_session_only;
        // SAFETY: the compressor is ours. To reset a session cannot fail.
        unsafe { zstd_sys::ZSTD_CCtx_reset(self.0.as_ptr(), session) };
    }

    /// Appends to `out` what `input` comes to. For a compressor that does not read in place.
    pub(super) fn flush(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(), ZstdFailed> {
        // SAFETY: a compressor that does not read in place copies what it may need later.
        unsafe { self.flush_from(input, 0, out) }
    }

    /// Appends to `out` what `area[from..]` comes to; what lies before has come this way in the calls
    /// before, since the last [`reset`](Self::reset).
    ///
    /// # Safety
    /// For a compressor that reads in place: since then, `area` has not moved, and is as it was up to
    /// `from`. A move is refused by zstd itself, which compares the addresses.
    pub(super) unsafe fn flush_in_place(
        &mut self,
        area: &[u8],
        from: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ZstdFailed> {
        // SAFETY: as promised by the caller.
        unsafe { self.flush_from(area, from, out) }
    }

    /// # Safety
    /// That of [`flush_in_place`](Self::flush_in_place).
    unsafe fn flush_from(
        &mut self,
        area: &[u8],
        from: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ZstdFailed> {
        let mut input = zstd_sys::ZSTD_inBuffer {
            src: area.as_ptr().cast(),
            size: area.len(),
            pos: from,
        };
        loop {
            // Room for all in one turn, unless zstd thinks otherwise.
            // SAFETY: takes a number.
            let room = unsafe { zstd_sys::ZSTD_compressBound(area.len() - input.pos) };
            out.reserve(room);
            let free = out.spare_capacity_mut();
            let mut output = zstd_sys::ZSTD_outBuffer {
                dst: free.as_mut_ptr().cast(),
                size: free.len(),
                pos: 0,
            };
            let flush = ZSTD_EndDirective::ZSTD_e_flush;
            // SAFETY: both buffers are what they say for as long as the call takes, and the input for as
            // long as the compressor looks at it, as promised.
            let left = checked(unsafe {
                zstd_sys::ZSTD_compressStream2(
                    self.0.as_ptr(),
                    &raw mut output,
                    &raw mut input,
                    flush,
                )
            })?;
            // SAFETY: zstd has written so many bytes there.
            unsafe { out.set_len(out.len() + output.pos) };
            if left == 0 {
                return Ok(());
            }
        }
    }
}

/// What zstd returned, unless it is an error.
fn checked(code: usize) -> Result<usize, ZstdFailed> {
    // SAFETY: takes a number.
    if unsafe { zstd_sys::ZSTD_isError(code) } == 0 {
        Ok(code)
    } else {
        Err(ZstdFailed)
    }
}
