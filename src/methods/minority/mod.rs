//! MinorityPrompt (Um & Ye 2025, algorithm 1): at some of the sampling steps, what the network is conditioned on is optimized
//! towards images that the model finds unlikely.
//!
//! The variable (a learnable token, all text states, the unconditional ones) and the objective (minority, repulsion, or one of your
//! own) are chosen apart. The default mode follows the paper where the released code differs from it; see [`Schedule`].

mod method;
mod programs;
mod recommended;
mod released;
mod settings;

pub use method::{MinorityPrompt, Raised, show_init};
pub use recommended::{Recommended, parse_init};
pub use released::{Convention, Renoise, released, renoise};
pub use settings::{Schedule, Settings, token};

use crate::data::textual_inversion::LearnedToken;
use crate::exec::{Data, DataMut, Executor};
use crate::optimize::objective::{Nfe, NoiseLevels, report_name};
use crate::optimize::optimizer::{LoadedOptimizer, LrSchedule, Optimizer, PlannedOptimizer};
use crate::optimize::variable::token::TokenBatch;
use crate::optimize::variable::{CONTEXT, Entry, POOLED, Parameter, Variable};
use crate::pipeline::conditioning::{self, Branch, States};
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::pipeline::programs::gradient_of;
use crate::pipeline::{AtStep, Iteration, Pipeline};
use crate::pipeline::{Observer, Progress};
use crate::plan::{Footprint, Planned};
use crate::sampler::{self, Level, draw};
use crate::{Error, Result};
use programs::OfPrefix;
use std::collections::BTreeMap;

/// An optimized sampling step: the noise levels of its objectives, and Adam's learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
struct OptimizedStep {
    levels: NoiseLevels,
    lr: f64,
}

/// A run, planned but not loaded.
pub struct Minority<'p> {
    generator: Generator<'p>,
    settings: Settings,
    steps: Vec<Option<OptimizedStep>>,
    optimizer: PlannedOptimizer,
    /// Programs by the number of tokens before the first learnable one: those that some batch of the run needs.
    prefixes: BTreeMap<usize, OfPrefix>,
}

impl<'p> Minority<'p> {
    /// Plans for one batch: these prompts, or others with as many tokens before the learnable one.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: Settings,
        prompts: &[&str],
    ) -> Result<Minority<'p>> {
        Minority::plan_batches(pipeline, executor, settings, prompts, prompts.len())
    }

    /// Plans for a run over all these prompts, so many in a batch; whole batches.
    pub fn plan_batches(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: Settings,
        prompts: &[&str],
        batch: usize,
    ) -> Result<Minority<'p>> {
        let generator = programs::generator(pipeline, executor, &settings, batch)?;
        let steps = optimized_steps(pipeline, &settings, generator.schedule())?;
        let variable = |prefix| programs::variable(pipeline, generator.sizes(), &settings, prefix);
        let (dtype, parameters) = (settings.images.dtype, variable(0).parameters());
        let optimizer = Optimizer::ADAM.plan(executor, dtype, &parameters, settings.loss_scale)?;
        let mut prefixes = BTreeMap::new();
        for prefix in programs::prefixes(pipeline, &settings.variable, prompts, batch)? {
            prefixes.insert(prefix, OfPrefix::plan(&variable(prefix), executor, &settings)?);
        }
        Ok(Minority { generator, settings, steps, optimizer, prefixes })
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(&self.programs())
    }

    /// Every planned program.
    pub fn programs(&self) -> Vec<&Planned> {
        let mut all = self.generator.programs().all().to_vec();
        all.extend(self.optimizer.all());
        all.extend(self.prefixes.values().flat_map(OfPrefix::all));
        all
    }

    /// Sampling steps and iterations of one batch.
    pub fn progress_units(&self) -> usize {
        let iterations = self.settings.schedule.iterations * self.settings.objectives.len();
        self.generator.calls() + self.optimized().len() * iterations
    }

    /// UNet calls of one batch, sampling included.
    pub fn nfe(&self) -> Nfe {
        let sampling = self.generator.nfe();
        let iterations = self.optimized().len() * self.settings.schedule.iterations;
        // Of any prefix: they differ in the text towers alone.
        let evaluations = self.prefixes.values().next().map(|of_prefix| of_prefix.objectives.nfe());
        let Nfe { forward, backward } = evaluations.unwrap_or_default();
        Nfe { forward: sampling + iterations * forward, backward: iterations * backward }
    }

    /// Numbers of the sampling steps that are optimized.
    pub fn optimized(&self) -> Vec<usize> {
        (0..self.steps.len()).filter(|step| self.steps[*step].is_some()).collect()
    }

    /// The optimized steps, each with the noise levels of its objectives.
    pub(crate) fn levels(&self) -> impl Iterator<Item = (usize, NoiseLevels)> {
        self.steps.iter().enumerate().filter_map(|(index, step)| Some((index, step.as_ref()?.levels)))
    }

    /// Loads weights and programs.
    pub fn load<'e>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e>> {
        let pipeline = self.generator.pipeline();
        let parameters = programs::variable(pipeline, self.generator.sizes(), &self.settings, 0).parameters();
        let images = self.generator.load(executor)?;
        let optimizer = self.optimizer.load(&mut *images.executor, &pipeline.model)?;
        let mut prefixes = BTreeMap::new();
        for (prefix, planned) in self.prefixes {
            prefixes.insert(prefix, planned.load(&mut *images.executor, &pipeline.model)?);
        }
        Ok(Loaded {
            rows: parameters.iter().map(|p| vec![0.0; p.len()]).collect(),
            images,
            settings: self.settings,
            steps: self.steps,
            optimizer,
            parameters,
            prefix: prefixes.keys().next().copied().unwrap_or_default(),
            prefixes,
            seeds: vec![],
            drawn: 0,
        })
    }
}

