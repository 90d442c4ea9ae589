//! Evolutionary search: generations of candidates, each bred from the best so far.

use super::Strategy;
use super::mix::{Choices, Mix, is_probability, is_step};
use crate::{Error, Result};

/// The first generation is all draws. Of every later one some are the best so far, not evaluated again; the others are children of
/// parents drawn among those (truncation selection). Elites and mutation as in EvoSearch (He et al. 2025, arXiv 2505.17618), crossover
/// as in a genetic algorithm over noise (Jajal et al. 2025, arXiv 2506.00299). Ours: the crossover is an equal mixture of both parents,
/// which keeps the variance as an exchange of single numbers does.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Evolution {
    /// Candidates of a generation, its elites among them.
    pub population: usize,
    /// The best of all so far: members of the next generation, and parents of the others.
    pub elites: usize,
    /// Probability that a child has two parents.
    pub crossover: f64,
    /// Mutation: a child is this much of a fresh draw and √(1 − step²) of what it inherits.
    pub step: f64,
}

impl Default for Evolution {
    fn default() -> Evolution {
        Evolution { population: 8, elites: 2, crossover: 0.5, step: 0.4 }
    }
}

impl Evolution {
    pub(super) fn check(self) -> Result<()> {
        let Evolution { population, elites, crossover, step } = self;
        if elites == 0 || elites >= population {
            let what = format!("{elites} elites in a population of {population}: must be 1 or more, and fewer");
            return Err(Error::Usage(what));
        }
        if is_probability(crossover) && is_step(step) {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "crossover with probability {crossover} and mutation by a step of {step}: must be 0 to 1, above 0 and at most 1"
        )))
    }
}

pub(super) struct Generations<C> {
    options: Evolution,
    choices: Choices,
    /// The elites of all generations that are complete, the best first; of equal ones the older.
    parents: Vec<(C, f64)>,
    /// The generation that is being made, its elites first.
    members: Vec<(C, f64)>,
}

impl<C> Generations<C> {
    pub fn new(options: Evolution, seed: u64) -> Generations<C> {
        Generations { options, choices: Choices::new(seed), parents: vec![], members: vec![] }
    }
}

/// The step of a mixture that is as much of one as of the other: √(1 − s²) = s.
const EQUAL: f64 = std::f64::consts::FRAC_1_SQRT_2;

impl<C: Mix> Strategy<C> for Generations<C> {
    fn next(&mut self, draw: C) -> C {
        let parents = self.parents.len();
        if parents == 0 {
            return draw;
        }
        let first = self.choices.below(parents);
        let mut child = self.parents[first].0.clone();
        if parents > 1 && self.choices.happens(self.options.crossover) {
            // One of the others.
            let second = (first + 1 + self.choices.below(parents - 1)) % parents;
            child = child.mix(&self.parents[second].0, EQUAL);
        }
        child.mix(&draw, self.options.step)
    }

    fn scored(&mut self, candidate: &C, score: f64) {
        self.members.push((candidate.clone(), score));
        if self.members.len() == self.options.population {
            // A stable sort: of equal ones the older stays first.
            self.members.sort_by(|(_, a), (_, b)| b.total_cmp(a));
            self.members.truncate(self.options.elites);
            self.parents = self.members.clone();
        }
    }
}
