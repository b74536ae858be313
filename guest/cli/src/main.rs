//! The article's program: a JSON request on stdin, a JSON response on stdout.

use std::io::{Read, Write};
use std::process::ExitCode;

use inference::model::Model;
use inference::request::{error_json, infer};

const USAGE: &str = "usage: cli --model PATH < request.json > response.json";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [flag, path] = &arguments[..] else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if flag != "--model" {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    let (json, code) = match answer(&path.to_string_lossy()) {
        Ok(response) => (response, ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("cli: {error}");
            (error, ExitCode::FAILURE)
        }
    };
    // A reader that closed its end early is no reason to panic, as println! would.
    match writeln!(std::io::stdout(), "{json}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The response, or an error, as JSON.
fn answer(path: &str) -> Result<String, String> {
    let bytes = std::fs::read(path).map_err(|error| {
        // The article's error E9. A WASI program sees only folders that the host opened for it.
        let cure = "is it there, and did the host pre-open its folder (wasmtime: --dir FOLDER)?";
        error_json("E9", &format!("can't read the model {path}: {error}; {cure}"))
    })?;
    let model = Model::from_bytes(&bytes)
        .map_err(|error| error_json("invalid_model", &format!("{path}: {error}")))?;
    let mut request = Vec::new();
    std::io::stdin()
        .read_to_end(&mut request)
        .map_err(|error| error_json("invalid_request", &format!("can't read stdin: {error}")))?;
    infer(Some(&model), &request)
}
