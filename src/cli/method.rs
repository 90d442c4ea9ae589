//! The methods that make images from prompts, behind one way to plan, load and run them.

use crate::cli::minority::Options;
use crate::data::textual_inversion::LearnedToken;
use crate::exec::Executor;
use crate::methods::baselines::Cads;
use crate::methods::baselines::best_of::{self, Chosen};
use crate::methods::baselines::cads;
use crate::methods::baselines::sgms::{self, Sgms};
use crate::methods::minority::{self, Minority};
use crate::metrics::denoising_loss as elbo;
use crate::metrics::shapes::{Eye, Sight};
use crate::optimize::objective::Nfe;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{self, Generator, Image, Job, Settings};
use crate::pipeline::{Observer, Progress};
use crate::plan::Footprint;
use crate::{Error, Result};
use serde_json::{Value, json};

/// How images are made.
#[derive(Clone)]
pub enum Method {
    Plain,
    Cads(Cads),
    Sgms(Sgms),
    BestOf(usize, Score),
    Minority(Options),
}

/// What the best of several images is the best in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Score {
    /// Error of the model in predicting the noise in its own image: any model, one pass per look
    Elbo,
    /// Minus the exact log-density of what a `shapes` image shows
    Rarity,
    /// Share of the prompt's attributes that a `shapes` image shows
    Agreement,
}

/// Noise levels at which [`Score::Elbo`] looks.
const LOOKS: usize = 8;

impl Method {
    /// As images record it.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Plain => "generate",
            Method::Cads(_) => "cads",
            Method::Sgms(_) => "sgms",
            Method::BestOf(..) => "best-of",
            Method::Minority(_) => "minority",
        }
    }

    /// Everything of the method that decides the pixels, as images record it.
    pub fn options(&self) -> Value {
        match self {
            Method::Plain => Value::Null,
            Method::Cads(cads) => json!(cads),
            Method::Sgms(sgms) => json!(sgms),
            Method::BestOf(n, score) => json!({"n": n, "by": format!("{score:?}").to_lowercase()}),
            Method::Minority(options) => options.record(),
        }
    }

    /// Tokens of the prompt that the method takes for itself.
    pub fn reserved_tokens(&self) -> usize {
        match self {
            Method::Plain | Method::Cads(_) | Method::Sgms(_) | Method::BestOf(..) => 0,
            Method::Minority(options) => options.reserved_tokens(),
        }
    }

    /// `Error::Usage` where it cannot make a batch of so many images.
    pub fn check(&self, batch: usize) -> Result<()> {
        match self {
            Method::Plain | Method::Sgms(_) | Method::BestOf(..) => Ok(()),
            Method::Cads(cads) => cads.check(),
            Method::Minority(options) => options.check(batch),
        }
    }

    /// Plans for batches like these prompts; where the fastest way would not fit `memory` bytes, a way that computes more again.
    pub fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        settings: &Settings,
        prompts: &[&str],
        memory: Option<usize>,
    ) -> Result<Planned<'p>> {
        let batch = prompts.len();
        self.check(batch)?;
        let plain = || Generator::plan(pipeline, executor, settings.clone(), batch);
        Ok(match self {
            Method::Plain => Planned::Plain(plain()?),
            Method::Cads(cads) => Planned::Cads(plain()?, *cads),
            Method::Sgms(sgms) => {
                Planned::Sgms(Box::new(sgms::Planner::plan(pipeline, executor, settings.clone(), *sgms, batch)?))
            }
            Method::BestOf(n, score) => {
                let generator = plain()?;
                let eye = || Eye::open(settings.width, settings.height).map(Box::new);
                let scorer = match score {
                    Score::Elbo => Planner::Elbo(Box::new(elbo::Planner::plan(
                        pipeline,
                        executor,
                        &generator,
                        settings.dtype,
                        LOOKS,
                    )?)),
                    Score::Rarity => Planner::Shapes(eye()?, |sight| -sight.log_density),
                    Score::Agreement => Planner::Shapes(eye()?, Sight::agreement),
                };
                Planned::BestOf(generator, *n, scorer)
            }
            Method::Minority(options) => {
                let plan = |budget| Minority::plan(pipeline, executor, options.settings(settings, budget), prompts);
                let fastest = plan(None)?;
                let footprint = fastest.footprint();
                let over = memory.filter(|memory| footprint.total() > *memory);
                let rest = |memory: usize| memory.checked_sub(footprint.total() - footprint.arena_bytes);
                Planned::Minority(
                    Box::new(match over.and_then(rest) {
                        Some(budget) => plan(Some(budget)).unwrap_or(fastest),
                        None => fastest,
                    }),
                    options.clone(),
                )
            }
        })
    }
}

/// The score of a chosen image, planned.
pub enum Planner<'p> {
    Elbo(Box<elbo::Planner<'p>>),
    Shapes(Box<Eye>, fn(&Sight) -> f64),
}

