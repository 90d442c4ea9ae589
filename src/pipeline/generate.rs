//! Text to image: encode the prompts, sample a batch of latents, decode image by image.

pub use super::job::{Image, Job};
pub use super::layout::{to_channels_first, to_channels_last};

use super::{Observer, Progress};
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::{Branch, Conditioning, States, Text};
use crate::pipeline::decode::Decoder;
use crate::pipeline::programs::{Programs, Sizes, check_pixels, rows, write_step};
use crate::plan::Footprint;
use crate::program::DType;
use crate::sampler::{self, Noise, Rng, Schedule};
use crate::{Error, Result};

/// Everything that holds for a whole run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Pixels.
    pub width: usize,
    pub height: usize,
    pub sampler: sampler::Settings,
    pub rng: Rng,
    pub dtype: DType,
}

/// The programs of one batch size, planned but not loaded: ask for the footprint, then [`Generator::load`].
pub struct Generator<'p> {
    pipeline: &'p Pipeline,
    settings: Settings,
    schedule: Schedule,
    sizes: Sizes,
    programs: Programs,
}

impl<'p> Generator<'p> {
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: Settings,
        batch: usize,
    ) -> Result<Generator<'p>> {
        let schedule = sampler::schedule(&pipeline.config.scheduler, &settings.sampler)?;
        Generator::with_schedule(pipeline, executor, settings, batch, schedule)
    }

    /// With tables that are not those of `settings.sampler`.
    pub(crate) fn with_schedule(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: Settings,
        batch: usize,
        schedule: Schedule,
    ) -> Result<Generator<'p>> {
        let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
        check_pixels(settings.width, settings.height, batch)?;
        let sizes = Sizes { batch, height, width, tokens: pipeline.tokens() };
        let programs = Programs::plan(pipeline, executor, settings.dtype, sizes, &schedule)?;
        Ok(Generator { pipeline, settings, schedule, sizes, programs })
    }

    pub fn footprint(&self) -> Footprint {
        self.programs.footprint()
    }

    /// UNet calls of one batch: the sampling steps, one more for samplers with a warm-up call.
    pub fn calls(&self) -> usize {
        self.schedule.steps.len()
    }

    /// Network function evaluations of one batch: UNet calls, each on one image's latents.
    pub fn nfe(&self) -> usize {
        self.calls() * rows(self.sizes, &self.schedule)
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    pub(crate) fn pipeline(&self) -> &'p Pipeline {
        self.pipeline
    }

    pub(crate) fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Loads the weights that are not held yet.
    pub fn load<'e>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e>> {
        let model = &self.pipeline.model;
        let Programs { text, condition, step, decode } = self.programs;
        let (text, condition) = (executor.load(text, model)?, executor.load(condition, model)?);
        Ok(Loaded {
            conditioning: Conditioning::new(self.pipeline, self.sizes, text, condition),
            step: executor.load(step, model)?,
            decoder: Decoder::load(self.pipeline, executor, decode)?,
            executor,
            pipeline: self.pipeline,
            settings: self.settings,
            schedule: self.schedule,
            sizes: self.sizes,
            jobs: vec![],
            noises: vec![],
        })
    }
}

/// A generator with its programs on an executor. [`Loaded::run`] makes images; methods that act between the steps call its parts
/// themselves.
pub struct Loaded<'p, 'e> {
    pub(crate) pipeline: &'p Pipeline,
    pub(crate) executor: &'e mut dyn Executor,
    pub(crate) schedule: Schedule,
    pub(crate) sizes: Sizes,
    settings: Settings,
    conditioning: Conditioning<'p>,
    step: ProgramId,
    decoder: Decoder,
    jobs: Vec<Job>,
    /// Per job.
    noises: Vec<Noise>,
}

impl Loaded<'_, '_> {
    /// Gives the states of a prompt, which is then not encoded: embeddings that come from elsewhere.
    pub fn set_text(&mut self, prompt: &str, text: Text) {
        self.conditioning.give(prompt, text);
    }

