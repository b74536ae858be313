//! Makes a component of a core module: `componentize MODULE COMPONENT`.
//!
//! wit-bindgen left the types in the module. This adds what the component model needs around them,
//! as `wasm-tools component new` does.

use std::error::Error;
use std::{env, fs};

use wit_component::ComponentEncoder;

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<_> = env::args_os().skip(1).collect();
    let [module, component] = paths.as_slice() else {
        return Err("two paths are needed: of the module, and of the component to write".into());
    };
    let module = fs::read(module)?;
    fs::write(component, ComponentEncoder::default().module(&module)?.validate(true).encode()?)?;
    Ok(())
}
