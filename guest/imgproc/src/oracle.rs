//! The normalisation as its formula reads, in f64: slow, obvious, and what the kernels must match.

/// `(x / 255 - mean) / std` for every value; RGB pixels in, planar floats out.
pub fn normalize(src: &[u8], mean: [f32; 3], std: [f32; 3]) -> Vec<f32> {
    let mut planar = Vec::with_capacity(src.len());
    for channel in 0..3 {
        for pixel in src.chunks_exact(3) {
            let x = f64::from(pixel[channel]) / 255.0;
            planar.push(((x - f64::from(mean[channel])) / f64::from(std[channel])) as f32);
        }
    }
    planar
}
