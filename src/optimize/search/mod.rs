//! Gradient-free search: candidates of any variable, any score of what is made of them, and a budget in UNet forwards.

pub mod best_of;

use crate::{Error, Result};

/// Makes and scores candidates, one per image at a time; the images are searched side by side and apart from each other.
pub trait Evaluate {
    /// A value of the variable: a seed, a noise, a prompt.
    type Candidate;
    /// What is made of it, kept beside its score.
    type Outcome;

    /// UNet forwards of one evaluation, that of all images together.
    fn forwards(&self) -> usize;

    /// One candidate per image → its score and outcome; the higher the better, infinite ones included.
    fn evaluate(&mut self, candidates: &[Self::Candidate]) -> Result<Vec<(f64, Self::Outcome)>>;
}

/// What a search may spend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub forwards: usize,
}

impl Budget {
    /// How many evaluations of so many forwards it pays for; `Error::Usage` where that is none, or no number.
    pub fn evaluations(self, forwards: usize) -> Result<usize> {
        match self.forwards.checked_div(forwards) {
            None => Err(Error::Usage("a search whose evaluation costs no UNet forward has no end".into())),
            Some(0) => {
                let budget = self.forwards;
                Err(Error::Usage(format!("a search of {budget} UNet forwards: one evaluation takes {forwards}")))
            }
            Some(evaluations) => Ok(evaluations),
        }
    }
}

/// The best candidate of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Best<C, T> {
    pub candidate: C,
    /// Which evaluation it was, from 0.
    pub index: usize,
    pub score: f64,
    pub outcome: T,
}
