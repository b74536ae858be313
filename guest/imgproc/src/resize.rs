use crate::kernel::{Kernel, Machine, Resize, Scalar, on};
use crate::{Error, try_zeros};

pub const MAX_SIDE: u32 = 65_535;
pub const MAX_PIXELS: u64 = 1 << 26;
pub const MAX_RESIZE: u32 = 4096;

/// Filter weights are integers in units of 2^-22, as in Pillow.
const WEIGHT_BITS: u32 = 22;

/// A sum of weights times bytes has 8 bits more, and so many are left of 32.
pub(crate) const SPARE_BITS: u32 = 32 - 8 - WEIGHT_BITS;

/// What is below, and what is above, are numbers of 16 bits with a sign, whatever the weight is.
pub(crate) const LOW_BITS: i32 = 15;

/// Up to so many weights, their rounding can't make a sum pass 255: each is off by half at most.
/// There are never more. An axis of `side` pixels has 2 * side / resized weights for an output, and
/// not more than `side`; with [`MAX_PIXELS`], and the ratio of the sides kept, that is 14,189.
const MAX_WEIGHTS: usize = 1 << 14;

/// Sizes of an image and of the centre crop that is cut from its resized form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Geometry {
    width: u32,
    height: u32,
    resize: u32,
    crop: u32,
}

impl Geometry {
    /// All in pixels; `resize` is the length of the shorter side after the resize.
    pub fn new(width: u32, height: u32, resize: u32, crop: u32) -> Result<Self, Error> {
        let sides = 1..=MAX_SIDE;
        let pixels = u64::from(width) * u64::from(height);
        if !sides.contains(&width) || !sides.contains(&height) || pixels > MAX_PIXELS {
            return Err(Error::ImageSize(format!(
                "image of {width} x {height} px; a side must be 1..={MAX_SIDE}, all pixels at most {MAX_PIXELS}"
            )));
        }
        if crop == 0 || crop > resize || resize > MAX_RESIZE {
            return Err(Error::InvalidArgument(format!(
                "resize = {resize}, crop = {crop}; needed: 1 <= crop <= resize <= {MAX_RESIZE}"
            )));
        }
        Ok(Self { width, height, resize, crop })
    }

    /// The crop's side.
    pub(crate) fn crop(&self) -> usize {
        self.crop as usize
    }

    /// Number of values in the RGB crop.
    pub fn output_len(&self) -> usize {
        3 * self.crop as usize * self.crop as usize
    }

    fn check_output(&self, len: usize) -> Result<(), Error> {
        if len == self.output_len() {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "dst has {len} bytes, but a crop of {0} x {0} RGB pixels needs {1}",
            self.crop,
            self.output_len()
        )))
    }

    /// Bilinear weights along an axis of `side` source pixels, for the outputs inside the crop.
    fn filter(&self, side: u32) -> Result<Filter, Error> {
        // As in torchvision's Resize: the shorter side becomes `resize`, the other keeps the ratio.
        let shorter = u64::from(self.width.min(self.height));
        let resized = u64::from(side) * u64::from(self.resize) / shorter;
        // As in its CenterCrop: Python's round(), a half goes to the even neighbour.
        let margin = resized - u64::from(self.crop);
        let offset = margin / 2 + (margin % 2) * (margin / 2 % 2);
        Filter::new(side as usize, resized, offset, self.crop)
    }
}

/// For each output pixel along one axis, the source pixels that count and how much.
pub(crate) struct Filter {
    /// The length of the source.
    pub(crate) side: usize,
    pub(crate) outputs: Vec<Taps>,
    weights: Vec<i32>,
    /// The same in units of 2^-24, in parts of 16 bits: for every two weights their lower bits, then
    /// their upper bits. So a sum's upper byte is the result.
    pub(crate) pairs: Vec<i32>,
    /// How many outputs at the start have room behind them, in the source and in the result, for
    /// kernels that read 12 bytes for each 4 weights and 4 more, and write 4 bytes instead of 3.
    pub(crate) roomy: usize,
}

