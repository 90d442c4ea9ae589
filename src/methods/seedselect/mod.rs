//! SeedSelect (Samuel et al., AAAI 2024, arXiv 2304.14530): the starting noise is optimised until the image of a whole sampling run is
//! like a few reference images of a rare concept. The model stays as it is.
//!
//! ```text
//! c = the mean CLIP features of the references, u = their mean latents
//! z = the best of some starting noises
//! for every iteration:
//!     s_0 = z;  s_i+1 = a sampling step of s_i                           i = 0 .. T-1
//!     L = 10 Σ w_i (1 - cos(CLIP(decode(s_i)), c)) + mean (s_T - u)²     the last three i, w = 0.05, 0.25, 0.70
//!     z = AdamW(z, dL/dz)                                                through all steps
//! the image of the z of the lowest L
//! ```

mod cache;
mod checkpoint;
mod held_out;
mod judge;
mod method;
pub mod nao;
mod options;
mod programs;
mod references;
mod seed;
mod watch;

pub use cache::ReferenceCache;
pub use checkpoint::Checkpoints;
pub use held_out::HeldOut;
pub use judge::Likeness;
pub use method::SeedSelect;
pub use options::{Convention, LearningRate, Options, Patience};
pub use references::{References, Targets};
pub use seed::Best;
pub use watch::Watch;

use crate::Result;
use crate::exec::Executor;
use crate::methods::ImageMethod;
use crate::optimize::chain;
use crate::optimize::objective::loss_scale;
use crate::optimize::optimizer::LoadedOptimizer;
use crate::optimize::variable::Entry;
use crate::pipeline::decode::Decoder;
use crate::pipeline::generate::{self, Image, Job, to_channels_last};
use crate::pipeline::{Iteration, Observer, Progress};
use crate::sampler::{self, Noise, draw};
use crate::weights::fingerprint;
use checkpoint::State;
use held_out::LoadedHeldOut;
use nao::chi::Chi;
use programs::{Programs, TermName};
use seed::Seed;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Log-density of a noise's length below which a user is told: 5 from the likeliest length, whatever the dimensions.
const UNLIKELY: f64 = -25.0;

/// SeedSelect on an executor.
pub struct Loaded<'p, 'e> {
    chain: chain::Loaded<'p, 'e>,
    optimizer: LoadedOptimizer,
    decoder: Decoder,
    targets: Targets,
    judge: Option<LoadedHeldOut>,
    options: Options,
    images: generate::Settings,
    /// What the losses of the chain are, in their order, and what each was multiplied with.
    terms: Vec<(TermName, f64)>,
    /// Numbers of a starting noise `[h, w, C]`, and its channels.
    len: usize,
    channels: usize,
    /// How likely the length of a noise is.
    chi: Chi,
    /// Report every iteration.
    trace: bool,
    watch: Watch,
    checkpoints: Option<Arc<dyn Checkpoints>>,
    /// Everything but the jobs that decides the images, where there are checkpoints.
    settings: String,
    /// Of the last batch.
    best: Vec<Best>,
}

/// The losses of one evaluation, per image.
struct Losses {
    total: Vec<f64>,
    terms: BTreeMap<String, Vec<f64>>,
}

impl<'p, 'e> Loaded<'p, 'e> {
    /// Loads weights and programs, and encodes the references.
    fn new(programs: Programs<'p>, executor: &'e mut dyn Executor, method: &SeedSelect) -> Result<Loaded<'p, 'e>> {
        let Programs { pipeline, options, images, terms, chain, optimizer, decode, encoders, judge, .. } = programs;
        let (channels, len) = (programs.channels, programs.len);
        let cache = method.watch.cache.as_deref();
        let targets = encoders.encode(pipeline, executor, &method.references, method.seed, cache)?;
        let judge = judge.map(|judge| judge.load(pipeline, executor, &method.references, cache)).transpose()?;
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
            judge,
            options,
            images,
            terms,
            len,
            channels,
            chi: Chi::new(len)?,
            trace: method.trace,
            watch: method.watch.clone(),
            checkpoints: method.checkpoints.clone(),
            settings,
            best: vec![],
        })
    }
}

