//! DDIM inversion: from the latents of an image to the starting noise that a sampler would make them of.

use super::conditioning::Conditioning;
use super::generate::{self, Job, to_channels_first, to_channels_last};
use super::programs::{self, Sizes, check_pixels, rows, write_step};
use super::{Observer, Pipeline, Progress};
use crate::exec::{Data, DataMut, Executor, ProgramId, Scope, scoped};
use crate::plan::{Footprint, Planned, plan};
use crate::program::Program;
use crate::sampler::{self, LATENTS, Schedule};
use crate::{Error, Result};

/// The programs of one batch size, planned but not loaded.
///
/// They are those of text to image without the decoder: an inversion is a run of the inverted schedule
/// ([`sampler::Schedule::inverted`]) that starts from an image's latents. At guidance 1 the branch without the prompt is left out, as
/// SeedSelect's NAO does it; with more an inversion is less exact. Their buffers have names of their own, so that they go beside what
/// samples.
pub struct Inversion<'p> {
    pipeline: &'p Pipeline,
    sizes: Sizes,
    schedule: Schedule,
    text: Planned,
    condition: Planned,
    step: Planned,
    initial_scale: f64,
    refinements: usize,
}

/// What the names of the buffers begin with.
const SCOPE: &str = "inversion.";

impl<'p> Inversion<'p> {
    /// `settings` are those of the sampler to invert.
    ///
    /// Each of the `refinements` of a step, 0 in the released code of NAO, asks the network once more, at the noisier latents found so
    /// far, and solves the step for them again: a fixed-point iteration on what the sampler will do (Meiri et al. 2023, arXiv
    /// 2312.12540). `Error::Usage` for a sampler with history or fresh noise.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: &generate::Settings,
        batch: usize,
        refinements: usize,
    ) -> Result<Inversion<'p>> {
        let schedule = sampler::schedule(&pipeline.config.scheduler, &settings.sampler)?;
        let (initial_scale, schedule) = (schedule.initial_scale, schedule.inverted()?);
        let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
        check_pixels(settings.width, settings.height, batch)?;
        let sizes = Sizes { batch, height, width, tokens: pipeline.tokens() };
        let planned =
            |program: Program| plan(scoped(program, SCOPE), |program, node| executor.workspace(program, node));
        Ok(Inversion {
            text: planned(programs::text(pipeline, settings.dtype)?),
            condition: planned(programs::condition(pipeline, settings.dtype, sizes, &schedule)?),
            step: planned(programs::step(pipeline, settings.dtype, sizes, &schedule)?),
            pipeline,
            sizes,
            schedule,
            initial_scale,
            refinements,
        })
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(&self.programs())
    }

    pub fn programs(&self) -> [&Planned; 3] {
        [&self.text, &self.condition, &self.step]
    }

    /// UNet calls of one batch.
    pub fn calls(&self) -> usize {
        self.schedule.steps.len() * (1 + self.refinements)
    }

    /// Network function evaluations of one batch: UNet calls, each on one image's latents.
    pub fn nfe(&self) -> usize {
        self.calls() * rows(self.sizes, &self.schedule)
    }

    /// Loads the weights that are not held yet.
    pub fn load(self, executor: &mut dyn Executor) -> Result<Loaded<'p>> {
        let Inversion { pipeline, sizes, schedule, text, condition, step, initial_scale, refinements } = self;
        let mut load = |planned: Planned| executor.load(planned, &pipeline.model);
        let conditioning = Conditioning::new(pipeline, sizes, load(text)?, load(condition)?);
        Ok(Loaded { pipeline, conditioning, step: load(step)?, sizes, schedule, initial_scale, refinements })
    }
}

/// An inversion with its programs on an executor, which it borrows for a call only, so that others use it in between.
pub struct Loaded<'p> {
    pipeline: &'p Pipeline,
    conditioning: Conditioning<'p>,
    step: ProgramId,
    sizes: Sizes,
    schedule: Schedule,
    initial_scale: f64,
    refinements: usize,
}