/// A method's programs, planned but not loaded.
pub enum Planned<'p> {
    Plain(Generator<'p>),
    Cads(Generator<'p>, Cads),
    Sgms(Box<sgms::Planner<'p>>),
    BestOf(Generator<'p>, usize, Planner<'p>),
    Minority(Box<Minority<'p>>, Options),
}

impl<'p> Planned<'p> {
    pub fn footprint(&self) -> Footprint {
        match self {
            Planned::Plain(generator) | Planned::Cads(generator, _) => generator.footprint(),
            Planned::Sgms(sgms) => sgms.footprint(),
            Planned::BestOf(generator, _, Planner::Elbo(elbo)) => {
                let programs: Vec<_> = generator.programs().all().into_iter().chain(elbo.programs()).collect();
                Footprint::of(&programs)
            }
            Planned::BestOf(generator, _, Planner::Shapes(..)) => generator.footprint(),
            Planned::Minority(minority, _) => minority.footprint(),
        }
    }

    /// Steps and iterations of one batch.
    pub fn ticks(&self) -> usize {
        match self {
            Planned::Plain(generator) | Planned::Cads(generator, _) => generator.calls(),
            Planned::Sgms(sgms) => sgms.progress_units(),
            Planned::BestOf(generator, n, _) => n * generator.calls(),
            Planned::Minority(minority, _) => minority.progress_units(),
        }
    }

    /// UNet calls of one batch, each on one image's latents.
    pub fn passes(&self) -> Nfe {
        match self {
            Planned::Plain(generator) | Planned::Cads(generator, _) => Nfe { forward: generator.nfe(), backward: 0 },
            Planned::Sgms(sgms) => sgms.nfe(),
            Planned::BestOf(generator, n, scorer) => {
                let looks = match scorer {
                    Planner::Elbo(elbo) => elbo.nfe().forward,
                    Planner::Shapes(..) => 0,
                };
                Nfe { forward: n * (generator.nfe() + looks), backward: 0 }
            }
            Planned::Minority(minority, _) => minority.nfe(),
        }
    }

    pub fn load<'e>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e>> {
        Ok(match self {
            Planned::Plain(generator) => Loaded::Plain(generator.load(executor)?),
            Planned::Cads(generator, cads) => Loaded::Cads(generator.load(executor)?, cads),
            Planned::Sgms(sgms) => Loaded::Sgms(sgms.load(executor)?),
            Planned::BestOf(generator, n, scorer) => {
                let mut images = generator.load(executor)?;
                let scorer = match scorer {
                    Planner::Elbo(elbo) => Scorer::Elbo(elbo.load(&mut images)?),
                    Planner::Shapes(eye, score) => Scorer::Shapes(eye, score),
                };
                Loaded::BestOf { images, n, scorer, chosen: vec![] }
            }
            Planned::Minority(minority, options) => Loaded::Minority(Box::new(minority.load(executor)?), options),
        })
    }
}

/// The score of a chosen image, loaded.
pub enum Scorer {
    Elbo(elbo::Loaded),
    Shapes(Box<Eye>, fn(&Sight) -> f64),
}

/// A method on an executor.
pub enum Loaded<'p, 'e> {
    Plain(generate::Loaded<'p, 'e>),
    Cads(generate::Loaded<'p, 'e>, Cads),
    Sgms(sgms::Loaded<'p, 'e>),
    BestOf {
        images: generate::Loaded<'p, 'e>,
        n: usize,
        scorer: Scorer,
        /// Of the last batch.
        chosen: Vec<Chosen>,
    },
    Minority(Box<minority::Loaded<'p, 'e>>, Options),
}

impl<'p, 'e> Loaded<'p, 'e> {
    /// Makes one full batch of images. What is not finite is made once more with a look at every op, for the error to name the
    /// first that goes wrong.
    pub fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let made = self.make(jobs, observe);
        let Err(Error::NotFinite(_)) = made else { return made };
        self.images().executor().set_check_finite(true);
        let again = self.make(jobs, &mut |_| observe(Progress::Again));
        self.images().executor().set_check_finite(false);
        again.and(made)
    }

    fn images(&mut self) -> &mut generate::Loaded<'p, 'e> {
        match self {
            Loaded::Plain(images) | Loaded::Cads(images, _) | Loaded::BestOf { images, .. } => images,
            Loaded::Sgms(sgms) => sgms.images(),
            Loaded::Minority(minority, _) => minority.images(),
        }
    }

    fn make(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        match self {
            Loaded::Plain(images) => images.run(jobs, observe),
            Loaded::Cads(images, cads) => cads::run(images, cads, jobs, observe),
            Loaded::Sgms(sgms) => sgms.run(jobs, observe),
            Loaded::BestOf { images, n, scorer, chosen } => {
                let mut score = |loaded: &mut generate::Loaded<'_, '_>, jobs: &[Job], made: &[Image]| match scorer {
                    Scorer::Elbo(elbo) => elbo.score(loaded, jobs),
                    Scorer::Shapes(eye, score) => {
                        let look = |(job, image): (&Job, &Image)| Ok(score(&eye.look(&job.prompt, &image.rgb)?));
                        jobs.iter().zip(made).map(look).collect()
                    }
                };
                *chosen = best_of::run(images, *n, jobs, &mut score, observe)?;
                Ok(chosen.iter().map(|chosen| chosen.image.clone()).collect())
            }
            Loaded::Minority(minority, options) => {
                let seeds: Vec<u64> = jobs.iter().map(|job| options.seed(job.seed)).collect();
                minority.run(jobs, &seeds, observe)
            }
        }
    }

    /// Which seed the image of job `index` came from, where there was a choice.
    pub fn chosen(&self, index: usize) -> Option<&Chosen> {
        match self {
            Loaded::BestOf { chosen, .. } => chosen.get(index),
            Loaded::Plain(_) | Loaded::Cads(..) | Loaded::Sgms(_) | Loaded::Minority(..) => None,
        }
    }

    /// The token learned for job `index` of the last batch.
    pub fn learned(&self, index: usize, word: &str) -> Result<LearnedToken> {
        match self {
            Loaded::Minority(minority, _) => minority.token(index, word),
            Loaded::Plain(_) | Loaded::Cads(..) | Loaded::Sgms(_) | Loaded::BestOf { .. } => {
                Err(Error::Usage("--save-token: this method learns no token".into()))
            }
        }
    }
}
