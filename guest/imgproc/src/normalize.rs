use crate::Error;

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

/// Which implementation of [`normalize`] runs. The SIMD ones exist only in Wasm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    Scalar,
    #[cfg(target_arch = "wasm32")]
    Simd128,
    #[cfg(target_arch = "wasm32")]
    RelaxedSimd,
}

impl Kernel {
    #[cfg(target_arch = "wasm32")]
    pub const ALL: &[Kernel] = &[Self::Scalar, Self::Simd128, Self::RelaxedSimd];
    #[cfg(not(target_arch = "wasm32"))]
    pub const ALL: &[Kernel] = &[Self::Scalar];

    /// The fastest one whose result is the same on every machine.
    #[cfg(target_arch = "wasm32")]
    pub const PORTABLE: Kernel = Self::Simd128;
    #[cfg(not(target_arch = "wasm32"))]
    pub const PORTABLE: Kernel = Self::Scalar;
}

/// `n` RGB pixels (u8, interleaved) to `[3, n]` normalised floats (planar).
pub fn normalize(
    src: &[u8],
    normalization: &Normalization,
    dst: &mut [f32],
    kernel: Kernel,
) -> Result<(), Error> {
    if src.is_empty() || src.len() % 3 != 0 {
        return Err(Error::InvalidArgument(format!(
            "src has {} bytes; RGB pixels need a positive multiple of 3",
            src.len()
        )));
    }
    if dst.len() != src.len() {
        return Err(Error::InvalidArgument(format!(
            "dst holds {} floats, but src has {} bytes; they must be equal",
            dst.len(),
            src.len()
        )));
    }
    let (red, rest) = dst.split_at_mut(src.len() / 3);
    let (green, blue) = rest.split_at_mut(src.len() / 3);
    let planes = [red, green, blue];
    match kernel {
        Kernel::Scalar => scalar(src, normalization, planes),
        #[cfg(target_arch = "wasm32")]
        Kernel::Simd128 => crate::simd::simd128(src, normalization, planes),
        #[cfg(target_arch = "wasm32")]
        Kernel::RelaxedSimd => crate::simd::relaxed_simd(src, normalization, planes),
    }
    Ok(())
}

/// One pixel at a time. The SIMD kernels also use it for the pixels that are left over.
pub(crate) fn scalar(src: &[u8], n: &Normalization, [red, green, blue]: [&mut [f32]; 3]) {
    let pixels = src.chunks_exact(3);
    for (((pixel, r), g), b) in pixels.zip(red).zip(green).zip(blue) {
        *r = f32::from(pixel[0]) * n.scale[0] + n.bias[0];
        *g = f32::from(pixel[1]) * n.scale[1] + n.bias[1];
        *b = f32::from(pixel[2]) * n.scale[2] + n.bias[2];
    }
}
