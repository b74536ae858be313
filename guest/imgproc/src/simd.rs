//! The kernels on vectors: once, for every machine that [`Lanes`] knows.

use crate::kernel::{Machine, Resize, Scalar};
use crate::lanes::Lanes;
use crate::normalize::Normalization;
use crate::resize::{Filter, HALF, LOW_BITS, SPARE_BITS, Taps, padded};

/// What [`Scalar`] does, 4 pixels of each half at once.
#[inline(always)]
fn normalize<L: Lanes, const RELAXED: bool>(
    src: &[u8],
    n: &Normalization,
    [red, green, blue]: [&mut [f32]; 3],
) {
    let (pixels, step) = (src.len() / 3, 16 * L::HALVES);
    if pixels < step {
        return Scalar::normalize(src, n, [red, green, blue]);
    }
    assert!(red.len() >= pixels && green.len() >= pixels && blue.len() >= pixels);
    let all = Pointers {
        src: src.as_ptr(),
        planes: [red.as_mut_ptr(), green.as_mut_ptr(), blue.as_mut_ptr()],
    };
    let factors = Factors {
        scale: [L::f32(n.scale[0]), L::f32(n.scale[1]), L::f32(n.scale[2])],
        bias: [L::f32(n.bias[0]), L::f32(n.bias[1]), L::f32(n.bias[2])],
    };
    // Four steps a turn: a Wasm runtime looks at the clock in each turn of a loop.
    let mut to = all;
    for _ in 0..pixels / (4 * step) {
        // SAFETY: so many steps of 4 fit in.
        unsafe {
            factors.step::<RELAXED>(to);
            factors.step::<RELAXED>(to.at(step));
            factors.step::<RELAXED>(to.at(2 * step));
            factors.step::<RELAXED>(to.at(3 * step));
            to = to.at(4 * step);
        }
    }
    let mut done = pixels / (4 * step) * (4 * step);
    while done < pixels {
        // The last step overlaps the one before, where the length is no multiple.
        let at = done.min(pixels - step);
        // SAFETY: a step from there ends at `pixels` or earlier.
        unsafe { factors.step::<RELAXED>(all.at(at)) };
        done = at + step;
    }
}

/// A pixel, where it is and where it goes.
#[derive(Clone, Copy)]
struct Pointers {
    src: *const u8,
    planes: [*mut f32; 3],
}

impl Pointers {
    /// The pixel `pixels` further on.
    ///
    /// # Safety
    /// It, or the one before, must be there.
    #[inline(always)]
    unsafe fn at(self, pixels: usize) -> Self {
        let [r, g, b] = self.planes;
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                src: self.src.add(3 * pixels),
                planes: [r.add(pixels), g.add(pixels), b.add(pixels)],
            }
        }
    }
}

struct Factors<L> {
    scale: [L; 3],
    bias: [L; 3],
}

impl<L: Lanes> Factors<L> {
    /// Normalises 16 pixels of each half.
    ///
    /// # Safety
    /// There must be so many at the pointers.
    #[inline(always)]
    unsafe fn step<const RELAXED: bool>(&self, Pointers { src, planes: [r, g, b] }: Pointers) {
        let chunk = 4 * L::HALVES;
        // SAFETY: the caller's promise. 12 bytes a half are used, and 16 read; the last read begins
        // 4 bytes early, or it would end behind the pixels.
        unsafe {
            let p = L::load(src, 12).channels();
            let q = L::load(src.add(3 * chunk), 12).channels();
            let s = L::load(src.add(6 * chunk), 12).channels();
            let t = L::load(src.add(9 * chunk - 4), 12).channels_at_4();
            // A plane gets a whole cache line before the next one does.
            self.line::<RELAXED>(r, 0, [p[0], q[0], s[0], t[0]]);
            self.line::<RELAXED>(g, 1, [p[1], q[1], s[1], t[1]]);
            self.line::<RELAXED>(b, 2, [p[2], q[2], s[2], t[2]]);
        }
    }

