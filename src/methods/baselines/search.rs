//! Gradient-free search as a method: every image is the best of several candidates by some score, at a known number of UNet passes.

use super::judge::{Criterion, Judge, PlannedJudge};
use crate::exec::Executor;
use crate::methods::{Chosen, ImageMethod, LoadedMethod, PlannedMethod, Request};
use crate::optimize::objective::Nfe;
use crate::optimize::search::best_of::best_of;
use crate::optimize::search::ladder::{Evolution, Search};
use crate::optimize::search::{Best, Budget, Evaluate};
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::pipeline::{Observer, Pipeline, Progress};
use crate::plan::Planned;
use crate::sampler::{draw, normal};
use crate::{Error, Result};
use serde_json::{Value, json};

/// A search for the starting noise of every image.
pub struct Searched {
    pub search: Search,
    /// Candidates per image.
    pub n: usize,
    pub by: Box<dyn Criterion>,
}

/// The seed of candidate `index` of `n` for an image: those of images with neighbouring seeds do not overlap.
pub fn candidate(seed: u64, n: usize, index: usize) -> u64 {
    seed.wrapping_mul(n as u64).wrapping_add(index as u64)
}

/// Makes one full batch of images, each the highest of `n` by `judge`; of equal ones the first. `Progress::Image` comes once per
/// image, when it is chosen. The candidate of each is the job that makes it alone.
///
/// Best of n makes the images of `n` seeds, so that the chosen one has a seed of its own. The other searches begin with the job's own
/// starting noise and find no worse; their fresh noise is drawn by our generator under the job's seed.
pub fn run(
    images: &mut generate::Loaded<'_, '_>,
    search: &Search,
    n: usize,
    jobs: &[Job],
    judge: &mut dyn Judge,
    observe: &mut Observer<'_>,
) -> Result<Vec<Best<Job, Image>>> {
    let budget = Budget { forwards: n * (images.nfe() + judge.forwards()) };
    let chosen = if let Search::BestOf = search {
        let job = |image: usize, seed: &u64| Job { seed: *seed, ..jobs[image].clone() };
        let draw = |image: usize, index: usize| candidate(jobs[image].seed, n, index);
        let mut candidates = Candidates { images, judge, observe, job: &job };
        let best = best_of(jobs.len(), budget, draw, &mut candidates)?;
        with_jobs(best, job)
    } else {
        let start: Vec<Vec<f32>> = jobs.iter().map(|job| images.starting_noise(job)).collect();
        let job = |image: usize, noise: &Vec<f32>| {
            let later = jobs[image].draws.iter().skip(1).cloned();
            Job { draws: std::iter::once(noise.clone()).chain(later).collect(), ..jobs[image].clone() }
        };
        let draw = |image: usize, index: usize| {
            let mut noise = start[image].clone();
            if index > 0 {
                normal(jobs[image].seed, draw::SEARCH + index as u64, &mut noise);
            }
            noise
        };
        let seeds: Vec<u64> = jobs.iter().map(|job| job.seed).collect();
        let mut candidates = Candidates { images, judge, observe, job: &job };
        let best = search.run(&seeds, budget, draw, &mut candidates)?;
        with_jobs(best, job)
    };
    for (index, chosen) in chosen.iter().enumerate() {
        observe(Progress::Image { index, image: &chosen.outcome })?;
    }
    Ok(chosen)
}

/// Gives what was found for each image the job that makes it.
fn with_jobs<C, T>(found: Vec<Best<C, T>>, job: impl Fn(usize, &C) -> Job) -> Vec<Best<Job, T>> {
    let found = found.into_iter().enumerate();
    let with_job = |(image, Best { candidate, index, score, outcome }): (usize, Best<C, T>)| Best {
        candidate: job(image, &candidate),
        index,
        score,
        outcome,
    };
    found.map(with_job).collect()
}

/// The search's evaluation: candidates to images and their scores.
struct Candidates<'a, 'o, 'p, 'e, C> {
    images: &'a mut generate::Loaded<'p, 'e>,
    judge: &'a mut dyn Judge,
    observe: &'a mut Observer<'o>,
    /// What makes a candidate of an image.
    job: &'a dyn Fn(usize, &C) -> Job,
}

