//! A small convolutional network, read from a safetensors file and run by plain loops.

use imgproc::{Geometry, Kernel, Normalization, Params, preprocess, try_zeros};

use crate::json::Json;
use crate::postprocess::top_k;
use crate::safetensors::SafeTensors;
use crate::{Error, Status};

const MAX_BYTES: usize = 64 << 20;
const MAX_CONV_LAYERS: usize = 16;
/// Of one layer's patches or outputs; far above a small network's need, and no length overflows.
const MAX_VALUES: u64 = 1 << 24;

/// 3x3 convolution, stride 2, zero padding 1, then ReLU.
struct Conv {
    inputs: usize,
    outputs: usize,
    /// `[outputs, inputs * 9]`
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// The last layer: `weight` is `[classes, inputs]`.
struct Linear {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

pub struct Model {
    pub name: String,
    pub version: String,
    labels: Vec<String>,
    params: Params,
    pool: usize,
    convs: Vec<Conv>,
    fc: Linear,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Status::InvalidModel, message)
}

impl Model {
    /// Reads a safetensors file; its metadata describe the preprocessing and the labels.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_BYTES {
            return Err(invalid(format!("model of {} bytes; at most {MAX_BYTES}", bytes.len())));
        }
        let tensors = SafeTensors::from_bytes(bytes)
            .map_err(|error| invalid(format!("not a usable safetensors file: {error}")))?;
        let text = |key| tensors.metadata(key).map_err(invalid);
        for (key, known) in [("layout", "NCHW"), ("color", "RGB")] {
            if text(key)? != known {
                return Err(invalid(format!("{key} is {}; known is {known} only", text(key)?)));
            }
        }
        let integer = |key| -> Result<u32, Error> {
            let digits = text(key)?;
            digits.parse().map_err(|_| invalid(format!("{key} is {digits}, not a whole number")))
        };
        let params = Params {
            resize: integer("resize")?,
            crop: integer("crop")?,
            mean: rgb("mean", text("mean")?)?,
            std: rgb("std", text("std")?)?,
        };
        let pool = integer("pool")? as usize;
        let labels = strings("labels", text("labels")?)?;
        // Whether an image of any size could be preprocessed; the size here doesn't matter.
        Geometry::new(1, 1, params.resize, params.crop).map_err(|e| invalid(e.to_string()))?;
        Normalization::new(params.mean, params.std).map_err(|e| invalid(e.to_string()))?;
        if pool == 0 || params.crop as usize % pool != 0 {
            return Err(invalid(format!("pool = {pool} does not divide crop = {}", params.crop)));
        }

        let (mut channels, mut side) = (3, params.crop as usize / pool);
        let mut convs = Vec::new();
        let layers = (1..).take_while(|i| tensors.contains(&format!("conv{i}.weight"))).count();
        if layers == 0 || layers > MAX_CONV_LAYERS {
            return Err(invalid(format!("{layers} conv layers; needed 1..={MAX_CONV_LAYERS}")));
        }
        for i in 1..=layers {
            let bias = read(&tensors, &format!("conv{i}.bias"), None)?;
            let shape = [bias.len(), channels, 3, 3];
            let weight = read(&tensors, &format!("conv{i}.weight"), Some(&shape))?;
            convs.push(Conv { inputs: channels, outputs: bias.len(), weight, bias });
            side = side.div_ceil(2);
            let values = (9 * channels).max(shape[0]) as u64 * (side * side) as u64;
            if values > MAX_VALUES {
                return Err(invalid(format!(
                    "conv{i} makes {values} values; at most {MAX_VALUES}"
                )));
            }
            channels = shape[0];
        }
        let bias = read(&tensors, "fc.bias", Some(&[labels.len()]))?;
        let shape = [labels.len(), channels * side * side];
        let weight = read(&tensors, "fc.weight", Some(&shape))?;
        if tensors.len() != 2 * layers + 2 {
            return Err(invalid(format!(
                "{} tensors, but {} are known",
                tensors.len(),
                2 * layers + 2
            )));
        }
        Ok(Self {
            name: text("name")?.to_owned(),
            version: text("version")?.to_owned(),
            labels,
            params,
            pool,
            convs,
            fc: Linear { weight, bias },
        })
    }

    /// The best label of an RGB image (u8, HWC) and its probability.
    pub fn classify(&self, pixels: &[u8], width: u32, height: u32) -> Result<(&str, f32), Error> {
        let side = self.params.crop as usize;
        let mut tensor = try_zeros::<f32>(3 * side * side)?;
        preprocess(pixels, width, height, &self.params, &mut tensor, Kernel::PORTABLE)?;
        let logits = self.logits(&tensor)?;
        let best = top_k(&logits, 1)?[0];
        Ok((&self.labels[best.index as usize], best.probability))
    }

    /// Forward pass: a normalised CHW crop in, one logit a class out.
    pub fn logits(&self, tensor: &[f32]) -> Result<Vec<f32>, Error> {
        let mut side = self.params.crop as usize;
        let mut activation = average_pool(tensor, side, self.pool)?;
        side /= self.pool;
        for conv in &self.convs {
            activation = conv.forward(&activation, side)?;
            side = side.div_ceil(2);
        }
        let mut logits = try_zeros::<f32>(self.fc.bias.len())?;
        let rows = self.fc.weight.chunks_exact(activation.len());
        for ((logit, row), bias) in logits.iter_mut().zip(rows).zip(&self.fc.bias) {
            *logit = bias + row.iter().zip(&activation).map(|(w, x)| w * x).sum::<f32>();
        }
        Ok(logits)
    }
}

