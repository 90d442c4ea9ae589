//! One image of SeedSelect on its way: where its noise began, the best one so far, and whether it goes on.

use super::options::Patience;
use crate::{Error, Result};

/// One image on its way.
pub(super) struct Seed {
    /// Where it began, `[h, w, C]`.
    pub first: Vec<f32>,
    pub best: Best,
    pub patience: Patience,
    pub stopped: bool,
    /// It was said that the length of its noise is unlikely; a run that goes on says it again.
    pub is_unlikely: bool,
}

/// A starting noise that is returned.
#[derive(Clone, Debug)]
pub struct Best {
    /// `[h, w, C]`, unit variance.
    pub noise: Vec<f32>,
    pub loss: f64,
    /// Steps of the optimizer that led to it.
    pub iteration: usize,
}

impl Seed {
    pub fn new(first: Vec<f32>) -> Seed {
        let best = Best { noise: first.clone(), loss: f64::INFINITY, iteration: 0 };
        Seed { first, best, patience: Patience::default(), stopped: false, is_unlikely: false }
    }

    /// Keeps a noise of a lower loss.
    pub fn take(&mut self, noise: &[f32], loss: f64, iteration: usize) {
        if loss < self.best.loss {
            self.best = Best { noise: noise.to_vec(), loss, iteration };
        }
    }

    /// `Error::NotFinite` where no noise had a loss that is a number.
    pub fn check(&self, seed: u64) -> Result<()> {
        match self.best.loss.is_finite() {
            true => Ok(()),
            false => Err(Error::NotFinite(format!("the loss of seed {seed}"))),
        }
    }

    pub fn begin_at_best(&mut self) {
        self.first.clone_from(&self.best.noise);
    }
}
