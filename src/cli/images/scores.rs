//! Scores that a comparison computes on request, of images that are made already. A new one is a variant here and what it opens.

use crate::cli::flags::device::{self, DeviceFlags};
use crate::cli::images::targets::Target;
use crate::cli::images::work;
use crate::cli::machine;
use crate::exec::Executor;
use crate::metrics::denoising_loss;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{Generator, Image, Settings};
use crate::plan::{Footprint, Planned};
use crate::rewards::{Aesthetic, Clip, Reward, Scorer};
use crate::weights::Component;
use crate::{Error, Result};
use clap::ValueEnum;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Score {
    /// Error of the model in predicting the noise in the images, under the prompt: any model, 8 UNet forwards an image
    DenoisingLoss,
    /// Similarity of image and prompt by the CLIP in the model's folder, -1 to 1
    Clip,
    /// The aesthetic head on that CLIP, in the model's folder
    Aesthetic,
}

impl Score {
    /// As events name it.
    pub fn name(self) -> &'static str {
        match self {
            Score::DenoisingLoss => "denoising_loss",
            Score::Clip => "clip",
            Score::Aesthetic => "aesthetic",
        }
    }

    /// As tables name it.
    pub fn label(self) -> &'static str {
        match self {
            Score::DenoisingLoss => "denoising-loss",
            Score::Clip => "clip",
            Score::Aesthetic => "aesthetic",
        }
    }

    /// An error where the model lacks what it is computed by.
    pub fn open(self, pipeline: &Pipeline) -> Result<OpenScore<'_>> {
        let (model, clip) = (&pipeline.model, Component::Clip);
        if self != Score::DenoisingLoss && !model.has(clip) {
            let (label, path) = (self.label(), model.path().display());
            return Err(Error::Usage(format!(
                "--score {label}: {path} has no CLIP; its folder would hold one in clip/"
            )));
        }
        let reward: Option<Box<dyn Reward>> = match self {
            Score::DenoisingLoss => None,
            Score::Clip => Some(Box::new(Clip::new(model, clip)?)),
            Score::Aesthetic => Some(Box::new(Aesthetic::new(model, clip)?)),
        };
        Ok(OpenScore { score: self, pipeline, reward })
    }
}

/// Noise levels of [`Score::DenoisingLoss`].
const NOISE_LEVELS: usize = 8;

/// A score with what it is computed by.
pub struct OpenScore<'p> {
    score: Score,
    pipeline: &'p Pipeline,
    /// Without, the model itself scores.
    reward: Option<Box<dyn Reward>>,
}

impl OpenScore<'_> {
    /// Plans it for images one at a time, within the memory.
    pub fn plan(&self, flags: &DeviceFlags, executor: &dyn Executor, settings: &Settings) -> Result<PlannedScore<'_>> {
        let (pipeline, size) = (self.pipeline, [settings.height, settings.width]);
        let programs = match &self.reward {
            Some(reward) => Programs::Reward(Box::new(Scorer::plan(&**reward, executor, settings.dtype, 1, size)?)),
            None => {
                let generator = Generator::plan(pipeline, executor, settings.clone(), 1)?;
                let dtype = settings.dtype;
                let loss = denoising_loss::Planner::plan(pipeline, executor, &generator, dtype, NOISE_LEVELS)?;
                Programs::DenoisingLoss(Box::new((generator, loss)))
            }
        };
        let footprint = Footprint::of(&programs.all());
        machine::check_memory(flags.memory_limit, executor.free_memory()?, &footprint, device::smaller_plan(1))?;
        Ok(PlannedScore { score: self.score, pipeline, programs })
    }
}

pub struct PlannedScore<'p> {
    pub score: Score,
    pipeline: &'p Pipeline,
    programs: Programs<'p>,
}

enum Programs<'p> {
    DenoisingLoss(Box<(Generator<'p>, denoising_loss::Planner<'p>)>),
    Reward(Box<Scorer<'p>>),
}

impl Programs<'_> {
    fn all(&self) -> Vec<&Planned> {
        match self {
            Programs::DenoisingLoss(both) => both.0.programs().all().into_iter().chain(both.1.programs()).collect(),
            Programs::Reward(scorer) => scorer.programs(),
        }
    }
}

impl PlannedScore<'_> {
    /// A score per image, whatever method made it. The executor holds nothing else meanwhile.
    pub fn run<'i>(
        self,
        executor: &mut dyn Executor,
        images: impl Iterator<Item = (&'i Target, &'i Image)>,
        interrupt: &AtomicBool,
    ) -> Result<Vec<f64>> {
        executor.clear();
        let uninterrupted = images.map(|image| match interrupt.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(image),
        });
        let mut scores = Vec::new();
        match self.programs {
            Programs::DenoisingLoss(planned) => {
                let (generator, loss) = *planned;
                let mut generator = generator.load(executor)?;
                let loss = loss.load(&mut generator)?;
                for image in uninterrupted {
                    let (target, image) = image?;
                    let job = work::job(target, None, &None);
                    scores.extend(loss.score_latents(&mut generator, &[job], &image.latents)?);
                }
            }
            Programs::Reward(scorer) => {
                let scorer = scorer.load(executor, &self.pipeline.model)?;
                for image in uninterrupted {
                    let (target, image) = image?;
                    scores.extend(scorer.score(executor, &[&image.rgb], &[&target.prompt])?);
                }
            }
        }
        match scores.iter().all(|score| score.is_finite()) {
            true => Ok(scores),
            false => Err(Error::NotFinite(format!("--score {}", self.score.label()))),
        }
    }
}
