//! Ops, the planner and optimisers on the CPU, without a model.

#[path = "../common/mod.rs"]
mod common;

mod cpu;
mod optimisers;
mod planner;
mod resize;
