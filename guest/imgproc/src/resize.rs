use crate::{Error, try_zeros};

pub const MAX_SIDE: u32 = 65_535;
pub const MAX_PIXELS: u64 = 1 << 26;
pub const MAX_RESIZE: u32 = 4096;

/// Filter weights are integers in units of 2^-22, as in Pillow.
const WEIGHT_BITS: u32 = 22;

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

    /// Number of values in the RGB crop.
    pub fn output_len(&self) -> usize {
        3 * self.crop as usize * self.crop as usize
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
struct Filter {
    outputs: Vec<Taps>,
    weights: Vec<i32>,
}

/// Source pixels `source..source + count`, with the weights that begin at `first_weight`.
#[derive(Clone, Copy, Default)]
struct Taps {
    source: usize,
    count: usize,
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
        let mut weights = try_zeros::<i32>(count as usize * most_taps)?;
        let mut triangle = try_zeros::<f64>(most_taps)?;
        let mut used = 0;
        for (i, taps) in outputs.iter_mut().enumerate() {
            let center = ((offset + i as u64) as f64 + 0.5) * scale;
            // A cast from a negative number gives 0: the image's border.
            let source = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(side);
            *taps = Taps { source, count: end - source, first_weight: used };
            let triangle = &mut triangle[..taps.count];
            for (x, weight) in triangle.iter_mut().enumerate() {
                let distance = ((x + source) as f64 - center + 0.5) * (1.0 / support);
                *weight = (1.0 - distance.abs()).max(0.0);
            }
            let total: f64 = triangle.iter().sum();
            for (fixed, weight) in weights[used..].iter_mut().zip(triangle) {
                *fixed = (0.5 + *weight / total * f64::from(1 << WEIGHT_BITS)) as i32;
            }
            used += taps.count;
        }
        Ok(Self { outputs, weights })
    }

    fn weights(&self, taps: &Taps) -> &[i32] {
        &self.weights[taps.first_weight..][..taps.count]
    }

    /// The source pixels that count for any output.
    fn source_range(&self) -> std::ops::Range<usize> {
        let last = self.outputs[self.outputs.len() - 1];
        self.outputs[0].source..last.source + last.count
    }
}

/// RGB image (u8, HWC) to its resized centre crop (u8, HWC), bilinear with antialiasing: bit for
/// bit what Pillow's `resize(.., BILINEAR)` and a crop give. (Pillow 13 swaps the passes where the
/// height shrinks by more than twice as many pixels as the width; there it may differ by 1.)
///
/// Both steps are one: only the crop's pixels are computed. So a 1 x 4000 image, which would be
/// resized to 256 x 1,024,000 pixels, costs no more than any other. Source pixels around the crop
/// still count where the filter reaches them.
pub fn resize_crop(src: &[u8], geometry: &Geometry, dst: &mut [u8]) -> Result<(), Error> {
    let Geometry { width, height, crop, .. } = *geometry;
    let needed = 3 * u64::from(width) * u64::from(height);
    if src.len() as u64 != needed {
        return Err(Error::InvalidArgument(format!(
            "src has {} bytes, but {width} x {height} RGB pixels need {needed}",
            src.len()
        )));
    }
    if dst.len() != geometry.output_len() {
        return Err(Error::InvalidArgument(format!(
            "dst has {} bytes, but a crop of {crop} x {crop} RGB pixels needs {}",
            dst.len(),
            geometry.output_len()
        )));
    }
    let across = geometry.filter(width)?;
    let down = geometry.filter(height)?;
    let rows = down.source_range();
    let (src_row_len, row_len) = (3 * width as usize, 3 * crop as usize);

    // Horizontal pass first, rounded to u8, as in Pillow.
    let mut narrow = try_zeros::<u8>(rows.len() * row_len)?;
    let src_rows = src.chunks_exact(src_row_len).skip(rows.start);
    for (src_row, row) in src_rows.zip(narrow.chunks_exact_mut(row_len)) {
        shrink_row(src_row, &across, row);
    }
    let mut sums = try_zeros::<i32>(row_len)?;
    for (taps, dst_row) in down.outputs.iter().zip(dst.chunks_exact_mut(row_len)) {
        let rows = narrow[(taps.source - rows.start) * row_len..].chunks_exact(row_len);
        sums.fill(HALF);
        for (row, &weight) in rows.zip(down.weights(taps)) {
            add_scaled(&mut sums, weight, row);
        }
        for (value, sum) in dst_row.iter_mut().zip(&sums) {
            *value = to_u8(*sum);
        }
    }
    Ok(())
}

/// Sums begin with one half, so that dropping the fraction rounds.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

/// Weights of a pixel add up to 1, but each is rounded: the sum may pass 255.
fn to_u8(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).min(255) as u8
}

/// One row of the horizontal pass.
fn shrink_row(src: &[u8], filter: &Filter, dst: &mut [u8]) {
    for (taps, pixel) in filter.outputs.iter().zip(dst.chunks_exact_mut(3)) {
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

/// `sums += weight * row`: the vertical pass. In Wasm, vectors may be used here, and are.
#[cfg_attr(target_arch = "wasm32", target_feature(enable = "simd128"))]
fn add_scaled(sums: &mut [i32], weight: i32, row: &[u8]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += weight * i32::from(x);
    }
}
