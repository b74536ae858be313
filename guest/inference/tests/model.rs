//! The network against a plain convolution, and model files that are not what they should be.

mod common;

use common::{File, values};
use inference::Status;
use inference::model::Model;
use proptest::prelude::*;

fn with(file: &File, key: &'static str, value: &str) -> File {
    let mut file = file.clone();
    file.metadata.insert(key, value.to_owned());
    file
}

fn tensor<'a>(file: &'a File, name: &str) -> &'a [f32] {
    &file.tensors.iter().find(|(known, ..)| known == name).unwrap().2
}

/// 3x3, stride 2, padding 1, ReLU, as the definition reads: `input` is `[inputs, side, side]`.
fn conv(input: &[f32], side: usize, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let (inputs, half) = (input.len() / side / side, side.div_ceil(2));
    let mut output = Vec::new();
    for (filter, bias) in weight.chunks(inputs * 9).zip(bias) {
        for (y, x) in (0..half * half).map(|i| (i / half, i % half)) {
            let mut sum = f64::from(*bias);
            for (k, weight) in filter.iter().enumerate() {
                let (c, row, column) = (k / 9, 2 * y + k / 3 % 3, 2 * x + k % 3);
                if (1..=side).contains(&row) && (1..=side).contains(&column) {
                    let value = input[(c * side + row - 1) * side + column - 1];
                    sum += f64::from(*weight) * f64::from(value);
                }
            }
            output.push(sum.max(0.0) as f32);
        }
    }
    output
}

#[test]
fn logits_equal_the_definition() {
    let file = File::small();
    let input = values(3 * 12 * 12, 7);
    let mut pooled = vec![0.0; 3 * 6 * 6];
    for (i, x) in input.iter().enumerate() {
        let (c, y, x_index) = (i / 144, i / 12 % 12, i % 12);
        pooled[(c * 6 + y / 2) * 6 + x_index / 2] += x / 4.0;
    }
    let first = conv(&pooled, 6, tensor(&file, "conv1.weight"), tensor(&file, "conv1.bias"));
    let second = conv(&first, 3, tensor(&file, "conv2.weight"), tensor(&file, "conv2.bias"));
    let logits = Model::from_bytes(&file.bytes()).unwrap().logits(&input).unwrap();
    assert!(second.iter().any(|&x| x > 0.0), "the test must not be about zeros");
    for (class, logit) in logits.iter().enumerate() {
        let row = &tensor(&file, "fc.weight")[class * 20..][..20];
        let product: f32 = row.iter().zip(&second).map(|(w, x)| w * x).sum();
        let expected = tensor(&file, "fc.bias")[class] + product;
        assert!((logit - expected).abs() < 1e-5, "class {class}: {logit}, not {expected}");
    }
}

#[test]
fn classifies_images_of_any_size() {
    let model = Model::from_bytes(&File::small().bytes()).unwrap();
    for (width, height) in [(1, 1), (12, 12), (1, 4000), (4000, 1), (17, 31)] {
        let pixels = vec![200; (3 * width * height) as usize];
        let (label, confidence) = model.classify(&pixels, width, height).unwrap();
        assert!(["stop", "go", "bär"].contains(&label));
        assert!((1.0 / 3.0..=1.0).contains(&confidence), "{confidence}");
        let error = model.classify(&pixels[1..], width, height).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument);
    }
}

fn refused(file: &File, part_of_message: &str) {
    let Err(error) = Model::from_bytes(&file.bytes()) else {
        panic!("accepted, but expected: {part_of_message}");
    };
    assert_eq!(error.status, Status::InvalidModel);
    assert!(error.message.contains(part_of_message), "{:?}", error.message);
}

#[test]
fn metadata_are_checked() {
    let good = File::small();
    for key in good.metadata.keys() {
        let mut file = good.clone();
        file.metadata.remove(key);
        refused(&file, key);
    }
    for (key, value) in [
        ("layout", "NHWC"),
        ("color", "BGR"),
        ("resize", "-1"),
        ("resize", "5000"),
        ("crop", "15"),
        ("crop", "0"),
        ("crop", "1e1"),
        ("pool", "0"),
        ("pool", "5"),
        ("mean", "[0, 0]"),
        ("mean", "[0, 0, NaN]"),
        ("mean", "[0, 0, 1e39]"),
        ("std", "[1, 1, 0]"),
        ("std", "1"),
        ("labels", "[]"),
        ("labels", "[1, 2, 3]"),
        ("labels", r#"["a", "b", 3]"#),
        ("labels", "stop"),
    ] {
        refused(&with(&good, key, value), key);
    }
    refused(&with(&good, "labels", r#"["a", "b"]"#), "fc.bias has shape [3]");
}

#[test]
fn tensors_are_checked() {
    let good = File::small();
    for i in 0..good.tensors.len() {
        let mut file = good.clone();
        let name = file.tensors[i].0.clone();
        // Without conv2.weight the file is that of a smaller network, whose fc has another shape.
        let missing = if name == "conv2.weight" { "fc.weight" } else { &*name };
        file.tensors.remove(i);
        refused(&file, if name == "conv1.weight" { "0 conv layers" } else { missing });

        let mut file = good.clone();
        file.tensors[i].1.push(1);
        refused(&file, &name);

        for bad in [f32::NAN, f32::INFINITY] {
            let mut file = good.clone();
            *file.tensors[i].2.last_mut().unwrap() = bad;
            refused(&file, &format!("{name}[{}] is NaN or infinite", good.tensors[i].2.len() - 1));
        }
    }
    let mut file = good.clone();
    file.tensors.push(("extra".to_owned(), vec![1], vec![0.0]));
    refused(&file, "7 tensors");

    let mut file = good.clone();
    file.tensors = (1..=17)
        .flat_map(|i| {
            let weight = (format!("conv{i}.weight"), vec![3, 3, 3, 3], vec![0.0; 81]);
            [weight, (format!("conv{i}.bias"), vec![3], vec![0.0; 3])]
        })
        .collect();
    refused(&file, "17 conv layers");

    // A file of some KB must not ask for GBs when it runs.
    let mut file = with(&with(&with(&good, "resize", "4096"), "crop", "4096"), "pool", "1");
    file.tensors[0] = ("conv1.weight".to_owned(), vec![400, 3, 3, 3], vec![0.0; 400 * 27]);
    file.tensors[1] = ("conv1.bias".to_owned(), vec![400], vec![0.0; 400]);
    refused(&file, "conv1 makes");
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = File::small().bytes();
    for len in 0..bytes.len() {
        assert!(Model::from_bytes(&bytes[..len]).is_err(), "the first {len} bytes were accepted");
    }
    let header_of = |len: u64| [&len.to_le_bytes()[..], &bytes[8..]].concat();
    for len in [0, 1, bytes.len() as u64 - 7, 1 << 31, 1 << 32, (1 << 32) + 8, u64::MAX] {
        assert!(Model::from_bytes(&header_of(len)).is_err(), "header of {len} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// Damage gives an error or a model that runs; never a panic.
    #[test]
    fn damaged_files_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        let mut bytes = File::small().bytes();
        // Most of the interest is in the header, which is short of half of the file.
        let header = bytes.len() / 2;
        for (position, value) in damage {
            let position = position.index(header);
            bytes[position] = value;
        }
        if let Ok(model) = Model::from_bytes(&bytes) {
            let _ = model.classify(&[1, 2, 3], 1, 1);
        }
    }
}
