//! Methods: the loops. Each file reads like the algorithm it runs; everything it runs is a planned program.

pub mod baselines;
pub mod minority;
