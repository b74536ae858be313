//! A component that runs models through `wasi:nn`, the WIT form of WASI-NN.
//!
//! It imports nothing else. Rust's `std` can print and read the environment, so a module that has it
//! imports WASI; hence there is none here.

#![no_std]
#![cfg(target_arch = "wasm32")]

extern crate alloc;

use alloc::{format, string::String, vec::Vec};
use core::cell::RefCell;

use exports::edgelab::component::models::{Failure, Guest};
use wasi::nn::errors::{Error, ErrorCode};
use wasi::nn::graph::{self, ExecutionTarget, Graph, GraphEncoding};
use wasi::nn::inference::GraphExecutionContext;
use wasi::nn::tensor::{Tensor, TensorType};

wit_bindgen::generate!({ world: "component", generate_all, std_feature });

#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    core::arch::wasm32::unreachable()
}

// For memcpy and the like, which otherwise come with `std`.
#[link(name = "c")]
unsafe extern "C" {}

/// Model number -> execution context. The host keeps a graph as long as it has contexts.
struct Contexts(RefCell<Vec<Option<GraphExecutionContext>>>);

// SAFETY: an instance of this component has one thread.
unsafe impl Sync for Contexts {}

static CONTEXTS: Contexts = Contexts(RefCell::new(Vec::new()));

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { code: error.code(), message: error.data() }
    }
}

fn keep(graph: Graph) -> Result<u32, Failure> {
    let context = graph.init_execution_context()?;
    let mut contexts = CONTEXTS.0.borrow_mut();
    contexts.push(Some(context));
    Ok(contexts.len() as u32 - 1)
}

struct Component;

impl Guest for Component {
    fn load(parts: Vec<Vec<u8>>, is: GraphEncoding, on: ExecutionTarget) -> Result<u32, Failure> {
        keep(graph::load(&parts, is, on)?)
    }

    fn load_by_name(name: String) -> Result<u32, Failure> {
        keep(graph::load_by_name(&name)?)
    }

    fn compute(
        model: u32,
        inputs: Vec<(String, Tensor)>,
    ) -> Result<Vec<(String, Tensor)>, Failure> {
        let contexts = CONTEXTS.0.borrow();
        let context = contexts.get(model as usize).and_then(Option::as_ref).ok_or_else(|| {
            let message = format!("no model has the number {model}");
            Failure { code: ErrorCode::InvalidArgument, message }
        })?;
        Ok(context.compute(inputs)?)
    }

    fn classify(
        model: u32,
        name: String,
        dims: Vec<u32>,
        x: Vec<f32>,
    ) -> Result<Vec<f32>, Failure> {
        let bytes: Vec<[u8; 4]> = x.into_iter().map(f32::to_le_bytes).collect();
        let tensor = Tensor::new(&dims, TensorType::Fp32, bytes.as_flattened());
        let outputs = Self::compute(model, [(name, tensor)].into())?;
        let scores = outputs.first().map(|(_, tensor)| tensor.data()).unwrap_or_default();
        Ok(scores.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn unload(model: u32) -> bool {
        let mut contexts = CONTEXTS.0.borrow_mut();
        contexts.get_mut(model as usize).and_then(Option::take).is_some()
    }
}

export!(Component);
