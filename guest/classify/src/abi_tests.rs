//! The exported functions as a host calls them. Runs in Wasm only.

use imgproc::Kernel;
use inference::Status;

use crate::abi::*;
use crate::memory::Region;

const INVALID: i32 = Status::InvalidArgument as i32;

/// A block with these bytes.
fn put(bytes: &[u8]) -> usize {
    let address = alloc(bytes.len());
    let mut region = Region::<u8>::new("block", address, bytes.len()).unwrap();
    // SAFETY: the block is new.
    unsafe { region.as_mut_slice() }.copy_from_slice(bytes);
    address
}

fn floats(address: usize, count: usize) -> Vec<f32> {
    let region = Region::<f32>::new("floats", address, count).unwrap();
    // SAFETY: copied at once.
    unsafe { region.as_slice() }.to_vec()
}

fn message() -> String {
    let packed = last_error() as u64;
    let (address, len) = ((packed >> 32) as usize, packed as u32 as usize);
    // SAFETY: the guest's own message, which stays until the next call.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, len) };
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn params(resize: u32, crop: u32, mean: [f32; 3], std: [f32; 3]) -> usize {
    let mut bytes = [resize.to_le_bytes(), crop.to_le_bytes()].concat();
    bytes.extend(mean.iter().chain(&std).flat_map(|x| x.to_le_bytes()));
    put(&bytes)
}

#[test]
fn preprocess_agrees_with_its_halves() {
    let (width, height, crop) = (31, 17, 9);
    let src = put(&(0..width * height * 3).map(|i| i as u8).collect::<Vec<_>>());
    let p = params(12, crop, [0.5; 3], [0.25; 3]);
    let values = 3 * (crop * crop) as usize;
    let (pixels, halves, whole) = (alloc(values), alloc(4 * values), alloc(4 * values));
    let src_len = (width * height * 3) as usize;
    assert_eq!(resize_crop(src, src_len, width, height, 12, crop, pixels, values), 0);
    type Normalize = extern "C" fn(usize, usize, usize, usize, usize) -> i32;
    let kernels: [Normalize; 3] = [normalize_scalar, normalize_simd128, normalize_relaxed_simd];
    for (kernel, normalize) in (0..).zip(kernels) {
        assert_eq!(normalize(pixels, values, p, halves, 4 * values), 0);
        assert_eq!(preprocess(src, src_len, width, height, p, whole, 4 * values, kernel), 0);
        assert_eq!(last_error(), 0);
        let (whole, halves) = (floats(whole, values), floats(halves, values));
        if Kernel::ALL[kernel as usize].is_exact() {
            assert_eq!(whole, halves);
        } else {
            // A short row is not long enough for vectors, and rounds like the scalar kernel.
            assert!(whole.iter().zip(&halves).all(|(x, y)| (x - y).abs() < 1e-6));
        }
    }
    for bad_len in [0, src_len - 1, src_len + 1] {
        assert_eq!(preprocess(src, bad_len, width, height, p, whole, 4 * values, 1), INVALID);
        assert!(message().contains("src"), "{}", message());
    }
    for bad_len in [0, 4 * values - 4, 4 * values - 1, 4 * values + 4] {
        assert_eq!(preprocess(src, src_len, width, height, p, whole, bad_len, 1), INVALID);
        assert!(message().contains("dst"), "{}", message());
    }
    assert_eq!(preprocess(src, src_len, width, height, p, whole, 4 * values, 3), INVALID);
    assert_eq!(preprocess(src, src_len, width, height, p + 1, whole, 4 * values, 1), INVALID);
    assert_eq!(preprocess(src, src_len, width, height, p, src, 4 * values, 1), INVALID);
    assert_eq!(preprocess(src, src_len, 0, height, p, whole, 4 * values, 1), -3);
    let nan = params(12, crop, [f32::NAN; 3], [1.0; 3]);
    assert_eq!(preprocess(src, src_len, width, height, nan, whole, 4 * values, 1), -7);
}

#[test]
fn normalize_checks_what_it_gets() {
    let p = params(0, 0, [0.0; 3], [1.0; 3]);
    let (src, dst) = (put(&[255; 30]), alloc(120));
    assert_eq!(normalize_scalar(src, 30, p, dst, 120), 0);
    assert_eq!(floats(dst, 30), [1.0; 30]);
    for (src, src_len, p, dst, dst_len) in [
        (0, 30, p, dst, 120),
        (src, 30, 0, dst, 120),
        (src, 30, p, 0, 120),
        (src, 29, p, dst, 116),
        (src, 30, p, dst, 116),
        (src, 30, p, dst + 2, 116),
        (src, 27, p, dst + 1, 108),
        (src, 31, p, dst, 120),
        (dst, 30, p, dst, 120),
        (dst + 117, 3, p, dst + 108, 12),
        (src, usize::MAX, p, dst, 120),
        (src, 30, p, usize::MAX - 3, 120),
    ] {
        assert_eq!(normalize_simd128(src, src_len, p, dst, dst_len), INVALID);
        assert!(!message().is_empty());
    }
}

#[test]
fn alloc_and_dealloc() {
    assert_eq!(alloc(0), 0);
    assert_eq!(alloc(usize::MAX), 0);
    assert!(message().contains("4294967295"), "{}", message());
    let block = alloc(10);
    assert_eq!(dealloc(block, 11), INVALID);
    assert_eq!(dealloc(block, 10), 0);
    assert_eq!(dealloc(block, 10), INVALID);
    assert!(message().contains("10 bytes"), "{}", message());
}

#[test]
fn top_k_writes_pairs() {
    let logits = put(&[1.0f32, 9.0, 9.0].map(f32::to_le_bytes).concat());
    let out = alloc(24);
    assert_eq!(top_k(logits, 3, 2, out), 2);
    let pairs = Region::<u32>::new("pairs", out, 4).unwrap();
    // SAFETY: nothing writes to it during this comparison.
    let pairs = unsafe { pairs.as_slice() };
    assert_eq!((pairs[0], pairs[2]), (1, 2));
    assert!((f32::from_bits(pairs[1]) - 0.499_916).abs() < 1e-6);
    for (n, k, out) in [(3, 0, out), (3, 4, out), (4, 1, out), (3, 1, out + 2), (3, 1, logits)] {
        assert_eq!(top_k(logits, n, k, out), INVALID, "{n} {k}");
    }
    assert_eq!(top_k(logits, 3, usize::MAX, out), INVALID);
    let bad = put(&[1.0, f32::NAN].map(f32::to_le_bytes).concat());
    assert_eq!(top_k(bad, 2, 1, out), -7);
    assert!(message().contains("logits[1]"), "{}", message());
}

#[test]
fn infer_answers_in_json_whatever_it_gets() {
    let json = br#"{"image_data": [1, 2, 3], "width": 1, "height": 1, "model_id": "m"}"#;
    let text = put(json);
    for (address, len, id) in [
        (text, json.len(), "no_model"),
        (text, 20, "E8"),
        (text, 5000, "invalid_request"),
        (0, 0, "invalid_request"),
        (usize::MAX, usize::MAX, "invalid_request"),
    ] {
        let packed = infer(address, len) as u64;
        let (address, len) = ((packed >> 32) as usize, packed as u32 as usize);
        let region = Region::<u8>::new("response", address, len).unwrap();
        // SAFETY: copied at once.
        let response = String::from_utf8(unsafe { region.as_slice() }.to_vec()).unwrap();
        assert!(response.starts_with(&format!("{{\"error\":{{\"id\":\"{id}\"")), "{response}");
        assert_eq!(dealloc(address, len), 0);
    }
}

#[test]
fn model_load_refuses_what_is_no_model() {
    let junk = put(&[9; 100]);
    assert_eq!(model_load(junk, 100), Status::InvalidModel as i32);
    assert!(message().contains("safetensors"), "{}", message());
    assert_eq!(model_load(junk, 101), INVALID);
    assert_eq!(model_load(0, 100), INVALID);
}
