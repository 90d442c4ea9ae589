//! Metrics: what a set of images is worth, measured.

pub mod shapes;
