//! The guest with WASI-NN: all exports of `classify`, and inference by the host's backend.

#![cfg(target_arch = "wasm32")]

use std::cell::RefCell;
use std::mem::discriminant;
use std::time::Instant;

use classify::memory::Region;
use classify::{normalization, respond, status};
use imgproc::{Kernel, Normalization, normalize, try_zeros};
use inference::request::{self, Run};
use inference::{Error, Status};
use wasmedge_wasi_nn::{
    BackendError, Error as NnError, ExecutionTarget, Graph, GraphBuilder, GraphEncoding,
    GraphExecutionContext, TensorType,
};

/// A model that the host loaded, and the one context that runs it.
type Slot = Option<(Graph, GraphExecutionContext)>;

thread_local! {
    static SLOTS: RefCell<Vec<Slot>> = const { RefCell::new(Vec::new()) };
}

fn model(slots: &mut [Slot], slot: u32) -> Result<&mut (Graph, GraphExecutionContext), Error> {
    slots.get_mut(slot as usize).and_then(Option::as_mut).ok_or_else(|| {
        Error::new(Status::NoModel, format!("slot {slot} holds no model; nn_load gives a slot"))
    })
}

/// Says which call failed, with the errno's name and number.
fn wasi_nn_error(call: &str, error: NnError) -> Error {
    let number = match &error {
        NnError::BackendError(BackendError::UnknownError(number)) => *number,
        NnError::BackendError(known) => {
            // The crate numbers its errors only the other way round.
            (1..=103)
                .find(|&number| discriminant(&BackendError::from(number)) == discriminant(known))
                .unwrap_or(-1)
        }
        NnError::IoError(_) => -1,
    };
    let name = match &error {
        NnError::BackendError(errno) => format!("{errno:?}"),
        NnError::IoError(error) => error.to_string(),
    };
    Error::new(Status::WasiNn, format!("wasi_nn: {call} failed: {name} (errno {number})"))
}

/// Makes an execution context of a graph and keeps both; the result is their slot.
fn keep(graph: Graph) -> Result<i32, Error> {
    let context = match graph.init_execution_context() {
        Ok(context) => context,
        Err(error) => {
            let _ = graph.unload(); // the first error says why
            return Err(wasi_nn_error("init_execution_context", error));
        }
    };
    SLOTS.with_borrow_mut(|slots| {
        let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        if slot == slots.len() {
            slots.push(None);
        }
        slots[slot] = Some((graph, context));
        Ok(slot as i32)
    })
}

/// Hands a model's bytes to the host's backend; `encoding` as in WASI-NN (1 = ONNX).
#[unsafe(no_mangle)]
pub extern "C" fn nn_load(address: usize, len: usize, encoding: u32) -> i32 {
    status(|| {
        let encoding = match encoding {
            0 => GraphEncoding::Openvino,
            1 => GraphEncoding::Onnx,
            2 => GraphEncoding::Tensorflow,
            3 => GraphEncoding::Pytorch,
            4 => GraphEncoding::TensorflowLite,
            5 => GraphEncoding::Autodetec,
            _ => {
                let message = format!("encoding = {encoding}; needed 0..=5 (1 is ONNX)");
                return Err(Error::new(Status::InvalidArgument, message));
            }
        };
        let bytes = Region::<u8>::new("model", address, len)?;
        // SAFETY: the host only reads it, and only during this call.
        let bytes = unsafe { bytes.as_slice() };
        let graph = GraphBuilder::new(encoding, ExecutionTarget::CPU)
            .build_from_bytes([bytes])
            .map_err(|error| wasi_nn_error("load", error))?;
        keep(graph)
    })
}

fn by_name(name: &str) -> Result<Graph, Error> {
    // The crate makes a C string of it, and would drop one with a zero byte inside.
    if name.contains('\0') {
        return Err(Error::new(Status::InvalidArgument, "name: a zero byte"));
    }
    GraphBuilder::default()
        .build_from_cache(name)
        .map_err(|error| wasi_nn_error("load_by_name", error))
}

/// Asks the host for a model that it knows by name (UTF-8).
#[unsafe(no_mangle)]
pub extern "C" fn nn_load_by_name(address: usize, len: usize) -> i32 {
    status(|| {
        let name = Region::<u8>::new("name", address, len)?;
        // SAFETY: nothing writes to it during this call.
        let name = std::str::from_utf8(unsafe { name.as_slice() })
            .map_err(|_| Error::new(Status::InvalidArgument, "name: not UTF-8"))?;
        keep(by_name(name)?)
    })
}

