//! The kernels of `imgproc` by name, each with a number of repeats, so that a measurement can tell
//! the kernel's time from that of the call. One source, built as Wasm and as a native library.
//!
//! The caller is trusted with the pointers: this is for measuring, and no guest for strangers. A
//! result of 0 is success.

use std::alloc::{Layout, alloc_zeroed};
use std::hint::black_box;
use std::slice;

use imgproc::{Error, Geometry, Kernel, Normalization, Params};

/// In Wasm: what `classify` has, and why.
#[cfg(target_arch = "wasm32")]
#[unsafe(no_mangle)]
pub extern "C" fn _initialize() {
    unsafe extern "C" {
        fn __wasm_call_ctors();
    }
    // SAFETY: the linker defines it, and the host calls `_initialize` once.
    unsafe { __wasm_call_ctors() }
}

/// Zeroed memory, aligned to a cache line, for good; null if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn alloc(len: usize) -> *mut u8 {
    let Ok(layout) = Layout::from_size_align(len.max(1), 64) else {
        return std::ptr::null_mut();
    };
    // SAFETY: the size is not 0.
    unsafe { alloc_zeroed(layout) }
}

fn status(repeats: u32, mut body: impl FnMut() -> Result<(), Error>) -> i32 {
    for _ in 0..repeats {
        if body().is_err() {
            return -1;
        }
    }
    0
}

/// Three functions for one kernel.
macro_rules! kernel {
    ($kernel:expr, $normalize:ident, $resize:ident, $preprocess:ident) => {
        /// `pixels` RGB pixels to `[3, pixels]` floats; `params` are mean and std, 3 floats each.
        ///
        /// # Safety
        /// The pointers must be valid for that.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $normalize(
            src: *const u8,
            pixels: usize,
            params: *const [[f32; 3]; 2],
            dst: *mut f32,
            repeats: u32,
        ) -> i32 {
            // SAFETY: the caller's promise.
            let (src, dst, [mean, std]) = unsafe {
                (
                    slice::from_raw_parts(src, 3 * pixels),
                    slice::from_raw_parts_mut(dst, 3 * pixels),
                    *params,
                )
            };
            status(repeats, || {
                let normalization = Normalization::new(mean, std)?;
                imgproc::normalize(black_box(src), &normalization, black_box(&mut *dst), $kernel)
            })
        }

        /// A picture to its resized crop, both RGB bytes.
        ///
        /// # Safety
        /// The pointers must be valid for that.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $resize(
            src: *const u8,
            width: u32,
            height: u32,
            resize: u32,
            crop: u32,
            dst: *mut u8,
            repeats: u32,
        ) -> i32 {
            // SAFETY: the caller's promise.
            let (src, dst) = unsafe {
                (
                    slice::from_raw_parts(src, 3 * width as usize * height as usize),
                    slice::from_raw_parts_mut(dst, 3 * crop as usize * crop as usize),
                )
            };
            status(repeats, || {
                let geometry = Geometry::new(width, height, resize, crop)?;
                imgproc::resize_crop(black_box(src), &geometry, black_box(&mut *dst), $kernel)
            })
        }

        /// A picture to a model's input: both steps.
        ///
        /// # Safety
        /// The pointers must be valid for that.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $preprocess(
            src: *const u8,
            width: u32,
            height: u32,
            resize: u32,
            crop: u32,
            params: *const [[f32; 3]; 2],
            dst: *mut f32,
            repeats: u32,
        ) -> i32 {
            // SAFETY: the caller's promise.
            let (src, dst, [mean, std]) = unsafe {
                (
                    slice::from_raw_parts(src, 3 * width as usize * height as usize),
                    slice::from_raw_parts_mut(dst, 3 * crop as usize * crop as usize),
                    *params,
                )
            };
            let params = Params { resize, crop, mean, std };
            status(repeats, || {
                let (src, dst) = (black_box(src), black_box(&mut *dst));
                imgproc::preprocess(src, width, height, &params, dst, $kernel)
            })
        }
    };
}

kernel!(Kernel::Scalar, normalize_scalar, resize_scalar, preprocess_scalar);
#[cfg(target_arch = "wasm32")]
kernel!(Kernel::Simd128, normalize_simd128, resize_simd128, preprocess_simd128);
#[cfg(target_arch = "wasm32")]
kernel!(Kernel::RelaxedSimd, normalize_relaxed_simd, resize_relaxed_simd, preprocess_relaxed_simd);
#[cfg(target_arch = "x86_64")]
kernel!(Kernel::Sse41, normalize_sse41, resize_sse41, preprocess_sse41);
#[cfg(target_arch = "x86_64")]
kernel!(Kernel::Avx2, normalize_avx2, resize_avx2, preprocess_avx2);
