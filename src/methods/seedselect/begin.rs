//! The starting noises of a batch: drawn, tried, and the best of each image begun with.

use super::Loaded;
use super::seed::Seed;
use crate::Result;
use crate::pipeline::Observer;
use crate::pipeline::generate::{Job, to_channels_last};
use crate::sampler::{self, Noise, draw};

impl Loaded<'_, '_> {
    /// The best of some starting noises of each image.
    pub(super) fn start(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Seed>> {
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
    pub(super) fn begin(&mut self, seeds: &[Seed]) -> Result<()> {
        let noise: Vec<f32> = seeds.iter().flat_map(|seed| seed.first.iter()).copied().collect();
        self.chain.set_noise(&noise)?;
        self.optimizer.reset(self.chain.executor())
    }

    /// Every image's own noise, and where the sampler adds noise, its draws.
    pub(super) fn draw(&mut self, jobs: &[Job]) -> Result<Vec<Vec<f32>>> {
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
    pub(super) fn candidate(&self, jobs: &[Job], own: &[Vec<f32>], index: usize) -> Result<Vec<Vec<f32>>> {
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
}
