use crate::Error;
use crate::kernel::{Kernel, Machine, on};

/// `(x / 255 - mean) / std`, rearranged to one multiplication and one addition: `x * scale + bias`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    pub scale: [f32; 3],
    pub bias: [f32; 3],
}

impl Normalization {
    /// `mean` and `std` per channel (R, G, B), on a 0..1 scale.
    pub fn new(mean: [f32; 3], std: [f32; 3]) -> Result<Self, Error> {
        let (mut scale, mut bias) = ([0.0; 3], [0.0; 3]);
        for channel in 0..3 {
            let (m, s) = (mean[channel], std[channel]);
            if !m.is_finite() || !s.is_finite() {
                return Err(Error::NotFinite(format!(
                    "mean[{channel}] or std[{channel}] is NaN or infinite"
                )));
            }
            if s <= 0.0 {
                return Err(Error::InvalidArgument(format!(
                    "std[{channel}] must be greater than 0"
                )));
            }
            // In f64, so that only the last step rounds to f32.
            scale[channel] = (1.0 / (255.0 * f64::from(s))) as f32;
            bias[channel] = (-f64::from(m) / f64::from(s)) as f32;
            if !scale[channel].is_finite() || !bias[channel].is_finite() {
                return Err(Error::NotFinite(format!(
                    "std[{channel}] is too small: 1 / (255 * std) or mean / std overflows f32"
                )));
            }
        }
        Ok(Self { scale, bias })
    }
}

/// `n` RGB pixels (u8, interleaved) to `[3, n]` normalised floats (planar).
#[inline(always)]
pub fn normalize(
    src: &[u8],
    normalization: &Normalization,
    dst: &mut [f32],
    kernel: Kernel,
) -> Result<(), Error> {
    check(src.len(), dst.len())?;
    on!(kernel, run(src, normalization, dst))
}

fn check(src_len: usize, dst_len: usize) -> Result<(), Error> {
    if src_len == 0 || src_len % 3 != 0 {
        return Err(Error::InvalidArgument(format!(
            "src has {src_len} bytes; RGB pixels need a positive multiple of 3"
        )));
    }
    if dst_len != src_len {
        return Err(Error::InvalidArgument(format!(
            "dst holds {dst_len} floats, but src has {src_len} bytes; they must be equal"
        )));
    }
    Ok(())
}

fn run<M: Machine>(src: &[u8], n: &Normalization, dst: &mut [f32]) -> Result<(), Error> {
    let (red, rest) = dst.split_at_mut(src.len() / 3);
    let (green, blue) = rest.split_at_mut(src.len() / 3);
    M::normalize(src, n, [red, green, blue]);
    Ok(())
}
