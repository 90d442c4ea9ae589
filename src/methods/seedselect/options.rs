//! What SeedSelect is asked for: the terms of its loss, how long and how hard it is minimized, and which iterate is returned.

use super::start::Start;
use crate::optimize::objective::references::View;
use crate::optimize::optimizer::{Clip, Optimizer, Rule};
use crate::{Error, Result};
use serde_json::{Value, json};

/// Which defects of the released code are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// Generated images and references are seen in the same way: antialiased, cropped. References are encoded to their posterior mean.
    /// The best iterate is returned.
    Default,
    /// As the released code: generated images are squashed without antialias before CLIP, references are squashed before the VAE
    /// and encoded to a sample, the last iterate that was looked at is returned.
    Released,
}

/// The learning rate over the iterations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    pub first: f64,
    /// From iteration `from` on it is `later`.
    pub from: usize,
    pub later: f64,
}

impl LearningRate {
    pub fn at(&self, iteration: usize) -> f64 {
        if iteration < self.from { self.first } else { self.later }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    pub convention: Convention,
    pub iterations: usize,
    pub lr: LearningRate,
    pub weight_decay: f64,
    /// Weights of the terms.
    pub semantics: f64,
    pub appearance: f64,
    pub norm_prior: f64,
    /// Of the distance to the prompt itself, relative to that to the references: both are taken of the same features.
    pub prompt: f64,
    /// What the CLIP is shown of an image.
    pub views: &'static [View],
    /// Of the distance to other classes; an extension.
    pub contrast: f64,
    /// Steps of the sampler while noises are tried and optimised, where images have more: the image of a noise changes little with them.
    /// A sampler that adds noise takes all.
    pub steps: Option<usize>,
    /// Starting noises that are tried; the one of the lowest loss is optimised.
    pub starts: usize,
    /// What they are drawn from.
    pub start: Start,
    /// Steps of the inversion of a reference, where starts take one.
    pub inversion_steps: usize,
    /// One noise is optimised for all images of a prompt, and every image goes on from near it for so many iterations at the later
    /// learning rate, towards a subset of the references.
    pub bootstrap: Option<usize>,
    /// Stop once the loss has risen more often than this one after the other.
    pub patience: Option<usize>,
    /// Bounds on the gradient. That of DOODL (Wallace et al. 2023) is 1e-3 on every number.
    pub clip: Option<Clip>,
    /// After every step the noise is brought back to the length it began with, as DOODL does.
    pub renormalise: bool,
}

/// Weights of the loss at the states after the last steps, the last one last (the released code's SeedOpt, line 139).
const STATES: [f64; 3] = [0.05, 0.25, 0.70];

/// τ of the contrast, that of supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362). Ours: that of the paper is not
/// known.
pub(super) const TEMPERATURE: f64 = 0.1;

impl Options {
    /// The released code's settings (main.py, lines 85 to 90, 105 and 153): AdamW with torch's decay, a tenth of the rate from the fourth
    /// iteration on, no other stop than the number of iterations.
    pub const RELEASED: Options = Options {
        convention: Convention::Released,
        iterations: 30,
        lr: LearningRate { first: 0.1, from: 3, later: 0.01 },
        weight_decay: 0.01,
        semantics: 10.0,
        appearance: 1.0,
        norm_prior: 0.0,
        prompt: 0.0,
        views: View::WHOLE,
        contrast: 0.0,
        steps: None,
        starts: 1,
        start: Start::Noise,
        inversion_steps: 50,
        bootstrap: None,
        patience: None,
        clip: None,
        renormalise: false,
    };

    /// What `tools/study/seedselect.py` found best on the tuning set: the best iterate, small steps from the best of many starts, few steps of the
    /// sampler, a loss that is hard to fool.
    pub const DEFAULT: Options = Options {
        convention: Convention::Default,
        iterations: 6,
        lr: LearningRate { first: 0.03, from: 3, later: 0.03 },
        weight_decay: 0.0,
        appearance: 0.0,
        prompt: 0.3,
        views: View::ALL,
        steps: Some(8),
        starts: 24,
        patience: Some(3),
        ..Options::RELEASED
    };

    /// `Error::Usage` where they make no sense for a batch of so many images.
    pub fn check(&self, batch: usize) -> Result<()> {
        let wrong = |what: &str| Err(Error::Usage(what.to_string()));
        if self.steps == Some(0) {
            return wrong("--optimise-steps 0: must be 1 or more");
        }
        if self.starts == 0 {
            return wrong("the best of 0 starting noises: must be 1 or more");
        }
        if self.semantics == 0.0 && self.appearance == 0.0 && self.contrast == 0.0 {
            return wrong(
                "nothing of the references is minimized: the weights of semantics and of appearance are both 0",
            );
        }
        if matches!(self.clip, Some(Clip::GlobalNorm(_))) && batch > 1 {
            return wrong("a bound on the length of the gradient is on that of a whole batch; choose --batch 1");
        }
        Ok(())
    }

