//! An image classifier: [`model`] is the network, [`postprocess`] the step from logits to labels,
//! [`request`] the article's JSON interface. Safe code only, and no knowledge of any host.

#![forbid(unsafe_code)]

mod error;
mod json;
pub mod model;
pub mod postprocess;
pub mod request;
mod safetensors;

pub use error::{Error, Status};
