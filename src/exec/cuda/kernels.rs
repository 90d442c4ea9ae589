//! What build.rs made of kernels/.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// What the kernels are compiled for that use Hopper's own instructions, as nvcc names it.
pub const HOPPER: &str = "90a";
