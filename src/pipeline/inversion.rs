//! DDIM inversion: from the latents of an image to the starting noise that a sampler would make them of.

use super::generate::{self, Generator, Job, to_channels_first};
use super::programs::Programs;
use super::{Observer, Pipeline};
use crate::exec::{Data, Executor};
use crate::plan::Footprint;
use crate::sampler::{self, LATENTS};
use crate::{Error, Result};

/// The programs of one batch size, planned but not loaded.
///
/// They are those of [`Generator`]: an inversion is a run of the inverted schedule ([`sampler::Schedule::inverted`]) that starts from an
/// image's latents. At guidance 1 the branch without the prompt is left out, as SeedSelect's NAO does it; with more an inversion is less
/// exact.
pub struct Inversion<'p> {
    generator: Generator<'p>,
    initial_scale: f64,
    refinements: usize,
}

impl<'p> Inversion<'p> {
    /// `settings` are those of the sampler to invert.
    ///
    /// Each of the `refinements` of a step, 0 in the released code of NAO, asks the network once more, at the noisier latents found so
    /// far, and solves the step for them again: a fixed-point iteration on what the sampler will do (Meiri et al. 2023, arXiv
    /// 2312.12540). `Error::Usage` for a sampler with history or fresh noise.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: generate::Settings,
        batch: usize,
        refinements: usize,
    ) -> Result<Inversion<'p>> {
        let schedule = sampler::schedule(&pipeline.config.scheduler, &settings.sampler)?;
        let (initial_scale, inverted) = (schedule.initial_scale, schedule.inverted()?);
        let generator = Generator::with_schedule(pipeline, executor, settings, batch, inverted)?;
        Ok(Inversion { generator, initial_scale, refinements })
    }

    pub fn footprint(&self) -> Footprint {
        self.generator.footprint()
    }

    pub fn programs(&self) -> &Programs {
        self.generator.programs()
    }

    /// Network function evaluations of one batch: UNet calls, each on one image's latents.
    pub fn nfe(&self) -> usize {
        self.generator.nfe() * (1 + self.refinements)
    }

    /// Loads the weights that are not held yet.
    pub fn load<'e>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e>> {
        let run = self.generator.load(executor)?;
        Ok(Loaded { run, initial_scale: self.initial_scale, refinements: self.refinements })
    }
}

/// An inversion with its programs on an executor.
pub struct Loaded<'p, 'e> {
    run: generate::Loaded<'p, 'e>,
    initial_scale: f64,
    refinements: usize,
}

impl Loaded<'_, '_> {
    /// Unit noises `[C, h, w]`, one per image of a full batch, from their latents `[C, h, w]` at the UNet's scale and the prompts that
    /// they are to be made with. `observe` hears of every UNet call.
    pub fn run(&mut self, prompts: &[&str], latents: &[Vec<f32>], observe: &mut Observer<'_>) -> Result<Vec<Vec<f32>>> {
        let channels = self.run.pipeline.config.unet.in_channels;
        let len = self.run.sizes.height * self.run.sizes.width * channels;
        if latents.len() != prompts.len() {
            return Err(Error::Usage(format!("{} prompts for the latents of {} images", prompts.len(), latents.len())));
        }
        if let Some(wrong) = latents.iter().find(|latents| latents.len() != len) {
            return Err(Error::Usage(format!("latents of {} numbers for images of {len}", wrong.len())));
        }
        let job = |(prompt, latents): (&&str, &Vec<f32>)| Job {
            prompt: prompt.to_string(),
            negative: None,
            seed: 0,
            draws: vec![latents.clone()],
        };
        self.run.begin(&prompts.iter().zip(latents).map(job).collect::<Vec<_>>())?;
        for step in 0..self.run.schedule.steps.len() {
            self.step(step, observe)?;
        }
        let noises = self.run.latents()?;
        if let Some(index) = noises.chunks(len).position(|noise| noise.iter().any(|x| !x.is_finite())) {
            return Err(Error::NotFinite(format!("the noise of image {index}")));
        }
        let unit = |x: f32| (f64::from(x) / self.initial_scale) as f32;
        Ok(noises.chunks(len).map(|noise| to_channels_first(noise, channels).into_iter().map(unit).collect()).collect())
    }

    /// One step towards the noise. A refinement runs it at the latents `x` it found and gets `k x - u e(x)` with the step's
    /// coefficients `k` and `u`; what it looks for is `k y - u e(x)`, `y` being the latents the step began with.
    fn step(&mut self, index: usize, observe: &mut Observer<'_>) -> Result<()> {
        let kept = self.run.schedule.steps[index].kept() as f32;
        let from = if self.refinements > 0 { self.run.latents()? } else { vec![] };
        self.run.step(index, observe)?;
        for _ in 0..self.refinements {
            let at = self.run.latents()?;
            self.run.step(index, observe)?;
            let found = self.run.latents()?.into_iter().zip(from.iter().zip(&at));
            let refined: Vec<f32> = found.map(|(found, (from, at))| found + kept * (from - at)).collect();
            self.run.executor.write(LATENTS, Data::F32(&refined))?;
        }
        Ok(())
    }
}