impl<C> Evaluate for Candidates<'_, '_, '_, '_, C> {
    type Candidate = C;
    type Outcome = Image;

    fn forwards(&self) -> usize {
        self.images.nfe() + self.judge.forwards()
    }

    fn evaluate(&mut self, candidates: &[C]) -> Result<Vec<(f64, Image)>> {
        let jobs: Vec<Job> =
            candidates.iter().enumerate().map(|(image, candidate)| (self.job)(image, candidate)).collect();
        let made = self.images.run(&jobs, &mut |progress| match progress {
            Progress::Image { .. } => Ok(()),
            Progress::Step { .. }
            | Progress::Preview { .. }
            | Progress::Iteration(_)
            | Progress::Remark { .. }
            | Progress::Again => (self.observe)(progress),
        })?;
        let scores = self.judge.score(self.images, &jobs, &made)?;
        Ok(scores.into_iter().zip(made).collect())
    }
}

impl ImageMethod for Searched {
    fn name(&self) -> &'static str {
        self.search.name()
    }

    fn title(&self) -> String {
        match self.search {
            Search::BestOf => format!("best of {}", self.n),
            Search::ZeroOrder(_) | Search::EpsilonGreedy(_) | Search::Evolution(_) => {
                format!("{}, {}", self.search.name(), self.n)
            }
        }
    }

    fn options(&self) -> Value {
        let mut options = self.search.options();
        options.extend([("n".to_string(), json!(self.n)), ("by".to_string(), self.by.record())]);
        Value::Object(options)
    }

    fn check(&self, _batch: usize) -> Result<()> {
        match self.n {
            0 => Err(Error::Usage(format!("{} of 0 images: must be 1 or more", self.search.name()))),
            _ => self.search.check(),
        }
    }

    fn remarks(&self, _settings: &generate::Settings) -> Vec<String> {
        match self.search {
            Search::Evolution(Evolution { population, .. }) if self.n <= population => vec![format!(
                "evolution of {} candidates: a first generation of {population} is all there is, drawn and not bred",
                self.n
            )],
            _ => vec![],
        }
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        self.check(request.batch)?;
        let settings = request.settings;
        let generator = Generator::plan(pipeline, executor, settings.clone(), request.batch)?;
        let judge = self.by.plan(pipeline, executor, &generator, settings)?;
        Ok(Box::new(PlannedSearch { generator, search: self.search, n: self.n, judge }))
    }
}

struct PlannedSearch<'p> {
    generator: Generator<'p>,
    search: Search,
    n: usize,
    judge: Box<dyn PlannedJudge + 'p>,
}

impl PlannedMethod for PlannedSearch<'_> {
    fn programs(&self) -> Vec<&Planned> {
        let mut all = self.generator.programs().all().to_vec();
        all.extend(self.judge.programs());
        all
    }

    fn progress_units(&self) -> usize {
        self.n * self.generator.calls()
    }

    fn nfe(&self) -> Nfe {
        Nfe { forward: self.n * (self.generator.nfe() + self.judge.forwards()), backward: 0 }
    }

    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e,
    {
        let PlannedSearch { generator, search, n, judge } = *self;
        let mut images = generator.load(executor)?;
        let judge = judge.load(&mut images)?;
        Ok(Box::new(LoadedSearch { images, search, n, judge, chosen: vec![] }))
    }
}

struct LoadedSearch<'p, 'e> {
    images: generate::Loaded<'p, 'e>,
    search: Search,
    n: usize,
    judge: Box<dyn Judge>,
    /// Of the last batch.
    chosen: Vec<Chosen>,
}

impl LoadedMethod for LoadedSearch<'_, '_> {
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let best = run(&mut self.images, &self.search, self.n, jobs, &mut *self.judge, observe)?;
        let has_seed = self.search == Search::BestOf;
        let chosen = |best: &Best<Job, Image>| Chosen {
            candidate: best.index,
            seed: has_seed.then_some(best.candidate.seed),
            score: best.score,
        };
        self.chosen = best.iter().map(chosen).collect();
        Ok(best.into_iter().map(|best| best.outcome).collect())
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self.images.executor()
    }

    fn chosen(&self, index: usize) -> Option<Chosen> {
        self.chosen.get(index).copied()
    }
}
