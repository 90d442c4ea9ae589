//! Gradient-free search: candidates of any variable, any score of what is made of them, and a budget in UNet forwards.

pub mod best_of;
pub mod evolution;
pub mod ladder;
pub mod mix;
pub mod walk;

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

/// The search of one image: what it tries next, and what came of it.
trait Strategy<C> {
    /// The next candidate of the image, from a draw of its own that no other has.
    fn next(&mut self, draw: C) -> C;

    /// Its score, before the next is asked for; never NaN.
    fn scored(&mut self, candidate: &C, score: f64);
}

/// Evaluates as many candidates per image as the budget pays for; the best of each, of equal ones the first. `draw(image, index)` is
/// the draw of candidate `index` of an image. A score that is no number is an error.
fn search<E: Evaluate>(
    mut strategies: Vec<Box<dyn Strategy<E::Candidate>>>,
    budget: Budget,
    draw: impl Fn(usize, usize) -> E::Candidate,
    evaluation: &mut E,
) -> Result<Vec<Best<E::Candidate, E::Outcome>>> {
    let evaluations = budget.evaluations(evaluation.forwards())?;
    let mut best: Vec<Option<Best<E::Candidate, E::Outcome>>> = strategies.iter().map(|_| None).collect();
    for index in 0..evaluations {
        let of_images = strategies.iter_mut().enumerate();
        let candidates: Vec<_> = of_images.map(|(image, strategy)| strategy.next(draw(image, index))).collect();
        let evaluated = evaluation.evaluate(&candidates)?;
        for (image, (candidate, (score, outcome))) in candidates.into_iter().zip(evaluated).enumerate() {
            if score.is_nan() {
                return Err(Error::NotFinite(format!("the score of candidate {index} of image {image}")));
            }
            strategies[image].scored(&candidate, score);
            if best[image].as_ref().is_none_or(|best| score > best.score) {
                best[image] = Some(Best { candidate, index, score, outcome });
            }
        }
    }
    Ok(best.into_iter().flatten().collect())
}
