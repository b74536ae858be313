//! A model file made from scratch, for the tests of this crate.

use std::collections::BTreeMap;

/// Values in -0.5..0.5 that repeat late.
pub fn values(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32)
        .map(|i| {
            ((i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 2f32.powi(24)
                - 0.5
        })
        .collect()
}

/// Parts of a model file; a test changes one before it writes the file.
#[derive(Clone)]
pub struct File {
    pub metadata: BTreeMap<&'static str, String>,
    pub tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl File {
    /// Crop 12, pooled to 6; convolutions 3 -> 4 -> 5, so 6 -> 3 -> 2; 3 classes.
    pub fn small() -> Self {
        let metadata = [
            ("name", "signs"),
            ("version", "1.2"),
            ("labels", r#"["stop", "go", "b\u00e4r"]"#),
            ("resize", "14"),
            ("crop", "12"),
            ("mean", "[0.4, 0.5, 0.6]"),
            ("std", "[0.2, 0.25, 0.3]"),
            ("pool", "2"),
            ("layout", "NCHW"),
            ("color", "RGB"),
        ];
        let shapes: [(&str, &[usize]); 6] = [
            ("conv1.weight", &[4, 3, 3, 3]),
            ("conv1.bias", &[4]),
            ("conv2.weight", &[5, 4, 3, 3]),
            ("conv2.bias", &[5]),
            ("fc.weight", &[3, 20]),
            ("fc.bias", &[3]),
        ];
        let tensor = |(seed, (name, shape)): (usize, (&str, &[usize]))| {
            let len = shape.iter().product();
            (name.to_owned(), shape.to_vec(), values(len, 1000 * seed as u32))
        };
        Self {
            metadata: metadata.map(|(key, value)| (key, value.to_owned())).into(),
            tensors: shapes.into_iter().enumerate().map(tensor).collect(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut entries =
            vec![format!("\"__metadata__\":{}", serde_json::to_string(&self.metadata).unwrap())];
        let mut data = Vec::new();
        for (name, shape, values) in &self.tensors {
            let begin = data.len();
            data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            entries.push(format!(
                r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{}]}}"#,
                data.len()
            ));
        }
        let header = format!("{{{}}}", entries.join(","));
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
    }
}