/// The number of weights with the zeros that follow.
pub(crate) fn padded(count: usize) -> usize {
    count.next_multiple_of(4)
}

/// Source pixels `source..source + count`, with the weights that begin at `first_weight`. Zeros
/// follow up to a multiple of 4, for kernels that take 4 at once.
#[derive(Clone, Copy, Default)]
pub(crate) struct Taps {
    pub(crate) source: usize,
    pub(crate) count: usize,
    first_weight: usize,
}

impl Filter {
    /// Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc` (libImaging/Resample.c), for the
    /// outputs `offset..offset + count` of `resized`. The filter is a triangle; when shrinking, it
    /// is as wide as the source pixels that fall together (antialiasing).
    fn new(side: usize, resized: u64, offset: u64, count: u32) -> Result<Self, Error> {
        let scale = side as f64 / resized as f64;
        let support = scale.max(1.0);
        let most_taps = (2 * support as usize + 3).min(side);
        let mut outputs = try_zeros::<Taps>(count as usize)?;
        let mut weights = try_zeros::<i32>(count as usize * padded(most_taps))?;
        let mut triangle = try_zeros::<f64>(most_taps)?;
        let mut used = 0;
        for (i, taps) in outputs.iter_mut().enumerate() {
            let center = ((offset + i as u64) as f64 + 0.5) * scale;
            // A cast from a negative number gives 0: the image's border.
            let source = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(side);
            *taps = Taps { source, count: end - source, first_weight: used };
            debug_assert!(taps.count <= MAX_WEIGHTS);
            let triangle = &mut triangle[..taps.count];
            for (x, weight) in triangle.iter_mut().enumerate() {
                let distance = ((x + source) as f64 - center + 0.5) * (1.0 / support);
                *weight = (1.0 - distance.abs()).max(0.0);
            }
            let total: f64 = triangle.iter().sum();
            for (fixed, weight) in weights[used..].iter_mut().zip(triangle) {
                *fixed = (0.5 + *weight / total * f64::from(1 << WEIGHT_BITS)) as i32;
            }
            used += padded(taps.count);
        }
        let mut pairs = try_zeros::<i32>(used)?;
        for (pair, weights) in pairs.chunks_exact_mut(2).zip(weights.chunks_exact(2)) {
            let (a, b) = (weights[0] << SPARE_BITS, weights[1] << SPARE_BITS);
            let low = (1 << LOW_BITS) - 1;
            pair[0] = (a & low) | (b & low) << 16;
            pair[1] = (a >> LOW_BITS) | (b >> LOW_BITS) << 16;
        }
        let has_room = |taps: &&Taps| 3 * (taps.source + padded(taps.count)) + 4 <= 3 * side;
        let roomy = outputs[..outputs.len() - 1].iter().take_while(has_room).count();
        Ok(Self { side, outputs, weights, pairs, roomy })
    }

    pub(crate) fn weights(&self, taps: &Taps) -> &[i32] {
        &self.weights[taps.first_weight..][..taps.count]
    }

    /// The same as pairs, with the zeros.
    pub(crate) fn pairs(&self, taps: &Taps) -> &[i32] {
        &self.pairs[taps.first_weight..][..padded(taps.count)]
    }

    /// The source pixels that count for any output.
    fn source_range(&self) -> std::ops::Range<usize> {
        let last = self.outputs[self.outputs.len() - 1];
        self.outputs[0].source..last.source + last.count
    }
}

/// Sums begin with one half, so that dropping the fraction rounds.
pub(crate) const HALF: i32 = 1 << (WEIGHT_BITS - 1);

/// Weights of a pixel add up to 1, but each is rounded: the sum may pass 255.
pub(crate) fn to_u8(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).min(255) as u8
}

