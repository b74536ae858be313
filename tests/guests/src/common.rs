//! What all guests share: memory for the test, and the words of the last error.

use std::cell::RefCell;
use std::fmt::{Debug, Display};

thread_local!(static SAID: RefCell<String> = const { RefCell::new(String::new()) });

/// Reserve bytes for the test, and keep them.
#[unsafe(no_mangle)]
pub extern "C" fn alloc(size: usize) -> *mut u64 {
    vec![0u64; size.div_ceil(8)].leak().as_mut_ptr()
}

/// Copy the words of the last error to `buffer`; return their length.
///
/// # Safety
/// `buffer` has `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn said(buffer: *mut u8, room: usize) -> usize {
    SAID.with_borrow(|said| {
        let length = said.len().min(room);
        // SAFETY: the caller's promise; the text is not in that buffer.
        unsafe { buffer.copy_from_nonoverlapping(said.as_ptr(), length) };
        length
    })
}

/// Pass a result on: what it holds, or -1 and the crate's own words for the error.
pub fn answer<E: Debug + Display>(result: Result<u32, E>) -> i32 {
    match result {
        Ok(value) => value as i32,
        Err(error) => {
            SAID.set(format!("{error:?} = {error}"));
            -1
        }
    }
}

/// The one or two parts of a model.
///
/// # Safety
/// Each pointer has its length in bytes.
pub unsafe fn parts<'a>(
    first: *const u8,
    first_size: usize,
    second: *const u8,
    second_size: usize,
) -> Vec<&'a [u8]> {
    // SAFETY: the caller's promise. The test may break it: then the host has to notice.
    let part = |at, size| unsafe { std::slice::from_raw_parts(at, size) };
    let mut parts = vec![part(first, first_size)];
    if !second.is_null() {
        parts.push(part(second, second_size));
    }
    parts
}