impl Loaded<'_> {
    /// Unit noises `[C, h, w]`, one per image of a full batch, from their latents `[C, h, w]` at the UNet's scale and the prompts that
    /// they are to be made with. `observe` hears of every UNet call.
    pub fn run(
        &mut self,
        executor: &mut dyn Executor,
        prompts: &[&str],
        latents: &[Vec<f32>],
        observe: &mut Observer<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let executor = &mut Scope::new(executor, SCOPE);
        let channels = self.pipeline.config.unet.in_channels;
        let len = self.sizes.height * self.sizes.width * channels;
        if latents.len() != prompts.len() || latents.len() != self.sizes.batch {
            let (found, batch) = (latents.len(), self.sizes.batch);
            let what = format!("{} prompts for the latents of {found} images, a batch of {batch}", prompts.len());
            return Err(Error::Usage(what));
        }
        if let Some(wrong) = latents.iter().find(|latents| latents.len() != len) {
            return Err(Error::Usage(format!("latents of {} numbers for images of {len}", wrong.len())));
        }
        let job = |prompt: &&str| Job { prompt: prompt.to_string(), negative: None, seed: 0, draws: vec![] };
        self.conditioning.request(&self.schedule, &prompts.iter().map(job).collect::<Vec<_>>());
        self.conditioning.restore(executor, &self.schedule)?;
        let rows: Vec<f32> = latents.iter().flat_map(|latents| to_channels_last(latents, channels)).collect();
        executor.write(LATENTS, Data::F32(&rows))?;
        for step in 0..self.schedule.steps.len() {
            self.step(executor, step, observe)?;
        }
        let noises = self.latents(executor)?;
        if let Some(index) = noises.chunks(len).position(|noise| noise.iter().any(|x| !x.is_finite())) {
            return Err(Error::NotFinite(format!("the noise of image {index}")));
        }
        let unit = |x: f32| (f64::from(x) / self.initial_scale) as f32;
        Ok(noises.chunks(len).map(|noise| to_channels_first(noise, channels).into_iter().map(unit).collect()).collect())
    }

    /// One step towards the noise. A refinement runs it at the latents `x` it found and gets `k x - u e(x)` with the step's
    /// coefficients `k` and `u`; what it looks for is `k y - u e(x)`, `y` being the latents the step began with.
    fn step(&self, executor: &mut dyn Executor, index: usize, observe: &mut Observer<'_>) -> Result<()> {
        let kept = self.schedule.steps[index].kept() as f32;
        let from = if self.refinements > 0 { self.latents(executor)? } else { vec![] };
        write_step(executor, &self.schedule, index)?;
        self.call(executor, index, observe)?;
        for _ in 0..self.refinements {
            let at = self.latents(executor)?;
            self.call(executor, index, observe)?;
            let found = self.latents(executor)?.into_iter().zip(from.iter().zip(&at));
            let refined: Vec<f32> = found.map(|(found, (from, at))| found + kept * (from - at)).collect();
            executor.write(LATENTS, Data::F32(&refined))?;
        }
        Ok(())
    }

    /// One UNet call.
    fn call(&self, executor: &mut dyn Executor, index: usize, observe: &mut Observer<'_>) -> Result<()> {
        let (done, steps) = (index + 1, self.schedule.steps.len());
        executor.run(self.step).map_err(|error| error.during(format!("inversion step {done} of {steps}")))?;
        observe(Progress::Step { done, steps })
    }

    /// The latents as they are now, `[B, h, w, C]`.
    fn latents(&self, executor: &dyn Executor) -> Result<Vec<f32>> {
        let Sizes { batch, height, width, .. } = self.sizes;
        let mut latents = vec![0.0; batch * height * width * self.pipeline.config.unet.in_channels];
        executor.read(LATENTS, DataMut::F32(&mut latents))?;
        Ok(latents)
    }
}
