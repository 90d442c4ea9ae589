//! What images are chosen by: a score of a batch that was just made. In three stages, as methods are.

use crate::Result;
use crate::exec::Executor;
use crate::metrics::denoising_loss;
use crate::metrics::shapes::{ShapesScore, ShapesScorer};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::plan::Planned;
use serde_json::{Value, json};

/// A score by its settings.
pub trait Criterion {
    /// Everything of it that decides which image is chosen, as images record it.
    fn record(&self) -> Value;

    /// Plans what scores the images of `generator`, which makes them with `settings`.
    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        generator: &Generator<'p>,
        settings: &generate::Settings,
    ) -> Result<Box<dyn PlannedJudge + 'p>>;
}

/// A judge's programs, planned but not loaded.
pub trait PlannedJudge {
    fn programs(&self) -> Vec<&Planned>;

    /// UNet forwards of scoring one batch.
    fn forwards(&self) -> usize;

    /// Loads them beside the generator.
    fn load(self: Box<Self>, images: &mut generate::Loaded<'_, '_>) -> Result<Box<dyn Judge>>;
}

/// Scores a batch that the generator has just made: its executor holds the final latents still.
pub trait Judge {
    /// UNet forwards of scoring one batch.
    fn forwards(&self) -> usize;

    /// Per image, the higher the better. It may leave anything in the generator's buffers.
    fn score(&mut self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job], made: &[Image]) -> Result<Vec<f64>>;
}

/// The scores that need no more than the model and the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Error of the model in predicting the noise in its own image: any model.
    DenoisingLoss,
    /// Minus the exact log-density of what a `shapes` image shows.
    Rarity,
    /// Fraction of the prompt's attributes that a `shapes` image shows.
    Agreement,
}

/// Noise levels at which [`Score::DenoisingLoss`] predicts the noise.
const NOISE_LEVELS: usize = 8;

impl Criterion for Score {
    fn record(&self) -> Value {
        json!(match self {
            Score::DenoisingLoss => "elbo",
            Score::Rarity => "rarity",
            Score::Agreement => "agreement",
        })
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        generator: &Generator<'p>,
        settings: &generate::Settings,
    ) -> Result<Box<dyn PlannedJudge + 'p>> {
        let shapes = |score: fn(&ShapesScore) -> f64| -> Result<Box<dyn PlannedJudge + 'p>> {
            Ok(Box::new(ByShapes { shapes_scorer: ShapesScorer::open(settings.width, settings.height)?, score }))
        };
        match self {
            Score::DenoisingLoss => {
                let dtype = settings.dtype;
                Ok(Box::new(denoising_loss::Planner::plan(pipeline, executor, generator, dtype, NOISE_LEVELS)?))
            }
            Score::Rarity => shapes(|shapes_score| -shapes_score.log_density),
            Score::Agreement => shapes(ShapesScore::agreement),
        }
    }
}

impl PlannedJudge for denoising_loss::Planner<'_> {
    fn programs(&self) -> Vec<&Planned> {
        self.programs()
    }

    fn forwards(&self) -> usize {
        self.nfe().forward
    }

    fn load(self: Box<Self>, images: &mut generate::Loaded<'_, '_>) -> Result<Box<dyn Judge>> {
        let forwards = self.nfe().forward;
        Ok(Box::new(ByDenoisingLoss { loss: (*self).load(images)?, forwards }))
    }
}

struct ByDenoisingLoss {
    loss: denoising_loss::Loaded,
    forwards: usize,
}

impl Judge for ByDenoisingLoss {
    fn forwards(&self) -> usize {
        self.forwards
    }

    fn score(&mut self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job], _made: &[Image]) -> Result<Vec<f64>> {
        self.loss.score(images, jobs)
    }
}

struct ByShapes {
    shapes_scorer: ShapesScorer,
    score: fn(&ShapesScore) -> f64,
}

impl PlannedJudge for ByShapes {
    fn programs(&self) -> Vec<&Planned> {
        vec![]
    }

    fn forwards(&self) -> usize {
        0
    }

    fn load(self: Box<Self>, _images: &mut generate::Loaded<'_, '_>) -> Result<Box<dyn Judge>> {
        Ok(self)
    }
}

impl Judge for ByShapes {
    fn forwards(&self) -> usize {
        0
    }

    fn score(&mut self, _images: &mut generate::Loaded<'_, '_>, jobs: &[Job], made: &[Image]) -> Result<Vec<f64>> {
        let score =
            |(job, image): (&Job, &Image)| Ok((self.score)(&self.shapes_scorer.score(&job.prompt, &image.rgb)?));
        jobs.iter().zip(made).map(score).collect()
    }
}
