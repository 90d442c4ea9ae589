//! A score of rarity for any model: how badly the model predicts the noise in its own images.
//!
//! The mean over a fixed grid of noise levels and draws of `‖ε(√ᾱ_s z₀ + √(1 − ᾱ_s) n, s, C) − n‖² / D`, the terms of the diffusion loss
//! (Ho et al. 2020, eq. 14) under the image's prompt: high where the model finds an image unlikely. Ours, and no likelihood; the
//! minority objective raises one of its terms, so score its images with another model too.

use crate::exec::{Data, DataMut, Executor};
use crate::optimize::objective::{
    self, At, Condition, Nfe, NoiseLevels, Objective, ObjectiveSpec, Objectives, StepContext, report_name,
};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{self, Generator, Job, to_channels_last};
use crate::plan::Planned;
use crate::program::DType;
use crate::sampler::{LATENTS, Level, draw, level_at_fraction};
use crate::{Error, Result};

/// The score's program, planned but not loaded.
pub struct Planner<'p> {
    pipeline: &'p Pipeline,
    objectives: Objectives,
    levels: Vec<NoiseLevels>,
}

impl<'p> Planner<'p> {
    /// For the images of `generator`, from `levels` noise levels spread evenly over the training steps.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        generator: &Generator<'p>,
        dtype: DType,
        levels: usize,
    ) -> Result<Planner<'p>> {
        let spec = ObjectiveSpec {
            pipeline,
            dtype,
            sizes: generator.sizes(),
            guidance: 1.0,
            variable: None,
            prefix: 0,
            loss_scale: 1.0,
            budget: None,
        };
        let objectives = Objectives::plan(&spec, executor, &[denoising_loss()])?;
        let levels_of = |index: usize| {
            let fraction = (index as f64 + 0.5) / levels as f64;
            let (t2, level2) = level_at_fraction(&pipeline.config.scheduler, fraction)?;
            Ok(NoiseLevels { t1: 0.0, level1: Level { alpha: 1.0, sigma: 0.0 }, t2, level2 })
        };
        Ok(Planner { pipeline, objectives, levels: (0..levels).map(levels_of).collect::<Result<_>>()? })
    }

    pub fn programs(&self) -> Vec<&Planned> {
        self.objectives.all()
    }

    /// UNet calls of one batch.
    pub fn nfe(&self) -> Nfe {
        let Nfe { forward, backward } = self.objectives.nfe();
        Nfe { forward: self.levels.len() * forward, backward: self.levels.len() * backward }
    }

    /// Loads it beside the generator.
    pub fn load(self, images: &mut generate::Loaded<'_, '_>) -> Result<Loaded> {
        let objectives = self.objectives.load(&mut *images.executor, &self.pipeline.model)?;
        Ok(Loaded { objectives, levels: self.levels })
    }
}

fn denoising_loss() -> Objective<'static> {
    Objective::new("denoising_loss", |s: &mut StepContext<'_>| {
        let n = s.draw();
        let noised = s.renoise(s.latents, n);
        let prediction = s.predict(noised, At::T2, Condition::Prompt);
        let e = s.noise(prediction);
        let error = s.difference(e, n);
        let numbers = s.b.shape(error)[1..].iter().product::<usize>();
        let squares = s.squares(error);
        s.b.affine(squares, 1.0 / numbers as f64, 0.0)
    })
}

/// The score on the executor of a generator.
pub struct Loaded {
    objectives: objective::Loaded,
    levels: Vec<NoiseLevels>,
}

impl Loaded {
    /// Of images made elsewhere, by their latents, `[C, H/f, W/f]` of every job in turn.
    pub fn score_latents(
        &self,
        images: &mut generate::Loaded<'_, '_>,
        jobs: &[Job],
        latents: &[f32],
    ) -> Result<Vec<f64>> {
        images.begin(jobs)?;
        let channels = images.pipeline.config.unet.in_channels;
        let own = latents.chunks(latents.len() / jobs.len().max(1));
        let latents: Vec<f32> = own.flat_map(|image| to_channels_last(image, channels)).collect();
        images.executor.write(LATENTS, Data::F32(&latents))?;
        self.score(images, jobs)
    }

    /// Of the images the generator has just made.
    pub fn score(&self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job]) -> Result<Vec<f64>> {
        self.objectives.constants(images, jobs)?;
        // One grid for all images, so that they can be compared.
        let seeds = vec![0; jobs.len()];
        let mut sums = vec![0.0; jobs.len()];
        let mut scores = vec![0.0; jobs.len()];
        for (index, level) in self.levels.iter().enumerate() {
            self.objectives.set_levels(images, level)?;
            self.objectives.run(images, 0, &seeds, draw::SCORE + index as u64)?;
            images.executor.read(&report_name(0), DataMut::F32(&mut scores))?;
            if scores.iter().any(|score| !score.is_finite()) {
                return Err(Error::NotFinite("the error that images are scored by".into()));
            }
            sums.iter_mut().zip(&scores).for_each(|(sum, score)| *sum += f64::from(*score));
        }
        Ok(sums.into_iter().map(|sum| sum / self.levels.len() as f64).collect())
    }
}
