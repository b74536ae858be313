//! An ONNX model with one f32 input, run by the crate tract: the same in Wasm and natively.

use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::{DimLike, TractErrorContext, ensure};
use tract_onnx::tract_hir::infer::Factoid;

pub use tract_onnx::prelude::TractResult;

pub struct Model {
    pub shape: Vec<usize>,
    runnable: Arc<TypedRunnableModel>,
}

impl Model {
    /// Parses an ONNX file and prepares it to run. Dimensions that it leaves open, such as the
    /// batch, become 1: shapes that are known let tract optimise more.
    pub fn from_bytes(bytes: &[u8]) -> TractResult<Self> {
        // What the file says about later shapes may name the open dimensions, which are not open
        // here.
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
        Ok(Self { shape, runnable: model.into_optimized()?.into_runnable()? })
    }

    /// The first output. An input of another length than `shape` has is an error.
    pub fn run(&self, input: &[f32]) -> TractResult<Vec<f32>> {
        let input = Tensor::from_shape(&self.shape, input)?;
        let output = self.runnable.run(tvec![input.into()])?.swap_remove(0);
        Ok(output.to_plain_array_view::<f32>()?.iter().copied().collect())
    }
}