    /// Makes one full batch of images.
    pub fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        self.begin(jobs)?;
        for step in 0..self.schedule.steps.len() {
            self.step(step, observe)?;
        }
        self.finish(observe)
    }

    /// Encodes the prompts, computes what all steps share and draws the starting latents.
    pub fn begin(&mut self, jobs: &[Job]) -> Result<()> {
        if jobs.len() != self.sizes.batch {
            return Err(Error::Usage(format!("{} jobs for a batch of {}", jobs.len(), self.sizes.batch)));
        }
        self.jobs = jobs.to_vec();
        self.conditioning.request(&self.schedule, jobs);
        self.condition_as_requested()?;

        self.noises = jobs.iter().map(|job| Noise::new(self.settings.rng, job.seed)).collect();
        let scale = self.schedule.initial_scale as f32;
        let latents: Vec<f32> = self.draw(0).into_iter().map(|x| x * scale).collect();
        self.executor.write(sampler::LATENTS, Data::F32(&latents))
    }

    /// Network function evaluations of one batch: UNet calls, each on one image's latents.
    pub fn nfe(&self) -> usize {
        self.schedule.steps.len() * rows(self.sizes, &self.schedule)
    }

    /// What the run is on.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.executor
    }

    /// The timestep of every sampling step.
    pub fn timesteps(&self) -> Vec<f64> {
        self.schedule.steps.iter().map(|step| step.timestep).collect()
    }

    /// The weight of classifier-free guidance that the settings ask for.
    pub fn guidance(&self) -> f64 {
        self.settings.sampler.guidance
    }

    pub(crate) fn is_cfg_pp(&self) -> bool {
        self.settings.sampler.cfg_pp
    }

    /// Gives one step another guidance weight, where there is guidance.
    pub fn guide(&mut self, step: usize, weight: f64) {
        if self.schedule.needs.uncond {
            self.schedule.steps[step] = self.schedule.steps[step].guided(weight);
        }
    }

    /// Puts the states a job asks for in a branch into row `row` of other buffers.
    pub(crate) fn fetch(&mut self, branch: Branch, job: &Job, to: States<'_>, row: usize) -> Result<()> {
        self.conditioning.fetch_for(&mut *self.executor, branch, job, (to, row))
    }

    /// Conditions both branches on what the jobs ask for, from now on.
    pub(crate) fn condition_as_requested(&mut self) -> Result<()> {
        self.conditioning.restore(&mut *self.executor, &self.schedule)
    }

    /// States of a branch, per image, on the host.
    pub(crate) fn texts(&self, branch: Branch) -> Result<Vec<Text>> {
        self.conditioning.texts(&*self.executor, branch)
    }

    /// Conditions branches, where there are they, on other states from now on.
    pub(crate) fn condition_on(&mut self, branches: &[(Branch, &[Text])]) -> Result<()> {
        for (branch, texts) in branches {
            self.conditioning.set(&mut *self.executor, *branch, texts)?;
        }
        self.conditioning.update(&mut *self.executor, &self.schedule)
    }

    /// The same from buffers of a row per image; without pooled states there, the branch keeps its own.
    pub(crate) fn condition_on_states(&mut self, branch: Branch, from: States<'_>) -> Result<()> {
        self.conditioning.set_states(&mut *self.executor, branch, from)?;
        self.conditioning.update(&mut *self.executor, &self.schedule)
    }

    /// The unit noise that a job's image begins as, `[C, H/f, W/f]`.
    pub(crate) fn starting_noise(&self, job: &Job) -> Vec<f32> {
        let Sizes { height, width, .. } = self.sizes;
        job.draws.first().cloned().unwrap_or_else(|| {
            let mut noise = vec![0.0; self.pipeline.config.unet.in_channels * height * width];
            Noise::new(self.settings.rng, job.seed).normal(&mut noise);
            noise
        })
    }

    /// Draw `index` of every image, channels last: 0 is the starting noise, `k + 1` belongs to step `k`.
    fn draw(&mut self, index: usize) -> Vec<f32> {
        let Sizes { height, width, .. } = self.sizes;
        let channels = self.pipeline.config.unet.in_channels;
        let mut unit = vec![0.0; channels * height * width];
        let mut all = Vec::with_capacity(self.jobs.len() * unit.len());
        for (job, noise) in self.jobs.iter().zip(&mut self.noises) {
            // The generator draws even where a given draw replaces its own, so that later draws do not depend on it.
            noise.normal(&mut unit);
            all.extend(to_channels_last(job.draws.get(index).unwrap_or(&unit), channels));
        }
        all
    }

    /// One sampling step: latents in, latents out.
    pub fn step(&mut self, index: usize, observe: &mut Observer<'_>) -> Result<()> {
        write_step(&mut *self.executor, &self.schedule, index)?;
        if self.schedule.needs.noise {
            let noise = self.draw(index + 1);
            self.executor.write(sampler::NOISE, Data::F32(&noise))?;
        }
        let (done, steps) = (index + 1, self.schedule.steps.len());
        self.executor.run(self.step).map_err(|error| error.during(format!("sampling step {done} of {steps}")))?;
        observe(Progress::Step { done, steps })
    }

    /// The latents as they are now, `[B, h, w, C]`.
    pub(crate) fn latents(&self) -> Result<Vec<f32>> {
        let Sizes { batch, height, width, .. } = self.sizes;
        let mut latents = vec![0.0; batch * height * width * self.pipeline.config.unet.in_channels];
        self.executor.read(sampler::LATENTS, DataMut::F32(&mut latents))?;
        Ok(latents)
    }

    /// Decodes the batch image by image; see [`Decoder::finish`].
    pub fn finish(&mut self, observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        self.decoder.finish(&mut *self.executor, &self.jobs, observe)
    }
}
