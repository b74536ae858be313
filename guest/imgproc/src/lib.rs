//! Image preprocessing for a classifier: resize, centre crop, normalise.
//!
//! Everything takes slices and returns `Result`; nothing here knows about guest memory or WASI.
//! [`oracle`] repeats the normalisation as plainly as possible, for tests.

mod error;
mod normalize;
pub mod oracle;
mod resize;
#[cfg(target_arch = "wasm32")]
mod simd;

pub use error::{Error, try_zeros};
pub use normalize::{Kernel, Normalization, normalize};
pub use resize::{Geometry, MAX_PIXELS, MAX_RESIZE, MAX_SIDE, resize_crop};

/// How an image becomes a tensor: sizes in pixels, mean and std per channel on a 0..1 scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params {
    /// Length of the shorter side after the resize.
    pub resize: u32,
    /// Side of the square cut from the centre; at most `resize`.
    pub crop: u32,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

/// RGB pixels (u8, HWC) to a normalised tensor (f32, CHW, `[3, crop, crop]`).
pub fn preprocess(
    src: &[u8],
    width: u32,
    height: u32,
    params: &Params,
    dst: &mut [f32],
    kernel: Kernel,
) -> Result<(), Error> {
    // All checks come before the costly resize.
    let normalization = Normalization::new(params.mean, params.std)?;
    let geometry = Geometry::new(width, height, params.resize, params.crop)?;
    let values = geometry.output_len();
    if dst.len() != values {
        return Err(Error::InvalidArgument(format!(
            "dst holds {} floats, but a crop of {} px needs {values}",
            dst.len(),
            params.crop,
        )));
    }
    let mut pixels = try_zeros::<u8>(values)?;
    resize_crop(src, &geometry, &mut pixels)?;
    normalize(&pixels, &normalization, dst, kernel)
}
