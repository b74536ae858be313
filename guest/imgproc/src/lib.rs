//! Image preprocessing for a classifier: resize, centre crop, normalise.
//!
//! Everything takes slices and returns `Result`; nothing here knows about guest memory or WASI.
//! [`oracle`] repeats the normalisation as plainly as possible, for tests.

mod error;
mod kernel;
#[cfg(any(target_arch = "wasm32", target_arch = "x86_64"))]
mod lanes;
mod normalize;
pub mod oracle;
mod resize;
#[cfg(any(target_arch = "wasm32", target_arch = "x86_64"))]
mod simd;

use kernel::{Machine, on};

pub use error::{Error, try_zeros};
pub use kernel::Kernel;
pub use normalize::{Normalization, normalize};
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
#[inline(always)]
pub fn preprocess(
    src: &[u8],
    width: u32,
    height: u32,
    params: &Params,
    dst: &mut [f32],
    kernel: Kernel,
) -> Result<(), Error> {
    let (geometry, normalization) = check(width, height, params, dst.len())?;
    on!(kernel, run(src, &geometry, &normalization, dst))
}

/// All checks come before the costly resize.
fn check(
    width: u32,
    height: u32,
    params: &Params,
    len: usize,
) -> Result<(Geometry, Normalization), Error> {
    let normalization = Normalization::new(params.mean, params.std)?;
    let geometry = Geometry::new(width, height, params.resize, params.crop)?;
    let values = geometry.output_len();
    if len != values {
        return Err(Error::InvalidArgument(format!(
            "dst holds {len} floats, but a crop of {} px needs {values}",
            params.crop,
        )));
    }
    Ok((geometry, normalization))
}

/// Row by row, so that a resized row is normalised while it is in the cache.
#[inline(never)]
fn run<M: Machine>(
    src: &[u8],
    geometry: &Geometry,
    n: &Normalization,
    dst: &mut [f32],
) -> Result<(), Error> {
    let rows = resize::Rows::new::<M::Resize>(src, geometry)?;
    let crop = geometry.crop();
    let mut row = try_zeros::<u8>(3 * crop)?;
    let (red, rest) = dst.split_at_mut(crop * crop);
    let (green, blue) = rest.split_at_mut(crop * crop);
    let planes = red.chunks_exact_mut(crop).zip(green.chunks_exact_mut(crop));
    for (y, ((r, g), b)) in planes.zip(blue.chunks_exact_mut(crop)).enumerate() {
        rows.blend::<M::Resize>(y, &mut row);
        M::normalize(&row, n, [r, g, b]);
    }
    Ok(())
}
