//! The article's interface: a JSON request in, a JSON response out.

use std::time::Instant;

use crate::json::{Json, integer};
use crate::model::Model;
use crate::{Error, Status};

/// Answers {"image_data", "width", "height", "model_id"}. Both results are JSON texts, `Err` with
/// {"error": {"id", "message"}}.
///
/// `latency_ms` covers all of it: reading the request, preprocessing and the model.
pub fn infer(model: Option<&Model>, request: &[u8]) -> Result<String, String> {
    let start = Instant::now();
    let invalid = |message: &str| error_json("invalid_request", message);
    let request = Json::parse(request).map_err(|error| {
        // The article's error E8: a request that was cut off on its way.
        let id = if error.is_eof() { "E8" } else { "invalid_request" };
        error_json(id, &error.to_string())
    })?;
    let request = Request::new(&request).map_err(|message| invalid(&message))?;
    let Some(model) = model else {
        return Err(error_json("no_model", "no model is loaded; load one first"));
    };
    if request.model_id != model.name {
        let message = format!("no model {}; loaded is {}", request.model_id, model.name);
        return Err(error_json("model_not_found", &message));
    }
    let (label, confidence) = bytes(request.image_data)
        .and_then(|pixels| model.classify(&pixels, request.width, request.height))
        .map_err(|error| match error.status {
            Status::OutOfMemory => error_json("out_of_memory", &error.message),
            _ => invalid(&error.message),
        })?;
    Ok(format!(
        r#"{{"label":{},"confidence":{},"latency_ms":{},"model_version":{}}}"#,
        quote(label),
        decimal(f64::from(confidence)),
        decimal(start.elapsed().as_secs_f64() * 1e3),
        quote(&model.version),
    ))
}

pub fn error_json(id: &str, message: &str) -> String {
    format!(r#"{{"error":{{"id":{},"message":{}}}}}"#, quote(id), quote(message))
}

/// A JSON string.
fn quote(text: &str) -> String {
    // Writing text to memory has no way to fail.
    serde_json::to_string(text).unwrap_or_default()
}

/// A JSON number with six decimals; `x` is not negative. Made of integers: the code that writes
/// any float is 7 KB.
fn decimal(x: f64) -> String {
    let millionths = (x * 1e6).round_ties_even() as u64;
    format!("{}.{:06}", millionths / 1_000_000, millionths % 1_000_000)
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