/// How often the optimizer iterates for one image.
fn iterations(pipeline: &Pipeline, settings: &Settings) -> Result<usize> {
    let steps = optimized_steps(pipeline, settings, &programs::schedule(pipeline, settings)?)?;
    let each = settings.schedule.iterations * settings.objectives.len();
    Ok(steps.iter().flatten().count() * each)
}

/// The steps that are optimized, and the two noise levels of each.
fn optimized_steps(
    pipeline: &Pipeline,
    settings: &Settings,
    schedule: &sampler::Schedule,
) -> Result<Vec<Option<OptimizedStep>>> {
    let (config, s) = (&pipeline.config.scheduler, &settings.schedule);
    if s.every == 0 || !(s.lr >= 0.0 && s.lr.is_finite()) {
        let what = format!("a learning rate of {} every {} steps: must be 0 or more, and 1 or more", s.lr, s.every);
        return Err(Error::Usage(what));
    }
    match settings.variable.branch() {
        Some(Branch::Prompt) => {}
        Some(Branch::Negative) if schedule.needs.uncond => {}
        Some(Branch::Negative) => {
            let what = "the unconditional branch cannot be optimized at guidance 1, which leaves it out";
            return Err(Error::Usage(what.into()));
        }
        None => return Err(Error::Usage("MinorityPrompt optimizes a token or text states, no latents".into())),
    }
    let steps = &schedule.steps;
    let [above, up_to] = [s.t_lo, s.t_hi].map(|fraction| fraction * config.train_timesteps as f64);
    let optimized = |(index, step): (usize, &crate::sampler::Step)| {
        if step.timestep <= above || step.timestep > up_to || !index.is_multiple_of(s.every) {
            return Ok(None);
        }
        let lr = s.lr * LrSchedule::Linear { decay: s.lr_decay }.factor(index);
        if lr < 0.0 {
            let what =
                format!("--lr-decay {} makes the learning rate negative at step {index}; choose less", s.lr_decay);
            return Err(Error::Usage(what));
        }
        let (t2, level2) = renoise(config, steps.len(), s.convention, s.renoise, step.timestep)?;
        let level1 = Level { alpha: step.alpha, sigma: step.sigma };
        Ok(Some(OptimizedStep { levels: NoiseLevels { t1: step.timestep, level1, t2, level2 }, lr }))
    };
    steps.iter().enumerate().map(optimized).collect()
}

