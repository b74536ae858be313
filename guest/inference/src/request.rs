//! The article's interface: a JSON request in, a JSON response out.

use std::time::{Duration, Instant};

use crate::json::{Json, integer};
use crate::model::Model;
use crate::postprocess::top_k;
use crate::{Error, Status};

/// Answers {"image_data", "width", "height", "model_id"}. Both results are JSON texts, `Err` with
/// {"error": {"id", "message"}}.
///
/// `latency_ms` covers all of it: reading the request, preprocessing and the model.
pub fn infer(model: Option<&Model>, request: &[u8]) -> Result<String, String> {
    let start = Instant::now();
    let document = parse(request)?;
    let request = Request::new(&document)?;
    let Some(model) = model else {
        return Err(error_json("no_model", "no model is loaded; load one first"));
    };
    if request.model_id != model.name {
        let message = format!("no model {}; loaded is {}", request.model_id, model.name);
        return Err(error_json("model_not_found", &message));
    }
    let (label, confidence) = bytes(request.image_data)
        .and_then(|pixels| model.classify(&pixels, request.width, request.height))
        .map_err(|error| refusal(&error))?;
    Ok(format!(
        r#"{{"label":{},"confidence":{},"latency_ms":{},"model_version":{}}}"#,
        quote(label),
        decimal(f64::from(confidence)),
        decimal(start.elapsed().as_secs_f64() * 1e3),
        quote(&model.version),
    ))
}

/// What a model outside of this crate gives, and the time that its stages took.
pub struct Run {
    pub logits: Vec<f32>,
    pub load: Duration,
    pub preprocess: Duration,
    pub infer: Duration,
}

/// Answers the same request by another model: `run` gets `model_id`, the pixels, width and height.
///
/// The response is {"index", "confidence", "logits", "stages_ms", "latency_ms"}: which label a
/// class has is the host's to know. What `stages_ms` lacks of `latency_ms` was spent on JSON.
pub fn answer(
    request: &[u8],
    run: impl FnOnce(&str, &[u8], u32, u32) -> Result<Run, Error>,
) -> Result<String, String> {
    let start = Instant::now();
    let document = parse(request)?;
    let request = Request::new(&document)?;
    let (width, height) = (request.width, request.height);
    let ran = bytes(request.image_data)
        .and_then(|pixels| {
            let wanted = u64::from(width).saturating_mul(u64::from(height)).saturating_mul(3);
            if pixels.len() as u64 == wanted {
                return run(request.model_id, &pixels, width, height);
            }
            let message =
                format!("image_data has {} numbers; {width} x {height} x 3 needed", pixels.len());
            Err(Error::new(Status::InvalidArgument, message))
        })
        .map_err(|error| refusal(&error))?;
    let ranking = Instant::now();
    let best = top_k(&ran.logits, 1).map_err(|error| refusal(&error))?[0];
    let postprocess = ranking.elapsed();
    let logits: Vec<_> = ran.logits.iter().map(|&x| decimal(f64::from(x))).collect();
    let ms = |time: Duration| decimal(time.as_secs_f64() * 1e3);
    Ok(format!(
        r#"{{"index":{},"confidence":{},"logits":[{}],"stages_ms":{{"load":{},"preprocess":{},"infer":{},"postprocess":{}}},"latency_ms":{}}}"#,
        best.index,
        decimal(f64::from(best.probability)),
        logits.join(","),
        ms(ran.load),
        ms(ran.preprocess),
        ms(ran.infer),
        ms(postprocess),
        ms(start.elapsed()),
    ))
}

fn parse(request: &[u8]) -> Result<Json, String> {
    Json::parse(request).map_err(|error| {
        // The article's error E8: a request that was cut off on its way.
        let id = if error.is_eof() { "E8" } else { "invalid_request" };
        error_json(id, &error.to_string())
    })
}

/// The response to a request that can't be answered.
fn refusal(error: &Error) -> String {
    let id = match error.status {
        Status::OutOfMemory => "out_of_memory",
        Status::WasiNn => "wasi_nn",
        _ => "invalid_request",
    };
    error_json(id, &error.message)
}

pub fn error_json(id: &str, message: &str) -> String {
    format!(r#"{{"error":{{"id":{},"message":{}}}}}"#, quote(id), quote(message))
}

/// A JSON string.
fn quote(text: &str) -> String {
    // Writing text to memory has no way to fail.
    serde_json::to_string(text).unwrap_or_default()
}

/// A JSON number with six decimals. Made of integers: the code that writes any float is 7 KB.
fn decimal(x: f64) -> String {
    let millionths = (x.abs() * 1e6).round_ties_even() as u64;
    let sign = if x < 0.0 { "-" } else { "" };
    format!("{sign}{}.{:06}", millionths / 1_000_000, millionths % 1_000_000)
}

struct Request<'a> {
    image_data: &'a [f64],
    width: u32,
    height: u32,
    model_id: &'a str,
}

impl<'a> Request<'a> {
    /// Each field once, and no other.
    fn new(request: &'a Json) -> Result<Self, String> {
        Self::read(request).map_err(|message| error_json("invalid_request", &message))
    }

    fn read(request: &'a Json) -> Result<Self, String> {
        let Json::Object(fields) = request else {
            return Err("the request is not an object".to_owned());
        };
        let (mut image_data, mut width, mut height, mut model_id) = (None, None, None, None);
        for (name, value) in fields {
            let new = match (name.as_str(), value) {
                ("image_data", Json::Numbers(numbers)) => image_data.replace(&**numbers).is_none(),
                ("width", Json::Number(x)) => width.replace(*x).is_none(),
                ("height", Json::Number(x)) => height.replace(*x).is_none(),
                ("model_id", Json::Text(text)) => model_id.replace(&**text).is_none(),
                _ => return Err(format!("field {name}: unknown, or of a wrong type")),
            };
            if !new {
                return Err(format!("field {name} is there twice"));
            }
        }
        let size = |number: Option<f64>| number.and_then(integer);
        match (image_data, size(width), size(height), model_id) {
            (Some(image_data), Some(width), Some(height), Some(model_id)) => {
                Ok(Self { image_data, width, height, model_id })
            }
            _ => Err("needed: image_data (array of numbers), width and height (whole numbers), \
                      model_id (string)"
                .to_owned()),
        }
    }
}

/// `image_data` (row-major RGB, 0..=255) as bytes.
fn bytes(image_data: &[f64]) -> Result<Vec<u8>, Error> {
    let mut pixels = imgproc::try_zeros::<u8>(image_data.len())?;
    for (i, (pixel, &x)) in pixels.iter_mut().zip(image_data).enumerate() {
        if !(0.0..=255.0).contains(&x) {
            let message = format!("image_data[{i}] is outside 0..=255");
            return Err(Error::new(Status::InvalidArgument, message));
        }
        *pixel = x.round_ties_even() as u8;
    }
    Ok(pixels)
}
