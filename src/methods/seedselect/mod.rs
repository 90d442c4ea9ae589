//! SeedSelect (Samuel et al., AAAI 2024, arXiv 2304.14530): the starting noise is optimised until the image of a whole sampling run is
//! like a few reference images of a rare concept. The model stays as it is.
//!
//! ```text
//! c = the mean CLIP features of the references, u = their mean latents, p = the features of the prompt
//! z = the best of some starting noises, of the image's own or among those that the references are inverted to
//! for every iteration:
//!     s_0 = z;  s_i+1 = a sampling step of s_i                           i = 0 .. T-1
//!     L = 10 Σ w_i (1 - cos(CLIP(decode(s_i)), c)) + mean (s_T - u)²     the last three i, w = 0.05, 0.25, 0.70
//!     z = AdamW(z, dL/dz)                                                through all steps
//! the image of the z of the lowest L
//! ```

mod bootstrap;
mod checkpoint;
mod judge;
mod method;
pub mod nao;
mod options;
mod programs;
mod prompt;
mod references;
mod seed;
mod start;
mod subset;

pub use checkpoint::Checkpoints;
pub use judge::Likeness;
pub use method::SeedSelect;
pub use options::{Convention, LearningRate, Options, Patience};
pub use references::{References, Targets};
pub use seed::Best;
pub use start::Start;
pub use subset::subset;

use crate::Result;
use crate::exec::{Data, Executor};
use crate::methods::ImageMethod;
use crate::optimize::chain;
use crate::optimize::objective::loss_scale;
use crate::optimize::objective::references::buffer;
use crate::optimize::optimizer::LoadedOptimizer;
use crate::optimize::variable::Entry;
use crate::pipeline::decode::Decoder;
use crate::pipeline::generate::{self, Image, Job, to_channels_first, to_channels_last};
use crate::pipeline::inversion::Inversion;
use crate::pipeline::{Iteration, Observer, Progress};
use crate::sampler::{self, Noise, draw};
use crate::weights::fingerprint;
use checkpoint::State;
use programs::{Programs, TermName};
use prompt::LoadedPrompt;
use seed::Seed;
use start::Inverter;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// SeedSelect on an executor.
pub struct Loaded<'p, 'e> {
    chain: chain::Loaded<'p, 'e>,
    optimizer: LoadedOptimizer,
    decoder: Decoder,
    targets: Targets,
    prompt: Option<LoadedPrompt>,
    /// The directions of other classes' features, where they count.
    others: Vec<Vec<f32>>,
    /// Where starts are among the inverted references.
    inverter: Option<Inverter<'p>>,
    options: Options,
    images: generate::Settings,
    /// What the losses of the chain are, in their order, and what each was multiplied with.
    terms: Vec<(TermName, f64)>,
    /// Numbers of a starting noise `[h, w, C]`, and its channels.
    len: usize,
    channels: usize,
    /// Report every iteration.
    trace: bool,
    /// How many references there are.
    references: usize,
    /// Of noises that images share.
    seed: u64,
    /// Those of the last batch, `[h, w, C]`.
    found: HashMap<Conditions, Vec<f32>>,
    checkpoints: Option<Arc<dyn Checkpoints>>,
    /// Everything but the jobs that decides the images, where there are checkpoints.
    settings: String,
    /// Of the last batch.
    best: Vec<Best>,
}

/// Prompt and negative prompt: what a noise that images share depends on besides its seed.
type Conditions = (String, Option<String>);

/// A stretch of iterations.
struct Phase<'a> {
    /// The batch, whose state is kept.
    batch: &'a [Job],
    /// What its rows are optimised as.
    jobs: &'a [Job],
    iterations: usize,
    lr: LearningRate,
    /// Iterations of the phase before, which the trace counts first.
    before: usize,
    /// What the phase before found, all rows; empty where there was none.
    shared: &'a [f32],
    /// Report every iteration.
    trace: bool,
}

