//! How the C library's allocator treats the gateway's larger buffers.

/// Allocations from this size on are mapped by themselves, in bytes, and go back to the kernel when they
/// are freed: frames, compressors and their windows.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 512 << 10;

/// Keeps glibc from raising that size, up to 32 MiB, whenever a larger buffer is freed: the next ones
/// would come from heaps, one for each thread, that such buffers leave full of holes. With four migrations at
/// once that made a difference of up to 30 MiB.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "a setting of the C library")]
pub(super) fn return_large_buffers() {
    // SAFETY: takes two numbers. Where it fails, which is only said of other values, the default stays.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM) };
}

/// Other C libraries do so anyway.
#[cfg(not(target_env = "gnu"))]
pub(super) fn return_large_buffers() {}