impl Loaded<'_, '_> {
    /// Makes one full batch of images.
    pub fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        self.condition(jobs)?;
        let (mut seeds, begun) = match self.resume(jobs)? {
            Some(State { seeds, iteration, .. }) => (seeds, iteration),
            None => (self.start(jobs, observe)?, 0),
        };
        for iteration in begun..self.options.iterations {
            if seeds.iter().all(|seed| seed.stopped) {
                break;
            }
            let noise = self.chain.noise()?;
            let losses = self.gradient(observe)?;
            self.keep((&mut seeds, jobs), &noise, &losses.total, iteration, observe)?;
            let report = self.trace.then(|| self.report(&seeds, &noise, losses, iteration)).transpose()?;
            let lr = self.options.lr.at(iteration);
            self.optimizer.step(self.chain.executor(), lr)?;
            if self.options.renormalise {
                self.renormalise(&seeds)?;
            }
            observe(Progress::Iteration(report.as_ref()))?;
            if self.watch.shows(iteration) {
                self.preview(&seeds, jobs, observe)?;
            }
            seeds = self.checkpoint(jobs, seeds, iteration + 1)?;
        }
        if self.options.convention == Convention::Default && !seeds.iter().all(|seed| seed.stopped) {
            let noise = self.chain.noise()?;
            let losses = self.loss(observe)?;
            self.keep((&mut seeds, jobs), &noise, &losses.total, self.options.iterations, observe)?;
        }
        self.best = seeds.into_iter().map(|seed| seed.best).collect();
        let noise: Vec<f32> = self.best.iter().flat_map(|best| best.noise.iter()).copied().collect();
        self.render(&noise, jobs, observe)
    }

    /// Shows what the images would be by now. The next evaluation begins from the noises as they are.
    fn preview(&mut self, seeds: &[Seed], jobs: &[Job], observe: &mut Observer<'_>) -> Result<()> {
        let noise: Vec<f32> = seeds.iter().flat_map(|seed| seed.best.noise.iter()).copied().collect();
        self.chain.put_noise_aside()?;
        self.render(&noise, jobs, &mut |progress| match progress {
            Progress::Image { index, image } => observe(Progress::Preview { index, image }),
            other => observe(other),
        })?;
        self.chain.take_noise_back()
    }

    /// Goes on where an earlier run of the jobs was cut short.
    fn resume(&mut self, jobs: &[Job]) -> Result<Option<State>> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(None) };
        let Some(bytes) = checkpoints.read(jobs)? else { return Ok(None) };
        let state = State::parse(&bytes, &self.key(jobs), (jobs.len(), self.len))?;
        // Draws of the sampler are those of the jobs.
        self.draw(jobs)?;
        self.chain.set_noise(&state.noise)?;
        self.optimizer.restore(self.chain.executor(), &state.optimizer)?;
        Ok(Some(state))
    }

    /// Of everything that decides the images of these jobs.
    fn key(&self, jobs: &[Job]) -> String {
        format!("{:016x}", fingerprint(format!("{} {jobs:?}", self.settings).into_bytes()))
    }

    /// Keeps where the run is, before `iteration`.
    fn checkpoint(&mut self, jobs: &[Job], seeds: Vec<Seed>, iteration: usize) -> Result<Vec<Seed>> {
        let Some(checkpoints) = self.checkpoints.clone() else { return Ok(seeds) };
        let (noise, optimizer) = (self.chain.noise()?, self.optimizer.state(self.chain.executor())?);
        let state = State { iteration, noise, seeds, optimizer };
        checkpoints.write(jobs, &state.to_bytes(&self.key(jobs))?)?;
        Ok(state.seeds)
    }

    /// What the images of the last batch were made from.
    pub fn best(&self) -> &[Best] {
        &self.best
    }

    /// The prompts, and what the loss compares with, a row per image.
    fn condition(&mut self, jobs: &[Job]) -> Result<()> {
        self.chain.jobs(jobs)?;
        if let Some(judge) = &self.judge {
            judge.write(self.chain.executor(), jobs)?;
        }
        self.targets.write(self.chain.executor(), jobs.len())
    }

    /// The best of some starting noises of each image: its own, and others under its seed.
    fn start(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Seed>> {
        let own = self.draw(jobs)?;
        let mut seeds: Vec<Seed> = own.into_iter().map(Seed::new).collect();
        if self.options.starts > 1 {
            for index in 0..self.options.starts {
                let noise = match index {
                    0 => seeds.iter().flat_map(|seed| seed.first.clone()).collect(),
                    index => self.other(jobs, index),
                };
                self.chain.set_noise(&noise)?;
                let losses = self.loss(observe)?;
                for ((seed, noise), loss) in seeds.iter_mut().zip(noise.chunks(self.len)).zip(losses.total) {
                    seed.take(noise, loss, 0);
                }
            }
            seeds.iter().zip(jobs).try_for_each(|(seed, job)| seed.check(job.seed))?;
            seeds.iter_mut().for_each(Seed::begin_at_best);
        }
        let noise: Vec<f32> = seeds.iter().flat_map(|seed| seed.first.iter()).copied().collect();
        self.chain.set_noise(&noise)?;
        self.optimizer.reset(self.chain.executor())?;
        Ok(seeds)
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

    /// Starting noise `index`, from 1, of every image besides its own.
    fn other(&self, jobs: &[Job], index: usize) -> Vec<f32> {
        let mut unit = vec![0.0; self.len];
        let mut all = Vec::with_capacity(jobs.len() * self.len);
        for job in jobs {
            sampler::normal(job.seed, draw::SEARCH + index as u64, &mut unit);
            all.extend(to_channels_last(&unit, self.channels));
        }
        all
    }

    /// Loss and gradient of the noise as it is.
    fn gradient(&mut self, observe: &mut Observer<'_>) -> Result<Losses> {
        let (mut done, steps) = (0, 2 * self.images.sampler.steps);
        let losses = self.chain.gradient_observed(&mut || {
            done += 1;
            observe(Progress::Step { done, steps })
        })?;
        Ok(self.losses(&losses))
    }

    /// Loss alone.
    fn loss(&mut self, observe: &mut Observer<'_>) -> Result<Losses> {
        let (mut done, steps) = (0, self.images.sampler.steps);
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
            if let TermName::HeldOut(judge) = term {
                terms.insert(term.to_string(), losses.iter().map(|loss| judge.score((*loss).into())).collect());
                continue;
            }
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
            if !seed.is_unlikely && self.chi.log_density(length(noise)) < UNLIKELY {
                seed.is_unlikely = true;
                let text = self.unlikely(jobs[index].seed, length(noise), iteration);
                observe(Progress::Remark { index, text: &text })?;
            }
        }
        Ok(())
    }

    /// That a noise has a length that those of a model do not have.
    fn unlikely(&self, seed: u64, length: f64, iteration: usize) -> String {
        let likeliest = self.chi.mode();
        format!(
            "seed {seed}: after {iteration} iterations the noise is {length:.1} long, the model's are {likeliest:.1}: its images \
             may be flat or garish; --norm-prior 0.01 holds the length"
        )
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

    fn report(&self, seeds: &[Seed], noise: &[f32], losses: Losses, iteration: usize) -> Result<Iteration> {
        let gradient = self.chain.read_gradient(Entry::Latents)?;
        let scale = self.loss_scale();
        let rows = || noise.chunks(self.len);
        let moved = |(row, seed): (&[f32], &Seed)| {
            row.iter().zip(&seed.first).map(|(x, first)| f64::from(x - first).powi(2)).sum::<f64>().sqrt()
        };
        let mut terms = losses.terms;
        terms.insert("norm".into(), rows().map(length).collect());
        terms.insert("log_density".into(), rows().map(|row| self.chi.log_density(length(row))).collect());
        Ok(Iteration {
            at: None,
            objective: "seedselect",
            iteration,
            lr: self.options.lr.at(iteration),
            score: losses.total,
            terms,
            gradient: gradient.chunks(self.len).map(|row| length(row) / scale).collect(),
            moved: rows().zip(seeds).map(moved).collect(),
        })
    }

    /// The images of these noises.
    fn render(&mut self, noise: &[f32], jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        self.chain.set_noise(noise)?;
        self.loss(observe)?;
        self.decoder.finish(self.chain.executor(), jobs, observe)
    }
}

fn length(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}
