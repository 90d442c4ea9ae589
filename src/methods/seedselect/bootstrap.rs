//! Many images of one optimisation: a noise that is optimised once towards all references, and near it a few iterations for every image
//! towards a subset of them of its own.

use super::checkpoint::State;
use super::options::LearningRate;
use super::seed::Seed;
use super::subset::subset;
use super::{Conditions, Loaded, Phase};
use crate::Result;
use crate::optimize::search::mix::Mix;
use crate::pipeline::Observer;
use crate::pipeline::generate::Job;

/// How much of an image's own noise its start is, and √(1 − s²) of the shared one. Ours: few references have few subsets, and two images
/// of one subset must differ.
const OWN: f64 = 0.1;

fn conditions(job: &Job) -> Conditions {
    (job.prompt.clone(), job.negative.clone())
}

impl Loaded<'_, '_> {
    /// The seeds of a batch after `iterations` of their own.
    pub(super) fn bootstrapped(
        &mut self,
        jobs: &[Job],
        iterations: usize,
        observe: &mut Observer<'_>,
    ) -> Result<Vec<Seed>> {
        let (shared, cut_short) = match self.kept(jobs)? {
            Some(state) if !state.shared.is_empty() => (state.shared.clone(), Some(state)),
            state => (self.shared(jobs, state, observe)?, None),
        };
        for (job, noise) in jobs.iter().zip(shared.chunks(self.len)) {
            self.found.insert(conditions(job), noise.to_vec());
        }
        let subsets = jobs.iter().map(|job| self.targets.of(&subset(job.seed, self.references)));
        let subsets: Vec<_> = subsets.collect();
        self.condition(jobs, &subsets.iter().collect::<Vec<_>>())?;
        let from = match cut_short {
            Some(state) => self.restore(jobs, state)?,
            None => (self.near(jobs, &shared)?, 0),
        };
        let later = self.options.lr.later;
        let phase = Phase {
            lr: LearningRate { first: later, from: 0, later },
            iterations,
            before: self.options.iterations,
            shared: &shared,
            ..Phase::new(jobs, &self.options, self.trace)
        };
        self.optimise(&phase, from, observe)
    }

    /// For every job the noise that all images of its prompt share, `[B, h, w, C]`. It has the seed of the run, which is that of the
    /// prompt's first image, so that it depends on no batch; an earlier batch of the prompt has found it already.
    fn shared(&mut self, jobs: &[Job], cut_short: Option<State>, observe: &mut Observer<'_>) -> Result<Vec<f32>> {
        self.found.retain(|known, _| jobs.iter().any(|job| conditions(job) == *known));
        if jobs.iter().all(|job| self.found.contains_key(&conditions(job))) {
            return Ok(jobs.iter().flat_map(|job| self.found[&conditions(job)].iter().copied()).collect());
        }
        let rows: Vec<Job> = jobs.iter().map(|job| Job { seed: self.seed, draws: vec![], ..job.clone() }).collect();
        self.condition_on_all(&rows)?;
        let from = match cut_short {
            Some(state) => self.restore(&rows, state)?,
            None => (self.start(&rows, observe)?, 0),
        };
        // It stands in the trace of the image whose seed it has, wherever it is found again.
        let trace = self.trace && jobs.iter().any(|job| job.seed == self.seed);
        let phase = Phase { jobs: &rows, ..Phase::new(jobs, &self.options, trace) };
        let seeds = self.optimise(&phase, from, observe)?;
        Ok(seeds.into_iter().flat_map(|seed| seed.best.noise).collect())
    }

    /// Where the images begin: near the noise they share.
    fn near(&mut self, jobs: &[Job], shared: &[f32]) -> Result<Vec<Seed>> {
        let own = self.draw(jobs)?;
        let noises = shared.chunks(self.len).zip(&own).map(|(shared, own)| shared.to_vec().mix(own, OWN));
        let seeds: Vec<Seed> = noises.map(Seed::new).collect();
        self.begin(&seeds)?;
        Ok(seeds)
    }
}
