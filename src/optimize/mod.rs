//! Optimization of what goes in: variables, objectives, optimizers, and whole runs as differentiable functions.

pub mod chain;
pub mod objective;
pub mod optimizer;
pub mod search;
pub mod variable;
