//! Scores that a comparison computes on request, of images that are made already. A new one is a variant here and its scorer.

use crate::cli::flags::device::{self, DeviceFlags};
use crate::cli::images::targets::Target;
use crate::cli::images::work;
use crate::cli::machine;
use crate::exec::Executor;
use crate::metrics::denoising_loss;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{self, Generator, Image, Settings};
use crate::plan::Footprint;
use crate::{Error, Result};
use clap::ValueEnum;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Score {
    /// Error of the model in predicting the noise in the images, under the prompt: any model, 8 UNet forwards an image
    DenoisingLoss,
}

impl Score {
    /// As events name it.
    pub fn name(self) -> &'static str {
        match self {
            Score::DenoisingLoss => "denoising_loss",
        }
    }

    /// As tables name it.
    pub fn label(self) -> &'static str {
        match self {
            Score::DenoisingLoss => "denoising-loss",
        }
    }

    /// Plans it for images one at a time, within the memory.
    pub fn plan<'p>(
        self,
        pipeline: &'p Pipeline,
        flags: &DeviceFlags,
        executor: &dyn Executor,
        settings: &Settings,
    ) -> Result<PlannedScore<'p>> {
        let Score::DenoisingLoss = self;
        let generator = Generator::plan(pipeline, executor, settings.clone(), 1)?;
        let loss = denoising_loss::Planner::plan(pipeline, executor, &generator, settings.dtype, NOISE_LEVELS)?;
        let programs: Vec<_> = generator.programs().all().into_iter().chain(loss.programs()).collect();
        let footprint = Footprint::of(&programs);
        machine::check_memory(flags.memory_limit, executor.free_memory()?, &footprint, device::smaller_plan(1))?;
        Ok(PlannedScore { score: self, generator, loss })
    }
}

/// Noise levels of [`Score::DenoisingLoss`].
const NOISE_LEVELS: usize = 8;

pub struct PlannedScore<'p> {
    pub score: Score,
    generator: Generator<'p>,
    loss: denoising_loss::Planner<'p>,
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
        let mut generator: generate::Loaded<'_, '_> = self.generator.load(executor)?;
        let loss = self.loss.load(&mut generator)?;
        let mut scores = Vec::new();
        for (target, image) in images {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let job = work::job(target, None, &None);
            scores.extend(loss.score_latents(&mut generator, &[job], &image.latents)?);
        }
        Ok(scores)
    }
}
