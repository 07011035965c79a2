//! Guest memory passes through this process: it must not end up in a core file.

use std::io;

/// Turns core dumps off for this process and forbids other processes of the same user to trace it or
/// to read its memory.
///
/// # Errors
/// When the kernel refuses, which no kernel is known to do.
pub(super) fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: setrlimit only reads the struct, which lives until the call returns.
    #[expect(unsafe_code, reason = "the standard library has no setrlimit")]
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    if limited != 0 {
        return Err(io::Error::last_os_error());
    }
    let (off, unused): (libc::c_ulong, libc::c_ulong) = (0, 0);
    // The limit alone does not stop a core pattern that pipes to a program; this does.
    // SAFETY: with PR_SET_DUMPABLE, prctl takes plain numbers only.
    #[expect(unsafe_code, reason = "the standard library has no prctl")]
    let set = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, off, unused, unused, unused) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
