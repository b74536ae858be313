//! Which implementation runs.

use crate::Error;
use crate::normalize::Normalization;
use crate::resize::{Filter, HALF, Taps, to_u8};

/// The normalisation, for one machine.
pub(crate) trait Machine {
    type Resize: Resize;

    /// RGB pixels to three planes of as many floats.
    fn normalize(src: &[u8], n: &Normalization, planes: [&mut [f32]; 3]);
}

/// The inner loops of the resize, for one machine. All give the same bytes.
pub(crate) trait Resize {
    /// How many rows [`Resize::shrink_rows`] takes.
    const ROWS: usize;

    /// The horizontal pass for `ROWS` rows, which lie one after the other.
    fn shrink_rows(src: &[u8], filter: &Filter, dst: &mut [u8]);

    /// One row of the vertical pass: the sum of weight times row. The rows are as long as `dst`, and
    /// lie one after the other; there are at least as many as weights.
    fn blend_rows(rows: &[u8], filter: &Filter, taps: &Taps, dst: &mut [u8]);
}

/// One value after the other, without vectors unless the compiler finds them.
pub(crate) struct Scalar;

impl Machine for Scalar {
    type Resize = Self;

    #[inline(never)]
    fn normalize(src: &[u8], n: &Normalization, [red, green, blue]: [&mut [f32]; 3]) {
        let pixels = src.chunks_exact(3);
        for (((pixel, r), g), b) in pixels.zip(red).zip(green).zip(blue) {
            *r = f32::from(pixel[0]) * n.scale[0] + n.bias[0];
            *g = f32::from(pixel[1]) * n.scale[1] + n.bias[1];
            *b = f32::from(pixel[2]) * n.scale[2] + n.bias[2];
        }
    }
}

impl Scalar {
    /// A row of the horizontal pass, from one of its pixels on.
    #[inline(never)]
    pub(crate) fn shrink(src: &[u8], filter: &Filter, first: usize, dst: &mut [u8]) {
        let outputs = filter.outputs[first..].iter();
        for (taps, pixel) in outputs.zip(dst[3 * first..].chunks_exact_mut(3)) {
            let mut sums = [HALF; 3];
            let pixels = src[3 * taps.source..].chunks_exact(3);
            for (source, &weight) in pixels.zip(filter.weights(taps)) {
                for (sum, &x) in sums.iter_mut().zip(source) {
                    *sum += weight * i32::from(x);
                }
            }
            for (value, sum) in pixel.iter_mut().zip(sums) {
                *value = to_u8(sum);
            }
        }
    }
}

impl Resize for Scalar {
    const ROWS: usize = 1;

    #[inline(always)]
    fn shrink_rows(src: &[u8], filter: &Filter, dst: &mut [u8]) {
        Self::shrink(src, filter, 0, dst);
    }

    #[inline(never)]
    fn blend_rows(rows: &[u8], filter: &Filter, taps: &Taps, dst: &mut [u8]) {
        // A few sums at a time, row by row: so the compiler has loops that it can make vectors of.
        const STEP: usize = 64;
        let len = dst.len();
        for (i, dst) in dst.chunks_mut(STEP).enumerate() {
            let mut sums = [HALF; STEP];
            for (row, &weight) in rows.chunks_exact(len).zip(filter.weights(taps)) {
                for (sum, &x) in sums.iter_mut().zip(&row[STEP * i..]) {
                    *sum += weight * i32::from(x);
                }
            }
            for (value, sum) in dst.iter_mut().zip(sums) {
                *value = to_u8(sum);
            }
        }
    }
}

/// An implementation of the kernels. There are those that the machine's architecture can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    Scalar,
    #[cfg(target_arch = "wasm32")]
    Simd128,
    #[cfg(target_arch = "wasm32")]
    RelaxedSimd,
    #[cfg(target_arch = "x86_64")]
    Sse41,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Kernel {
    #[cfg(target_arch = "wasm32")]
    pub const ALL: &[Kernel] = &[Self::Scalar, Self::Simd128, Self::RelaxedSimd];
    #[cfg(target_arch = "x86_64")]
    pub const ALL: &[Kernel] = &[Self::Scalar, Self::Sse41, Self::Avx2];
    #[cfg(not(any(target_arch = "wasm32", target_arch = "x86_64")))]
    pub const ALL: &[Kernel] = &[Self::Scalar];

    /// The fastest one whose result is the same on every machine, and which each of them has.
    #[cfg(target_arch = "wasm32")]
    pub const PORTABLE: Kernel = Self::Simd128;
    #[cfg(not(target_arch = "wasm32"))]
    pub const PORTABLE: Kernel = Self::Scalar;

    /// Whether its result is that of `Scalar` bit for bit.
    pub fn is_exact(self) -> bool {
        #[cfg(target_arch = "wasm32")]
        return self != Self::RelaxedSimd;
        #[cfg(not(target_arch = "wasm32"))]
        true
    }

    /// Whether this CPU has the instructions. A Wasm module is not loaded where they are missing.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Sse41 => std::arch::is_x86_feature_detected!("sse4.1"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            _ => true,
        }
    }
}

#[cold]
pub(crate) fn missing(kernel: Kernel) -> Error {
    Error::InvalidArgument(format!("this CPU lacks the instructions of {kernel:?}"))
}

/// Calls a function that is generic over a [`Machine`].
macro_rules! on {
    ($kernel:expr, $function:ident($($argument:expr),*)) => {
        match $kernel {
            kernel if !kernel.is_available() => Err($crate::kernel::missing(kernel)),
            #[cfg(target_arch = "wasm32")]
            Kernel::Simd128 => $function::<$crate::simd::Simd128>($($argument),*),
            #[cfg(target_arch = "wasm32")]
            Kernel::RelaxedSimd => $function::<$crate::simd::RelaxedSimd>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kernel::Sse41 => $function::<$crate::simd::Sse41>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => $function::<$crate::simd::Avx2>($($argument),*),
            Kernel::Scalar => $function::<$crate::kernel::Scalar>($($argument),*),
        }
    };
}
pub(crate) use on;
