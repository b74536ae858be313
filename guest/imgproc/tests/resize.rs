//! Resize and crop against a plain two-pass resize of the whole image, cropped last.

use imgproc::{Geometry, Kernel, Params, preprocess, resize_crop};

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn crop(src: &[u8], width: u32, height: u32, resize: u32, crop: u32) -> Vec<u8> {
    let geometry = Geometry::new(width, height, resize, crop).unwrap();
    let mut dst = vec![0; geometry.output_len()];
    resize_crop(src, &geometry, &mut dst, Kernel::Scalar).unwrap();
    dst
}

/// One axis of a bilinear resize with antialiasing, in f64, rounded to u8: `get(i)` are the inputs.
fn resize_line(size: usize, resized: usize, get: impl Fn(usize) -> u8) -> Vec<u8> {
    let scale = size as f64 / resized as f64;
    let support = scale.max(1.0);
    (0..resized)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            let (mut sum, mut total) = (0.0, 0.0);
            for x in 0..size {
                let weight = (1.0 - ((x as f64 + 0.5 - center) / support).abs()).max(0.0);
                sum += weight * f64::from(get(x));
                total += weight;
            }
            (sum / total).round() as u8
        })
        .collect()
}

/// The same crop by the long way round.
fn oracle(src: &[u8], width: usize, height: usize, resize: usize, crop: usize) -> Vec<u8> {
    let shorter = width.min(height);
    let (new_width, new_height) = (width * resize / shorter, height * resize / shorter);
    let mut narrow = vec![0; new_width * height * 3];
    for y in 0..height {
        for c in 0..3 {
            let line = resize_line(width, new_width, |x| src[(y * width + x) * 3 + c]);
            line.iter().enumerate().for_each(|(x, &v)| narrow[(y * new_width + x) * 3 + c] = v);
        }
    }
    let mut small = vec![0; new_width * new_height * 3];
    for x in 0..new_width {
        for c in 0..3 {
            let line = resize_line(height, new_height, |y| narrow[(y * new_width + x) * 3 + c]);
            line.iter().enumerate().for_each(|(y, &v)| small[(y * new_width + x) * 3 + c] = v);
        }
    }
    let offset = |side: usize| ((side - crop) as f64 / 2.0).round_ties_even() as usize;
    let (left, top) = (offset(new_width), offset(new_height));
    (top..top + crop)
        .flat_map(|y| &small[(y * new_width + left) * 3..][..crop * 3])
        .copied()
        .collect()
}

#[test]
fn crop_equals_the_long_way_round() {
    let cases = [
        (1, 1, 5, 4),
        (7, 5, 5, 5),
        (5, 7, 9, 6),
        (40, 30, 16, 13),
        (31, 64, 8, 8),
        (64, 31, 20, 17),
        (2, 50, 6, 5),
        (50, 2, 6, 5),
        (33, 33, 1, 1),
        (16, 16, 16, 9),
    ];
    for (width, height, resize, size) in cases {
        let src = bytes(width * height * 3);
        let found = crop(&src, width as u32, height as u32, resize as u32, size as u32);
        let expected = oracle(&src, width, height, resize, size);
        // Weights in fixed point and in f64 may round a value differently, never by more than 1.
        let worst = found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst <= Some(1), "{width} x {height} -> {resize}, {size}: off by {worst:?}");
    }
}

#[test]
fn same_size_copies() {
    let src = bytes(24 * 24 * 3);
    assert_eq!(crop(&src, 24, 24, 24, 24), src);
}

#[test]
fn one_colour_stays_that_colour() {
    for (width, height) in [(1, 1), (1, 4000), (4000, 1), (639, 481), (3, 65_535), (65_535, 3)] {
        let src = [1, 128, 255].repeat((width * height) as usize);
        let found = crop(&src, width, height, 256, 224);
        assert_eq!(found, [1, 128, 255].repeat(224 * 224), "{width} x {height}");
    }
}

#[test]
fn impossible_sizes_are_errors() {
    use imgproc::Error::{ImageSize, InvalidArgument};
    for (width, height) in
        [(0, 1), (1, 0), (65_536, 1), (1, 65_536), (65_535, 65_535), (u32::MAX, 1)]
    {
        let result = Geometry::new(width, height, 256, 224);
        assert!(matches!(result, Err(ImageSize(_))), "{width} x {height}");
    }
    for (resize, crop) in [(0, 0), (256, 0), (256, 257), (4097, 224), (u32::MAX, u32::MAX)] {
        let result = Geometry::new(8, 8, resize, crop);
        assert!(matches!(result, Err(InvalidArgument(_))), "{resize} {crop}");
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let geometry = Geometry::new(4, 3, 2, 2).unwrap();
    for (src, dst) in [(35, 12), (37, 12), (0, 12), (36, 11), (36, 13), (36, 0)] {
        let result = resize_crop(&vec![0; src], &geometry, &mut vec![0; dst], Kernel::Scalar);
        assert!(matches!(result, Err(imgproc::Error::InvalidArgument(_))), "{src} {dst}");
    }
}

#[test]
fn preprocess_is_resize_then_normalise() {
    let params = Params { resize: 20, crop: 17, mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.4] };
    let src = bytes(40 * 30 * 3);
    let expected = imgproc::oracle::normalize(&crop(&src, 40, 30, 20, 17), params.mean, params.std);
    for &kernel in Kernel::ALL.iter().filter(|kernel| kernel.is_available()) {
        let mut dst = vec![f32::NAN; 3 * 17 * 17];
        preprocess(&src, 40, 30, &params, &mut dst, kernel).unwrap();
        for (x, y) in dst.iter().zip(&expected) {
            assert!((x - y).abs() < 1e-5, "{kernel:?}: {x}, not {y}");
        }
        assert!(preprocess(&src, 40, 30, &params, &mut dst[1..], kernel).is_err());
    }
}
