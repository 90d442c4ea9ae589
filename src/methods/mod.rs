//! Methods: the loops. Each file reads like the algorithm it runs; everything it runs is a planned program.

pub mod chain;
pub mod generate;
pub mod networks;
pub mod pipeline;
pub mod programs;
pub mod text;
