//! A prepared picture in, its label out: one model by the crate tract, as Wasm or natively.
//!
//! The first line on stdout is the label, the second the logits. With REPEATS > 0 the third has
//! the time of each further run in milliseconds, from the tensor to the label.

use std::error::Error;
use std::hint::black_box;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use engine::Model;

const USAGE: &str = "usage: tract_cli MODEL.onnx TENSOR.f32 LABELS.txt REPEATS";
const MAX_REPEATS: u32 = 1_000_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, tensor, labels, repeats] = &arguments[..] else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let Some(repeats) = repeats.parse().ok().filter(|&count| count <= MAX_REPEATS) else {
        eprintln!("{USAGE} (a whole number, at most {MAX_REPEATS})");
        return ExitCode::from(2);
    };
    match answer(model, tensor, labels, repeats) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tract_cli: {error}");
            ExitCode::FAILURE
        }
    }
}

fn answer(model: &str, tensor: &str, labels: &str, repeats: u32) -> Result<(), Box<dyn Error>> {
    let model = Model::from_bytes(&read(model)?).map_err(|error| format!("{model}: {error:#}"))?;
    let tensor = floats(tensor, &model.shape)?;
    let labels = String::from_utf8(read(labels)?)?;
    let labels: Vec<&str> = labels.lines().collect();
    let run = || -> Result<(Vec<f32>, usize), Box<dyn Error>> {
        let logits = model.run(&tensor).map_err(|error| format!("tract: {error:#}"))?;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        Ok((logits, best.ok_or("the model gives no logits")?))
    };
    let (logits, best) = run()?;
    if labels.len() != logits.len() {
        return Err(format!("{} labels for {} logits", labels.len(), logits.len()).into());
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", labels[best])?;
    out.flush()?;
    writeln!(out, "{}", joined(&logits))?;
    if repeats > 0 {
        let mut times = Vec::new();
        for _ in 0..repeats {
            let start = Instant::now();
            black_box(run()?);
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        writeln!(out, "{}", joined(&times))?;
    }
    Ok(())
}

fn joined<T: ToString>(numbers: &[T]) -> String {
    numbers.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

fn read(path: &str) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("can't read {path}: {error}"))
}

/// Little-endian f32, exactly as many as the shape has.
fn floats(path: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
    let bytes = read(path)?;
    let size = shape.iter().try_fold(4_usize, |size, &side| size.checked_mul(side));
    if size != Some(bytes.len()) {
        return Err(format!("{path}: {} bytes; the model takes float32 {shape:?}", bytes.len()));
    }
    let (values, _) = bytes.as_chunks::<4>();
    Ok(values.iter().map(|&value| f32::from_le_bytes(value)).collect())
}
