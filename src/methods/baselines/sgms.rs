//! SGMS, self-guided minority sampling (Um & Ye 2024, arXiv 2407.11555), moved to latents and text.
//!
//! Every few steps the latents go a little way up the distance between their clean estimate and that estimate noised and estimated
//! again. The original works on pixels with ancestral steps and LPIPS; how it was run on Stable Diffusion is not published. This
//! is our version: L2 between latents, both estimates under the prompt, the step added to DDIM's result and scaled with the
//! variance an ancestral step would have.

use crate::exec::{Data, DataMut, Executor};
use crate::methods::{ImageMethod, LoadedMethod, PlannedMethod, Request};
use crate::optimize::objective::{self, Minority, Nfe, NoiseLevels, ObjectiveSpec, Objectives, minority};
use crate::optimize::variable::Variable;
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::pipeline::programs::gradient_of;
use crate::pipeline::{Observer, Pipeline, Progress};
use crate::plan::Planned;
use crate::sampler::{LATENTS, Level, draw, level_at_fraction};
use crate::{Error, Result};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Sgms {
    /// Length η of the step, in units of the gradient's largest number.
    pub eta: f64,
    /// The estimate is noised to this fraction of the training steps.
    pub ratio: f64,
    /// Guides every so many steps …
    pub every: usize,
    /// … while the timestep is above this fraction of the training steps; 0: always.
    pub t_mid: f64,
    /// Each image's gradient is divided by its largest number.
    pub normalised: bool,
    /// The step is multiplied with the variance of an ancestral step.
    pub variance: bool,
    /// Both estimates are those of classifier-free guidance.
    pub guided: bool,
}

impl Default for Sgms {
    /// The released code's numbers, but for η, which is for pixels there: ours is about the most that leaves the images of the
    /// embedded model whole.
    fn default() -> Sgms {
        Sgms { eta: 0.4, ratio: 0.8, every: 5, t_mid: 0.0, normalised: true, variance: true, guided: false }
    }
}

impl ImageMethod for Sgms {
    fn name(&self) -> &'static str {
        "sgms"
    }

    fn title(&self) -> String {
        "SGMS".into()
    }

    fn options(&self) -> Value {
        json!(self)
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        Ok(Box::new(Planner::plan(pipeline, executor, request.settings.clone(), *self, request.batch)?))
    }
}

/// A run, planned but not loaded.
struct Planner<'p> {
    pipeline: &'p Pipeline,
    generator: Generator<'p>,
    objectives: Objectives,
    sgms: Sgms,
    loss_scale: f64,
    /// Per sampling step, where it is guided: the noise levels and what the gradient is multiplied with.
    guided: Vec<Option<(NoiseLevels, f64)>>,
}

impl<'p> Planner<'p> {
    fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: generate::Settings,
        sgms: Sgms,
        batch: usize,
    ) -> Result<Planner<'p>> {
        if sgms.every == 0 || !sgms.eta.is_finite() || !(0.0..=1.0).contains(&sgms.ratio) {
            let Sgms { eta, ratio, every, .. } = sgms;
            let what = format!(
                "SGMS with a step of {eta} every {every} steps, noised to {ratio}: must be finite, 1 or more, 0 to 1"
            );
            return Err(Error::Usage(what));
        }
        let (dtype, guidance) = (settings.dtype, settings.sampler.guidance);
        let generator = Generator::plan(pipeline, executor, settings, batch)?;
        let sizes = generator.sizes();
        let loss_scale = objective::loss_scale(dtype);
        let variable = Some(&Variable::Latents);
        let spec = ObjectiveSpec { pipeline, dtype, sizes, guidance, variable, prefix: 0, loss_scale, budget: None };
        let distance = minority(Minority { detach_second: true, guided: sgms.guided, ..Minority::default() });
        let objectives = Objectives::plan(&spec, executor, &[distance])?;
        let guided = guided(pipeline, &generator, &sgms)?;
        Ok(Planner { pipeline, generator, objectives, sgms, loss_scale, guided })
    }
}

