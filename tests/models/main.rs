//! Whole models on the CPU against diffusers, transformers and torch, the `shapes` world, rewards, and images that users hand in.

#[path = "../common/mod.rs"]
mod common;

mod auxiliary;
mod content;
mod determinism;
mod files;
mod golden;
mod images;
mod inversion;
mod layouts;
mod noise;
mod pruned;
mod rewards;
mod sampler;
mod shapes;
mod text;