impl<'a> Phase<'a> {
    /// The whole of a run.
    fn new(jobs: &'a [Job], options: &Options, trace: bool) -> Phase<'a> {
        let Options { iterations, lr, .. } = *options;
        Phase { batch: jobs, jobs, iterations, lr, before: 0, shared: &[], trace }
    }
}

/// The losses of one evaluation, per image.
struct Losses {
    total: Vec<f64>,
    terms: BTreeMap<String, Vec<f64>>,
}

impl<'p, 'e> Loaded<'p, 'e> {
    /// Loads weights and programs, and encodes the references.
    fn new(programs: Programs<'p>, executor: &'e mut dyn Executor, method: &SeedSelect) -> Result<Loaded<'p, 'e>> {
        let Programs { pipeline, options, images, terms, chain, optimizer, decode, encoders, .. } = programs;
        let (channels, len) = (programs.channels, programs.len);
        let encoders = encoders.load(pipeline, executor)?;
        let targets = encoders.targets(executor, &method.references, method.seed)?;
        let prompt = programs.prompt.map(|prompt| prompt.load(pipeline, executor)).transpose()?;
        let classes = method.others.iter().map(|other| encoders.centroid(executor, other));
        let others = classes.collect::<Result<_>>()?;
        let inverter = |inversion: Inversion<'p>| -> Result<Inverter<'p>> {
            let means = encoders.means(executor, &method.references)?;
            let latents = means.iter().map(|mean| to_channels_first(mean, channels)).collect();
            let inversion = inversion.load(executor)?;
            Ok(Inverter { inversion, start: options.start, latents, inverted: HashMap::new() })
        };
        let inverter = programs.inversion.map(inverter).transpose()?;
        let mut chain = chain.load::<f32>(executor)?;
        let optimizer = optimizer.load(chain.executor(), &pipeline.model)?;
        let decoder = Decoder::load(pipeline, chain.executor(), decode)?;
        let settings = match &method.checkpoints {
            Some(_) => format!("{images:?} {} {}", method.options(), pipeline.model.fingerprint()?),
            None => String::new(),
        };
        Ok(Loaded {
            chain,
            optimizer,
            decoder,
            targets,
            prompt,
            others,
            inverter,
            options,
            images,
            terms,
            len,
            channels,
            trace: method.trace,
            references: method.references.pictures.len(),
            seed: method.seed,
            found: HashMap::new(),
            checkpoints: method.checkpoints.clone(),
            settings,
            best: vec![],
        })
    }
}

impl Loaded<'_, '_> {
    /// Makes one full batch of images.
    pub fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let seeds = match self.options.bootstrap {
            Some(iterations) => self.bootstrapped(jobs, iterations, observe)?,
            None => self.alone(jobs, observe)?,
        };
        self.best = seeds.into_iter().map(|seed| seed.best).collect();
        self.render(jobs, observe)
    }

