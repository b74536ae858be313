//! The vector instructions that the kernels need, under one name for each machine.
//!
//! All methods are `inline(always)`: they become instructions only inside a function that enables
//! their CPU feature, as those of [`crate::simd`] do.

/// One or two halves of 128 bits, which all instructions treat alike.
pub(crate) trait Lanes: Copy {
    /// How many halves.
    const HALVES: usize;

    /// The same number in each 32-bit lane.
    fn i32(x: i32) -> Self;
    fn f32(x: f32) -> Self;

    /// 16 bytes from `p` and, for the other half, from `p + stride`.
    ///
    /// # Safety
    /// These bytes must be readable.
    unsafe fn load(p: *const u8, stride: usize) -> Self;

    /// All bytes to `p`.
    ///
    /// # Safety
    /// These bytes must be writable.
    unsafe fn store(self, p: *mut u8);

    /// Lane `I` (0 to 3) of each half: 4 bytes to `p` and, for the other half, to `p + stride`.
    ///
    /// # Safety
    /// These bytes must be writable.
    unsafe fn store_lane<const I: i32>(self, p: *mut u8, stride: usize);

    /// The channels of the 4 RGB pixels at byte 0, each value widened to a 32-bit lane.
    fn channels(self) -> [Self; 3];
    /// The same for the 4 pixels at byte 4.
    fn channels_at_4(self) -> [Self; 3];

    /// The 4 RGB pixels at byte 0 as 16-bit numbers: pixels 0 and 1, then pixels 2 and 3. The three
    /// channels are the 32-bit lanes 0 to 2, with a number from each pixel.
    fn pairs(self) -> [Self; 2];
    /// The same for 16 bytes of two rows: in each 32-bit lane, a 16-bit number from each row.
    fn pairs_with(self, other: Self) -> [Self; 4];

    /// The products of signed 16-bit numbers, of which each 32-bit lane has the sum of two.
    fn dot(self, other: Self) -> Self;
    /// 32-bit lanes: sum, and shift to the left; both drop what does not fit.
    fn add(self, other: Self) -> Self;
    fn shl<const BITS: i32>(self) -> Self;
    /// The upper byte of each 32-bit lane: in each half, those of the first vector come first.
    fn upper_bytes(four: [Self; 4]) -> Self;
    /// The four 32-bit numbers at `p`, each in all lanes of a vector.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_each(p: *const i32) -> [Self; 4];

    /// `self * scale + bias`, of 32-bit integers as floats.
    fn scaled(self, scale: Self, bias: Self) -> Self;
    /// The same, but the machine may round once instead of twice.
    #[inline(always)]
    fn scaled_relaxed(self, scale: Self, bias: Self) -> Self {
        self.scaled(scale, bias)
    }
}

#[cfg(target_arch = "wasm32")]
mod wasm {
    use core::arch::wasm32::*;

    use super::Lanes;

    /// Three channels of pixels whose bytes are [red, green, -, blue] in each lane.
    #[inline(always)]
    fn split(pixels: v128) -> [v128; 3] {
        let byte = u32x4_splat(255);
        [v128_and(pixels, byte), v128_and(u32x4_shr(pixels, 8), byte), u32x4_shr(pixels, 24)]
    }

    impl Lanes for v128 {
        const HALVES: usize = 1;