    /// # Safety
    /// `to` must have room for 4 vectors.
    #[inline(always)]
    unsafe fn line<const RELAXED: bool>(&self, to: *mut f32, channel: usize, [p, q, s, t]: [L; 4]) {
        let (scale, bias, chunk) = (self.scale[channel], self.bias[channel], 4 * L::HALVES);
        // SAFETY: the caller's promise.
        unsafe {
            scaled::<L, RELAXED>(p, scale, bias).store(to.cast());
            scaled::<L, RELAXED>(q, scale, bias).store(to.add(chunk).cast());
            scaled::<L, RELAXED>(s, scale, bias).store(to.add(2 * chunk).cast());
            scaled::<L, RELAXED>(t, scale, bias).store(to.add(3 * chunk).cast());
        }
    }
}

#[inline(always)]
fn scaled<L: Lanes, const RELAXED: bool>(x: L, scale: L, bias: L) -> L {
    if RELAXED { x.scaled_relaxed(scale, bias) } else { x.scaled(scale, bias) }
}

/// Sums of products of [`Filter::pairs`] and bytes. The sum of a weight's lower bits and that of
/// its upper bits are apart; both may lose what is above 32 bits, for the result has 32.
#[derive(Clone, Copy)]
struct Sum<L> {
    low: L,
    high: L,
}

impl<L: Lanes> Sum<L> {
    #[inline(always)]
    fn half() -> Self {
        Self { low: L::i32(HALF << SPARE_BITS), high: L::i32(0) }
    }

    #[inline(always)]
    fn add(self, pairs: L, low: L, high: L) -> Self {
        Self { low: self.low.add(pairs.dot(low)), high: self.high.add(pairs.dot(high)) }
    }

    /// Adds 4 RGB pixels.
    ///
    /// # Safety
    /// See [`Lanes::load`].
    #[inline(always)]
    unsafe fn add_pixels(self, from: *const u8, stride: usize, weights: [L; 4]) -> Self {
        // SAFETY: the caller's promise.
        let [a, b] = unsafe { L::load(from, stride) }.pairs();
        self.add(a, weights[0], weights[1]).add(b, weights[2], weights[3])
    }

    /// The result is the upper byte.
    #[inline(always)]
    fn value(self) -> L {
        self.low.add(self.high.shl::<LOW_BITS>())
    }
}

/// The results of four sums.
#[inline(always)]
fn bytes<L: Lanes>([a, b, c, d]: [Sum<L>; 4]) -> L {
    L::upper_bytes([a.value(), b.value(), c.value(), d.value()])
}

/// Rows in a half that [`shrink_rows`] takes: they share the weights, and what a loop costs.
const ROWS: usize = 8;

/// What [`Scalar`] does, for [`ROWS`] rows in each half.
#[inline(always)]
fn shrink_rows<L: Lanes>(src: &[u8], filter: &Filter, dst: &mut [u8]) {
    let rows = ROWS * L::HALVES;
    let (src_len, dst_len) = (src.len() / rows, dst.len() / rows);
    let roomy = &filter.outputs[..filter.roomy];
    let mut rest = filter.pairs.as_slice();
    assert!(src_len == 3 * filter.side && 3 * roomy.len() < dst_len);
    for (i, taps) in roomy.iter().enumerate() {
        let (pairs, later) = rest.split_at(padded(taps.count));
        rest = later;
        // SAFETY: at a roomy place, all that is read is in the row; and there are `rows` rows.
        let (upper, lower) = unsafe {
            let from = src.as_ptr().add(3 * taps.source);
            (
                shrink_four::<L>(from, src_len, pairs),
                shrink_four::<L>(from.add(rows / 2 * src_len), src_len, pairs),
            )
        };
        // SAFETY: the 4 bytes are in the row.
        unsafe {
            let to = dst.as_mut_ptr().add(3 * i);
            store_four(upper, to, dst_len);
            store_four(lower, to.add(rows / 2 * dst_len), dst_len);
        }
    }
    for (src, dst) in src.chunks_exact(src_len).zip(dst.chunks_exact_mut(dst_len)) {
        Scalar::shrink(src, filter, filter.roomy, dst);
    }
}

