//! The guest with the whole model inside: all exports of `classify`, and inference by the crate
//! tract. Nothing is asked of the host, so any runtime with WASI can run it.

#![cfg(target_arch = "wasm32")]

use std::cell::RefCell;
use std::sync::Arc;

use classify::memory::Region;
use classify::status;
use inference::{Error, Status};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::{DimLike, TractErrorContext, ensure};
use tract_onnx::tract_hir::infer::Factoid;

struct Loaded {
    shape: Vec<usize>,
    model: Arc<TypedRunnableModel>,
}

thread_local! {
    /// Slot number -> model.
    static SLOTS: RefCell<Vec<Option<Loaded>>> = const { RefCell::new(Vec::new()) };
}

fn loaded(slots: &[Option<Loaded>], slot: u32) -> Result<&Loaded, Error> {
    slots.get(slot as usize).and_then(Option::as_ref).ok_or_else(|| {
        let message = format!("slot {slot} holds no model; tract_load gives a slot");
        Error::new(Status::NoModel, message)
    })
}

/// Parses an ONNX file and prepares it to run. Dimensions that it leaves open, such as the batch,
/// become 1: shapes that are known let tract optimise more.
fn load(bytes: &[u8]) -> TractResult<Loaded> {
    // What the file says about later shapes may name the open dimensions, which are not open here.
    let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true);
    let mut model = onnx.model_for_read(&mut { bytes })?;
    let inputs = model.input_outlets()?.len();
    ensure!(inputs == 1, "the model has {inputs} inputs; needed 1");
    let fact = model.input_fact(0)?;
    if let Some(kind) = fact.datum_type.concretize() {
        ensure!(kind == f32::datum_type(), "the input is {kind:?}; needed F32");
    }
    let open = fact.shape.concretize().context("the input's number of dimensions is open")?;
    let shape: Vec<usize> = open.iter().map(|size| size.to_usize().unwrap_or(1)).collect();
    model.set_input_fact(0, f32::fact(&shape).into())?;
    Ok(Loaded { shape, model: model.into_optimized()?.into_runnable()? })
}

impl Loaded {
    /// Runs the model, and writes its first output; the result is the number of bytes.
    fn compute(&self, dims: &[usize], input: &[f32], output: &mut [f32]) -> Result<i32, Error> {
        if dims != self.shape || input.len() != dims.iter().product::<usize>() {
            let message = format!(
                "the input is {dims:?} with {} values; the model takes {:?}",
                input.len(),
                self.shape
            );
            return Err(Error::new(Status::InvalidArgument, message));
        }
        let run = || -> TractResult<TValue> {
            let input = Tensor::from_shape(dims, input)?;
            Ok(self.model.run(tvec![input.into()])?.swap_remove(0))
        };
        let failed = |error| Error::new(Status::InvalidModel, format!("tract: {error:#}"));
        let result = run().map_err(failed)?;
        let view = result.to_plain_array_view::<f32>().map_err(failed)?;
        let output = output.get_mut(..view.len()).ok_or_else(|| {
            let message = format!("the model gives {} values; more than output holds", view.len());
            Error::new(Status::InvalidArgument, message)
        })?;
        output.iter_mut().zip(view.iter()).for_each(|(to, from)| *to = *from);
        Ok(size_of_val(output) as i32)
    }
}

/// Loads an ONNX model with one f32 input; the result is its slot.
#[unsafe(no_mangle)]
pub extern "C" fn tract_load(address: usize, len: usize) -> i32 {
    status(|| {
        let bytes = Region::<u8>::new("model", address, len)?;
        // SAFETY: tract copies what it needs; nothing else runs meanwhile.
        let loaded = load(unsafe { bytes.as_slice() })
            .map_err(|error| Error::new(Status::InvalidModel, format!("tract: {error:#}")))?;
        SLOTS.with_borrow_mut(|slots| {
            let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
            if slot == slots.len() {
                slots.push(None);
            }
            slots[slot] = Some(loaded);
            Ok(slot as i32)
        })
    })
}

/// Runs a model on its input (f32, `input_len` bytes) and writes its first output (f32); the
/// result is the number of bytes written. The parameters are those of `nn_compute`.
#[unsafe(no_mangle)]
pub extern "C" fn tract_compute(
    slot: u32,
    dims: usize,
    dims_len: usize,
    input: usize,
    input_len: usize,
    output: usize,
    output_len: usize,
) -> i32 {
    status(|| {
        let dims = Region::<usize>::new("dims", dims, dims_len)?;
        let input = Region::<f32>::new("input", input, input_len / 4)?;
        let mut output = Region::<f32>::new("output", output, output_len / 4)?;
        output.disjoint_from(&input)?;
        output.disjoint_from(&dims)?;
        // SAFETY: the output is disjoint from the others, and this call frees no block.
        let (dims, input, output) =
            unsafe { (dims.as_slice(), input.as_slice(), output.as_mut_slice()) };
        SLOTS.with_borrow(|slots| loaded(slots, slot)?.compute(dims, input, output))
    })
}

/// Drops a model, with its memory.
#[unsafe(no_mangle)]
pub extern "C" fn tract_unload(slot: u32) -> i32 {
    status(|| {
        SLOTS.with_borrow_mut(|slots| {
            loaded(slots, slot)?;
            slots[slot as usize] = None;
            Ok(0)
        })
    })
}