/// A run with its programs on an executor.
pub struct Loaded<'p, 'e> {
    images: generate::Loaded<'p, 'e>,
    settings: Settings,
    steps: Vec<Option<OptimizedStep>>,
    optimizer: LoadedOptimizer,
    parameters: Vec<Parameter>,
    /// Of the batch that is made.
    prefix: usize,
    prefixes: BTreeMap<usize, programs::LoadedOfPrefix>,
    /// What the parameters begin as.
    rows: Vec<Vec<f32>>,
    /// Per image, of the optimizer.
    seeds: Vec<u64>,
    /// Draws of noise so far.
    drawn: u64,
}

impl<'p, 'e> Loaded<'p, 'e> {
    /// Fills an input that an objective of your own declares.
    pub fn write(&mut self, name: &str, data: Data<'_>) -> Result<()> {
        self.images.executor.write(name, data)
    }

    /// What samples.
    pub fn images(&mut self) -> &mut generate::Loaded<'p, 'e> {
        &mut self.images
    }

    /// Makes one full batch of images; `seeds` are the optimizer's, one per image. Other seeds leave the starting noise as it is.
    pub fn run(&mut self, jobs: &[Job], seeds: &[u64], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        if seeds.len() != jobs.len() {
            return Err(Error::Usage(format!("{} seeds of the optimizer for {} images", seeds.len(), jobs.len())));
        }
        self.images.begin(jobs)?;
        self.begin(jobs, seeds)?;
        let mut is_optimized = false;
        for step in 0..self.steps.len() {
            if let Some(optimized) = self.steps[step] {
                self.optimize(step, optimized, observe)?;
                self.condition()?;
                is_optimized = true;
            } else if self.settings.schedule.base_prompt_after && is_optimized {
                self.images.condition_as_requested()?;
                is_optimized = false;
            }
            self.images.step(step, observe)?;
        }
        self.images.finish(observe)
    }

    /// The optimizer's inner loop at one step: Adam starts anew, what is optimized goes on.
    fn optimize(&mut self, step: usize, optimized: OptimizedStep, observe: &mut Observer<'_>) -> Result<()> {
        self.prefixes[&self.prefix].objectives.set_levels(&mut self.images, &optimized.levels)?;
        for objective in 0..self.settings.objectives.len() {
            self.optimizer.reset(&mut *self.images.executor)?;
            for iteration in 0..self.settings.schedule.iterations {
                let objectives = &self.prefixes[&self.prefix].objectives;
                let place = format_args!("iteration {} before sampling step {}", iteration + 1, step + 1);
                let evaluated = objectives.run(&mut self.images, objective, &self.seeds, draw::LOOK + self.drawn);
                evaluated.map_err(|error| error.during(place))?;
                self.drawn += 1;
                let report = match self.settings.trace {
                    true => Some(self.report(step, optimized, objective, iteration)?),
                    false => None,
                };
                let updated = self.optimizer.step(&mut *self.images.executor, optimized.lr);
                updated.map_err(|error| error.during(place))?;
                observe(Progress::Iteration(report.as_ref()))?;
            }
        }
        Ok(())
    }

    /// The branch that is optimized.
    fn branch(&self) -> Branch {
        self.settings.variable.branch().unwrap_or(Branch::Prompt)
    }

    /// Conditions that branch on what was optimized.
    fn condition(&mut self) -> Result<()> {
        if let Some(forward) = self.prefixes[&self.prefix].forward {
            self.images.executor.run(forward)?;
        }
        // Where the text states are optimized themselves, the pooled text stays the prompt's.
        let pooled = (self.settings.variable.entry() == Entry::Tokens).then_some(POOLED);
        self.images.condition_on_states(self.branch(), States { context: CONTEXT, pooled })
    }

    /// Writes what stays the same for all iterations of a batch, and the parameters as they begin.
    fn begin(&mut self, jobs: &[Job], seeds: &[u64]) -> Result<()> {
        (self.seeds, self.drawn) = (seeds.to_vec(), 0);
        if let Variable::Token(token) = &self.settings.variable {
            let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
            let token_batch = token.tokenize(self.images.pipeline, &prompts)?;
            self.rows = token.initial(self.images.pipeline, seeds)?;
            self.write_tokens(&token_batch)?;
        } else {
            // As numbers of the accumulator type, which the distance from them is measured with, too.
            let stacked = conditioning::stacked(&self.images.texts(self.branch())?);
            self.rows = vec![stacked.context];
            self.prefixes[&self.prefix].objectives.write(&mut self.images, POOLED, Data::F32(&stacked.pooled))?;
        }
        for (parameter, rows) in self.parameters.iter().zip(&self.rows) {
            self.images.executor.write(parameter.name, Data::F32(rows))?;
        }
        self.prefixes[&self.prefix].objectives.constants(&mut self.images, jobs)
    }