/// Runs a model on input 0 (f32) and fetches output 0: the backend reads and writes the host's
/// blocks, without a copy in the guest. The result is the number of bytes written.
#[unsafe(no_mangle)]
pub extern "C" fn nn_compute(
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
        let input = Region::<u8>::new("input", input, input_len)?;
        let mut output = Region::<u8>::new("output", output, output_len)?;
        output.disjoint_from(&input)?;
        output.disjoint_from(&dims)?;
        // SAFETY: the output is disjoint from the others, and this call frees no block.
        let (dims, input, output) =
            unsafe { (dims.as_slice(), input.as_slice(), output.as_mut_slice()) };
        SLOTS.with_borrow_mut(|slots| {
            let (_, context) = model(slots, slot)?;
            Ok(compute(context, dims, input, output)? as i32)
        })
    })
}

/// Input 0 in, output 0 out; the result is the number of bytes written.
fn compute<T>(
    context: &mut GraphExecutionContext,
    dims: &[usize],
    input: &[T],
    output: &mut [T],
) -> Result<usize, Error> {
    context
        .set_input(0, TensorType::F32, dims, input)
        .map_err(|error| wasi_nn_error("set_input", error))?;
    context.compute().map_err(|error| wasi_nn_error("compute", error))?;
    context.get_output(0, output).map_err(|error| wasi_nn_error("get_output", error))
}

/// Room for the answer of `nn_infer`.
const MAX_CLASSES: usize = 1 << 14;

/// The article's interface, JSON to JSON, with a model that the host knows: it is asked for by the
/// request's `model_id`, and given back in the end. The pixels are normalised, not resized. The
/// response is in a block that the host must `dealloc`; 0 if none is free.
#[unsafe(no_mangle)]
pub extern "C" fn nn_infer(address: usize, len: usize, params: usize, kernel: u32) -> i64 {
    let mut response = String::new();
    let outcome = status(|| {
        let text = Region::<u8>::new("request", address, len)?;
        let normalization = normalization(params)?;
        let kernel = *Kernel::ALL.get(kernel as usize).ok_or_else(|| {
            Error::new(Status::InvalidArgument, format!("kernel = {kernel}; needed 0, 1 or 2"))
        })?;
        // SAFETY: nothing writes to it during this call.
        let text = unsafe { text.as_slice() };
        response = request::answer(text, |name, pixels, width, height| {
            run(name, pixels, [width, height], &normalization, kernel)
        })
        .unwrap_or_else(|error| error);
        Ok(0)
    });
    if outcome < 0 { 0 } else { respond(&response) }
}

fn run(
    name: &str,
    pixels: &[u8],
    [width, height]: [u32; 2],
    normalization: &Normalization,
    kernel: Kernel,
) -> Result<Run, Error> {
    let begin = Instant::now();
    let mut tensor = try_zeros::<f32>(pixels.len())?;
    normalize(pixels, normalization, &mut tensor, kernel)?;
    let preprocess = begin.elapsed();
    let begin = Instant::now();
    let graph = by_name(name)?;
    let context = graph.init_execution_context();
    let load = begin.elapsed();
    let computed = context
        .map_err(|error| wasi_nn_error("init_execution_context", error))
        .and_then(|mut context| {
            let begin = Instant::now();
            let mut logits = try_zeros::<f32>(MAX_CLASSES)?;
            let dims = [1, 3, height as usize, width as usize];
            let written = compute(&mut context, &dims, &tensor, &mut logits)?;
            logits.truncate(written / size_of::<f32>());
            Ok(Run { logits, load, preprocess, infer: begin.elapsed() })
        });
    let given_back = graph.unload().map_err(|error| wasi_nn_error("unload", error));
    let done = computed?; // the first error says why
    given_back.map(|_| done)
}

/// Takes a model back from the host, and frees its slot.
#[unsafe(no_mangle)]
pub extern "C" fn nn_unload(slot: u32) -> i32 {
    status(|| {
        SLOTS.with_borrow_mut(|slots| {
            let (graph, _) = model(slots, slot)?;
            graph.unload().map_err(|error| wasi_nn_error("unload", error))?;
            slots[slot as usize] = None;
            Ok(0)
        })
    })
}
