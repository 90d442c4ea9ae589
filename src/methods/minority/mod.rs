//! MinorityPrompt (Um & Ye 2025, algorithm 1): while an image is sampled, what the network is told is optimised towards what the
//! model finds unlikely, at some of the steps.
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
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::optimize::objective::{Look, Passes, score_name};
use crate::optimize::variable::token::Placed;
use crate::optimize::variable::{ADAM, CONTEXT, Names, POOLED, Parameter, Variable, moments_of};
use crate::pipeline::conditioning::{self, States};
use crate::pipeline::generate::{self, Branch, Generator, Image, Job};
use crate::pipeline::programs::gradient_of;
use crate::pipeline::{Iteration, Pipeline};
use crate::pipeline::{Observer, Progress};
use crate::plan::{Footprint, Planned, plan};
use crate::sampler::{Level, draw};
use crate::{Error, Result};
use programs::OfPrefix;
use std::collections::BTreeMap;

/// An optimised step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Visit {
    look: Look,
    rate: f64,
}

/// A run, planned but not loaded.
pub struct Minority<'p> {
    generator: Generator<'p>,
    settings: Settings,
    visits: Vec<Option<Visit>>,
    update: Planned,
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
        let visits = visits(pipeline, &settings, &generator)?;
        let design = programs::design(&generator, pipeline, &settings);
        let mut prefixes = BTreeMap::new();
        for prefix in programs::prefixes(pipeline, &settings.variable, prompts, batch)? {
            prefixes.insert(prefix, OfPrefix::plan(&design, executor, &settings, prefix)?);
        }
        let update = plan(design.update(settings.loss_scale)?, |program, node| executor.workspace(program, node));
        Ok(Minority { generator, settings, visits, update, prefixes })
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(&self.programs())
    }

    /// Every planned program.
    pub fn programs(&self) -> Vec<&Planned> {
        let mut all = self.generator.programs().all().to_vec();
        all.push(&self.update);
        all.extend(self.prefixes.values().flat_map(OfPrefix::all));
        all
    }

    /// Sampling steps and iterations of one batch.
    pub fn ticks(&self) -> usize {
        let iterations = self.settings.schedule.iterations * self.settings.objectives.len();
        self.generator.calls() + self.optimised().len() * iterations
    }

    /// UNet calls of one batch, sampling included.
    pub fn passes(&self) -> Passes {
        let sampling = self.generator.passes();
        let iterations = self.optimised().len() * self.settings.schedule.iterations;
        // Of any prefix: they differ in the text towers alone.
        let looks = self.prefixes.values().next().map(|of_prefix| of_prefix.objectives.passes());
        let Passes { forward, backward } = looks.unwrap_or_default();
        Passes { forward: sampling + iterations * forward, backward: iterations * backward }
    }

    /// Numbers of the sampling steps that are optimised.
    pub fn optimised(&self) -> Vec<usize> {
        (0..self.visits.len()).filter(|step| self.visits[*step].is_some()).collect()
    }

    /// The optimised steps, each with the two noise levels it looks at.
    pub(crate) fn looks(&self) -> impl Iterator<Item = (usize, Look)> {
        self.visits.iter().enumerate().filter_map(|(step, visit)| Some((step, visit.as_ref()?.look)))
    }

    /// Loads weights and programs.
    pub fn load<'e>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e>> {
        let pipeline = self.generator.pipeline();
        let parameters = programs::design(&self.generator, pipeline, &self.settings).parameters();
        let images = self.generator.load(executor)?;
        let update = images.executor.load(self.update, &pipeline.model)?;
        let mut prefixes = BTreeMap::new();
        for (prefix, planned) in self.prefixes {
            prefixes.insert(prefix, planned.load(&mut *images.executor, &pipeline.model)?);
        }
        Ok(Loaded {
            rows: parameters.iter().map(|p| vec![0.0; p.shape.iter().product()]).collect(),
            images,
            settings: self.settings,
            visits: self.visits,
            update,
            parameters,
            prefix: prefixes.keys().next().copied().unwrap_or_default(),
            prefixes,
            seeds: vec![],
            drawn: 0,
        })
    }
}