    /// Whether a term looks through a CLIP.
    pub(super) fn has_features(&self) -> bool {
        self.semantics != 0.0 || self.contrast != 0.0
    }

    pub(super) fn optimizer(&self) -> Optimizer {
        let rule = Rule::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: self.weight_decay };
        Optimizer { rule, clip: self.clip }
    }

    /// Steps done and weight of every state of the semantic term; a run of fewer steps has fewer of them, of the same sum.
    pub(super) fn states(steps: usize) -> impl Iterator<Item = (usize, f64)> {
        let weights = &STATES[STATES.len().saturating_sub(steps)..];
        let sum: f64 = weights.iter().sum();
        let first = steps + 1 - weights.len();
        weights.iter().enumerate().map(move |(index, weight)| (first + index, weight / sum))
    }

    /// As images record them.
    pub(super) fn record(&self) -> Value {
        let clip = match self.clip {
            None => Value::Null,
            Some(Clip::Value(bound)) => json!({"value": bound}),
            Some(Clip::GlobalNorm(bound)) => json!({"norm": bound}),
        };
        let mut record = json!({
            "released": self.convention == Convention::Released, "iterations": self.iterations, "lr": self.lr.first,
            "lr_from": self.lr.from, "lr_later": self.lr.later, "weight_decay": self.weight_decay, "semantics": self.semantics,
            "appearance": self.appearance, "norm_prior": self.norm_prior, "starts": self.starts, "patience": self.patience,
            "clip": clip, "renormalise": self.renormalise, "prompt": self.prompt, "views": self.views.len(), "steps": self.steps
        });
        if self.contrast != 0.0 {
            record["contrast"] = json!({"weight": self.contrast, "temperature": TEMPERATURE});
        }
        if self.start != Start::Noise {
            record["start"] = json!({"from": self.start.name(), "inversion_steps": self.inversion_steps});
        }
        record
    }
}

/// The stop rule: how often the loss has risen one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Patience {
    last: Option<f64>,
    rises: usize,
}

impl Patience {
    /// Takes the next loss; whether to stop.
    pub fn stops(&mut self, loss: f64, most: Option<usize>) -> bool {
        self.rises = if self.last.is_some_and(|last| loss > last) { self.rises + 1 } else { 0 };
        self.last = Some(loss);
        most.is_some_and(|most| self.rises > most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_states_count() {
        let states: Vec<(usize, f64)> = Options::states(20).collect();
        assert_eq!(states.iter().map(|state| state.0).collect::<Vec<_>>(), [18, 19, 20]);
        assert!(
            (states.iter().map(|state| state.1).sum::<f64>() - 1.0).abs() < 1e-12 && (states[2].1 - 0.7).abs() < 1e-12
        );
        assert_eq!(Options::states(1).collect::<Vec<_>>(), [(1, 1.0)]);
        let two: Vec<(usize, f64)> = Options::states(2).collect();
        assert!(two[0].0 == 1 && two[1].0 == 2 && (two[0].1 - 0.25 / 0.95).abs() < 1e-12, "{two:?}");
    }

    #[test]
    fn learning_rates() {
        let rates: Vec<f64> = (0..5).map(|iteration| Options::RELEASED.lr.at(iteration)).collect();
        assert_eq!(rates, [0.1, 0.1, 0.1, 0.01, 0.01]);
    }

    #[test]
    fn stops_after_four_rises_and_not_after_three() {
        let stops_at = |losses: &[f64]| {
            let mut patience = Patience::default();
            losses.iter().position(|loss| patience.stops(*loss, Some(3)))
        };
        assert_eq!(stops_at(&[5.0, 6.0, 7.0, 8.0, 7.5, 9.0]), None);
        assert_eq!(stops_at(&[5.0, 6.0, 7.0, 8.0, 9.0, 1.0]), Some(4));
        let mut patience = Patience::default();
        assert!((0..99).all(|loss| !patience.stops(f64::from(loss), None)));
    }

    #[test]
    fn what_makes_no_sense() {
        Options::DEFAULT.check(4).unwrap();
        let norm = Some(Clip::GlobalNorm(1.0));
        assert!(Options { clip: norm, ..Options::DEFAULT }.check(1).is_ok());
        for options in [
            Options { clip: norm, ..Options::DEFAULT },
            Options { starts: 0, ..Options::DEFAULT },
            Options { semantics: 0.0, appearance: 0.0, ..Options::DEFAULT },
        ] {
            assert_eq!(options.check(2).unwrap_err().exit_code(), 2);
        }
    }
}
