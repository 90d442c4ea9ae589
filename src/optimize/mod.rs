//! Optimisation of what goes in: variables, objectives, optimisers, whole runs as differentiable functions, and gradient-free search.

pub mod chain;
pub mod objective;
pub mod search;
pub mod variable;
