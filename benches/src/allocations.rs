//! An allocator that counts, for programs that are to tell what a piece of work allocates.

#![expect(unsafe_code, reason = "a global allocator is unsafe by definition")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

static COUNT: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, which counts what is asked of it. A program sets it as its global one.
#[derive(Debug)]
pub struct CountingAllocator;

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to the contract.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Allocations of all threads so far; always 0 where [`CountingAllocator`] is not the program's.
#[must_use]
pub(crate) fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Whether allocations are counted in this program.
pub(crate) fn are_counted() -> bool {
    let before = count();
    drop(black_box(Box::new(before)));
    count() > before
}
