//! What a run's loss is a sum of: objectives at points of the run; and what is only watched there.

use crate::optimize::objective::Objective;

/// An objective on the latents at one point of the run.
pub struct Term<'a> {
    /// Steps done at that point; `None`: all.
    pub after: Option<usize>,
    /// The second noise level of the objective, as a fraction of the training steps.
    pub t2: f64,
    pub objective: Objective<'a>,
    /// It is no part of the loss: there is no gradient of it.
    pub watched: bool,
}

impl<'a> Term<'a> {
    /// On the final latents; what they are noised to is half of the training steps.
    pub fn at_end(objective: Objective<'a>) -> Term<'a> {
        Term { after: None, t2: 0.5, objective, watched: false }
    }

    /// After so many steps.
    pub fn after(steps: usize, objective: Objective<'a>) -> Term<'a> {
        Term { after: Some(steps), ..Term::at_end(objective) }
    }

    /// The same, only looked at.
    pub fn watched(self) -> Term<'a> {
        Term { watched: true, ..self }
    }
}