/// One result for 4 rows of each half, which are `len` bytes long.
///
/// # Safety
/// From `from` on, 12 bytes for each 4 weights, and 4 more, must be readable in each row.
#[inline(always)]
unsafe fn shrink_four<L: Lanes>(from: *const u8, len: usize, pairs: &[i32]) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        // Mostly there is no second group.
        let mut sums = add_pixels([Sum::<L>::half(); 4], from, len, pairs);
        for group in 1..pairs.len() / 4 {
            sums = add_pixels(sums, from.add(12 * group), len, &pairs[4 * group..]);
        }
        bytes(sums)
    }
}

/// # Safety
/// 4 bytes must be writable at `to` and, `len` bytes further each time, in the other rows.
#[inline(always)]
unsafe fn store_four<L: Lanes>(four: L, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        four.store_lane::<0>(to, 4 * len);
        four.store_lane::<1>(to.add(len), 4 * len);
        four.store_lane::<2>(to.add(2 * len), 4 * len);
        four.store_lane::<3>(to.add(3 * len), 4 * len);
    }
}

/// Adds 4 RGB pixels of each row.
///
/// # Safety
/// 16 bytes must be readable from `from` and, `len` bytes further each time, from the other rows.
#[inline(always)]
unsafe fn add_pixels<L: Lanes>(
    [a, b, c, d]: [Sum<L>; 4],
    from: *const u8,
    len: usize,
    pairs: &[i32],
) -> [Sum<L>; 4] {
    assert!(pairs.len() >= 4);
    // SAFETY: there are 4 numbers; and the caller's promise.
    unsafe {
        let weights = L::load_each(pairs.as_ptr());
        [
            a.add_pixels(from, 4 * len, weights),
            b.add_pixels(from.add(len), 4 * len, weights),
            c.add_pixels(from.add(2 * len), 4 * len, weights),
            d.add_pixels(from.add(3 * len), 4 * len, weights),
        ]
    }
}

/// What [`Scalar`] does, 16 values of each half at once.
#[inline(always)]
fn blend_rows<L: Lanes>(rows: &[u8], filter: &Filter, taps: &Taps, dst: &mut [u8]) {
    let (len, step) = (dst.len(), 16 * L::HALVES);
    if len < step {
        return Scalar::blend_rows(rows, filter, taps, dst);
    }
    let (pairs, count) = (filter.pairs(taps), taps.count);
    assert!(count > 0 && rows.len() >= len * count);
    // Where there are no 4 rows, the weight is 0, whatever row it is for.
    let row = |i: usize| rows[i.min(count - 1) * len..].as_ptr();
    let group = |i: usize| ([row(i), row(i + 1), row(i + 2), row(i + 3)], &pairs[i..]);
    let first = group(0);
    let mut at = 0;
    loop {
        // SAFETY: at + step <= len, which is the length of each row.
        let done = unsafe {
            let mut sums = add_rows([Sum::<L>::half(); 4], first, at);
            for i in (4..count).step_by(4) {
                sums = add_rows(sums, group(i), at);
            }
            bytes(sums)
        };
        // SAFETY: at + step <= len.
        unsafe { done.store(dst.as_mut_ptr().add(at)) };
        if at + step == len {
            return;
        }
        // The last step overlaps the one before, where the row's length is no multiple.
        at = (at + step).min(len - step);
    }
}

