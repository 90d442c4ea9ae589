//! rarebit: forward and input-gradient of Stable Diffusion pipelines as planned op programs.
//!
//! Data flows one way: `input` → `weights`, `text` → `program` → `models` → `autodiff` → `plan` → `exec` → `sampler` → `data` → `pipeline` →
//! `rewards` → `optimize` → `metrics` → `methods` → `cli`. A module imports only from its left (`tests/source/layering.rs` enforces it).
//!
//! | module | what it does |
//! |---|---|
//! | [`input`] | files that users hand in: regular, bounded, named as what they are |
//! | [`weights`], [`text`] | safetensors files under one set of names, whatever the layout; CLIP's tokenizer |
//! | [`program`] | a flat list of coarse ops in eight families, already fused as kernels are; shapes checked as they are appended |
//! | [`models`] | text towers, UNet, VAE, CLIP image towers, GPT-2: one builder file each |
//! | [`autodiff`] | from a program to a longer one that also gives gradients: a rule per op, and which values to keep or compute again |
//! | [`plan`] | lifetimes to arena offsets, in place where an op allows it; as little recomputation as a budget of bytes allows; a pure function |
//! | [`exec::cpu`] | blocked matrix products with weights packed once, convolution as implicit product, tiled attention; a run allocates nothing |
//! | [`exec::cuda`] | an op becomes kernel launches by a pure function; one arena; a GPU, or the host emulation, behind one narrow `Driver` |
//! | [`sampler`] | every sampler as a table of coefficients of one linear update; noise |
//! | [`data`] | what is read and written besides weights: images with their metadata, prompt lists, textual inversions |
//! | [`pipeline`] | an opened model: prompts to conditions, the sampling loop, single calls of a network |
//! | [`rewards`] | from an image to a number, differentiable |
//! | [`optimize`] | what may change, objectives, optimizers, and a sampling run as a differentiable function |
//! | [`metrics`] | what images are worth: the denoising loss, the `shapes` world whose density is known exactly |
//! | [`methods`] | the loops: MinorityPrompt and the samplers it is compared with |
//! | [`cli`] | the program `rarebit` |
#![deny(unsafe_code)]

pub mod assets;
pub mod autodiff;
pub mod cli;
pub mod data;
pub mod error;
pub mod exec;
pub mod input;
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
