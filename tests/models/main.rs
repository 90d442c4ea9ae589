//! Whole models on the CPU against diffusers, transformers and torch, the `shapes` world, rewards, and images that users hand in.

#[path = "../common/mod.rs"]
mod common;

mod auxiliary;
mod determinism;
mod files;
mod golden;
mod images;
mod layouts;
mod noise;
mod rewards;
mod sampler;
mod shapes;
mod text;