/// Adds 16 values of each half from 4 rows.
///
/// # Safety
/// The rows must have those at `at`.
#[inline(always)]
unsafe fn add_rows<L: Lanes>(
    [a, b, c, d]: [Sum<L>; 4],
    (rows, pairs): ([*const u8; 4], &[i32]),
    at: usize,
) -> [Sum<L>; 4] {
    assert!(pairs.len() >= 4);
    // SAFETY: there are 4 numbers; and the caller's promise.
    let (weights, upper, lower) = unsafe {
        (
            L::load_each(pairs.as_ptr()),
            L::load(rows[0].add(at), 16).pairs_with(L::load(rows[1].add(at), 16)),
            L::load(rows[2].add(at), 16).pairs_with(L::load(rows[3].add(at), 16)),
        )
    };
    let [low, high, low_2, high_2] = weights;
    [
        a.add(upper[0], low, high).add(lower[0], low_2, high_2),
        b.add(upper[1], low, high).add(lower[1], low_2, high_2),
        c.add(upper[2], low, high).add(lower[2], low_2, high_2),
        d.add(upper[3], low, high).add(lower[3], low_2, high_2),
    ]
}

/// Implements [`Machine`] and [`Resize`] by functions that have the CPU features, into which all above is inlined.
macro_rules! machine {
    ($(#[$doc:meta])* $name:ident, $lanes:ty, $features:tt) => {
        $(#[$doc])*
        pub(crate) struct $name;

        // SAFETY, for the calls: a `Kernel` gets here only where its machine is available.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Machine for $name {
            type Resize = Self;

            #[inline(always)]
            fn normalize(src: &[u8], n: &Normalization, planes: [&mut [f32]; 3]) {
                #[target_feature(enable = $features)]
                unsafe fn run(src: &[u8], n: &Normalization, planes: [&mut [f32]; 3]) {
                    normalize::<$lanes, false>(src, n, planes);
                }
                unsafe { run(src, n, planes) }
            }
        }

        // SAFETY: as above.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Resize for $name {
            const ROWS: usize = ROWS * <$lanes>::HALVES;

            #[inline(always)]
            fn shrink_rows(src: &[u8], filter: &Filter, dst: &mut [u8]) {
                #[target_feature(enable = $features)]
                unsafe fn run(src: &[u8], filter: &Filter, dst: &mut [u8]) {
                    shrink_rows::<$lanes>(src, filter, dst);
                }
                unsafe { run(src, filter, dst) }
            }

            #[inline(always)]
            fn blend_rows(rows: &[u8], filter: &Filter, taps: &Taps, dst: &mut [u8]) {
                #[target_feature(enable = $features)]
                unsafe fn run(rows: &[u8], filter: &Filter, taps: &Taps, dst: &mut [u8]) {
                    blend_rows::<$lanes>(rows, filter, taps, dst);
                }
                unsafe { run(rows, filter, taps, dst) }
            }
        }
    };
}

#[cfg(target_arch = "wasm32")]
machine!(Simd128, core::arch::wasm32::v128, "simd128");

#[cfg(target_arch = "x86_64")]
machine! {
    /// The instructions that simd128 was made after.
    Sse41, core::arch::x86_64::__m128i, "sse4.1"
}

#[cfg(target_arch = "x86_64")]
machine! {
    /// Twice as wide.
    Avx2, core::arch::x86_64::__m256i, "avx2"
}

/// A normalisation that may round once instead of twice, as the machine likes (with a fused
/// multiply-add if it has one). The resize has integers only, and is that of [`Simd128`].
#[cfg(target_arch = "wasm32")]
pub(crate) struct RelaxedSimd;

#[cfg(target_arch = "wasm32")]
impl Machine for RelaxedSimd {
    type Resize = Simd128;

    #[inline(always)]
    fn normalize(src: &[u8], n: &Normalization, planes: [&mut [f32]; 3]) {
        #[target_feature(enable = "relaxed-simd")]
        unsafe fn run(src: &[u8], n: &Normalization, planes: [&mut [f32]; 3]) {
            normalize::<core::arch::wasm32::v128, true>(src, n, planes);
        }
        // SAFETY: a module with such instructions is loaded only where they are available.
        unsafe { run(src, n, planes) }
    }
}
