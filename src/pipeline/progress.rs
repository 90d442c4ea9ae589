//! What a run says of itself while it works.

use super::job::Image;
use crate::Result;
use std::collections::BTreeMap;

/// Where a run is; the observer may stop it by returning an error.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// Sampling step `done` of `steps` is finished.
    Step { done: usize, steps: usize },
    /// The image of job `index` is finished.
    Image { index: usize, image: &'a Image },
    /// What the image of job `index` would be if its optimisation ended now.
    Preview { index: usize, image: &'a Image },
    /// An iteration of an optimiser is finished; with what came of it where a trace is kept.
    Iteration(Option<&'a Iteration>),
    /// Something the user may not expect of the image of job `index`.
    Remark { index: usize, text: &'a str },
    /// A run that went wrong goes on once more, to find out where.
    Again,
}

pub type Observer<'a> = dyn FnMut(Progress<'_>) -> Result<()> + 'a;

/// One iteration of an optimiser, as `--trace` writes it. Numbers are per image.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Iteration {
    /// Where it is; `None`: it is of the whole run.
    #[serde(flatten)]
    pub at: Option<AtStep>,
    pub objective: &'static str,
    /// Among those of this step and objective.
    pub iteration: usize,
    #[serde(rename = "rate")]
    pub lr: f64,
    /// What the objective reports before the update.
    pub score: Vec<f64>,
    /// What it is a sum of, unweighted, and what was measured beside it, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub terms: BTreeMap<String, Vec<f64>>,
    /// Length of the gradient of what is optimised.
    pub gradient: Vec<f64>,
    /// Distance from where it began, before the update.
    pub moved: Vec<f64>,
}

/// The sampling step an iteration comes before, and the timesteps of its noise levels.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct AtStep {
    pub step: usize,
    pub timestep: f64,
    pub second_timestep: f64,
}
