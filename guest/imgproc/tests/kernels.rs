//! All kernels against the oracle, and against each other.

use imgproc::{Geometry, Kernel, Normalization, normalize, oracle, resize_crop};
use proptest::prelude::*;

/// Nearest neighbours of a float are this far apart, relative to it.
const EPSILON: f32 = f32::EPSILON;

/// The kernels that this machine has.
fn available() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.iter().copied().filter(|kernel| kernel.is_available())
}

fn run(kernel: Kernel, src: &[u8], mean: [f32; 3], std: [f32; 3]) -> Vec<f32> {
    let normalization = Normalization::new(mean, std).unwrap();
    // NaN shows every value that a kernel forgets to write.
    let mut dst = vec![f32::NAN; src.len()];
    normalize(src, &normalization, &mut dst, kernel).unwrap();
    dst
}

fn check(src: &[u8], mean: [f32; 3], std: [f32; 3]) {
    let expected = oracle::normalize(src, mean, std);
    let scalar = run(Kernel::Scalar, src, mean, std);
    for kernel in available() {
        let found = run(kernel, src, mean, std);
        for (i, (&x, &y)) in found.iter().zip(&expected).enumerate() {
            // Each of the few roundings is relative to the largest term, 1 / std or mean / std.
            let channel = i / (src.len() / 3);
            let largest = mean[channel].abs().max(1.0) / std[channel];
            let difference = (x - y).abs();
            assert!(difference <= 4.0 * EPSILON * largest, "{kernel:?} [{i}]: {x}, not {y}");
        }
        if kernel.is_exact() {
            let same = found.iter().zip(&scalar).all(|(x, y)| x.to_bits() == y.to_bits());
            assert!(same, "{kernel:?} must equal the scalar kernel bit for bit");
        }
    }
}

/// Bytes that repeat late, without a generator of random numbers.
fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn every_short_length() {
    for pixels in 1..=200 {
        check(&bytes(3 * pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    }
}

#[test]
fn every_byte_in_every_channel() {
    let src: Vec<u8> = (0..=255).flat_map(|x: u8| [x, 255 - x, x.rotate_left(4)]).collect();
    check(&src, [0.0, 0.5, 1.0], [1.0, 0.5, 0.25]);
}

#[test]
fn a_whole_picture() {
    check(&bytes(3 * 224 * 224), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes_and_parameters(
        src in (1usize..700).prop_flat_map(|n| prop::collection::vec(any::<u8>(), 3 * n)),
        mean in prop::array::uniform3(-10.0f32..10.0),
        std in prop::array::uniform3(0.001f32..10.0),
    ) {
        check(&src, mean, std);
    }
}

/// Resizes with every kernel. That `Scalar` is right, `resize.rs` tests.
fn check_resize(src: &[u8], width: u32, height: u32, resize: u32, crop: u32) {
    let geometry = Geometry::new(width, height, resize, crop).unwrap();
    let run = |kernel| {
        let mut dst = vec![7; geometry.output_len()];
        resize_crop(src, &geometry, &mut dst, kernel).unwrap();
        dst
    };
    let expected = run(Kernel::Scalar);
    for kernel in available() {
        assert!(run(kernel) == expected, "{kernel:?}: {width} x {height} -> {resize}, {crop}");
    }
}

#[test]
fn resizes_of_many_shapes_are_equal_bit_for_bit() {
    for (width, height, resize, crop) in [
        (1, 1, 1, 1),
        (1, 1, 256, 224),
        (2, 3, 40, 33),
        (3, 2, 40, 33),
        (48, 48, 48, 48),
        (31, 64, 8, 8),
        (64, 31, 20, 17),
        (200, 150, 100, 99),
        (150, 200, 100, 99),
        (640, 480, 256, 224),
        (1, 4000, 256, 224),
        (4000, 1, 256, 224),
        (900, 700, 1, 1),
        (900, 700, 6, 5),
    ] {
        check_resize(&bytes(3 * (width * height) as usize), width, height, resize, crop);
    }
}

/// A sum that is a little too large or too small must not wrap around.
#[test]
fn white_stays_white_and_black_stays_black() {
    for (width, height) in [(211, 97), (301, 397), (3, 1000)] {
        for value in [0, 255] {
            let src = vec![value; 3 * (width * height) as usize];
            for resize in [1, 37, 120] {
                check_resize(&src, width, height, resize, resize);
                let geometry = Geometry::new(width, height, resize, resize).unwrap();
                let mut dst = vec![7; geometry.output_len()];
                resize_crop(&src, &geometry, &mut dst, Kernel::Scalar).unwrap();
                assert!(dst.iter().all(|&x| x == value));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_resize_is_equal_bit_for_bit(
        (width, height) in (1u32..120, 1u32..120),
        (one, other) in (1u32..90, 1u32..90),
        seed in any::<u8>(),
    ) {
        let src: Vec<u8> =
            bytes(3 * (width * height) as usize).iter().map(|x| x.wrapping_add(seed)).collect();
        check_resize(&src, width, height, one.max(other), one.min(other));
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let normalization = Normalization::new([0.0; 3], [1.0; 3]).unwrap();
    for (src, dst) in [(0, 0), (1, 1), (4, 4), (48, 47), (48, 49), (48, 0)] {
        for kernel in available() {
            let result = normalize(&bytes(src), &normalization, &mut vec![0.0; dst], kernel);
            assert!(matches!(result, Err(imgproc::Error::InvalidArgument(_))), "{src} {dst}");
        }
    }
}

#[test]
fn parameters_must_be_finite_and_usable() {
    use imgproc::Error::{InvalidArgument, NotFinite};
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(Normalization::new([0.0, bad, 0.0], [1.0; 3]), Err(NotFinite(_))));
        assert!(matches!(Normalization::new([0.0; 3], [1.0, 1.0, bad]), Err(NotFinite(_))));
    }
    for bad in [0.0, -0.0, -1.0] {
        assert!(matches!(Normalization::new([0.0; 3], [bad, 1.0, 1.0]), Err(InvalidArgument(_))));
    }
    // 1 / (255 * std) and mean / std must fit, too.
    assert!(matches!(Normalization::new([0.0; 3], [1e-44; 3]), Err(NotFinite(_))));
    assert!(matches!(Normalization::new([1e30; 3], [1e-20; 3]), Err(NotFinite(_))));
}
