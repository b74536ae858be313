//! Requests, good and bad, through the JSON interface.

mod common;

use common::File;
use inference::model::Model;
use inference::request::infer;
use serde_json::Value;

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