    /// Every image optimised for itself, towards all references.
    fn alone(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Seed>> {
        self.condition_on_all(jobs)?;
        let from = match self.kept(jobs)? {
            Some(state) => self.restore(jobs, state)?,
            None => (self.start(jobs, observe)?, 0),
        };
        self.optimise(&Phase::new(jobs, &self.options, self.trace), from, observe)
    }

    /// Iterates from some seeds on, which have so many iterations behind them.
    fn optimise(
        &mut self,
        phase: &Phase<'_>,
        (mut seeds, begun): (Vec<Seed>, usize),
        observe: &mut Observer<'_>,
    ) -> Result<Vec<Seed>> {
        for iteration in begun..phase.iterations {
            if seeds.iter().all(|seed| seed.stopped) {
                break;
            }
            let noise = self.chain.noise()?;
            let losses = self.gradient(observe)?;
            self.keep((&mut seeds, phase.jobs), &noise, &losses.total, iteration, observe)?;
            let report = phase.trace.then(|| self.report(&seeds, &noise, losses, (phase, iteration))).transpose()?;
            self.optimizer.step(self.chain.executor(), phase.lr.at(iteration))?;
            if self.options.renormalise {
                self.renormalise(&seeds)?;
            }
            observe(Progress::Iteration(report.as_ref()))?;
            seeds = self.checkpoint(phase, seeds, iteration + 1)?;
        }
        if self.options.convention == Convention::Default && !seeds.iter().all(|seed| seed.stopped) {
            let noise = self.chain.noise()?;
            let losses = self.loss(observe)?;
            self.keep((&mut seeds, phase.jobs), &noise, &losses.total, phase.iterations, observe)?;
        }
        Ok(seeds)
    }

    /// What is kept of an earlier run of the jobs that was cut short.
    fn kept(&self, jobs: &[Job]) -> Result<Option<State>> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(None) };
        let bytes = checkpoints.read(jobs)?;
        bytes.map(|bytes| State::parse(&bytes, &self.key(jobs), (jobs.len(), self.len))).transpose()
    }

    /// Goes on there: the seeds, and how many iterations they have behind them.
    fn restore(&mut self, jobs: &[Job], state: State) -> Result<(Vec<Seed>, usize)> {
        // Draws of the sampler are those of the jobs.
        self.draw(jobs)?;
        self.chain.set_noise(&state.noise)?;
        self.optimizer.restore(self.chain.executor(), &state.optimizer)?;
        Ok((state.seeds, state.iteration))
    }

    /// Of everything that decides the images of these jobs.
    fn key(&self, jobs: &[Job]) -> String {
        format!("{:016x}", fingerprint(format!("{} {jobs:?}", self.settings).into_bytes()))
    }

    /// Keeps where the run is, before `iteration`.
    fn checkpoint(&mut self, phase: &Phase<'_>, seeds: Vec<Seed>, iteration: usize) -> Result<Vec<Seed>> {
        let Some(checkpoints) = self.checkpoints.clone() else { return Ok(seeds) };
        let (noise, optimizer) = (self.chain.noise()?, self.optimizer.state(self.chain.executor())?);
        let state = State { iteration, noise, shared: phase.shared.to_vec(), seeds, optimizer };
        checkpoints.write(phase.batch, &state.to_bytes(&self.key(phase.batch))?)?;
        Ok(state.seeds)
    }

    /// What the images of the last batch were made from.
    pub fn best(&self) -> &[Best] {
        &self.best
    }

    /// The prompts, and what the loss compares with, of each row.
    fn condition(&mut self, jobs: &[Job], targets: &[&Targets]) -> Result<()> {
        self.chain.jobs(jobs)?;
        for (class, centroid) in self.others.iter().enumerate() {
            self.chain.write(&buffer::other(class), Data::F32(&centroid.repeat(jobs.len())))?;
        }
        self.prompt.iter().try_for_each(|prompt| prompt.write(self.chain.executor(), jobs))?;
        Targets::write(targets, self.chain.executor())
    }

    /// The same where all rows compare with all references.
    fn condition_on_all(&mut self, jobs: &[Job]) -> Result<()> {
        let all = self.targets.clone();
        self.condition(jobs, &vec![&all; jobs.len()])
    }

    /// The best of some starting noises of each image.
    fn start(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Seed>> {
        let own = self.draw(jobs)?;
        if let Some(inverter) = &mut self.inverter {
            inverter.prepare(self.chain.executor(), jobs, observe)?;
        }
        let mut seeds: Vec<Seed> = self.candidate(jobs, &own, 0)?.into_iter().map(Seed::new).collect();
        if self.options.starts > 1 {
            for index in 0..self.options.starts {
                let noises = self.candidate(jobs, &own, index)?;
                self.chain.set_noise(&noises.concat())?;
                let losses = self.loss(observe)?;
                for ((seed, noise), loss) in seeds.iter_mut().zip(&noises).zip(losses.total) {
                    seed.take(noise, loss, 0);
                }
            }
            seeds.iter().zip(jobs).try_for_each(|(seed, job)| seed.check(job.seed))?;
            seeds.iter_mut().for_each(Seed::begin_at_best);
        }
        self.begin(&seeds)?;
        Ok(seeds)
    }

    /// At the seeds' first noises, with an optimizer that has made no step.
    fn begin(&mut self, seeds: &[Seed]) -> Result<()> {
        let noise: Vec<f32> = seeds.iter().flat_map(|seed| seed.first.iter()).copied().collect();
        self.chain.set_noise(&noise)?;
        self.optimizer.reset(self.chain.executor())
    }

    /// Every image's own noise, and where the sampler adds noise, its draws.
    fn draw(&mut self, jobs: &[Job]) -> Result<Vec<Vec<f32>>> {
        let mut unit = vec![0.0; self.len];
        let mut draws = vec![vec![]; 1 + self.chain.draws()];
        let mut noises: Vec<Noise> = jobs.iter().map(|job| Noise::new(self.images.rng, job.seed)).collect();
        for (index, all) in draws.iter_mut().enumerate() {
            for (job, noise) in jobs.iter().zip(&mut noises) {
                noise.normal(&mut unit);
                all.extend(to_channels_last(job.draws.get(index).unwrap_or(&unit), self.channels));
            }
        }
        let steps = draws.split_off(1);
        self.chain.set_draws(&steps)?;
        Ok(draws.concat().chunks(self.len).map(<[f32]>::to_vec).collect())
    }

    /// Starting noise `index` of every image, `[h, w, C]`: its own and others under its seed, or those among the inverted references.
    fn candidate(&self, jobs: &[Job], own: &[Vec<f32>], index: usize) -> Result<Vec<Vec<f32>>> {
        let noise = |(job, own): (&Job, &Vec<f32>)| {
            let noise = match (&self.inverter, index) {
                (Some(inverter), _) => inverter.draw(job, index)?,
                (None, 0) => return Ok(own.clone()),
                (None, _) => {
                    let mut unit = vec![0.0; self.len];
                    sampler::normal(job.seed, draw::SEARCH + index as u64, &mut unit);
                    unit
                }
            };
            Ok(to_channels_last(&noise, self.channels))
        };
        jobs.iter().zip(own).map(noise).collect()
    }

    /// Loss and gradient of the noise as it is.
    fn gradient(&mut self, observe: &mut Observer<'_>) -> Result<Losses> {
        let (mut done, steps) = (0, 2 * self.chain.steps());
        let losses = self.chain.gradient_observed(&mut || {
            done += 1;
            observe(Progress::Step { done, steps })
        })?;
        Ok(self.losses(&losses))
    }

    /// Loss alone.
    fn loss(&mut self, observe: &mut Observer<'_>) -> Result<Losses> {
        let (mut done, steps) = (0, self.chain.steps());
        let losses = self.chain.loss_observed(&mut || {
            done += 1;
            observe(Progress::Step { done, steps })
        })?;
        Ok(self.losses(&losses))
    }

    fn losses(&self, losses: &[Vec<f32>]) -> Losses {
        let mut total = vec![0.0; losses.first().map_or(0, Vec::len)];
        let mut terms = BTreeMap::new();
        let scale = self.loss_scale();
        for ((term, weight), losses) in self.terms.iter().zip(losses) {
            total.iter_mut().zip(losses).for_each(|(total, loss)| *total += f64::from(*loss) / scale);
            terms.insert(term.to_string(), losses.iter().map(|loss| f64::from(*loss) / (weight * scale)).collect());
        }
        Losses { total, terms }
    }

    fn loss_scale(&self) -> f64 {
        loss_scale(self.images.dtype)
    }

    /// Takes the noises of an evaluation where they are better, and looks whether to stop. `Error::NotFinite` where an image has none.
    fn keep(
        &self,
        (seeds, jobs): (&mut [Seed], &[Job]),
        noise: &[f32],
        losses: &[f64],
        iteration: usize,
        observe: &mut Observer<'_>,
    ) -> Result<()> {
        // An image stops alone, whatever the others of its batch do.
        let rows = seeds.iter_mut().zip(noise.chunks(self.len)).zip(losses).enumerate();
        for (index, ((seed, noise), loss)) in rows.filter(|(_, ((seed, _), _))| !seed.stopped) {
            if !loss.is_finite() {
                seed.check(jobs[index].seed)?;
                seed.stopped = true;
                let seed = jobs[index].seed;
                let text = format!(
                    "seed {seed}: the loss is not finite after {iteration} iterations; what was best before is used"
                );
                observe(Progress::Remark { index, text: &text })?;
                continue;
            }
            match self.options.convention {
                Convention::Default => seed.take(noise, *loss, iteration),
                Convention::Released => seed.best = Best { noise: noise.to_vec(), loss: *loss, iteration },
            }
            seed.stopped = seed.patience.stops(*loss, self.options.patience);
        }
        Ok(())
    }

    /// Brings every noise back to the length it began with.
    fn renormalise(&mut self, seeds: &[Seed]) -> Result<()> {
        let mut noise = self.chain.noise()?;
        for (row, seed) in noise.chunks_mut(self.len).zip(seeds) {
            let scale = (length(&seed.first) / length(row)) as f32;
            row.iter_mut().for_each(|x| *x *= scale);
        }
        self.chain.set_noise(&noise)
    }

    fn report(
        &self,
        seeds: &[Seed],
        noise: &[f32],
        losses: Losses,
        (phase, iteration): (&Phase<'_>, usize),
    ) -> Result<Iteration> {
        let gradient = self.chain.read_gradient(Entry::Latents)?;
        let scale = self.loss_scale();
        let rows = || noise.chunks(self.len);
        let moved = |(row, seed): (&[f32], &Seed)| {
            row.iter().zip(&seed.first).map(|(x, first)| f64::from(x - first).powi(2)).sum::<f64>().sqrt()
        };
        let mut terms = losses.terms;
        terms.insert("norm".into(), rows().map(length).collect());
        Ok(Iteration {
            at: None,
            objective: "seedselect",
            iteration: phase.before + iteration,
            lr: phase.lr.at(iteration),
            score: losses.total,
            terms,
            gradient: gradient.chunks(self.len).map(|row| length(row) / scale).collect(),
            moved: rows().zip(seeds).map(moved).collect(),
        })
    }

    /// The images of the noises that are returned.
    fn render(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let noise: Vec<f32> = self.best.iter().flat_map(|best| best.noise.iter()).copied().collect();
        self.chain.set_noise(&noise)?;
        let (mut done, steps) = (0, self.images.sampler.steps);
        self.chain.sample(&mut || {
            done += 1;
            observe(Progress::Step { done, steps })
        })?;
        self.decoder.finish(self.chain.executor(), jobs, observe)
    }
}

fn length(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}
