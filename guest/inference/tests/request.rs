//! Requests, good and bad, through the JSON interface.

mod common;

use common::File;
use inference::model::Model;
use inference::request::{Run, answer, infer};
use inference::{Error, Status};
use serde_json::Value;
use std::time::Duration;

fn model() -> Model {
    Model::from_bytes(&File::small().bytes()).unwrap()
}

const GOOD: &str = r#"{"image_data": [0, 1.5, 255, 2e1, 254.9, 0.0],
    "width": 2, "height": 1, "model_id": "signs"}"#;

/// The id and the message of the error that a request gives.
fn error(request: &str) -> (String, String) {
    let text = infer(Some(&model()), request.as_bytes()).expect_err(request);
    let json: Value = serde_json::from_str(&text).unwrap();
    let field = |name| json["error"][name].as_str().unwrap().to_owned();
    (field("id"), field("message"))
}

#[test]
fn a_good_request() {
    let model = model();
    let text = infer(Some(&model), GOOD.as_bytes()).unwrap();
    let response: Value = serde_json::from_str(&text).unwrap();
    let keys: Vec<_> = response.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["confidence", "label", "latency_ms", "model_version"]);
    let (label, confidence) = model.classify(&[0, 2, 255, 20, 255, 0], 2, 1).unwrap();
    assert_eq!(response["label"], label);
    let error = response["confidence"].as_f64().unwrap() - f64::from(confidence);
    assert!(error.abs() <= 0.5e-6, "six decimals");
    assert_eq!(response["model_version"], "1.2");
    assert!(response["latency_ms"].as_f64().unwrap() >= 0.0);
}

#[test]
fn every_truncation_has_the_id_e8() {
    for len in 0..GOOD.len() {
        let (id, message) = error(&GOOD[..len]);
        assert_eq!(id, "E8", "the first {len} bytes: {message}");
    }
}

#[test]
fn a_wrong_model() {
    let (id, message) = error(&GOOD.replace("signs", "dogs"));
    assert_eq!(id, "model_not_found");
    assert!(message.contains("dogs") && message.contains("signs"), "{message}");
    let text = infer(None, GOOD.as_bytes()).unwrap_err();
    assert!(text.contains(r#""id":"no_model""#), "{text}");
}

#[test]
fn bad_requests() {
    let with = |from, to| {
        let request = GOOD.replace(from, to);
        assert_ne!(request, GOOD, "the test must change something");
        request
    };
    for (request, part_of_message) in [
        (with("[0, 1.5", "[-1, 1.5"), "image_data[0]"),
        (with("254.9", "255.1"), "image_data[4]"),
        (with("254.9", "1e39"), "image_data[4]"),
        (with("254.9", "1e999"), "out of range"),
        (with("254.9", "NaN"), "expected value"),
        (with("254.9", "Infinity"), "expected value"),
        (with("254.9", "null"), "image_data"),
        (with("254.9", "\"7\""), "image_data"),
        (with("254.9", "[7]"), "image_data"),
        (with(", 254.9", ""), "5 bytes"),
        (with("254.9", "1, 2"), "7 bytes"),
        (with("[0, 1.5, 255, 2e1, 254.9, 0.0]", "[]"), "0 bytes"),
        (with("\"width\": 2", "\"width\": 0"), "0 x 1"),
        (with("\"width\": 2", "\"width\": 2.5"), "whole numbers"),
        (with("\"width\": 2", "\"width\": -2"), "whole numbers"),
        (with("\"width\": 2", "\"width\": 4294967296"), "whole numbers"),
        (with("\"width\": 2", "\"width\": 65536"), "65536"),
        (with("\"width\": 2", "\"width\": \"2\""), "width"),
        (with("\"signs\"", "5"), "model_id"),
        (with("\"width\": 2,", ""), "needed: image_data"),
        (with("\"width\": 2", "\"width\": 2, \"width\": 2"), "width is there twice"),
        (with("\"width\": 2", "\"width\": 2, \"depth\": 2"), "depth"),
        (with("\"width\"", "\"a\\nb\""), "a\nb"),
        (with("}", "} x"), "trailing"),
        ("[]".to_owned(), "not an object"),
        ("null".to_owned(), "not an object"),
        ("[".repeat(10_000), "recursion limit"),
    ] {
        let (id, message) = error(&request);
        assert_eq!(id, "invalid_request", "{request}: {message}");
        assert!(message.contains(part_of_message), "{request}: {message}");
    }
    assert!(infer(Some(&model()), b"{\"model_id\": \"\xff\"}").is_err());
}

/// What a model of the host gives to a request, here one that says what it was asked.
fn by_host(request: &str, logits: &[f32]) -> Result<Value, Value> {
    let value = |text: String| serde_json::from_str(&text).unwrap();
    answer(request.as_bytes(), |name, pixels, width, height| {
        assert_eq!((name, pixels, width, height), ("signs", &[0, 2, 255, 20, 255, 0][..], 2, 1));
        Ok(Run {
            logits: logits.to_vec(),
            load: Duration::from_millis(3),
            preprocess: Duration::from_micros(1500),
            infer: Duration::from_nanos(7_000_123),
        })
    })
    .map(value)
    .map_err(value)
}

#[test]
fn a_model_of_the_host_answers() {
    let response = by_host(GOOD, &[-1.5, 2.25, 0.0, -0.000_001]).unwrap();
    assert_eq!(response["index"], 1);
    assert_eq!(response["logits"], serde_json::json!([-1.5, 2.25, 0.0, -0.000001]));
    let sum = (-3.75f64).exp() + 1.0 + 2.0 * (-2.25f64).exp();
    assert!((response["confidence"].as_f64().unwrap() - 1.0 / sum).abs() < 1e-5);
    let stages = &response["stages_ms"];
    assert_eq!((&stages["load"], &stages["preprocess"]), (&3.0.into(), &1.5.into()));
    assert_eq!(stages["infer"], 7.000123);
    assert!(stages["postprocess"].as_f64().unwrap() <= response["latency_ms"].as_f64().unwrap());
}

#[test]
fn a_model_of_the_host_gets_no_bad_request() {
    for (request, part) in [
        (GOOD.replace("\"width\": 2", "\"width\": 3"), "6 numbers; 3 x 1 x 3 needed"),
        (GOOD.replace("\"width\": 2", "\"width\": 4294967295"), "6 numbers"),
        (GOOD.replace("254.9", "-1"), "image_data[4]"),
        (GOOD[..GOOD.len() - 1].to_owned(), "EOF"),
    ] {
        let error = by_host(&request, &[1.0]).unwrap_err();
        assert!(error["error"]["message"].as_str().unwrap().contains(part), "{error}");
    }
    let error = by_host(GOOD, &[1.0, f32::NAN]).unwrap_err();
    assert!(error["error"]["message"].as_str().unwrap().contains("logits[1]"), "{error}");
    let failed =
        |_: &str, _: &[u8], _, _| Err(Error::new(Status::WasiNn, "wasi_nn: compute failed"));
    assert!(answer(GOOD.as_bytes(), failed).unwrap_err().contains(r#""id":"wasi_nn""#));
}
