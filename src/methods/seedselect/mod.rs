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

mod begin;
mod bootstrap;
mod cache;
mod checkpoint;
mod held_out;
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
mod watch;

pub use cache::ReferenceCache;
pub use checkpoint::Checkpoints;
pub use held_out::HeldOut;
pub use judge::Likeness;
pub use method::SeedSelect;
pub use options::{Convention, LearningRate, Options, Patience};
pub use references::{References, Targets};
pub use seed::Best;
pub use start::Start;
pub use subset::subset;
pub use watch::Watch;

use crate::Result;
use crate::exec::{Data, Executor};
use crate::methods::ImageMethod;
use crate::optimize::chain;
use crate::optimize::objective::loss_scale;
use crate::optimize::objective::references::buffer;
use crate::optimize::optimizer::LoadedOptimizer;
use crate::optimize::variable::Entry;
use crate::pipeline::decode::Decoder;
use crate::pipeline::generate::{self, Image, Job, to_channels_first};
use crate::pipeline::inversion::Inversion;
use crate::pipeline::{Iteration, Observer, Progress};
use held_out::LoadedHeldOut;
use nao::chi::Chi;
use programs::{Programs, TermName};
use prompt::LoadedPrompt;
use seed::Seed;
use start::Inverter;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Log-density of a noise's length below which a user is told: 5 from the likeliest length, whatever the dimensions.
const UNLIKELY: f64 = -25.0;

/// SeedSelect on an executor.
pub struct Loaded<'p, 'e> {
    chain: chain::Loaded<'p, 'e>,
    optimizer: LoadedOptimizer,
    decoder: Decoder,
    targets: Targets,
    prompt: Option<LoadedPrompt>,
    /// The directions of other classes' features, where they count.
    others: Vec<Vec<f32>>,
    judge: Option<LoadedHeldOut>,
    /// Where starts are among the inverted references.
    inverter: Option<Inverter<'p>>,
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
        let (judge, inversion, watch) = (programs.judge, programs.inversion, programs.watch);
        let (channels, len) = (programs.channels, programs.len);
        let cache = watch.cache.as_deref();
        let mut encoders = encoders.load(pipeline, cache)?;
        let targets = encoders.targets(executor, &method.references, method.seed)?;
        let prompt = programs.prompt.map(|prompt| prompt.load(pipeline, executor)).transpose()?;
        let classes = method.others.iter().map(|other| encoders.centroid(executor, other));
        let others = classes.collect::<Result<_>>()?;
        let judge = judge.map(|judge| judge.load(pipeline, executor, &method.references, cache)).transpose()?;
        let inverter = |inversion: Inversion<'p>| -> Result<Inverter<'p>> {
            let means = encoders.means(executor, &method.references)?;
            let latents = means.iter().map(|mean| to_channels_first(mean, channels)).collect();
            let inversion = inversion.load(executor)?;
            Ok(Inverter { inversion, start: options.start, latents, inverted: HashMap::new() })
        };
        let inverter = inversion.map(inverter).transpose()?;
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
            judge,
            inverter,
            options,
            images,
            terms,
            len,
            channels,
            chi: Chi::new(len)?,
            trace: method.trace,
            watch,
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
        self.best = seeds.iter().map(|seed| seed.best.clone()).collect();
        self.render(&seeds, jobs, observe)
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
            self.keep(&mut seeds, (&noise, &losses.total), (phase, iteration), observe)?;
            let report = phase.trace.then(|| self.report(&seeds, &noise, losses, (phase, iteration))).transpose()?;
            self.optimizer.step(self.chain.executor(), phase.lr.at(iteration))?;
            if self.options.renormalise {
                self.renormalise(&seeds)?;
            }
            observe(Progress::Iteration(report.as_ref()))?;
            if self.watch.shows(phase.before + iteration) {
                self.preview(&seeds, phase.jobs, observe)?;
            }
            seeds = self.checkpoint(phase, seeds, iteration + 1)?;
        }
        if self.options.convention == Convention::Default && !seeds.iter().all(|seed| seed.stopped) {
            let noise = self.chain.noise()?;
            let losses = self.loss(observe)?;
            self.keep(&mut seeds, (&noise, &losses.total), (phase, phase.iterations), observe)?;
        }
        Ok(seeds)
    }

    /// Shows what the images would be by now. The next evaluation begins from the noises as they are.
    fn preview(&mut self, seeds: &[Seed], jobs: &[Job], observe: &mut Observer<'_>) -> Result<()> {
        self.chain.put_noise_aside()?;
        self.render(seeds, jobs, &mut |progress| match progress {
            Progress::Image { index, image } => observe(Progress::Preview { index, image }),
            other => observe(other),
        })?;
        self.chain.take_noise_back()
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
        if let Some(judge) = &self.judge {
            judge.write(self.chain.executor(), jobs)?;
        }
        Targets::write(targets, self.chain.executor())
    }

    /// The same where all rows compare with all references.
    fn condition_on_all(&mut self, jobs: &[Job]) -> Result<()> {
        let all = self.targets.clone();
        self.condition(jobs, &vec![&all; jobs.len()])
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
        seeds: &mut [Seed],
        (noise, losses): (&[f32], &[f64]),
        (phase, iteration): (&Phase<'_>, usize),
        observe: &mut Observer<'_>,
    ) -> Result<()> {
        let behind = phase.before + iteration;
        // An image stops alone, whatever the others of its batch do.
        let rows = seeds.iter_mut().zip(noise.chunks(self.len)).zip(losses).enumerate();
        for (index, ((seed, noise), loss)) in rows.filter(|(_, ((seed, _), _))| !seed.stopped) {
            if !loss.is_finite() {
                seed.check(phase.jobs[index].seed)?;
                seed.stopped = true;
                let seed = phase.jobs[index].seed;
                let text = format!(
                    "seed {seed}: the loss is not finite after {behind} iterations; what was best before is used"
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
                let text = self.unlikely(phase.jobs[index].seed, length(noise), behind);
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
        terms.insert("log_density".into(), rows().map(|row| self.chi.log_density(length(row))).collect());
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

    /// The images of the seeds' best noises.
    fn render(&mut self, seeds: &[Seed], jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let noise: Vec<f32> = seeds.iter().flat_map(|seed| seed.best.noise.iter()).copied().collect();
        self.chain.set_noise(&noise)?;
        let (mut done, steps) = (0, self.chain.image_steps());
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