        #[inline(always)]
        fn i32(x: i32) -> Self {
            i32x4_splat(x)
        }
        #[inline(always)]
        fn f32(x: f32) -> Self {
            f32x4_splat(x)
        }
        #[inline(always)]
        unsafe fn load(p: *const u8, _stride: usize) -> Self {
            // SAFETY: the caller's promise.
            unsafe { v128_load(p.cast()) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut u8) {
            // SAFETY: the caller's promise.
            unsafe { v128_store(p.cast(), self) }
        }
        #[inline(always)]
        unsafe fn store_lane<const I: i32>(self, p: *mut u8, _stride: usize) {
            // SAFETY: the caller's promise.
            unsafe {
                match I {
                    0 => v128_store32_lane::<0>(self, p.cast()),
                    1 => v128_store32_lane::<1>(self, p.cast()),
                    2 => v128_store32_lane::<2>(self, p.cast()),
                    _ => v128_store32_lane::<3>(self, p.cast()),
                }
            }
        }
        // One shuffle, and shifts. A swizzle for each channel, as for x86 below, is slower: LLVM makes
        // a shuffle with a vector of zeros of it, which is several instructions of a CPU.
        #[inline(always)]
        #[rustfmt::skip]
        fn channels(self) -> [Self; 3] {
            split(u8x16_shuffle::<0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11>(self, self))
        }
        #[inline(always)]
        #[rustfmt::skip]
        fn channels_at_4(self) -> [Self; 3] {
            split(u8x16_shuffle::<4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15>(self, self))
        }
        #[inline(always)]
        fn pairs(self) -> [Self; 2] {
            let both =
                u8x16_shuffle::<0, 3, 1, 4, 2, 5, 2, 5, 6, 9, 7, 10, 8, 11, 8, 11>(self, self);
            [u16x8_extend_low_u8x16(both), u16x8_extend_high_u8x16(both)]
        }
        #[inline(always)]
        fn pairs_with(self, other: Self) -> [Self; 4] {
            let low = u8x16_shuffle::<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(
                self, other,
            );
            let high = u8x16_shuffle::<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(
                self, other,
            );
            [
                u16x8_extend_low_u8x16(low),
                u16x8_extend_high_u8x16(low),
                u16x8_extend_low_u8x16(high),
                u16x8_extend_high_u8x16(high),
            ]
        }
        #[inline(always)]
        fn dot(self, other: Self) -> Self {
            i32x4_dot_i16x8(self, other)
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            i32x4_add(self, other)
        }
        #[inline(always)]
        fn shl<const BITS: i32>(self) -> Self {
            i32x4_shl(self, BITS as u32)
        }
        #[inline(always)]
        fn upper_bytes([a, b, c, d]: [Self; 4]) -> Self {
            let ab =
                u8x16_shuffle::<3, 7, 11, 15, 19, 23, 27, 31, 3, 7, 11, 15, 19, 23, 27, 31>(a, b);
            let cd =
                u8x16_shuffle::<3, 7, 11, 15, 19, 23, 27, 31, 3, 7, 11, 15, 19, 23, 27, 31>(c, d);
            u64x2_shuffle::<0, 2>(ab, cd)
        }
        #[inline(always)]
        unsafe fn load_each(p: *const i32) -> [Self; 4] {
            // SAFETY: the caller's promise.
            let four = unsafe { v128_load(p.cast()) };
            [
                u32x4_shuffle::<0, 0, 0, 0>(four, four),
                u32x4_shuffle::<1, 1, 1, 1>(four, four),
                u32x4_shuffle::<2, 2, 2, 2>(four, four),
                u32x4_shuffle::<3, 3, 3, 3>(four, four),
            ]
        }
        #[inline(always)]
        fn scaled(self, scale: Self, bias: Self) -> Self {
            f32x4_add(f32x4_mul(f32x4_convert_i32x4(self), scale), bias)
        }
        #[inline(always)]
        fn scaled_relaxed(self, scale: Self, bias: Self) -> Self {
            f32x4_relaxed_madd(f32x4_convert_i32x4(self), scale, bias)
        }
    }
}

/// For the comparison with native code. `PSHUFB` writes a zero where an index is negative.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;

    use super::Lanes;

    /// Indices of one channel of the 4 RGB pixels at a byte.
    #[inline(always)]
    fn channel(first: i8) -> __m128i {
        #[rustfmt::skip]
        let at = [
            first, -1, -1, -1, first + 3, -1, -1, -1,
            first + 6, -1, -1, -1, first + 9, -1, -1, -1,
        ];
        // SAFETY: the array has 16 bytes.
        unsafe { _mm_loadu_si128(at.as_ptr().cast()) }
    }

    /// Indices of two RGB pixels' channels, side by side.
    #[inline(always)]
    fn pair(first: i8) -> __m128i {
        #[rustfmt::skip]
        let at = [
            first, -1, first + 3, -1, first + 1, -1, first + 4, -1,
            first + 2, -1, first + 5, -1, -1, -1, -1, -1,
        ];
        // SAFETY: the array has 16 bytes.
        unsafe { _mm_loadu_si128(at.as_ptr().cast()) }
    }