/// The steps that are optimised, and the two noise levels of each.
fn visits(pipeline: &Pipeline, settings: &Settings, generator: &Generator<'_>) -> Result<Vec<Option<Visit>>> {
    let (config, s) = (&pipeline.config.scheduler, &settings.schedule);
    if s.every == 0 || !(s.rate >= 0.0 && s.rate.is_finite()) {
        let what = format!("a learning rate of {} every {} steps: must be 0 or more, and 1 or more", s.rate, s.every);
        return Err(Error::Usage(what));
    }
    if settings.variable == Variable::Null && !generator.schedule().needs.uncond {
        return Err(Error::Usage(
            "the unconditional branch cannot be optimised at guidance 1, which leaves it out".into(),
        ));
    }
    let steps = &generator.schedule().steps;
    let [above, up_to] = [s.t_lo, s.t_hi].map(|share| share * config.train_timesteps as f64);
    let visit = |(index, step): (usize, &crate::sampler::Step)| {
        if step.timestep <= above || step.timestep > up_to || !index.is_multiple_of(s.every) {
            return Ok(None);
        }
        let rate = s.rate * (1.0 - index as f64 * s.decay);
        if rate < 0.0 {
            let what = format!("--lr-decay {} makes the learning rate negative at step {index}; choose less", s.decay);
            return Err(Error::Usage(what));
        }
        let (again, again_level) = renoise(config, steps.len(), s.convention, s.renoise, step.timestep)?;
        let level = Level { alpha: step.alpha, sigma: step.sigma };
        Ok(Some(Visit { look: Look { timestep: step.timestep, level, again, again_level }, rate }))
    };
    steps.iter().enumerate().map(visit).collect()
}

/// A run with its programs on an executor.
pub struct Loaded<'p, 'e> {
    images: generate::Loaded<'p, 'e>,
    settings: Settings,
    visits: Vec<Option<Visit>>,
    update: ProgramId,
    parameters: Vec<Parameter>,
    /// Of the batch that is made.
    prefix: usize,
    prefixes: BTreeMap<usize, programs::LoadedOfPrefix>,
    /// What the parameters begin as.
    rows: Vec<Vec<f32>>,
    /// Per image, of the optimiser.
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

    /// Makes one full batch of images; `seeds` are the optimiser's, one per image. Other seeds leave the starting noise as it is.
    pub fn run(&mut self, jobs: &[Job], seeds: &[u64], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        if seeds.len() != jobs.len() {
            return Err(Error::Usage(format!("{} seeds of the optimiser for {} images", seeds.len(), jobs.len())));
        }
        self.images.begin(jobs)?;
        self.begin(jobs, seeds)?;
        let mut learned = false;
        for step in 0..self.visits.len() {
            if let Some(visit) = self.visits[step] {
                self.optimise(step, visit, observe)?;
                self.tell()?;
                learned = true;
            } else if self.settings.schedule.base_prompt_after && learned {
                self.images.tell_asked()?;
                learned = false;
            }
            self.images.step(step, observe)?;
        }
        self.images.finish(observe)
    }

    /// The optimiser's inner loop at one step: Adam begins anew, what is optimised goes on.
    fn optimise(&mut self, step: usize, visit: Visit, observe: &mut Observer<'_>) -> Result<()> {
        self.prefixes[&self.prefix].objectives.prepare(&mut self.images, &visit.look)?;
        for objective in 0..self.settings.objectives.len() {
            self.forget_moments()?;
            for iteration in 0..self.settings.schedule.iterations {
                let of_prefix = &self.prefixes[&self.prefix];
                let place = format_args!("iteration {} before sampling step {}", iteration + 1, step + 1);
                let draw = draw::LOOK + self.drawn;
                let looked = of_prefix.objectives.run(&mut self.images, objective, &self.seeds, draw);
                looked.map_err(|error| error.during(place))?;
                self.drawn += 1;
                let report = match self.settings.trace {
                    true => Some(self.report(step, visit, objective, iteration)?),
                    false => None,
                };
                self.images.executor.write(ADAM, Data::F64(&adam(visit.rate, iteration)))?;
                self.images.executor.run(self.update).map_err(|error| error.during(place))?;
                observe(Progress::Iteration(report.as_ref()))?;
            }
        }
        Ok(())
    }

    /// The branch that is optimised.
    fn branch(&self) -> Branch {
        match self.settings.variable {
            Variable::Token(_) | Variable::Text => Branch::Prompt,
            Variable::Null => Branch::Negative,
        }
    }

    /// Tells that branch what was learned.
    fn tell(&mut self) -> Result<()> {
        self.images.executor.run(self.prefixes[&self.prefix].forward)?;
        // Where the text states are optimised themselves, the pooled text stays the prompt's.
        let pooled = matches!(self.settings.variable, Variable::Token(_)).then_some(POOLED);
        self.images.tell_states(self.branch(), States { context: CONTEXT, pooled })
    }

