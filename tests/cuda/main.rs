//! The CUDA kernels and their executor on the host emulation, which this binary compiles once.

#[path = "../common/mod.rs"]
mod common;

mod check;
mod edges;
mod graphs;
mod limits;
mod models;
mod names;
mod ops;
mod products;
mod upcast;
