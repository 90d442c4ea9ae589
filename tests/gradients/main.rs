//! Gradients on the CPU: of every op, of networks, of whole sampling runs.

#[path = "../common/mod.rs"]
mod common;

mod attention_norms;
mod autograd;
mod chain;
mod chain_device;
mod elementwise;
mod every_op;
mod products;
