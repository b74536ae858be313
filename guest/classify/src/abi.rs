//! The exported functions. Pointers and lengths are addresses and counts in guest memory; a
//! negative result is a [`Status`], explained by `last_error`.

use std::cell::RefCell;

use imgproc::{Geometry, Kernel, Normalization, Params, normalize};
use inference::model::Model;
use inference::{Error, Status, postprocess, request};

use crate::memory::{self, Region};

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
    static MODEL: RefCell<Option<Model>> = const { RefCell::new(None) };
}

/// Runs the body of an exported function, and keeps its message if it fails.
pub fn status(body: impl FnOnce() -> Result<i32, Error>) -> i32 {
    let result = body();
    let (code, message) = match result {
        Ok(value) => (value, String::new()),
        Err(error) => (error.status as i32, error.message),
    };
    LAST_ERROR.set(message);
    code
}

/// Address and length in one result, for hosts that can take only one.
fn pack(address: usize, len: usize) -> i64 {
    ((address as u64) << 32 | len as u64) as i64
}

/// Runs the constructors of wasi-libc, once, before any other call: what makes this a WASI
/// reactor. Without it the linker would wrap each export in code that runs them at every call.
#[unsafe(no_mangle)]
pub extern "C" fn _initialize() {
    unsafe extern "C" {
        fn __wasm_call_ctors();
    }
    // SAFETY: the linker defines it, and the host calls `_initialize` once.
    unsafe { __wasm_call_ctors() }
}

/// The message of the last call that failed, or 0 if the last call succeeded.
#[unsafe(no_mangle)]
pub extern "C" fn last_error() -> i64 {
    LAST_ERROR.with_borrow(|message| match message.len() {
        0 => 0,
        len => pack(message.as_ptr() as usize, len),
    })
}

/// Zeroed bytes, aligned to 16; 0 if `len` is 0 or memory is full.
#[unsafe(no_mangle)]
pub extern "C" fn alloc(len: usize) -> usize {
    let mut address = 0;
    status(|| {
        address = memory::alloc(len).ok_or_else(|| {
            Error::new(Status::OutOfMemory, format!("alloc({len}): zero, or more than memory has"))
        })?;
        Ok(0)
    });
    address
}

/// Gives a block back. It isn't called `free`: wasi-libc has a function of that name.
#[unsafe(no_mangle)]
pub extern "C" fn dealloc(address: usize, len: usize) -> i32 {
    status(|| memory::dealloc(address, len).map(|()| 0))
}

/// The 32 bytes {resize u32, crop u32, mean f32 x 3, std f32 x 3}, little-endian.
fn params(address: usize) -> Result<Params, Error> {
    let region = Region::<u8>::new("params", address, 32)?;
    // SAFETY: copied at once; nothing else runs meanwhile.
    let bytes = unsafe { region.as_slice() };
    let word = |i: usize| [bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]];
    let float = |i| f32::from_le_bytes(word(i));
    Ok(Params {
        resize: u32::from_le_bytes(word(0)),
        crop: u32::from_le_bytes(word(1)),
        mean: [float(2), float(3), float(4)],
        std: [float(5), float(6), float(7)],
    })
}

/// Checks `dst` of `bytes` bytes as f32, against `src` too.
fn floats(src: &Region<u8>, address: usize, bytes: usize) -> Result<Region<f32>, Error> {
    if bytes % 4 != 0 {
        let message = format!("dst_len = {bytes} bytes is not a multiple of 4");
        return Err(Error::new(Status::InvalidArgument, message));
    }
    let dst = Region::new("dst", address, bytes / 4)?;
    dst.disjoint_from(src)?;
    Ok(dst)
}

/// RGB u8 HWC to normalised f32 CHW `[3, crop, crop]`; kernel 0 scalar, 1 SIMD128, 2 relaxed SIMD.
#[unsafe(no_mangle)]
pub extern "C" fn preprocess(
    src: usize,
    src_len: usize,
    width: u32,
    height: u32,
    params_address: usize,
    dst: usize,
    dst_len: usize,
    kernel: u32,
) -> i32 {
    status(|| {
        let kernel = *Kernel::ALL.get(kernel as usize).ok_or_else(|| {
            Error::new(Status::InvalidArgument, format!("kernel = {kernel}; needed 0, 1 or 2"))
        })?;
        let params = params(params_address)?;
        let src = Region::new("src", src, src_len)?;
        let mut dst = floats(&src, dst, dst_len)?;
        // SAFETY: the regions are disjoint, and this call frees no block.
        let (src, dst) = unsafe { (src.as_slice(), dst.as_mut_slice()) };
        imgproc::preprocess(src, width, height, &params, dst, kernel)?;
        Ok(0)
    })
}