impl Conv {
    /// `input` is `[inputs, side, side]`; the result `[outputs, half, half]`, half = ceil(side / 2).
    ///
    /// The convolution as a matrix product ("im2col"): row k of `patches` holds what the k-th
    /// weight of a filter sees at each output pixel, so a filter is a sum of scaled rows.
    fn forward(&self, input: &[f32], side: usize) -> Result<Vec<f32>, Error> {
        let half = side.div_ceil(2);
        let area = half * half;
        let mut patches = try_zeros::<f32>(self.inputs * 9 * area)?;
        for (k, patch) in patches.chunks_exact_mut(area).enumerate() {
            let (channel, ky, kx) = (k / 9, k / 3 % 3, k % 3);
            let plane = &input[channel * side * side..][..side * side];
            for (y, row) in patch.chunks_exact_mut(half).enumerate() {
                // Padding 1 shifts by one. What falls outside stays 0; wrapping makes -1 huge.
                let source_y = (2 * y + ky).wrapping_sub(1);
                if source_y >= side {
                    continue;
                }
                let source = &plane[source_y * side..][..side];
                for (x, value) in row.iter_mut().enumerate() {
                    *value = source.get((2 * x + kx).wrapping_sub(1)).copied().unwrap_or(0.0);
                }
            }
        }
        let mut output = try_zeros::<f32>(self.outputs * area)?;
        let filters = self.weight.chunks_exact(self.inputs * 9);
        for ((out, filter), &bias) in output.chunks_exact_mut(area).zip(filters).zip(&self.bias) {
            out.fill(bias);
            for (&weight, patch) in filter.iter().zip(patches.chunks_exact(area)) {
                add_scaled(out, weight, patch);
            }
            out.iter_mut().for_each(|x| *x = x.max(0.0));
        }
        Ok(output)
    }
}

/// `out += weight * patch`: nearly all of the model's time. The compiler vectorises it.
#[cfg_attr(target_arch = "wasm32", target_feature(enable = "simd128"))]
fn add_scaled(out: &mut [f32], weight: f32, patch: &[f32]) {
    for (o, p) in out.iter_mut().zip(patch) {
        *o += weight * p;
    }
}

/// Mean of each `pool` x `pool` square of each channel; `side` is divisible by `pool`.
fn average_pool(input: &[f32], side: usize, pool: usize) -> Result<Vec<f32>, Error> {
    let small = side / pool;
    let mut output = try_zeros::<f32>(3 * small * small)?;
    for (row_index, row) in input.chunks_exact(side).enumerate() {
        let out_row = &mut output[row_index / pool * small..][..small];
        for (out, square) in out_row.iter_mut().zip(row.chunks_exact(pool)) {
            *out += square.iter().sum::<f32>();
        }
    }
    let area = (pool * pool) as f32;
    output.iter_mut().for_each(|x| *x /= area);
    Ok(output)
}

/// A JSON array of three numbers.
fn rgb(key: &str, json: &str) -> Result<[f32; 3], Error> {
    match Json::parse(json.as_bytes()).ok().as_ref().and_then(Json::numbers) {
        Some(&[r, g, b]) => Ok([r as f32, g as f32, b as f32]),
        _ => Err(invalid(format!("{key} is {json}, not an array of three numbers"))),
    }
}

/// A JSON array of strings.
fn strings(key: &str, json: &str) -> Result<Vec<String>, Error> {
    let text = |value| match value {
        Json::Text(text) => Some(text),
        _ => None,
    };
    match Json::parse(json.as_bytes()) {
        Ok(Json::Array(values)) => values.into_iter().map(text).collect(),
        _ => None,
    }
    .ok_or_else(|| invalid(format!("{key} is not an array of strings")))
}

/// Values of an F32 tensor, all finite. Without `shape` it must have one dimension, not empty.
fn read(tensors: &SafeTensors, name: &str, shape: Option<&[usize]>) -> Result<Vec<f32>, Error> {
    let (found, numbers) = tensors.f32(name).map_err(invalid)?;
    let fits = match shape {
        Some(shape) => found == shape,
        None => found.len() == 1 && found[0] > 0,
    };
    if !fits {
        return Err(invalid(format!("{name} has shape {found:?}; needed is {shape:?}")));
    }
    let mut values = try_zeros::<f32>(found.iter().product())?;
    for (i, (value, number)) in values.iter_mut().zip(numbers).enumerate() {
        if !number.is_finite() {
            return Err(invalid(format!("{name}[{i}] is NaN or infinite")));
        }
        *value = number;
    }
    Ok(values)
}
