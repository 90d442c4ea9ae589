//! Metrics: what a set of images is worth, measured.

pub mod denoising_loss;
pub mod shapes;
