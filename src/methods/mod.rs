//! Methods: the loops. Each file reads like the algorithm it runs; everything it runs is a planned program.

pub mod best_of;
pub mod cads;
pub mod chain;
pub mod elbo;
pub mod generate;
pub mod inversion;
pub mod minority;
pub mod networks;
pub mod objective;
pub mod pipeline;
pub mod programs;
pub mod sgms;
pub mod text;
pub mod token;
pub mod variable;