    // SAFETY, for every block here: the methods run inside functions that enable sse4.1, which
    // their callers checked; pointers are the caller's promise. (From Rust 1.87 on, most of these
    // instructions are safe there.)
    #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
    impl Lanes for __m128i {
        const HALVES: usize = 1;

        #[inline(always)]
        fn i32(x: i32) -> Self {
            unsafe { _mm_set1_epi32(x) }
        }
        #[inline(always)]
        fn f32(x: f32) -> Self {
            unsafe { _mm_castps_si128(_mm_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const u8, _stride: usize) -> Self {
            unsafe { _mm_loadu_si128(p.cast()) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut u8) {
            unsafe { _mm_storeu_si128(p.cast(), self) }
        }
        #[inline(always)]
        unsafe fn store_lane<const I: i32>(self, p: *mut u8, _stride: usize) {
            unsafe { p.cast::<i32>().write_unaligned(_mm_extract_epi32::<I>(self)) }
        }
        #[inline(always)]
        fn channels(self) -> [Self; 3] {
            unsafe {
                [
                    _mm_shuffle_epi8(self, channel(0)),
                    _mm_shuffle_epi8(self, channel(1)),
                    _mm_shuffle_epi8(self, channel(2)),
                ]
            }
        }
        #[inline(always)]
        fn channels_at_4(self) -> [Self; 3] {
            unsafe {
                [
                    _mm_shuffle_epi8(self, channel(4)),
                    _mm_shuffle_epi8(self, channel(5)),
                    _mm_shuffle_epi8(self, channel(6)),
                ]
            }
        }
        #[inline(always)]
        fn pairs(self) -> [Self; 2] {
            unsafe { [_mm_shuffle_epi8(self, pair(0)), _mm_shuffle_epi8(self, pair(6))] }
        }
        #[inline(always)]
        fn pairs_with(self, other: Self) -> [Self; 4] {
            unsafe {
                let zero = _mm_setzero_si128();
                let (low, high) = (_mm_unpacklo_epi8(self, other), _mm_unpackhi_epi8(self, other));
                [
                    _mm_unpacklo_epi8(low, zero),
                    _mm_unpackhi_epi8(low, zero),
                    _mm_unpacklo_epi8(high, zero),
                    _mm_unpackhi_epi8(high, zero),
                ]
            }
        }
        #[inline(always)]
        fn dot(self, other: Self) -> Self {
            unsafe { _mm_madd_epi16(self, other) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { _mm_add_epi32(self, other) }
        }
        #[inline(always)]
        fn shl<const BITS: i32>(self) -> Self {
            unsafe { _mm_slli_epi32::<BITS>(self) }
        }
        #[inline(always)]
        fn upper_bytes([a, b, c, d]: [Self; 4]) -> Self {
            unsafe {
                let ab = _mm_packs_epi32(_mm_srli_epi32::<24>(a), _mm_srli_epi32::<24>(b));
                let cd = _mm_packs_epi32(_mm_srli_epi32::<24>(c), _mm_srli_epi32::<24>(d));
                _mm_packus_epi16(ab, cd)
            }
        }
        #[inline(always)]
        unsafe fn load_each(p: *const i32) -> [Self; 4] {
            unsafe {
                [
                    _mm_set1_epi32(*p),
                    _mm_set1_epi32(*p.add(1)),
                    _mm_set1_epi32(*p.add(2)),
                    _mm_set1_epi32(*p.add(3)),
                ]
            }
        }
        #[inline(always)]
        fn scaled(self, scale: Self, bias: Self) -> Self {
            unsafe {
                let product = _mm_mul_ps(_mm_cvtepi32_ps(self), _mm_castsi128_ps(scale));
                _mm_castps_si128(_mm_add_ps(product, _mm_castsi128_ps(bias)))
            }
        }
    }

    #[inline(always)]
    fn twice(half: __m128i) -> __m256i {
        // SAFETY: as below.
        unsafe { _mm256_broadcastsi128_si256(half) }
    }

    // SAFETY: as above, with avx2.
    #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
    impl Lanes for __m256i {
        const HALVES: usize = 2;

        #[inline(always)]
        fn i32(x: i32) -> Self {
            unsafe { _mm256_set1_epi32(x) }
        }
        #[inline(always)]
        fn f32(x: f32) -> Self {
            unsafe { _mm256_castps_si256(_mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const u8, stride: usize) -> Self {
            unsafe {
                let low = _mm256_castsi128_si256(_mm_loadu_si128(p.cast()));
                _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(p.add(stride).cast()))
            }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut u8) {
            unsafe { _mm256_storeu_si256(p.cast(), self) }
        }
        #[inline(always)]
        unsafe fn store_lane<const I: i32>(self, p: *mut u8, stride: usize) {
            unsafe {
                let low = _mm256_castsi256_si128(self);
                let high = _mm256_extracti128_si256::<1>(self);
                p.cast::<i32>().write_unaligned(_mm_extract_epi32::<I>(low));
                p.add(stride).cast::<i32>().write_unaligned(_mm_extract_epi32::<I>(high));
            }
        }
        #[inline(always)]
        fn channels(self) -> [Self; 3] {
            unsafe {
                [
                    _mm256_shuffle_epi8(self, twice(channel(0))),
                    _mm256_shuffle_epi8(self, twice(channel(1))),
                    _mm256_shuffle_epi8(self, twice(channel(2))),
                ]
            }
        }
        #[inline(always)]
        fn channels_at_4(self) -> [Self; 3] {
            unsafe {
                [
                    _mm256_shuffle_epi8(self, twice(channel(4))),
                    _mm256_shuffle_epi8(self, twice(channel(5))),
                    _mm256_shuffle_epi8(self, twice(channel(6))),
                ]
            }
        }
        #[inline(always)]
        fn pairs(self) -> [Self; 2] {
            unsafe {
                [
                    _mm256_shuffle_epi8(self, twice(pair(0))),
                    _mm256_shuffle_epi8(self, twice(pair(6))),
                ]
            }
        }
        #[inline(always)]
        fn pairs_with(self, other: Self) -> [Self; 4] {
            unsafe {
                let zero = _mm256_setzero_si256();
                let low = _mm256_unpacklo_epi8(self, other);
                let high = _mm256_unpackhi_epi8(self, other);
                [
                    _mm256_unpacklo_epi8(low, zero),
                    _mm256_unpackhi_epi8(low, zero),
                    _mm256_unpacklo_epi8(high, zero),
                    _mm256_unpackhi_epi8(high, zero),
                ]
            }
        }
        #[inline(always)]
        fn dot(self, other: Self) -> Self {
            unsafe { _mm256_madd_epi16(self, other) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_epi32(self, other) }
        }
        #[inline(always)]
        fn shl<const BITS: i32>(self) -> Self {
            unsafe { _mm256_slli_epi32::<BITS>(self) }
        }
        #[inline(always)]
        fn upper_bytes([a, b, c, d]: [Self; 4]) -> Self {
            unsafe {
                let (a, b) = (_mm256_srli_epi32::<24>(a), _mm256_srli_epi32::<24>(b));
                let (c, d) = (_mm256_srli_epi32::<24>(c), _mm256_srli_epi32::<24>(d));
                _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d))
            }
        }
        #[inline(always)]
        unsafe fn load_each(p: *const i32) -> [Self; 4] {
            unsafe {
                [
                    _mm256_set1_epi32(*p),
                    _mm256_set1_epi32(*p.add(1)),
                    _mm256_set1_epi32(*p.add(2)),
                    _mm256_set1_epi32(*p.add(3)),
                ]
            }
        }
        #[inline(always)]
        fn scaled(self, scale: Self, bias: Self) -> Self {
            unsafe {
                let product = _mm256_mul_ps(_mm256_cvtepi32_ps(self), _mm256_castsi256_ps(scale));
                _mm256_castps_si256(_mm256_add_ps(product, _mm256_castsi256_ps(bias)))
            }
        }
    }
}
