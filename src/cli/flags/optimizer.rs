//! When, how hard and how long is optimised while images are sampled.

use crate::cli::flags::values;
use clap::{Args, ValueEnum};

#[derive(Args)]
pub struct OptimizerFlags {
    /// Adam steps at each optimised sampling step [default: the model's recommended.json, else 10]
    #[arg(long, value_name = "K", value_parser = values::number_of, allow_negative_numbers = true)]
    pub iterations: Option<usize>,
    /// Learning rate [default: the model's recommended.json, else a fraction of the spread of its token embeddings; released 0.01]
    #[arg(long, value_parser = values::amount, allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// The learning rate at step i is LR (1 - i DECAY) [default: the model's recommended.json, else 0]
    #[arg(long, value_name = "DECAY", value_parser = values::number, allow_negative_numbers = true)]
    pub lr_decay: Option<f64>,
    /// Optimise while the timestep is above this fraction of the training steps [default: the model's recommended.json, else 0.9 for
    /// Stable Diffusion, and where other models have as much signal left; released 0.9]
    #[arg(long, value_name = "SHARE", value_parser = values::number, allow_negative_numbers = true)]
    pub t_lo: Option<f64>,
    /// Optimise while the timestep is at most this fraction of the training steps [default: the model's recommended.json, else 1 for
    /// Stable Diffusion, and where other models have as much signal left; released 1]
    #[arg(long, value_name = "SHARE", value_parser = values::number, allow_negative_numbers = true)]
    pub t_hi: Option<f64>,
    /// Optimise every so many steps [default: the model's recommended.json, else 1]
    #[arg(long, value_name = "N", value_parser = values::count, allow_negative_numbers = true)]
    pub every: Option<usize>,
    /// What steps that are not optimised read [default: prompt; released: learned]
    #[arg(long, value_enum)]
    pub after: Option<After>,
    /// Seed of the optimiser's noise and first embeddings; image i uses OPT_SEED+i [default: --seed]
    #[arg(long, allow_negative_numbers = true)]
    pub opt_seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum After {
    Prompt,
    Learned,
}
