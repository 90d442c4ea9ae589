//! rarebit: forward and input-gradient of Stable Diffusion pipelines as planned op programs.
//!
//! Data flows one way: `weights`, `text` → `program` → `models` → `autodiff` → `plan` → `exec` → `sampler` → `data` → `pipeline` →
//! `rewards` → `optimize` → `metrics` → `methods` → `cli`. A module imports only from its left (`tests/source/layering.rs` enforces it).
#![deny(unsafe_code)]

pub mod assets;
pub mod autodiff;
pub mod cli;
pub mod data;
pub mod error;
pub mod exec;
pub mod methods;
pub mod metrics;
pub mod models;
pub mod optimize;
pub mod pipeline;
pub mod plan;
pub mod program;
pub mod rewards;
pub mod sampler;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
