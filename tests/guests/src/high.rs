//! The crates `wasi-nn` 0.4 to 0.6 and `wasmedge-wasi-nn`, whose API hides handles and codes.
//!
//! A graph and a context are numbers that this guest gives. `kind` is 0 for f16, 1 f32, 2 f64,
//! 3 u8, 4 i32, 5 i64, whatever number the crate has for it; `encoding` is 0 for OpenVINO, 1 ONNX,
//! 4 TensorFlow Lite; `target` is 0 for CPU, 1 GPU.

mod common;

use std::cell::RefCell;

use common::answer;
use nn::{Error, ExecutionTarget, Graph, GraphBuilder, GraphEncoding, TensorType};

#[cfg(feature = "wasmedge")]
type Context = nn::GraphExecutionContext;
#[cfg(not(feature = "wasmedge"))]
type Context = nn::GraphExecutionContext<'static>;

thread_local! {
    static GRAPHS: RefCell<Vec<&'static Graph>> = const { RefCell::new(Vec::new()) };
    static CONTEXTS: RefCell<Vec<Context>> = const { RefCell::new(Vec::new()) };
}

fn keep_graph(graph: Graph) -> u32 {
    GRAPHS.with_borrow_mut(|graphs| {
        graphs.push(Box::leak(Box::new(graph)));
        graphs.len() as u32 - 1
    })
}

fn with<T>(context: u32, act: impl FnOnce(&mut Context) -> Result<T, Error>) -> Result<T, Error> {
    CONTEXTS.with_borrow_mut(|contexts| act(&mut contexts[context as usize]))
}

fn builder(encoding: u32, target: u32) -> GraphBuilder {
    let encoding = match encoding {
        0 => GraphEncoding::Openvino,
        1 => GraphEncoding::Onnx,
        _ => GraphEncoding::TensorflowLite,
    };
    let target = if target == 0 { ExecutionTarget::CPU } else { ExecutionTarget::GPU };
    GraphBuilder::new(encoding, target)
}

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
    // SAFETY: the caller's promise.
    let parts = unsafe { common::parts(first, first_size, second, second_size) };
    answer(builder(encoding, target).build_from_bytes(parts).map(keep_graph))
}

/// # Safety
/// `at` has `size` bytes of UTF-8.
#[cfg(feature = "by_name")]
unsafe fn text<'a>(at: *const u8, size: usize) -> &'a str {
    // SAFETY: the caller's promise.
    unsafe { std::str::from_utf8_unchecked(std::slice::from_raw_parts(at, size)) }
}

/// # Safety
/// `name` has `size` bytes of UTF-8.
#[cfg(feature = "by_name")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn load_by_name(name: *const u8, size: usize) -> i32 {
    // SAFETY: the caller's promise.
    let name = unsafe { text(name, size) };
    answer(builder(1, 0).build_from_cache(name).map(keep_graph))
}

#[unsafe(no_mangle)]
pub extern "C" fn init_execution_context(graph: u32) -> i32 {
    let graph = GRAPHS.with_borrow(|graphs| graphs[graph as usize]);
    answer(graph.init_execution_context().map(|context| {
        CONTEXTS.with_borrow_mut(|contexts| {
            contexts.push(context);
            contexts.len() as u32 - 1
        })
    }))
}

/// # Safety
/// `dims` has `rank` numbers, `data` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn set_input(
    context: u32,
    index: usize,
    kind: u32,
    dims: *const usize,
    rank: usize,
    data: *const u8,
    size: usize,
) -> i32 {
    // SAFETY: the caller's promise. The test may break it: then the host has to notice.
    let dims = unsafe { std::slice::from_raw_parts(dims, rank) };
    answer(with(context, |context| {
        macro_rules! set {
            ($variant:ident, $element:ty) => {{
                let count = size / size_of::<$element>();
                // SAFETY: as above.
                let data = unsafe { std::slice::from_raw_parts(data.cast::<$element>(), count) };
                context.set_input(index, TensorType::$variant, dims, data).map(|()| 0)
            }};
        }
        match kind {
            0 => set!(F16, u16),
            1 => set!(F32, f32),
            3 => set!(U8, u8),
            4 => set!(I32, i32),
            #[cfg(feature = "wide")]
            2 => set!(F64, f64),
            #[cfg(feature = "wide")]
            5 => set!(I64, i64),
            _ => Err(std::io::Error::other("the crate has no such type").into()),
        }
    }))
}

#[unsafe(no_mangle)]
pub extern "C" fn compute(context: u32) -> i32 {
    answer(with(context, |context| context.compute().map(|()| 0)))
}

/// # Safety
/// `buffer` has `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn get_output(
    context: u32,
    index: usize,
    buffer: *mut u8,
    room: usize,
) -> i32 {
    // SAFETY: the caller's promise.
    let buffer = unsafe { std::slice::from_raw_parts_mut(buffer, room) };
    answer(with(context, |context| context.get_output(index, buffer).map(|n| n as u32)))
}

/// What WasmEdge adds.
#[cfg(feature = "wasmedge")]
mod wasmedge {
    use super::*;

    /// # Safety
    /// `name` and `config` have as many bytes of UTF-8 as they say.
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn load_by_name_with_config(
        name: *const u8,
        name_size: usize,
        config: *const u8,
        config_size: usize,
    ) -> i32 {
        // SAFETY: the caller's promise.
        let (name, config) = unsafe { (text(name, name_size), text(config, config_size)) };
        let builder = builder(1, 0).config(config.to_owned());
        answer(builder.build_from_cache(name).map(keep_graph))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn unload(graph: u32) -> i32 {
        let graph = GRAPHS.with_borrow(|graphs| graphs[graph as usize]);
        answer(graph.unload().map(|()| 0))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn compute_single(context: u32) -> i32 {
        answer(with(context, |context| context.compute_single().map(|()| 0)))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn fini_single(context: u32) -> i32 {
        answer(with(context, |context| context.fini_single().map(|()| 0)))
    }

    /// # Safety
    /// `buffer` has `room` bytes.
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn get_output_single(
        context: u32,
        index: usize,
        buffer: *mut u8,
        room: usize,
    ) -> i32 {
        // SAFETY: the caller's promise.
        let buffer = unsafe { std::slice::from_raw_parts_mut(buffer, room) };
        let written = with(context, |context| context.get_output_single(index, buffer));
        answer(written.map(|n| n as u32))
    }
}
