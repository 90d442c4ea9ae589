//! Best of n: the simplest baseline at equal compute. Every image is the best of several seeds by some score.

use crate::exec::Executor;
use crate::methods::{Chosen, ImageMethod, LoadedMethod, PlannedMethod, Request};
use crate::metrics::denoising_loss;
use crate::metrics::shapes::{ShapesScore, ShapesScorer};
use crate::optimize::objective::Nfe;
use crate::optimize::search::best_of::best_of;
use crate::optimize::search::{Best, Budget, Evaluate};
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::pipeline::{Observer, Pipeline, Progress};
use crate::plan::Planned;
use crate::{Error, Result};
use serde_json::{Value, json};

/// What the best of several images is the best in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Error of the model in predicting the noise in its own image: any model.
    DenoisingLoss,
    /// Minus the exact log-density of what a `shapes` image shows.
    Rarity,
    /// Fraction of the prompt's attributes that a `shapes` image shows.
    Agreement,
}

impl Score {
    /// As images record it.
    fn name(self) -> &'static str {
        match self {
            Score::DenoisingLoss => "elbo",
            Score::Rarity => "rarity",
            Score::Agreement => "agreement",
        }
    }
}

/// Noise levels at which [`Score::DenoisingLoss`] predicts the noise.
const NOISE_LEVELS: usize = 8;

#[derive(Clone, Copy, Debug)]
pub struct BestOf {
    /// Candidates per image.
    pub n: usize,
    pub score: Score,
}

/// The seed of candidate `index` of `n` for an image: those of images with neighbouring seeds do not overlap.
pub fn candidate(seed: u64, n: usize, index: usize) -> u64 {
    seed.wrapping_mul(n as u64).wrapping_add(index as u64)
}

/// Scores a batch that the generator has just made.
pub trait Judge {
    /// UNet forwards of scoring one batch.
    fn forwards(&self) -> usize;

    /// Per image, the higher the better.
    fn score(&mut self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job], made: &[Image]) -> Result<Vec<f64>>;
}

/// Makes one full batch of images, each the highest of `n` by `judge`; of equal ones the first. `Progress::Image` comes once per
/// image, when it is chosen. Candidates are the jobs with seeds of their own.
pub fn run(
    images: &mut generate::Loaded<'_, '_>,
    n: usize,
    jobs: &[Job],
    judge: &mut dyn Judge,
    observe: &mut Observer<'_>,
) -> Result<Vec<Best<Job, Image>>> {
    let draw = |image: usize, index: usize| {
        let job: &Job = &jobs[image];
        Job { seed: candidate(job.seed, n, index), ..job.clone() }
    };
    let mut seeds = Seeds { images, judge, observe };
    let budget = Budget { forwards: n * seeds.forwards() };
    let chosen = best_of(jobs.len(), budget, draw, &mut seeds)?;
    for (index, chosen) in chosen.iter().enumerate() {
        observe(Progress::Image { index, image: &chosen.outcome })?;
    }
    Ok(chosen)
}

/// The search's evaluation: jobs to images and their scores.
struct Seeds<'a, 'o, 'p, 'e> {
    images: &'a mut generate::Loaded<'p, 'e>,
    judge: &'a mut dyn Judge,
    observe: &'a mut Observer<'o>,
}

impl Evaluate for Seeds<'_, '_, '_, '_> {
    type Candidate = Job;
    type Outcome = Image;

    fn forwards(&self) -> usize {
        self.images.nfe() + self.judge.forwards()
    }

    fn evaluate(&mut self, jobs: &[Job]) -> Result<Vec<(f64, Image)>> {
        let made = self.images.run(jobs, &mut |progress| match progress {
            Progress::Image { .. } => Ok(()),
            Progress::Step { .. } | Progress::Iteration(_) | Progress::Again => (self.observe)(progress),
        })?;
        let scores = self.judge.score(self.images, jobs, &made)?;
        Ok(scores.into_iter().zip(made).collect())
    }
}