/// RGB image (u8, HWC) to its resized centre crop (u8, HWC), bilinear with antialiasing: bit for
/// bit what Pillow's `resize(.., BILINEAR)` and a crop give. (Pillow 13 swaps the passes where the
/// height shrinks by more than twice as many pixels as the width; there it may differ by 1.)
///
/// Both steps are one: only the crop's pixels are computed. So a 1 x 4000 image, which would be
/// resized to 256 x 1,024,000 pixels, costs no more than any other. Source pixels around the crop
/// still count where the filter reaches them.
#[inline(always)]
pub fn resize_crop(
    src: &[u8],
    geometry: &Geometry,
    dst: &mut [u8],
    kernel: Kernel,
) -> Result<(), Error> {
    geometry.check_output(dst.len())?;
    on!(kernel, run(src, geometry, dst))
}

#[inline(always)]
fn run<M: Machine>(src: &[u8], geometry: &Geometry, dst: &mut [u8]) -> Result<(), Error> {
    let rows = Rows::new::<M::Resize>(src, geometry)?;
    for (y, row) in dst.chunks_exact_mut(3 * geometry.crop as usize).enumerate() {
        rows.blend::<M::Resize>(y, row);
    }
    Ok(())
}

/// An image whose rows have their final width: the first half of a resize.
pub(crate) struct Rows {
    narrow: Vec<u8>,
    row_len: usize,
    /// Which of the image's rows are in `narrow`.
    rows: std::ops::Range<usize>,
    across: Filter,
    down: Filter,
}

impl Rows {
    /// The horizontal pass, rounded to u8, comes first, as in Pillow.
    #[inline(always)]
    pub(crate) fn new<M: Resize>(src: &[u8], geometry: &Geometry) -> Result<Self, Error> {
        let mut rows = Self::empty(src.len(), geometry)?;
        rows.shrink::<M>(src);
        Ok(rows)
    }

    #[inline(never)]
    fn empty(src_len: usize, geometry: &Geometry) -> Result<Self, Error> {
        let Geometry { width, height, crop, .. } = *geometry;
        let needed = 3 * u64::from(width) * u64::from(height);
        if src_len as u64 != needed {
            return Err(Error::InvalidArgument(format!(
                "src has {src_len} bytes, but {width} x {height} RGB pixels need {needed}"
            )));
        }
        let across = geometry.filter(width)?;
        let down = geometry.filter(height)?;
        let rows = down.source_range();
        let row_len = 3 * crop as usize;
        Ok(Self { narrow: try_zeros(rows.len() * row_len)?, row_len, rows, across, down })
    }

    #[inline(never)]
    fn shrink<M: Resize>(&mut self, src: &[u8]) {
        let Self { narrow, row_len, rows, across, .. } = self;
        let (src_len, row_len) = (3 * across.side, *row_len);
        let src = &src[rows.start * src_len..rows.end * src_len];
        let groups = src.chunks_exact(M::ROWS * src_len);
        for (src, dst) in groups.zip(narrow.chunks_exact_mut(M::ROWS * row_len)) {
            M::shrink_rows(src, across, dst);
        }
        let done = rows.len() / M::ROWS * M::ROWS;
        if done == rows.len() {
            return;
        }
        if done > 0 {
            // What is left, and some that is done, once more.
            let last = rows.len() - M::ROWS;
            M::shrink_rows(&src[last * src_len..], across, &mut narrow[last * row_len..]);
        } else {
            for (src, dst) in src.chunks_exact(src_len).zip(narrow.chunks_exact_mut(row_len)) {
                Scalar::shrink_rows(src, across, dst);
            }
        }
    }

    /// Row `y` of the result: the vertical pass.
    #[inline(always)]
    pub(crate) fn blend<M: Resize>(&self, y: usize, dst: &mut [u8]) {
        let taps = &self.down.outputs[y];
        let rows = &self.narrow[(taps.source - self.rows.start) * self.row_len..];
        M::blend_rows(rows, &self.down, taps, dst);
    }
}