impl PlannedMethod for Planner<'_> {
    fn programs(&self) -> Vec<&Planned> {
        let mut all = self.generator.programs().all().to_vec();
        all.extend(self.objectives.all());
        all
    }

    fn progress_units(&self) -> usize {
        self.generator.calls() + self.guided.iter().flatten().count()
    }

    fn nfe(&self) -> Nfe {
        let guided = self.guided.iter().flatten().count();
        let Nfe { forward, backward } = self.objectives.nfe();
        Nfe { forward: self.generator.nfe() + guided * forward, backward: guided * backward }
    }

    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e,
    {
        let images = self.generator.load(executor)?;
        let objectives = self.objectives.load(&mut *images.executor, &self.pipeline.model)?;
        let Planner { sgms, loss_scale, guided, .. } = *self;
        Ok(Box::new(Loaded { images, objectives, sgms, loss_scale, guided }))
    }
}

/// Where a run is guided, and by how much.
fn guided(pipeline: &Pipeline, generator: &Generator<'_>, sgms: &Sgms) -> Result<Vec<Option<(NoiseLevels, f64)>>> {
    let config = &pipeline.config.scheduler;
    let steps = &generator.schedule().steps;
    let above = sgms.t_mid * config.train_timesteps as f64;
    let at = |index: usize| {
        let step = &steps[index];
        if !index.is_multiple_of(sgms.every) || step.timestep <= above {
            return Ok(None);
        }
        let (t2, level2) = level_at_fraction(config, sgms.ratio)?;
        let level1 = Level { alpha: step.alpha, sigma: step.sigma };
        // β̃ = (1 − ᾱ_next) / (1 − ᾱ) · (1 − ᾱ / ᾱ_next), Ho et al. 2020, eq. 7; 0 after the last step.
        let next = steps.get(index + 1).map_or(1.0, |next| next.alpha.powi(2));
        let now = step.alpha.powi(2);
        let variance = (1.0 - next) / (1.0 - now) * (1.0 - now / next);
        let scale = if sgms.variance { sgms.eta * variance } else { sgms.eta };
        let levels = NoiseLevels { t1: step.timestep, level1, t2, level2 };
        Ok((scale != 0.0).then_some((levels, scale)))
    };
    (0..steps.len()).map(at).collect()
}

/// A run with its programs on an executor.
struct Loaded<'p, 'e> {
    images: generate::Loaded<'p, 'e>,
    objectives: objective::Loaded,
    sgms: Sgms,
    loss_scale: f64,
    guided: Vec<Option<(NoiseLevels, f64)>>,
}

impl LoadedMethod for Loaded<'_, '_> {
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        self.images.begin(jobs)?;
        self.objectives.constants(&mut self.images, jobs)?;
        let seeds: Vec<u64> = jobs.iter().map(|job| job.seed).collect();
        for step in 0..self.guided.len() {
            let Some((levels, scale)) = self.guided[step] else {
                self.images.step(step, observe)?;
                continue;
            };
            self.objectives.set_levels(&mut self.images, &levels)?;
            let evaluated = self.objectives.run(&mut self.images, 0, &seeds, draw::LOOK + step as u64);
            evaluated.map_err(|error| error.during(format!("SGMS before sampling step {}", step + 1)))?;
            observe(Progress::Iteration(None))?;
            let direction = self.direction()?;
            self.images.step(step, observe)?;
            let mut latents = self.images.latents()?;
            latents.iter_mut().zip(direction).for_each(|(x, d)| *x += scale as f32 * d);
            self.images.executor.write(LATENTS, Data::F32(&latents))?;
        }
        self.images.finish(observe)
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self.images.executor()
    }
}

impl Loaded<'_, '_> {
    /// Where the distance grows, per image with largest number 1 if normalised.
    fn direction(&self) -> Result<Vec<f32>> {
        let mut gradient = self.images.latents()?;
        self.images.executor.read(&gradient_of(LATENTS), DataMut::F32(&mut gradient))?;
        // The gradient is that of a loss.
        let scale = self.loss_scale as f32;
        let own = gradient.len() / self.images.sizes.batch;
        for image in gradient.chunks_mut(own) {
            let largest = image.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let by = match (self.sgms.normalised, largest > 0.0) {
                (true, true) => largest,
                (true, false) => 1.0,
                (false, _) => scale,
            };
            image.iter_mut().for_each(|x| *x = -*x / by);
        }
        Ok(gradient)
    }
}