    /// Enters the prompts' ids, and computes what their first tokens hand on to the learnable ones.
    fn write_tokens(&mut self, token_batch: &TokenBatch) -> Result<()> {
        if !self.prefixes.contains_key(&token_batch.prefix) {
            let planned = self.prefixes.keys().map(usize::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::Usage(format!(
                "prompts with {} tokens before the learnable one where programs are planned for {planned}; plan the run \
                 with the prompts of all its batches",
                token_batch.prefix
            )));
        }
        self.prefix = token_batch.prefix;
        token_batch.write(&mut *self.images.executor, self.images.sizes.tokens)?;
        match self.prefixes[&token_batch.prefix].prefix {
            Some(program) => self.images.executor.run(program),
            None => Ok(()),
        }
    }

    /// What was optimized, as it is now: per parameter, `[B · rows, C]` of a token's.
    pub fn learned(&self) -> Result<Vec<Vec<f32>>> {
        let own = |p: &Parameter| {
            let mut values = vec![0.0; p.len()];
            self.images.executor.read(p.name, DataMut::F32(&mut values))?;
            Ok(values)
        };
        self.parameters.iter().map(own).collect()
    }

    /// The token learned for image `index` of the batch.
    pub fn token(&self, index: usize, word: &str) -> Result<LearnedToken> {
        let Variable::Token(settings) = &self.settings.variable else {
            return Err(Error::Usage("no token is learned where all text states are".into()));
        };
        let learned = self.learned()?;
        let own = |rows: Vec<f32>| {
            let len = rows.len() / self.seeds.len();
            rows[index * len..][..len].to_vec()
        };
        let embeddings = learned.into_iter().map(own).collect();
        Ok(LearnedToken::new(word, settings.rows, embeddings))
    }

    /// The gradient of what was last raised, per parameter as [`Loaded::learned`] has them.
    pub fn gradient(&self) -> Result<Vec<Vec<f64>>> {
        let own = |p: &Parameter| {
            let loss = self.read(&gradient_of(p.name), p.len())?;
            Ok(loss.into_iter().map(|x| -x / self.settings.loss_scale).collect())
        };
        self.parameters.iter().map(own).collect()
    }

    fn read(&self, name: &str, len: usize) -> Result<Vec<f64>> {
        let mut values = vec![0.0; len];
        self.images.executor.read(name, DataMut::F64(&mut values))?;
        Ok(values)
    }

    fn report(&self, step: usize, optimized: OptimizedStep, objective: usize, iteration: usize) -> Result<Iteration> {
        let batch = self.seeds.len();
        let (mut gradient, mut moved) = (vec![0.0; batch], vec![0.0; batch]);
        for (index, slope) in self.gradient()?.iter().enumerate() {
            let (first, parameter) = (&self.rows[index], &self.parameters[index]);
            let now = self.read(parameter.name, first.len())?;
            for image in 0..batch {
                let own = image * first.len() / batch..(image + 1) * first.len() / batch;
                moved[image] += own.clone().map(|i| (now[i] - f64::from(first[i])).powi(2)).sum::<f64>();
                gradient[image] += own.map(|i| slope[i].powi(2)).sum::<f64>();
            }
        }
        gradient.iter_mut().chain(&mut moved).for_each(|sum| *sum = sum.sqrt());
        let score = self.read(&report_name(objective), batch)?;
        let name = self.settings.objectives[objective].name;
        if score.iter().chain(&gradient).chain(&moved).any(|x| !x.is_finite()) {
            let what = format!("the objective '{name}' before sampling step {}, or its gradient,", step + 1);
            return Err(Error::NotFinite(what));
        }
        Ok(Iteration {
            at: Some(AtStep { step, timestep: optimized.levels.t1, second_timestep: optimized.levels.t2 }),
            objective: name,
            iteration,
            lr: optimized.lr,
            score,
            terms: BTreeMap::new(),
            gradient,
            moved,
        })
    }
}