impl ImageMethod for BestOf {
    fn name(&self) -> &'static str {
        "best-of"
    }

    fn title(&self) -> String {
        format!("best of {}", self.n)
    }

    fn options(&self) -> Value {
        json!({"n": self.n, "by": self.score.name()})
    }

    fn check(&self, _batch: usize) -> Result<()> {
        match self.n {
            0 => Err(Error::Usage("the best of 0 images: must be 1 or more".into())),
            _ => Ok(()),
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
        let shapes = |score| Ok(Scorer::Shapes(Box::new(ShapesScorer::open(settings.width, settings.height)?), score));
        let scorer = match self.score {
            Score::DenoisingLoss => {
                let dtype = settings.dtype;
                let loss = denoising_loss::Planner::plan(pipeline, executor, &generator, dtype, NOISE_LEVELS)?;
                Scorer::DenoisingLoss(Box::new(loss))
            }
            Score::Rarity => shapes(|shapes_score| -shapes_score.log_density)?,
            Score::Agreement => shapes(ShapesScore::agreement)?,
        };
        Ok(Box::new(PlannedBestOf { generator, n: self.n, scorer }))
    }
}

/// A [`Judge`], planned.
enum Scorer<'p> {
    DenoisingLoss(Box<denoising_loss::Planner<'p>>),
    Shapes(Box<ShapesScorer>, fn(&ShapesScore) -> f64),
}

struct PlannedBestOf<'p> {
    generator: Generator<'p>,
    n: usize,
    scorer: Scorer<'p>,
}

impl PlannedMethod for PlannedBestOf<'_> {
    fn programs(&self) -> Vec<&Planned> {
        let mut all = self.generator.programs().all().to_vec();
        if let Scorer::DenoisingLoss(loss) = &self.scorer {
            all.extend(loss.programs());
        }
        all
    }

    fn progress_units(&self) -> usize {
        self.n * self.generator.calls()
    }

    fn nfe(&self) -> Nfe {
        let scoring = match &self.scorer {
            Scorer::DenoisingLoss(loss) => loss.nfe().forward,
            Scorer::Shapes(..) => 0,
        };
        Nfe { forward: self.n * (self.generator.nfe() + scoring), backward: 0 }
    }

    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e,
    {
        let mut images = self.generator.load(executor)?;
        let judge: Box<dyn Judge> = match self.scorer {
            Scorer::DenoisingLoss(planned) => {
                let forwards = planned.nfe().forward;
                Box::new(ByDenoisingLoss { loss: planned.load(&mut images)?, forwards })
            }
            Scorer::Shapes(shapes_scorer, score) => Box::new(ByShapes { shapes_scorer, score }),
        };
        Ok(Box::new(LoadedBestOf { images, n: self.n, judge, chosen: vec![] }))
    }
}

struct LoadedBestOf<'p, 'e> {
    images: generate::Loaded<'p, 'e>,
    n: usize,
    judge: Box<dyn Judge>,
    /// Of the last batch.
    chosen: Vec<Chosen>,
}

impl LoadedMethod for LoadedBestOf<'_, '_> {
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let best = run(&mut self.images, self.n, jobs, &mut *self.judge, observe)?;
        self.chosen = best.iter().map(|best| Chosen { seed: best.candidate.seed, score: best.score }).collect();
        Ok(best.into_iter().map(|best| best.outcome).collect())
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self.images.executor()
    }

    fn chosen(&self, index: usize) -> Option<Chosen> {
        self.chosen.get(index).copied()
    }
}

struct ByDenoisingLoss {
    loss: denoising_loss::Loaded,
    forwards: usize,
}

impl Judge for ByDenoisingLoss {
    fn forwards(&self) -> usize {
        self.forwards
    }

    fn score(&mut self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job], _made: &[Image]) -> Result<Vec<f64>> {
        self.loss.score(images, jobs)
    }
}

struct ByShapes {
    shapes_scorer: Box<ShapesScorer>,
    score: fn(&ShapesScore) -> f64,
}

impl Judge for ByShapes {
    fn forwards(&self) -> usize {
        0
    }

    fn score(&mut self, _images: &mut generate::Loaded<'_, '_>, jobs: &[Job], made: &[Image]) -> Result<Vec<f64>> {
        let score =
            |(job, image): (&Job, &Image)| Ok((self.score)(&self.shapes_scorer.score(&job.prompt, &image.rgb)?));
        jobs.iter().zip(made).map(score).collect()
    }
}
