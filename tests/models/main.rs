//! Whole models on the CPU against diffusers, transformers and torch, and the `shapes` world.

#[path = "../common/mod.rs"]
mod common;

mod auxiliary;
mod determinism;
mod golden;
mod layouts;
mod noise;
mod sampler;
mod shapes;
mod text;
