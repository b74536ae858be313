//! The guest with the whole model inside: all exports of `classify`, and inference by the crate
//! tract. Nothing is asked of the host, so any runtime with WASI can run it.

#![cfg(target_arch = "wasm32")]

use std::cell::RefCell;

use classify::memory::Region;
use classify::status;
use engine::Model;
use inference::{Error, Status};

thread_local! {
    /// Slot number -> model.
    static SLOTS: RefCell<Vec<Option<Model>>> = const { RefCell::new(Vec::new()) };
}

fn loaded(slots: &[Option<Model>], slot: u32) -> Result<&Model, Error> {
    slots.get(slot as usize).and_then(Option::as_ref).ok_or_else(|| {
        let message = format!("slot {slot} holds no model; tract_load gives a slot");
        Error::new(Status::NoModel, message)
    })
}

/// Runs a model, and writes its first output; the result is the number of bytes.
fn compute(model: &Model, dims: &[usize], input: &[f32], output: &mut [f32]) -> Result<i32, Error> {
    if dims != model.shape || input.len() != dims.iter().product::<usize>() {
        let message = format!(
            "the input is {dims:?} with {} values; the model takes {:?}",
            input.len(),
            model.shape
        );
        return Err(Error::new(Status::InvalidArgument, message));
    }
    let result = model.run(input).map_err(failed)?;
    let output = output.get_mut(..result.len()).ok_or_else(|| {
        let message = format!("the model gives {} values; more than output holds", result.len());
        Error::new(Status::InvalidArgument, message)
    })?;
    output.copy_from_slice(&result);
    Ok(size_of_val(output) as i32)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::new(Status::InvalidModel, format!("tract: {error:#}"))
}

/// Loads an ONNX model with one f32 input; the result is its slot.
#[unsafe(no_mangle)]
pub extern "C" fn tract_load(address: usize, len: usize) -> i32 {
    status(|| {
        let bytes = Region::<u8>::new("model", address, len)?;
        // SAFETY: tract copies what it needs; nothing else runs meanwhile.
        let model = Model::from_bytes(unsafe { bytes.as_slice() }).map_err(failed)?;
        SLOTS.with_borrow_mut(|slots| {
            let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
            if slot == slots.len() {
                slots.push(None);
            }
            slots[slot] = Some(model);
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
        SLOTS.with_borrow(|slots| compute(loaded(slots, slot)?, dims, input, output))
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
