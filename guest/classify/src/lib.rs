//! The guest: an image in, a label out, over functions that any host can call.
//!
//! `abi` (in Wasm only) holds the exported functions; [`memory`] checks what hosts pass to them.

#[cfg(target_arch = "wasm32")]
mod abi;
#[cfg(all(test, target_arch = "wasm32"))]
mod abi_tests;
pub mod memory;

#[cfg(target_arch = "wasm32")]
pub use abi::{normalization, respond, status};