/// The first half of `preprocess`: RGB u8 HWC of any size to RGB u8 HWC `[crop, crop, 3]`.
#[unsafe(no_mangle)]
pub extern "C" fn resize_crop(
    src: usize,
    src_len: usize,
    width: u32,
    height: u32,
    resize: u32,
    crop: u32,
    dst: usize,
    dst_len: usize,
) -> i32 {
    status(|| {
        let geometry = Geometry::new(width, height, resize, crop)?;
        let src = Region::<u8>::new("src", src, src_len)?;
        let mut dst = Region::<u8>::new("dst", dst, dst_len)?;
        dst.disjoint_from(&src)?;
        // SAFETY: the regions are disjoint, and this call frees no block.
        let (src, dst) = unsafe { (src.as_slice(), dst.as_mut_slice()) };
        imgproc::resize_crop(src, &geometry, dst, Kernel::PORTABLE)?;
        Ok(0)
    })
}

/// The second half of `preprocess`: n RGB pixels to f32 `[3, n]`. A function for each kernel: so the
/// instructions that an export reaches show which one it is.
fn normalize_with<const KERNEL: usize>(
    src: usize,
    src_len: usize,
    params_address: usize,
    dst: usize,
    dst_len: usize,
) -> i32 {
    status(|| {
        let normalization = normalization(params_address)?;
        let src = Region::new("src", src, src_len)?;
        let mut dst = floats(&src, dst, dst_len)?;
        // SAFETY: the regions are disjoint, and this call frees no block.
        let (src, dst) = unsafe { (src.as_slice(), dst.as_mut_slice()) };
        normalize(src, &normalization, dst, Kernel::ALL[KERNEL])?;
        Ok(0)
    })
}

/// Mean and deviation from the parameters at an address.
pub fn normalization(params_address: usize) -> Result<Normalization, Error> {
    let params = params(params_address)?;
    Ok(Normalization::new(params.mean, params.std)?)
}

#[unsafe(no_mangle)]
pub extern "C" fn normalize_scalar(
    src: usize,
    src_len: usize,
    params: usize,
    dst: usize,
    dst_len: usize,
) -> i32 {
    normalize_with::<0>(src, src_len, params, dst, dst_len)
}

#[unsafe(no_mangle)]
pub extern "C" fn normalize_simd128(
    src: usize,
    src_len: usize,
    params: usize,
    dst: usize,
    dst_len: usize,
) -> i32 {
    normalize_with::<1>(src, src_len, params, dst, dst_len)
}

#[unsafe(no_mangle)]
pub extern "C" fn normalize_relaxed_simd(
    src: usize,
    src_len: usize,
    params: usize,
    dst: usize,
    dst_len: usize,
) -> i32 {
    normalize_with::<2>(src, src_len, params, dst, dst_len)
}

/// Writes the k most probable of n classes to `out` as k pairs {index u32, probability f32}.
#[unsafe(no_mangle)]
pub extern "C" fn top_k(logits: usize, n: usize, k: usize, out: usize) -> i32 {
    status(|| {
        let logits = Region::<f32>::new("logits", logits, n)?;
        let mut out = Region::<u32>::new("out", out, k.saturating_mul(2))?;
        out.disjoint_from(&logits)?;
        // SAFETY: the regions are disjoint, and this call frees no block.
        let (logits, out) = unsafe { (logits.as_slice(), out.as_mut_slice()) };
        let ranked = postprocess::top_k(logits, k)?;
        for (pair, class) in out.chunks_exact_mut(2).zip(&ranked) {
            pair.copy_from_slice(&[class.index, class.probability.to_bits()]);
        }
        Ok(ranked.len() as i32)
    })
}

/// Loads the model that `infer` runs. If it fails, the model loaded before stays.
#[unsafe(no_mangle)]
pub extern "C" fn model_load(address: usize, len: usize) -> i32 {
    status(|| {
        let bytes = Region::<u8>::new("model", address, len)?;
        // SAFETY: the model copies what it needs; nothing else runs meanwhile.
        let model = Model::from_bytes(unsafe { bytes.as_slice() })?;
        MODEL.set(Some(model));
        Ok(0)
    })
}

/// JSON request to JSON response, in a block that the host must `dealloc`. 0 if none is free.
#[unsafe(no_mangle)]
pub extern "C" fn infer(address: usize, len: usize) -> i64 {
    let response = match Region::<u8>::new("request", address, len) {
        Err(error) => request::error_json("invalid_request", &error.message),
        Ok(text) => {
            // SAFETY: nothing else runs meanwhile.
            let text = unsafe { text.as_slice() };
            MODEL
                .with_borrow(|model| request::infer(model.as_ref(), text))
                .unwrap_or_else(|error| error)
        }
    };
    respond(&response)
}

/// Puts a response into a new block, which the host must `dealloc`. 0 if none is free.
pub fn respond(response: &str) -> i64 {
    let block = alloc(response.len());
    let Ok(mut region) = Region::<u8>::new("response", block, response.len()) else {
        return 0;
    };
    // SAFETY: the block is new: nobody else uses it.
    unsafe { region.as_mut_slice() }.copy_from_slice(response.as_bytes());
    pack(block, response.len())
}