    /// Writes what stays the same for all iterations of a batch, and the parameters as they begin.
    fn begin(&mut self, jobs: &[Job], seeds: &[u64]) -> Result<()> {
        (self.seeds, self.drawn) = (seeds.to_vec(), 0);
        if let Variable::Token(token) = &self.settings.variable {
            let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
            let placed = token.place(self.images.pipeline, &prompts)?;
            self.rows = token.initial(self.images.pipeline, seeds)?;
            self.place(&placed)?;
        } else {
            // As numbers of the wide type, which the distance from them is measured with, too.
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
    fn place(&mut self, placed: &Placed) -> Result<()> {
        if !self.prefixes.contains_key(&placed.prefix) {
            let planned = self.prefixes.keys().map(usize::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::Usage(format!(
                "prompts with {} tokens before the learnable one where programs are planned for {planned}; plan the run \
                 with the prompts of all its batches",
                placed.prefix
            )));
        }
        self.prefix = placed.prefix;
        let (names, tokens) = (Names::of(placed.prefix), self.images.sizes.tokens);
        for (tower, ids) in placed.ids.iter().enumerate() {
            let [first, rest] = names.ids(tower);
            let part = |from: usize, to: usize| -> Vec<i32> {
                ids.chunks(tokens).flat_map(|ids| &ids[from..to]).copied().collect()
            };
            self.images.executor.write(&first, Data::I32(&part(0, placed.prefix)))?;
            self.images.executor.write(&rest, Data::I32(&part(placed.prefix, tokens)))?;
        }
        if placed.ids.len() > 1 {
            let pool_at: Vec<i32> = placed.pool_at.iter().map(|at| at - placed.prefix as i32).collect();
            self.images.executor.write(&names.pool_at(), Data::I32(&pool_at))?;
        }
        match self.prefixes[&placed.prefix].prefix {
            Some(program) => self.images.executor.run(program),
            None => Ok(()),
        }
    }

    fn forget_moments(&mut self) -> Result<()> {
        for Parameter { name, shape } in &self.parameters {
            let zeros = vec![0.0; shape.iter().product()];
            for moment in moments_of(name) {
                self.images.executor.write(&moment, Data::F32(&zeros))?;
            }
        }
        Ok(())
    }

    /// What was optimised, as it is now: per parameter, `[B · rows, C]` of a token's.
    pub fn learned(&self) -> Result<Vec<Vec<f32>>> {
        let own = |p: &Parameter| {
            let mut values = vec![0.0; p.shape.iter().product()];
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
        Ok(LearnedToken { word: word.to_string(), rows: settings.rows, embeddings })
    }

    /// The gradient of what was last raised, per parameter as [`Loaded::learned`] has them.
    pub fn gradient(&self) -> Result<Vec<Vec<f64>>> {
        let own = |p: &Parameter| {
            let loss = self.read(&gradient_of(p.name), p.shape.iter().product())?;
            Ok(loss.into_iter().map(|x| -x / self.settings.loss_scale).collect())
        };
        self.parameters.iter().map(own).collect()
    }

    fn read(&self, name: &str, len: usize) -> Result<Vec<f64>> {
        let mut values = vec![0.0; len];
        self.images.executor.read(name, DataMut::F64(&mut values))?;
        Ok(values)
    }

    fn report(&self, step: usize, visit: Visit, objective: usize, iteration: usize) -> Result<Iteration> {
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
        let score = self.read(&score_name(objective), batch)?;
        let name = self.settings.objectives[objective].name;
        if score.iter().chain(&gradient).chain(&moved).any(|x| !x.is_finite()) {
            let what = format!("the objective '{name}' before sampling step {}, or its gradient,", step + 1);
            return Err(Error::NotFinite(what));
        }
        Ok(Iteration {
            step,
            timestep: visit.look.timestep,
            second_timestep: visit.look.again,
            objective: name,
            iteration,
            rate: visit.rate,
            score,
            gradient,
            moved,
        })
    }
}

/// Adam's numbers before update `iteration` since it began anew: torch's defaults, without weight decay.
fn adam(rate: f64, iteration: usize) -> [f64; 7] {
    const BETAS: [f64; 2] = [0.9, 0.999];
    let t = iteration as i32 + 1;
    let [b1, b2] = BETAS;
    [rate, 1.0 - b1, 1.0 - b2, 1e-8, 0.0, 1.0 - b1.powi(t), 1.0 - b2.powi(t)]
}
