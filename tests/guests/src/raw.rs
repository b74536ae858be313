//! The crates `wasi-nn` 0.1 to 0.3, which are no more than the calls themselves.
//!
//! A graph and a context are the host's own handles here, so the test can also pass wrong ones.
//! `kind` is 0 for f16, 1 f32, 2 f64, 3 u8, 4 i32, 5 i64, whatever number the crate has for it;
//! `encoding` is 0 for OpenVINO, 1 ONNX, 4 TensorFlow Lite; `target` is 0 for CPU, 1 GPU.

mod common;

use common::answer;

/// # Safety
/// Each pointer has its length in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn load(
    first: *const u8,
    first_size: usize,
    second: *const u8,
    second_size: usize,
    encoding: u32,
    target: u32,
) -> i32 {
    // A guest can't name what its crate doesn't know, and guests in the wild name other formats.
    let encoding = match encoding {
        #[cfg(feature = "onnx")]
        1 => nn::GRAPH_ENCODING_ONNX,
        #[cfg(feature = "tflite")]
        4 => nn::GRAPH_ENCODING_TENSORFLOWLITE,
        _ => nn::GRAPH_ENCODING_OPENVINO,
    };
    let target = if target == 0 { nn::EXECUTION_TARGET_CPU } else { nn::EXECUTION_TARGET_GPU };
    // SAFETY: the caller's promise; the host reads what it is given, and writes a handle.
    answer(unsafe {
        let parts = common::parts(first, first_size, second, second_size);
        nn::load(&parts, encoding, target)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn init_execution_context(graph: u32) -> i32 {
    // SAFETY: the host knows its handles.
    answer(unsafe { nn::init_execution_context(graph) })
}

/// # Safety
/// `dims` has `rank` numbers, `data` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn set_input(
    context: u32,
    index: u32,
    kind: u32,
    dims: *const u32,
    rank: usize,
    data: *const u8,
    size: usize,
) -> i32 {
    let kind = match kind {
        0 => nn::TENSOR_TYPE_F16,
        1 => nn::TENSOR_TYPE_F32,
        3 => nn::TENSOR_TYPE_U8,
        4 => nn::TENSOR_TYPE_I32,
        _ => return answer::<&str>(Err("the crate has no such type")),
    };
    // SAFETY: the caller's promise. The test may break it: then the host has to notice.
    answer(unsafe {
        let tensor = nn::Tensor {
            dimensions: std::slice::from_raw_parts(dims, rank),
            #[cfg(feature = "first")]
            r#type: kind,
            #[cfg(not(feature = "first"))]
            type_: kind,
            data: std::slice::from_raw_parts(data, size),
        };
        nn::set_input(context, index, tensor).map(|()| 0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn compute(context: u32) -> i32 {
    // SAFETY: the host knows its handles.
    answer(unsafe { nn::compute(context).map(|()| 0) })
}

/// # Safety
/// `buffer` has `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn get_output(context: u32, index: u32, buffer: *mut u8, room: u32) -> i32 {
    // SAFETY: the caller's promise.
    answer(unsafe { nn::get_output(context, index, buffer, room) })
}
