//! MinorityPrompt and the samplers it is compared with, as a library runs them.

#[path = "../common/mod.rs"]
mod common;

mod baselines;
mod example_method;
mod minority;
mod minority_gradients;
mod minority_reference;
mod nao;
mod planning;
mod seedselect;
mod seedselect_linear;
mod seedselect_reference;
