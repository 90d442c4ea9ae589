//! Zero-order and ε-greedy search: a walk from the best candidate so far to the best of its neighbours.

use super::Strategy;
use super::mix::{Choices, Mix, is_probability, is_step};
use crate::{Error, Result};

/// Zero-order search (Ma et al. 2025, arXiv 2501.09732): rounds of candidates at a distance from a pivot, which is the
/// first draw to begin with; the best of a round is the next pivot. Ours: a pivot that is better than its round stays.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct ZeroOrder {
    /// Candidates of a round.
    pub neighbours: usize,
    /// A candidate is this much of a fresh draw and √(1 − step²) of the pivot.
    pub step: f64,
}

impl Default for ZeroOrder {
    fn default() -> ZeroOrder {
        ZeroOrder { neighbours: 2, step: 0.4 }
    }
}

impl ZeroOrder {
    /// The walk without fresh draws.
    pub(super) fn walk(self) -> EpsilonGreedy {
        EpsilonGreedy { neighbours: self.neighbours, step: self.step, epsilon: 0.0 }
    }
}

/// The same with a fresh draw now and then (Ramesh & Mardani 2025, arXiv 2506.03164, there over the noise of every sampling step;
/// the released code has 4 neighbours, λ = 0.15 and ε = 0.4).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct EpsilonGreedy {
    pub neighbours: usize,
    pub step: f64,
    /// Probability that a candidate is a fresh draw.
    pub epsilon: f64,
}

impl Default for EpsilonGreedy {
    fn default() -> EpsilonGreedy {
        EpsilonGreedy { epsilon: 0.2, ..ZeroOrder::default().walk() }
    }
}

impl EpsilonGreedy {
    pub(super) fn check(self) -> Result<()> {
        let EpsilonGreedy { neighbours, step, epsilon } = self;
        if neighbours > 0 && is_step(step) && is_probability(epsilon) {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "a search with {neighbours} neighbours at a step of {step}, fresh draws with probability {epsilon}: must be 1 or more, \
             above 0 and at most 1, 0 to 1"
        )))
    }
}

pub(super) struct Walk<C> {
    options: EpsilonGreedy,
    choices: Choices,
    /// Candidates left in this round.
    left: usize,
    /// None before the first draw has a score.
    pivot: Option<C>,
    /// Of all so far.
    best: Option<(C, f64)>,
}

impl<C> Walk<C> {
    pub fn new(options: EpsilonGreedy, seed: u64) -> Walk<C> {
        Walk { options, choices: Choices::new(seed), left: 0, pivot: None, best: None }
    }
}

impl<C: Mix> Strategy<C> for Walk<C> {
    fn next(&mut self, draw: C) -> C {
        if self.left == 0 {
            self.pivot = self.best.as_ref().map(|(best, _)| best.clone());
            self.left = self.options.neighbours;
        }
        let Some(pivot) = &self.pivot else {
            self.left = 0;
            return draw;
        };
        self.left -= 1;
        if self.choices.happens(self.options.epsilon) { draw } else { pivot.mix(&draw, self.options.step) }
    }

    fn scored(&mut self, candidate: &C, score: f64) {
        if self.best.as_ref().is_none_or(|(_, best)| score > *best) {
            self.best = Some((candidate.clone(), score));
        }
    }
}
