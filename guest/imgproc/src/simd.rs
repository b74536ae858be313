//! The normalisation on 128-bit vectors: 16 pixels a step, 4 floats an instruction.

use core::arch::wasm32::*;

use crate::Normalization;
use crate::normalize::scalar;

/// Swizzle indices that pick one channel of the 4 RGB pixels starting at byte `first`. The index
/// 255 is out of range and gives a zero byte, so each u8 comes out widened to a 32-bit lane.
#[rustfmt::skip]
const fn pick(first: u8, channel: u8) -> v128 {
    const ZERO: u8 = 255;
    let a = first + channel;
    u8x16(
        a, ZERO, ZERO, ZERO,
        a + 3, ZERO, ZERO, ZERO,
        a + 6, ZERO, ZERO, ZERO,
        a + 9, ZERO, ZERO, ZERO,
    )
}

const FROM_0: [v128; 3] = [pick(0, 0), pick(0, 1), pick(0, 2)];
const FROM_4: [v128; 3] = [pick(4, 0), pick(4, 1), pick(4, 2)];

/// 16 pixels are 48 bytes, read by four loads of 16 bytes, 4 pixels from each: where the load
/// starts, and the indices of its pixels. The last one starts 4 bytes early, or it would read
/// past the end.
const LOADS: [(usize, [v128; 3]); 4] = [(0, FROM_0), (12, FROM_0), (24, FROM_0), (32, FROM_4)];

/// Both kernels are one loop. They differ in the multiply-add, and so in the CPU feature.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $feature:tt, $multiply_add:expr) => {
        $(#[$doc])*
        #[target_feature(enable = $feature)]
        pub(crate) fn $name(src: &[u8], n: &Normalization, [red, green, blue]: [&mut [f32]; 3]) {
            let scale = [f32x4_splat(n.scale[0]), f32x4_splat(n.scale[1]), f32x4_splat(n.scale[2])];
            let bias = [f32x4_splat(n.bias[0]), f32x4_splat(n.bias[1]), f32x4_splat(n.bias[2])];
            let blocks = src.chunks_exact(48);
            let r = red.chunks_exact_mut(16);
            let g = green.chunks_exact_mut(16);
            let b = blue.chunks_exact_mut(16);
            for (((block, r), g), b) in blocks.zip(r).zip(g).zip(b) {
                // SAFETY: a load starts at byte 32 at most, and block has 48 bytes.
                let pixels = LOADS.map(|(at, _)| unsafe { v128_load(block.as_ptr().add(at).cast()) });
                let planes = [r, g, b];
                for c in 0..3 {
                    for i in 0..4 {
                        let x = f32x4_convert_i32x4(u8x16_swizzle(pixels[i], LOADS[i].1[c]));
                        let y = $multiply_add(x, scale[c], bias[c]);
                        // SAFETY: 4 * i is at most 12, and each plane has 16 floats.
                        unsafe { v128_store(planes[c].as_mut_ptr().add(4 * i).cast(), y) };
                    }
                }
            }
            let done = src.len() / 48 * 16;
            let rest = [&mut red[done..], &mut green[done..], &mut blue[done..]];
            scalar(&src[3 * done..], n, rest);
        }
    };
}

kernel! {
    /// Multiplies, rounds, adds, rounds: bit for bit what [`scalar`] computes.
    simd128, "simd128", |x, scale, bias| f32x4_add(f32x4_mul(x, scale), bias)
}

kernel! {
    /// May round once instead of twice, as the machine likes (a fused multiply-add if it has one).
    relaxed_simd, "relaxed-simd", |x, scale, bias| f32x4_relaxed_madd(x, scale, bias)
}
